"""Plumbing of a run: settings, randomness, device and ranks, files. Nothing here knows about latents or models.

A frozen dataclass is a script's command line, its --help, its log and its config.json.
"""
import argparse
import codecs
import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import hashlib
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import typing
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


# ---- settings: dataclass -> flags -> config.json ---------------------------------------------------------------

def option(default, help: str, above: float | None = None, at_least: float | None = None, at_most: float | None = None,
           how: bool = False):
    """A field of a config: its default (a config nests its fields), its line of --help, the bounds of a number, and
    whether it only says how a run is done, with which files or where, so that it may change when the run goes on."""
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds, "how": how})


def says_how(config, prefix: str = "") -> set[str]:
    """The flags of a config on which no result depends."""
    names = set()
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        names |= says_how(value, f"{name}.") if is_dataclass(value) else {name} if field.metadata.get("how") else set()
    return names


def flatten(settings: dict, prefix: str = "") -> dict:
    """Nested settings as {flag name: value}: {"steps": 300, "model.width": 64, ...}."""
    flat = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def rebuild(config, flat: dict, prefix: str = ""):
    """The config with the values of `flat`, as `flatten` names them."""
    return dataclasses.replace(config, **{
        name: rebuild(value, flat, f"{prefix}{name}.") if is_dataclass(value) else flat[prefix + name]
        for name, value in vars(config).items()})


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def converter(kind, above: float | None = None, at_least: float | None = None, at_most: float | None = None):
    """What makes a value of a field's type from the text of a flag; Literal and bool are a choice of words, and one may
    stand in place of a number."""
    words = {"true": True, "false": False} if kind is bool else {word: word for word in typing.get_args(kind)}
    if float in words:      # float | Literal[...]
        kind, words = float, {word: word for word in typing.get_args(typing.get_args(kind)[1])}

    def convert(text: str):
        if text.lower() in words:
            return words[text.lower()]
        if words and kind is not float:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give one of {', '.join(words)}")
        value = kind(text)
        limits = (
            (kind is float and not abs(value) <= torch.finfo(torch.float32).max, "a finite number of float32"),
            (kind is int and not abs(value) < 2 ** 31, "a number of 31 bits"),
            (above is not None and value <= above, f"a number above {above}"),
            (at_least is not None and value < at_least, f"a number of at least {at_least}"),
            (at_most is not None and value > at_most, f"a number of at most {at_most}"))
        for is_beyond, what in limits:
            if is_beyond:
                raise argparse.ArgumentTypeError(f"{text} is not allowed; give {what}")
        return value
    names = [*words, kind.__name__] if kind is float else words
    convert.__name__ = "|".join(names) or kind.__name__         # for --help and argparse's own complaint
    return convert


def add_flags(parser, config, prefix: str = "", group=None) -> None:
    """A flag for every field; a nested config has a group of its own in --help."""
    hints, group = typing.get_type_hints(type(config)), group or parser
    for field in dataclasses.fields(config):
        name, value, help = prefix + field.name, getattr(config, field.name), field.metadata["help"]
        if is_dataclass(value):
            add_flags(parser, value, f"{name}.", parser.add_argument_group(name, help))
        else:
            convert = converter(hints[field.name], **field.metadata.get("bounds", {}))
            help = f"{help} [{value}]".replace("%", "%%")
            alone = {"nargs": "?", "const": True} if hints[field.name] is bool else {}      # --name is --name true
            group.add_argument(f"--{name}", type=convert, default=value, metavar=convert.__name__, help=help, **alone)


def parse_json(text: str | bytes, path):
    """What JSON of a file says. Raises ValueError that names the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); delete it, or have it back from a copy") from None


def read_json(path):
    """What a JSON file says. Raises ValueError that names it."""
    return parse_json(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8), path)


def read_config(path: str) -> dict:
    """The flat settings of a config.json. Raises FileNotFoundError, ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path!r}; a run folder holds one as config.json")
    try:
        return flatten(read_json(path)["config"])
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{str(path)!r} is no config.json of a run; it needs a \"config\" part") from None


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
    if vars(given).get("out") == "":
        raise ValueError("--out is empty; name where to write")
    return rebuild(default, vars(given))


def one_line(error: Exception, secret: str = "") -> str:
    """What another package says of its error, without its line breaks and a secret, as far as one reads."""
    said = str(error).replace(secret, "***") if len(secret) > 7 else str(error)        # else it is none
    return " ".join(said.split())[:300] or type(error).__name__


def script(main) -> None:
    """Run main(argv) as a program: a user's error ends it with one line and exit code 2, no traceback."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:       # as the scripts have it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:         # whoever read the output has had enough, as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:         # of an optional package
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:        # torch has RuntimeErrors for it
        said = ("out of memory", "not enough memory", "can't allocate memory")
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in said):
            raise
        print(f"error: out of memory ({one_line(error)}); a smaller model or batches (--batch_tokens, "
              "--micro_batch_rows, --rows) take less", file=sys.stderr)
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


# ---- progress --------------------------------------------------------------------------------------------------

class StageBar(tqdm):
    """A bar after what stage() says whenever it is drawn."""
    stage = staticmethod(lambda: "")

    @property
    def format_dict(self):
        return super().format_dict | {"prefix": self.stage() + (getattr(self, "desc", None) or "")}


def progress_bar(total: float, title: str, done: float = 0, hidden: bool = False,
                 stage: Callable[[], str] = lambda: "") -> tqdm:
    """One line that says how far a piece of work is, of a total that may be infinite, after what stage() says whenever
    it is drawn; where nobody looks at a terminal, as in a cluster's job, a line a minute."""
    def write(text: str) -> None:       # what tqdm draws over becomes a line of its own
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)
    lines = {"file": SimpleNamespace(write=write), "delay": 60, "mininterval": 60, "maxinterval": 60}
    total *= 1 + 1e-6       # of parts that may add up to a little more
    share = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}" if total < float("inf") else "{elapsed}"
    bar = StageBar(total=total, desc=title, initial=done, disable=hidden, leave=False, dynamic_ncols=True,
                   bar_format=f"{{desc}}: {share}{{postfix}}", **({} if sys.stderr.isatty() else lines))
    bar.stage = stage
    return bar


# ---- device and ranks ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Ranks:
    """Who this process is: its rank of `world` processes and the device it computes on."""
    rank: int
    world: int
    device: torch.device
    tell: Callable[[str], None] | None = None       # who says its lines for it; it then shows no progress bars
    stage: Callable[[], str] = lambda: ""           # where the whole run stands, for the front of a bar

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line, if there is one, above the progress bars."""
        if self.main and line:
            (self.tell or tqdm.write)(line)
            sys.stdout.flush()

    def bar(self, total: float, title: str, done: float = 0) -> tqdm:
        return progress_bar(total, title, done, not self.main or self.tell is not None, self.stage)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_main(self, make: Callable[[], object]):
        """What make() gives on the main rank, for all of them."""
        found = [make() if self.main else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]

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


def end_with_parent() -> None:
    """End this process soon after the one that started it, however that ends: none works on, unseen, in a folder that
    it holds."""
    ours = multiprocessing.parent_process()         # None of torchrun's processes

    def watch(parent: int) -> None:
        while ours is None and os.getppid() == parent:
            time.sleep(0.1)
        if ours:
            ours.join()         # also of one that is gone already
        os._exit(1)
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
    if sys.platform == "linux":         # kills also where Python, at its own end, runs no threads any more
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG


def start_ranks(device: str = "auto") -> Ranks:
    """Join the process group that torchrun describes, or be the only one. ValueError where the device is missing."""
    keep_freed_memory()
    if "TORCHELASTIC_RUN_ID" in os.environ:         # torchrun's processes outlive it
        end_with_parent()
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
def naming_the_file(path):
    """A write that fails in here, as on a full disk, says which file it was for."""
    try:
        yield
    except (OSError, RuntimeError) as error:        # torch has a RuntimeError, and the cause as its context
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.filename is not None:
            raise
        raise OSError(f"could not write {path} ({cause.strerror}); make room, the same command goes on") from None


@contextlib.contextmanager
def whole_file(path):
    """A file to write bytes to that appears whole or not at all: under a name of this process's own, then renamed."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with naming_the_file(path), open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)         # where it could not be written whole


def write_whole(path, text: str) -> None:
    """Write a text file whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text.encode())


class Log:
    """metrics.jsonl: the rows of a run so far, each with its kind, the step, the tokens and the seconds since it began.
    Those beyond the step from which a run goes on, which it writes again, are dropped."""

    def __init__(self, folder, step: int, ranks: Ranks, at_row: Callable[[dict], None]):
        self.path, self.rows, self.ranks, self.at_row = Path(folder, "metrics.jsonl"), [], ranks, at_row
        if ranks.main and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(True)
            rows = [parse_json(line, self.path) for line in lines if line.endswith("\n")]
            self.rows = [row for row in rows if row["step"] <= step]
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.start = time.time() - max((row["seconds"] for row in self.rows), default=0.0)

    def add(self, kind: str, step: int, tokens: int, figures: dict) -> None:
        """Write and tell a row."""
        seconds = round(time.time() - self.start, 2)
        self.rows.append({"kind": kind, "step": step, "tokens": tokens, "seconds": seconds} | figures)
        if self.ranks.main:
            with naming_the_file(self.path), open(self.path, "a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        self.at_row(self.rows[-1])


def sha256_of(path) -> str:
    """Of a file's content; of a folder, of the checkpoint in it, else of the parts of an open base."""
    if os.path.isfile(f"{path}/ckpt.pt"):
        path = f"{path}/ckpt.pt"
    if os.path.isdir(path):
        parts = sorted(file for file in Path(path).glob("*.*") if file.suffix in (".json", ".safetensors"))
        return hashlib.sha256("".join(file.name + sha256_of(file) for file in parts).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- run folders -----------------------------------------------------------------------------------------------

HELD: dict[Path, object] = {}       # folders that this process has to itself, with their open locks


def as_began(folder: str, name: str, wanted: str) -> str:
    """A setting; where it is auto, as the run in this folder, if there is one, began with it, on whatever machine."""
    path = f"{folder}/config.json"
    return read_config(path).get(name, wanted) if wanted == "auto" and folder and os.path.exists(path) else wanted


def commit_of_this_project() -> str:
    """Short hash of the commit, empty where there is no git."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def hold(folder, shared: bool = False) -> None:
    """Have a folder to oneself, or with others that share it, until this process ends, however it ends; it is made
    where it is not there.

    Raises ValueError where another process has it.
    """
    place = Path(folder).resolve()
    if place in HELD:
        return
    place.mkdir(parents=True, exist_ok=True)
    lock = open(place / ".lock", "a")
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another process; wait for its end, or give another --out") from None
    except OSError:         # a disk that has no locks
        pass
    HELD[place] = lock


def hold_early(folder, ranks: Ranks, shared: bool = False) -> None:
    """`hold` a folder that is there, so that a second process ends before it reads anything."""
    if ranks.main and os.path.isdir(folder):
        hold(folder, shared)


def open_run(folder, config, ranks: Ranks, may_grow: tuple[str, ...] = (), before_growing=lambda: None, part: str = "",
             **identity) -> None:
    """Make the run folder with its config.json, or continue in it. may_grow: settings that make a run longer, if
    before_growing() does not object. The others must be the same, but for those that only say how (what files hold is
    compared by their hashes, `identity`). part: what of it this process has to itself, where several share it.

    Raises ValueError where the folder belongs to another configuration: its files would not be those of this command.
    """
    if not ranks.main:
        return ranks.barrier()      # the main rank looks, and hashes, for all
    hold(folder, shared=bool(part))
    hold(Path(folder, part))
    path, settings = Path(folder) / "config.json", json.loads(json.dumps(asdict(config)))
    if path.exists():
        for leftover in [] if part else Path(folder).rglob("*.[0-9]*.tmp"):         # of a process that was killed
            leftover.unlink()
        saved = read_json(path)
        old = read_config(path) | {name: saved.get(name) for name in identity}
        new = flatten(settings) | identity
        differ = {name for name in new.keys() | old.keys() if old.get(name) != new.get(name)} - says_how(config)
        grown = {name for name in differ & {*may_grow} if name in old and old[name] < new[name]}
        if changed := [f"{name} {old.get(name)} -> {new.get(name)}" for name in sorted(differ - grown)]:
            raise ValueError(f"{folder} holds a run with other settings ({', '.join(changed)}); "
                             f"give another --out, or delete {folder}")
        if grown:
            before_growing()
    if not path.exists() or grown:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        record = {"config": settings, "command": command, "commit": commit_of_this_project(), **identity}
        write_whole(path, json.dumps(record, indent=2) + "\n")
    ranks.barrier()


def folder_beside(out: str) -> Path:
    """OUT.run, the run folder of a single file, with what is not the file itself. Raises ValueError where the file is
    there without it, and so is none of ours."""
    folder = Path(f"{out}.run")
    if not os.path.basename(out):
        raise ValueError(f"--out {out!r} names no file; give one")
    if os.path.exists(out) and not (folder / "config.json").exists():
        raise ValueError(f"{out} is there without its {folder}; give another --out, or delete it")
    return folder
