"""Plumbing of a run: settings, randomness, device and ranks, files. Nothing here knows about latents or models.

A frozen dataclass is a script's command line, its --help, its log and its config.json.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import json
import os
import subprocess
import sys
import typing
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


# ---- settings: dataclass -> flags -> config.json ---------------------------------------------------------------

def option(default, help: str, above: float | None = None):
    """A field of a config: its default (a config nests its fields), its line of --help, what a number must exceed."""
    return dataclasses.field(default=default, metadata={"help": help, "above": above})


def flatten(settings: dict, prefix: str = "") -> dict:
    """Nested settings as {flag name: value}: {"steps": 300, "model.width": 64, ...}."""
    flat = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def rebuild(config, flat: dict, prefix: str = ""):
    """The config with the values of `flat`, as `flatten` names them."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{
        name: rebuild(value, flat, f"{prefix}{name}.") if is_dataclass(value) else flat[prefix + name]
        for name, value in values.items()})


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def converter(kind, above: float | None):
    """What makes a value of a field's type from the text of a flag; Literal and bool are a choice of words."""
    words = {"true": True, "false": False} if kind is bool else {word: word for word in typing.get_args(kind)}

    def convert(text: str):
        value = words.get(text.lower()) if words else kind(text)
        if value is None:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give one of {', '.join(words)}")
        if kind is float and not abs(value) <= torch.finfo(torch.float32).max:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give a finite number of float32")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give a number above {above}")
        return value
    convert.__name__ = "|".join(words) or kind.__name__         # for --help and argparse's own complaint
    return convert


def add_flags(parser, config, prefix: str = "", group=None) -> None:
    """A flag for every field; a nested config has a group of its own in --help."""
    hints, group = typing.get_type_hints(type(config)), group or parser
    for field in dataclasses.fields(config):
        name, value, help = prefix + field.name, getattr(config, field.name), field.metadata["help"]
        if is_dataclass(value):
            add_flags(parser, value, f"{name}.", parser.add_argument_group(name, help))
        else:
            convert = converter(hints[field.name], field.metadata.get("above"))
            help = f"{help} [{value}]".replace("%", "%%")
            group.add_argument(f"--{name}", type=convert, default=value, metavar=convert.__name__, help=help)


def read_config(path: str) -> dict:
    """The flat settings of a config.json. Raises FileNotFoundError, ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path!r}; a run folder holds one as config.json")
    try:
        return flatten(json.loads(Path(path).read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path!r} is no config.json of a run; it needs a \"config\" part") from None


def parse_config(default, argv, description: str):
    """The config of a script: defaults < the "config" part of --config FILE < flags.

    Raises ValueError for a flag, key or value that does not fit, FileNotFoundError for a missing FILE.
    """
    parser = OneLineParser(usage="%(prog)s [--flag value ...]", description=description, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="take the settings of a config.json; flags override it")
    add_flags(parser, default)
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    if given.config:
        saved = read_config(given.config)
        if unknown := [name for name in saved if not hasattr(given, name)]:
            raise ValueError(f"{given.config} sets {', '.join(unknown)}, no setting of this script; remove it")
        given = parser.parse_args([*(f"--{name}={value}" for name, value in saved.items()), *argv])
    return rebuild(default, vars(given))


def script(main) -> None:
    """Run main(argv) as a program: a user's error ends it with one line and exit code 2, no traceback."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(130)


# ---- randomness ------------------------------------------------------------------------------------------------

def random_stream(seed: int, purpose: str, *labels: int) -> np.random.Generator:
    """Random numbers that are a function of (seed, purpose, labels) alone: of no clock, batch, row or rank.

    Philox is a counter-based generator: the labels (four at most, such as round, document, chunk, draw) go into its
    key and counter, so each combination has a stream of its own and none has to be drawn to reach another.
    """
    assert len(labels) <= 4, "a stream has at most four labels"
    word = int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "little")
    first, *others = (*labels, 0, 0, 0, 0)[:4]
    return np.random.Generator(np.random.Philox(key=[word, first], counter=[0, *others]))


# ---- device and ranks ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Ranks:
    """Who this process is: its rank of `world` processes and the device it computes on."""
    rank: int
    world: int
    device: torch.device
    quiet: bool = False     # it shows no progress bars

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def no_bar(self) -> bool:
        return self.quiet or not self.main

    def say(self, line: str) -> None:
        if self.main:
            tqdm.write(line)      # above the progress bars
            sys.stdout.flush()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all ranks, of a tensor that lies anywhere."""
        if self.world == 1:
            return tensor
        there = tensor.to(self.device, copy=True)
        dist.all_reduce(there)
        return there.to(tensor.device)


def keep_freed_memory() -> None:
    """Have malloc use freed memory again: glibc gives that of large tensors back, and new pages have to be cleared."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):      # another C library than glibc
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0), libc.mallopt(-1, -1)           # M_MMAP_MAX: none; M_TRIM_THRESHOLD: never


def start_ranks(device: str = "auto") -> Ranks:
    """Join the process group that torchrun describes, or be the only one. ValueError where the device is missing."""
    keep_freed_memory()
    world = int(os.environ.get("WORLD_SIZE", 1))
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and world == 1, "cpu": True}
    # (no process group works on mps)
    device = next(kind for kind in here if here[kind]) if device == "auto" else device
    kind, _, index = device.partition(":")
    if not here.get(kind) or index and not (kind == "cuda" and index in map(str, range(torch.cuda.device_count()))):
        raise ValueError(f"--device {device} is not on this machine; use {', '.join(k for k in here if here[k])}")
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 else f"cuda:{index or 0}"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False       # some containers allow it unasked
    if world == 1:
        return Ranks(0, 1, torch.device(device))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(hours=2),
                                device_id=torch.device(device) if kind == "cuda" else None)
    return Ranks(dist.get_rank(), world, torch.device(device))


def choose_dtype(wanted: str, width: int, device: torch.device) -> str:
    """What products are computed in, for a setting of float32, bfloat16 or auto.

    auto is bfloat16 on CUDA, and from width 192 on a CPU with AMX or avx512_bf16; below, conversions cost too much.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if device.type == "cpu" and width >= 192 and has_units else "float32"


# ---- files -----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def whole_file(path):
    """A file to write bytes to that appears whole or not at all: under a name of this process's own, then renamed."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)         # where it could not be written whole


def write_whole(path, text: str) -> None:
    """Write a text file whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text.encode())


def append_metrics(folder, record: dict) -> None:
    """One more line of metrics.jsonl."""
    with open(Path(folder) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def trim_metrics(folder, step: int) -> None:
    """Drop what metrics.jsonl holds beyond a step: a resumed run writes it again."""
    path = Path(folder) / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(True)
        write_whole(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


def sha256_of(path) -> str:
    """Of a file's content; of a folder, of the checkpoint in it, else of the parts of an open base."""
    if os.path.isdir(path):
        names = sorted(Path(path).glob("*.*"))
        files = ([file for file in names if file.name == "ckpt.pt"]
                 or [file for file in names if file.suffix in (".json", ".safetensors")])
        return hashlib.sha256("".join(file.name + sha256_of(file) for file in files).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- run folders -----------------------------------------------------------------------------------------------

# settings that may change when a run goes on, since no result depends on them
HOW_ONLY = ("device", "arms", "recompute", "train.recompute", "keep_models")


def commit_of_this_project() -> str:
    """Short hash of the commit, empty where there is no git."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def open_run(folder, config, ranks: Ranks, **identity) -> None:
    """Make the run folder with its config.json, or continue in it. identity: what else must be the same: hashes.

    Raises ValueError where the folder belongs to another configuration: its files would not be those of this command.
    """
    if not ranks.main:
        return ranks.barrier()      # the main rank looks, and hashes, for all
    path, settings = Path(folder) / "config.json", json.loads(json.dumps(asdict(config)))
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        old = read_config(path) | {name: saved.get(name) for name in identity}
        new = flatten(settings) | identity
        changed = [f"{name} {old.get(name)} -> {new.get(name)}" for name in sorted(new.keys() | old.keys())
                   if name not in HOW_ONLY and old.get(name) != new.get(name)]
        if changed:
            raise ValueError(f"{folder} holds a run with other settings ({', '.join(changed)}); "
                             f"give another --out, or delete {folder}")
    else:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        record = {"config": settings, "command": command, "commit": commit_of_this_project(), **identity}
        write_whole(path, json.dumps(record, indent=2) + "\n")
    ranks.barrier()


def choose_once(folder, choice: dict, ranks: Ranks) -> dict:
    """How a run computes (its dtype, say): as it began, also where it is continued on another machine."""
    path = Path(folder) / "chosen.json"
    if ranks.main and not path.exists():
        write_whole(path, json.dumps(choice) + "\n")
    ranks.barrier()
    return json.loads(path.read_text(encoding="utf-8"))
