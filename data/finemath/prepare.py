"""Write a corpus from the hub, or from files that other tools wrote: FineMath, the paper's published data, or yours.

    python data/finemath/prepare.py --limit 20000                        FineMath-4+, the first documents
    python data/finemath/prepare.py --source thoughts --out gold.jsonl   a subset of the paper's data, see below
    python data/finemath/prepare.py --source "part-*.parquet" --text content --out mine.jsonl

--source is the name of a subset below, org/name[:config] on the hub, or parquet or JSON-lines files (a pattern; folders
stand for all such files in them). Rows are streamed: memory does not grow, and a killed run goes on where it was.

    finemath       FineMath-4+                                  held_out    the paper's validation split, raw
    warm           its warm-start split, raw                    thoughts    the same with thoughts of GPT-4o-mini
    wrap, wrap_cot the same, rewritten as in WRAP, and with a chain of thought: one rewriting (a latent) a document
    raw            the split that is bootstrapped on            round_1 ... the same with the thoughts of EM round 1 ...

A row becomes a document of the data contract (data/corpus.py): its text, its chunks with their thoughts or its one
latent, its answer. Null is as good as absent, and chunks may be a list of structs, a struct of lists, or a list of
texts. Other columns are left out. Needs the package `datasets`.
"""
import codecs
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from glob import escape as glob_escape
from glob import glob
from pathlib import Path
from typing import Iterator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import CHUNK_TOKENS, check_record, with_chunks  # noqa: E402
from data.run import (Ranks, folder_beside, naming_the_file, one_line, open_run, option,  # noqa: E402
                      parse_config, read_json, script, write_whole)
from data.tokens import count_tokens  # noqa: E402

PAPER = "ryoungj/bootstrap-latent-thought-data:finemath_4plus_final_"
WARM, RAW = f"{PAPER}500m_warmstart_split", f"{PAPER}2b_separated_bootstrap_split"
SUBSETS = {"finemath": "HuggingFaceTB/finemath:finemath-4plus", "held_out": f"{PAPER}fixed_val_split", "warm": WARM,
           "thoughts": f"{WARM}_with_gpt_latent_thoughts_latents", "wrap": f"{WARM}_with_wrap_baseline_latents",
           "wrap_cot": f"{WARM}_with_wrap_cot_latents", "raw": RAW,
           **{f"round_{t}": f"{RAW}_with_bootstrap_latents_setup_bootstrap_fixed_data_iter_{t}_mc_4"
              for t in range(1, 10)}}
SAVE_EVERY = 1000       # rows between the states from which a killed run goes on
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json", ".jsonlines": "json"}
INFO = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")     # hold no rows


@dataclass(frozen=True)
class PrepareConfig:
    source: str = option("finemath", f"{', '.join([*SUBSETS][:7])}, round_1 ...; org/name[:config] of the hub; or "
                                     "files, as \"part-*.parquet\"")
    split: str = option("train", "split of a data set of the hub")
    out: str = option("data/finemath/raw.jsonl", "corpus to write; OUT.run keeps what a killed run needs",
                      how=True)
    text: str = option("text", "column that holds the text; meta.text: a field of a struct")
    latent: str = option("latent", "column that holds the thought about the whole text, where there is one")
    skip: int = option(0, "rows to leave out first, so that corpora of one source do not overlap", at_least=0)
    limit: int = option(0, "rows to read; 0: all", at_least=0)
    encoding: str = option("words", "what the printed counts of tokens and chunks are in: words, or an encoding of "
                                    "tiktoken such as gpt2")


# ---- rows ------------------------------------------------------------------------------------------------------

def kind_of(path: str) -> str | None:
    """What a file is by its name, with or without a compression such as .gz; None: nothing here."""
    suffixes = Path(path.lower()).suffixes[-2:]
    return next((FORMATS[suffix] for suffix in reversed(suffixes) if suffix in FORMATS), None)


def local_files(source: str) -> list[str]:
    """The files of a path, a pattern or a folder (there but for our own outputs and what is beside them); none where it
    is none."""
    source = os.path.expanduser(source)
    paths = [source] if os.path.exists(source) else glob(source)
    inside = [glob(f"{glob_escape(path)}/**", recursive=True) if os.path.isdir(path) else [path] for path in paths]
    return sorted(path for part in inside for path in part if os.path.isfile(path) and kind_of(path)
                  and ".run/" not in path and (not os.path.exists(f"{path}.run") or path in paths)
                  and os.path.basename(path) not in INFO)


def hub_files(name: str, subset: str, split: str) -> list[str]:
    """The files, hf://..., of a subset of a data set on the hub. Raises ImportError, ValueError, OSError."""
    try:
        import datasets
    except ImportError:
        raise ImportError("a data set of the hub needs datasets: pip install datasets") from None
    logging.getLogger("datasets").setLevel(logging.ERROR)
    of_splits = datasets.load_dataset_builder(name, subset or None).config.data_files or {}
    if files := [str(file) for file in of_splits.get(split, []) if kind_of(str(file))]:
        return files
    raise ValueError(f"no parquet or JSON-lines files in split {split}, of {', '.join(map(str, of_splits))}; "
                     "give --split")


def files_of(source: str, split: str) -> list[str]:
    """The files of a source, on the disk or (hf://...) on the hub. Raises ValueError, FileNotFoundError."""
    source = SUBSETS.get(source, source)
    if files := local_files(source):
        return files
    name, _, subset = source.partition(":")
    if name.count("/") != 1 or kind_of(source) or os.path.exists(name.partition("/")[0]):
        raise FileNotFoundError(f"--source {source} names no parquet or JSON-lines files, and no data set of the hub; "
                                f"give files, org/name[:config], or one of {', '.join([*SUBSETS][:7])}, round_1 ...")
    try:
        return hub_files(name, subset, split)
    except (OSError, ValueError) as error:
        raise ValueError(f"--source {source}: {one_line(error)}") from None


def rows_of(path: str, start: int) -> Iterator[dict]:
    """The rows of a file from one on, as json or pyarrow reads them: nothing is guessed from rows before."""
    try:
        import fsspec
        import pyarrow.parquet
    except ImportError:
        raise ImportError("files of other tools need datasets, and what comes with it: pip install datasets") from None
    is_parquet = kind_of(path) == "parquet"
    with fsspec.open(path, "rb", compression=None if is_parquet else "infer") as file:
        if is_parquet:
            table = pyarrow.parquet.ParquetFile(file)
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                for batch in table.iter_batches(256, row_groups=[group]) if start < size else ():
                    yield from batch.to_pylist()[start:]
                    start = max(0, start - batch.num_rows)
                start = start - size if start >= size else 0
            return
        lines = filter(bytes.strip, file)
        first = next(lines, b"")
        if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):       # one array of all, as pandas writes too
            yield from json.loads((first + b"".join(lines)).decode("utf-8-sig"))[start:]
        elif first:
            yield from (json.loads(line.decode("utf-8-sig"))
                        for line in itertools.islice(itertools.chain([first], lines), start, None))


# ---- a row -> a document ---------------------------------------------------------------------------------------

def absent(value) -> bool:
    """What stands for nothing: null, not a number, no text, no parts."""
    return value is None or value != value or isinstance(value, str) and not value.strip() or value in ([], {})


def chunks_of(column) -> list[dict]:
    """A column of chunks in any of its forms: structs, a struct of lists, texts. Keys that are not read are dropped,
    and ids, which are of another vocabulary."""
    if isinstance(column, dict) and all(values is None or isinstance(values, list) for values in column.values()):
        lists = {key: values for key, values in column.items() if values is not None}
        if len({len(values) for values in lists.values()}) > 1:
            raise ValueError("the lists of \"chunks\" differ in length")
        column = [dict(zip(lists, values)) for values in zip(*lists.values())]
    if not isinstance(column, list) or not all(isinstance(chunk, (dict, str, type(None))) for chunk in column):
        raise ValueError("\"chunks\" is a list of objects or texts, or an object of lists")
    chunks = [chunk if isinstance(chunk, dict) else {"suffix": chunk} for chunk in column]
    chunks = [chunk for chunk in chunks if any(value is not None for value in chunk.values())]
    if not all(isinstance(chunk.get("suffix"), str) for chunk in chunks):
        raise ValueError("a chunk needs a \"suffix\", a text")
    return [{key: chunk[key] for key in ("suffix", "latent", "given")
             if key in chunk and (key == "suffix" or not absent(chunk[key]))} for chunk in chunks]


def as_text(value) -> str:
    """An answer, which may come as a number; whole ones, which pandas writes as 72.0, without their fraction."""
    if isinstance(value, (dict, list)):
        raise ValueError(f"the \"answer\" is a text or a number, not {str(value)[:40]}")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def field_of(row: dict, name: str):
    """A column of a row, or what a struct in one holds: meta.text. None where there is none."""
    for part in [name] if name in row else name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def document_of(row: dict, config: PrepareConfig, counts: Counter) -> dict | None:
    """A line of the corpus, or None where a row has no text. Raises ValueError for what is no document.

    Published suffixes have lost a line break here and there: then they are the text, since a chunk is what is trained
    on.
    """
    if not isinstance(row, dict):
        raise ValueError("a row is an object with a text")
    if not {config.text, config.text.split(".")[0]} & row.keys() and absent(row.get("chunks")):
        raise ValueError(f"there is no column {config.text!r}; name it by --text, of {', '.join(row)}")
    record, latent = {"text": field_of(row, config.text)}, field_of(row, config.latent)
    chunks = [] if absent(row.get("chunks")) else chunks_of(row["chunks"])
    record |= {"chunks": chunks} if chunks else {}
    record |= {} if absent(latent) else {"latent": latent}
    record |= {} if absent(row.get("answer")) else {"answer": as_text(row["answer"])}
    if record.get("chunks"):
        text, whole = "".join(chunk["suffix"] for chunk in record["chunks"]), record["text"]
        if not absent(whole) and "".join(text.split()) != "".join(str(whole).split()):
            raise ValueError("the suffixes of the chunks do not add up to the text")
        counts["with the text of their chunks"] += text != whole
        record["text"] = text
    if absent(record["text"]):
        counts["without text, left out"] += 1
        return None
    return check_record(record)


def count_in(document: dict, encoding: str, counts: Counter) -> None:
    """Add a document to the counts, its text split as training would split it."""
    count = partial(count_tokens, encoding=encoding)
    chunks = with_chunks(document, count, CHUNK_TOKENS)["chunks"]
    thoughts = [chunk["latent"] for chunk in chunks if "latent" in chunk]
    counts.update({"documents": 1, "chunks": len(chunks), "thoughts": len(thoughts),
                   "tokens": sum(count(chunk["suffix"]) for chunk in chunks),
                   "tokens of thoughts": sum(map(count, thoughts))})


# ---- a stream that goes on -------------------------------------------------------------------------------------

def line_of(row, config: PrepareConfig, counts: Counter) -> bytes:
    """What a row adds to the corpus, and to the counts; nothing where it has no text that can be written."""
    document = document_of(row, config, counts)
    try:
        line = json.dumps(document, ensure_ascii=False).encode() + b"\n" if document else b""
    except UnicodeEncodeError:
        counts["with half a character, left out"] += 1
        return b""
    if document:
        count_in(document, config.encoding, counts)
    return line


@contextlib.contextmanager
def naming_the_row(path: str, row: int):
    """What is wrong in here, with a row or with its file, is one line that says where; rows count from 1."""
    try:
        yield
    except UnicodeDecodeError:
        raise ValueError(f"{path}, row {row:,} is not UTF-8; convert it") from None
    except (ValueError, EOFError, RecursionError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"{path}, row {row:,}: {one_line(error)}") from None
    except OSError as error:
        raise ValueError(f"{path}, row {row:,}: {one_line(error)}; the same command goes on") from None


def stream(files: list[str], first: int, row: int) -> Iterator[tuple[int, int, dict]]:
    """All rows from one on, each with the number of its file and how many of that are then read."""
    for number in range(first, len(files)):
        rows, end = rows_of(files[number], row), object()
        while True:
            with naming_the_row(files[number], row + 1):
                content = next(rows, end)
            if content is end:
                break
            row += 1
            yield number, row, content
        row = 0


def write_documents(config: PrepareConfig, files: list[str], state: dict, folder: Path, bar) -> Counter:
    """Append a line for each row to folder/lines, and keep every so often how far that is; returns the counts.

    state: see `resume`. Raises ValueError that says which row of which file is no document, or cannot be read.
    """
    counts = Counter(state["counts"])
    last = state["skip"] + config.limit - counts["rows"] if config.limit else None
    rows = itertools.islice(stream(files, state["file"], state["row"]), state["skip"], last)
    number, row = state["file"], state["row"]
    with naming_the_file(config.out), open(folder / "lines", "ab") as file:
        def save() -> None:
            file.flush()
            now = {"bytes": file.tell(), "counts": counts, "file": number, "row": row, "skip": 0}
            write_whole(folder / "state.json", json.dumps(now))
        for number, row, content in rows:
            with naming_the_row(files[number], row):
                line = line_of(content, config, counts)
            file.write(line)
            counts["rows"] += 1
            bar.update()
            bar.set_postfix_str(f"{counts['documents']:,} documents, {counts['tokens']:,} tokens", refresh=False)
            if counts["rows"] % SAVE_EVERY == 0:
                save()
        save()
    return counts


def resume(config: PrepareConfig, folder: Path) -> dict:
    """How far the corpus is written: its bytes and counts, the file and the row there to go on from, and how many rows
    are still to be skipped."""
    try:
        state = read_json(folder / "state.json")
        os.truncate(folder / "lines", state["bytes"])
        return state
    except (FileNotFoundError, ValueError):         # nothing is there, or not whole
        (folder / "lines").unlink(missing_ok=True)
        return {"bytes": 0, "counts": {}, "file": 0, "row": 0, "skip": config.skip}


def prepare(config: PrepareConfig, ranks: Ranks) -> dict[str, int]:
    """Write config.out, whole or not at all; returns the counts. Raises ValueError, OSError."""
    folder = folder_beside(config.out)
    is_done = os.path.exists(config.out) and (folder / "counts.json").exists()
    files = [] if is_done else files_of(config.source, config.split)
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in local_files(config.source)]
    identity = {"files": hashlib.sha256(repr(stats).encode()).hexdigest()[:16]} if stats or not is_done else {}
    open_run(folder, config, ranks, **identity)
    if files:
        try:
            state = resume(config, folder)
            with ranks.bar(config.limit or math.inf, config.source, done=Counter(state["counts"])["rows"]) as bar:
                counts = write_documents(config, files, state, folder, bar)
            if not counts["documents"]:
                raise ValueError(f"--source {config.source} has no document with text")
        except (ValueError, ImportError):
            if not resume(config, folder)["bytes"]:         # nothing is lost, and the settings may be mended
                shutil.rmtree(folder)
            raise
        write_whole(folder / "counts.json", json.dumps(counts, indent=1) + "\n")
        os.replace(folder / "lines", config.out)
    (folder / "state.json").unlink(missing_ok=True)
    return read_json(folder / "counts.json")


def main(argv=None) -> None:
    config = parse_config(PrepareConfig(), argv, __doc__)
    counts = prepare(config, Ranks(0, 1, None))
    figures = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count or what == "thoughts")
    print(f"{config.out}: {figures} (in {config.encoding})")


if __name__ == "__main__":
    script(main)
