"""Kill every stage at random moments and see that what is left at the end has the bytes of a run that was never killed.

    python -m tests.kill_soak --kills 30 --seed 0           about ten minutes on two cores

Not collected by pytest. Each stage (train.py, sample_latents.py, bolt.py with both its processes) is started, killed
with SIGKILL after a random time, and started again with the same command, until it ends by itself; then it begins anew,
until it has had its kills. Prints a line per kill.
"""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.alchemy.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model.width", "32", "--model.ffn", "48", "--device", "cpu"]
STAGES = {          # name -> command; {out} is its folder, {model} a checkpoint
    "train.py": ["train.py", "--data", "{corpus}/gold.jsonl", "--held_out", "{corpus}/held_out.jsonl", "--steps", "300",
                 "--checkpoint_every", "7", "--keep", "both", "--out", "{out}/train", *TINY],
    "sample_latents.py": ["sample_latents.py", "--checkpoint", "{model}", "--data", "{corpus}/raw.jsonl", "--out",
                          "{out}/latents.jsonl", "--block_chunks", "40", "--device", "cpu"],
    "bolt.py": ["bolt.py", "--data", "{corpus}", "--out", "{out}/bolt", "--rounds", "2", "--warm_steps", "60",
                "--train.steps", "30", "--sample.num_latents", "4", "--bound_draws", "4", "--checks", "2",
                "--train.checkpoint_every", "9", "--sample.block_chunks", "40"]}
SAME = ("ckpt.pt", "stable.pt", "best.pt", "latents.jsonl", "step_*.json", "figures.json", "report.json")


def start(name: str, folder: Path, out: Path) -> subprocess.Popen:
    model = folder / "whole" / "train.py" / "train"
    words = [word.format(corpus=folder / "corpus", out=out, model=model) for word in STAGES[name]]
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            start_new_session=True)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate()[1].decode()
    assert process.returncode == 0, error[-2000:]


def compare(whole: Path, killed: Path) -> int:
    """How many files were compared; AssertionError where one differs, is missing, or half a one is left."""
    files = sorted(path.relative_to(whole) for pattern in SAME for path in whole.rglob(pattern))
    for file in files:
        assert (whole / file).read_bytes() == (killed / file).read_bytes(), f"{file} differs"
    assert not list(killed.rglob("*.tmp")), "a half-written file is left"
    return len(files)


def kill_often(name: str, folder: Path, seconds: float, kills: int, chance: random.Random) -> int:
    """Kill a stage so many times while it runs, and compare whenever it ended; seconds: what it takes undisturbed."""
    whole, out, done, compared = folder / "whole" / name, folder / "killed" / name, 0, 0
    while done < kills:
        process, wait = start(name, folder, out), chance.uniform(0, seconds)
        time.sleep(wait)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            done += 1
            print(f"{name}: kill {done} of {kills}, after {wait:.1f} s", flush=True)
        ended = process.wait() == 0
        process.stderr.close()
        time.sleep(0.5)         # the second process sees that the first is gone
        if done == kills and not ended:
            finish(start(name, folder, out))
        if done == kills or ended:
            compared += compare(whole, out)
            shutil.rmtree(out)
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="over all stages [30]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    args = parser.parse_args()
    chance, compared = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder / "corpus", gold=200, raw=200, held_out=40)
        for number, name in enumerate(STAGES):
            begun = time.time()
            finish(start(name, folder, folder / "whole" / name))
            kills = args.kills * (number + 1) // len(STAGES) - args.kills * number // len(STAGES)
            compared += kill_often(name, folder, time.time() - begun, kills, chance)
    print(f"{args.kills} kills, {compared} files alike")


if __name__ == "__main__":
    main()
