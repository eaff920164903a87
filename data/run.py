"""Plumbing of a run: flags, randomness, device and ranks, files. Nothing here knows about latents or models.

One mechanism for settings: a frozen dataclass is the command line, its --help, the log and config.json.
"""
import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import typing
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import resource
except ImportError:
    resource = None         # on Windows


# ---- settings: dataclass -> flags -> config.json ---------------------------------------------------------------

def option(default, help: str):
    """A field of a config with its line of --help; a dataclass as default nests its fields (--train.steps)."""
    if is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def require_positive(config, *names: str) -> None:
    """Raise ValueError for the first of these fields that is not above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"--{name} {getattr(config, name)} is not allowed; give a number above 0")


def flatten(settings: dict, prefix: str = "") -> dict:
    """Nested settings as {flag name: value}: {"steps": 300, "model.width": 64, ...}."""
    flat = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def rebuild(config, flat: dict, prefix: str = ""):
    """The config with the values of `flat`, as `flatten` names them."""
    changes = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        changes[field.name] = rebuild(value, flat, f"{name}.") if is_dataclass(value) else flat[name]
    return dataclasses.replace(config, **changes)


def choices_of(kind) -> dict:
    """What a setting of a few values may be, by its text; empty where it is free."""
    return {"true": True, "false": False} if kind is bool else {str(choice): choice for choice in typing.get_args(kind)}


def convert(text, kind, name: str):
    """The value of a flag from its text. Raises ValueError where it has none."""
    choices = choices_of(kind)
    try:
        return choices[str(text).lower()] if choices else kind(str(text))
    except (KeyError, ValueError):
        wanted = f"one of {', '.join(choices)}" if choices else f"a value of type {kind.__name__}"
        raise ValueError(f"--{name} {text} is not allowed; give {wanted}") from None


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def add_flags(parser, config, prefix: str = "", group=None) -> dict:
    """A flag for every field, and the type of each; a nested config has a group of its own in --help."""
    hints, kinds, group = typing.get_type_hints(type(config)), {}, group or parser
    for field in dataclasses.fields(config):
        name, value, kind = prefix + field.name, getattr(config, field.name), hints[field.name]
        if is_dataclass(value):
            kinds |= add_flags(parser, value, f"{name}.", parser.add_argument_group(name, field.metadata["help"]))
            continue
        kinds[name] = kind
        shown = f"{field.metadata['help']} [{value}]".replace("%", "%%")
        metavar = "|".join(choices_of(kind)) or kind.__name__
        group.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, metavar=metavar, help=shown)
    return kinds


def read_config(path: str) -> dict:
    """The flat settings of a config.json. Raises FileNotFoundError, ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path!r}; a run folder holds one as config.json")
    try:
        return flatten(json.loads(Path(path).read_text(encoding="utf-8"))["config"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path!r} is no config.json of a run; it needs a \"config\" part") from None


def parse_config(default, argv, description: str):
    """The config of a script: defaults < the "config" part of --config FILE < flags.

    Raises ValueError for a value or key that does not fit, FileNotFoundError for a missing FILE; an unknown flag exits.
    """
    parser = OneLineParser(usage="%(prog)s [--flag value ...]", description=description, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="take the settings of a config.json; flags override it")
    kinds = add_flags(parser, default)
    given = vars(parser.parse_args(argv))
    path, values = given.pop("config"), flatten(asdict(default))
    for name, value in (read_config(path) | given).items() if path else given.items():
        if name not in values:
            raise ValueError(f"{path} sets {name!r}, which is no setting of this script; remove it")
        values[name] = convert(value, kinds[name], name)
    return rebuild(default, values)


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
    """Random numbers that are a function of (seed, purpose, labels) alone: of no clock, batch, slot or rank.

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

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        if self.main:
            tqdm.write(line)      # above the progress bars
            sys.stdout.flush()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def main_first(ranks: Ranks):
    """What the main rank makes in here the others find when their turn comes."""
    if not ranks.main:
        ranks.barrier()
    try:
        yield
    finally:
        if ranks.main:
            ranks.barrier()


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held, in bytes: of the device on CUDA, else of the machine; 0 where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def start_ranks(device: str = "auto") -> Ranks:
    """Join the process group that torchrun describes, or be the only process."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.split(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind):
        raise ValueError(f"--device {device} is not on this machine; use {', '.join(name for name in there if there[name])}")
    index = device[len(kind) + 1:]
    if index and not (kind == "cuda" and index.isdigit() and int(index) < torch.cuda.device_count()):
        raise ValueError(f"--device {device} is not on this machine; use {kind}")
    if world > 1 and kind == "mps":
        device = "cpu"      # no process group works on mps
    if world > 1 and kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if kind == "cuda":
        torch.cuda.set_device(device if ":" in device else "cuda:0")
        torch.backends.cuda.matmul.allow_tf32 = False       # some containers allow it; train.py does where it is welcome
    if world == 1:
        return Ranks(0, 1, torch.device(device))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(hours=2),
                                device_id=torch.device(device) if kind == "cuda" else None)
    return Ranks(dist.get_rank(), world, torch.device(device))


# ---- files -----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def whole_file(path):
    """A file to write bytes to that appears whole or not at all: under a name of this process's own, then renamed."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        yield file
    os.replace(temporary, path)


def write_whole(path, text: str) -> None:
    """Write a text file whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text.encode())


def write_jsonl(path, records) -> None:
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def join_files(paths, out) -> None:
    """One file after the other, whole or not at all."""
    with whole_file(out) as file:
        for path in paths:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, file)


def append_metrics(folder, record: dict) -> None:
    """One more line of metrics.jsonl."""
    with open(Path(folder) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def trim_metrics(folder, step: int, ranks: Ranks) -> None:
    """Drop what metrics.jsonl holds beyond a step: a resumed run writes it again."""
    path = Path(folder) / "metrics.jsonl"
    if ranks.main and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            write_whole(path, "".join(kept))


def sha256_of(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


HOW_ONLY = ("device", "processes", "arms")     # settings that say where and how much is computed, not what comes out


def commit_of_this_project() -> str:
    """Short hash of the commit, empty where there is no git."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def open_run(folder, config, ranks: Ranks, **identity) -> None:
    """Make the run folder with its config.json, or continue in it. identity: what else must be the same, such as a hash.

    Raises ValueError where the folder belongs to another configuration: its files would not be those of this command.
    """
    folder, settings = Path(folder), json.loads(json.dumps(asdict(config)))
    path = folder / "config.json"
    if path.exists():
        old, new = read_config(path), flatten(settings)
        saved = json.loads(path.read_text(encoding="utf-8"))
        old, new = old | {name: saved.get(name) for name in identity}, new | identity
        changed = [f"{name} {old.get(name)} -> {new.get(name)}" for name in new.keys() | old.keys()
                   if name not in HOW_ONLY and old.get(name) != new.get(name)]
        if changed:
            raise ValueError(f"{folder} holds a run with other settings ({', '.join(sorted(changed))}); "
                             f"give another --out, or delete {folder}")
    elif ranks.main:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        record = {"config": settings, "command": command, "commit": commit_of_this_project(), **identity}
        write_whole(path, json.dumps(record, indent=2) + "\n")
    ranks.barrier()
