"""A corpus tokenised once, by all cores, into files beside it, from which documents are read one at a time.

    CORPUS.jsonl.tokens/CONTENT.CODE.ENCODING.vocabulary     the tokens that occur
    CORPUS.jsonl.tokens/CONTENT.CODE.VOCABULARY.documents    the documents, one after the other, see `to_bytes`
    CORPUS.jsonl.tokens/CONTENT.CODE.VOCABULARY.starts.npy   where each of them starts, and the end

CONTENT, CODE and VOCABULARY are hashes: a changed corpus, chunker or tokenizer never meets old files, and all of them
may be deleted at any time. Memory does not grow with the corpus, but for eight bytes a document.
"""
import hashlib
import json
import marshal
import multiprocessing
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
from tqdm import tqdm

from data.corpus import Chunk, Document, numbered_lines, read_document, read_record, texts_of
from data.run import sha256_of, whole_file, write_whole
from data.tokens import Tokenizer, tokens_of

PART_BYTES = 2 ** 23        # of a corpus that a core tokenises at a time
SOURCES = [Path(__file__).with_name(name) for name in ("cache.py", "corpus.py", "tokens.py", "bases.py")]
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES) + str(marshal.version).encode()).hexdigest()[:8]


# ---- a corpus in parts, for all cores --------------------------------------------------------------------------

@dataclass(frozen=True)
class Source:
    """A corpus as it lies on the disk, with the hash of its content."""
    path: str
    digest: str

    def file(self, name: str) -> Path:
        """In a folder beside the corpus, or among the temporary files where that cannot be written."""
        folder, name = Path(f"{self.path}.tokens"), f"{self.digest[:16]}.{CODE}.{name}"
        beside = (folder / name).exists() or os.access(folder if folder.exists() else folder.parent, os.W_OK)
        return folder / name if beside else Path(tempfile.gettempdir(), folder.name, name)


def open_source(path: str) -> Source:
    """Raises FileNotFoundError, ValueError where there is no corpus."""
    next(numbered_lines(path))
    return Source(path, sha256_of(path))


Part = list[tuple[int, bytes]]      # lines with their numbers


def parts_of(path: str) -> Iterator[Part]:
    """A corpus, a part at a time."""
    part, size = [], 0
    for number, line in numbered_lines(path):
        part.append((number, line))
        size += len(line)
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def on_all_cores(job: Callable, path: str, title: str) -> Iterator:
    """job(part) of every part of a corpus, in their order; several are shared among the cores."""
    size = os.path.getsize(path)
    if size <= PART_BYTES:
        yield from map(job, parts_of(path))
        return
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield from tqdm(pool.imap(job, parts_of(path)), title, size // PART_BYTES, unit="part", leave=False)


def tokens_of_part(part: Part, path: str, encoding: str) -> set[bytes]:
    return tokens_of(texts_of((read_record(path, *numbered) for numbered in part), encoding), encoding)


def vocabulary(source: Source, encoding: str) -> set[bytes]:
    """The tokens that occur in a corpus. Raises ValueError with file:line."""
    file = source.file(f"{encoding}.vocabulary")
    if not file.exists():
        job = partial(tokens_of_part, path=source.path, encoding=encoding)
        tokens = set().union(*on_all_cores(job, source.path, "vocabulary"))
        write_whole(file, json.dumps(sorted(token.decode("latin-1") for token in tokens)))
    return {token.encode("latin-1") for token in json.loads(file.read_text(encoding="utf-8"))}


# ---- the tokenised corpus --------------------------------------------------------------------------------------

def to_bytes(document: Document) -> bytes:
    """What training needs of a document."""
    return marshal.dumps([(c.suffix, c.latent, c.given, c.draws, c.weights) for c in document.chunks])


def from_bytes(index: int, record: bytes) -> Document:
    """The inverse of `to_bytes`."""
    return Document(index, [Chunk(*parts) for parts in marshal.loads(record)], {})


def tokenize_part(part: Part, path: str, tokenizer: Tokenizer) -> list[bytes]:
    return [to_bytes(read_document(path, *numbered, tokenizer)) for numbered in part]


class TokenizedCorpus:
    """Documents by number, read from the disk when they are asked for; made where it is not there yet."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        name = hashlib.sha256(repr(tokenizer).encode()).hexdigest()[:16]
        documents, starts = source.file(f"{name}.documents"), source.file(f"{name}.starts.npy")
        if not starts.exists():
            self.make(source, tokenizer, documents, starts)
        self.starts, self.file = np.load(starts, mmap_mode="r"), open(documents, "rb")

    def make(self, source: Source, tokenizer: Tokenizer, documents: Path, starts: Path) -> None:
        job, sizes = partial(tokenize_part, path=source.path, tokenizer=tokenizer), [np.zeros(1, np.int64)]
        documents.parent.mkdir(exist_ok=True)
        with whole_file(documents) as file:
            for records in on_all_cores(job, source.path, "tokens"):
                sizes.append(np.array([len(record) for record in records]))
                file.write(b"".join(records))
        with whole_file(starts) as file:
            np.save(file, np.cumsum(np.concatenate(sizes)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Document:
        if index >= len(self):
            raise IndexError(index)     # ends a loop over the documents
        start, end = self.starts[index:index + 2].tolist()
        self.file.seek(start)
        return from_bytes(index, self.file.read(end - start))
