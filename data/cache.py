"""A corpus tokenised once, by all cores, into files beside it, from which documents are read one at a time.

    CORPUS.jsonl.tokens/CONTENT.CODE.CHUNK.ENCODING.vocabulary     the tokens that occur
    CORPUS.jsonl.tokens/CONTENT.CODE.CHUNK.VOCABULARY.documents    the documents, one after the other, see `to_bytes`;
                                                                   then where each starts, and where the last ends

CHUNK is the cap of a chunk; CONTENT, CODE and VOCABULARY are hashes: a changed corpus, chunker or tokenizer never meets
old files. All of them may be deleted, cut or forbidden at any time: what cannot be read is made anew, in the next place
that can be written. Memory does not grow with the corpus.
"""
import contextlib
import hashlib
import itertools
import marshal
import multiprocessing
import os
import tempfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np

from data.corpus import CHUNK_TOKENS, Chunk, Document, numbered_lines, read_document, read_record, texts_of
from data.run import progress_bar, sha256_of, whole_file
from data.tokens import Tokenizer, split, tokenizer_from

PART_BYTES = 2 ** 23        # of a corpus that a core tokenises at a time
SOURCES = [Path(__file__).with_name(name) for name in ("cache.py", "corpus.py", "tokens.py", "bases.py")]
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES) + str(marshal.version).encode()).hexdigest()[:8]


# ---- a corpus in parts, for all cores --------------------------------------------------------------------------

@dataclass(frozen=True)
class Source:
    """A corpus as it lies on the disk, with the hash of its content, and the cap of a chunk where text is split."""
    path: str
    digest: str
    chunk_tokens: int

    def cached(self, name: str, read: Callable[[Path], object], make: Callable[[Path], None]):
        """What `read` gives of a file beside the corpus, or among the temporary files, or in a folder of its own there:
        the first place where it is whole (else `read` raises ValueError), or where `make` can write it."""
        beside = Path(f"{self.path}.tokens")
        for place in (lambda: beside, lambda: Path(tempfile.gettempdir(), beside.name), tempfile.mkdtemp):
            try:
                file = Path(place(), f"{self.digest[:16]}.{CODE}.{self.chunk_tokens}.{name}")
                with contextlib.suppress(FileNotFoundError, ValueError):
                    return read(file)
                file.parent.mkdir(exist_ok=True)
                make(file)
                return read(file)
            except OSError as error:
                cause = error
        raise cause


def open_source(path: str, chunk_tokens: int = CHUNK_TOKENS) -> Source:
    """Raises FileNotFoundError, ValueError where there is no corpus."""
    next(numbered_lines(path))
    return Source(path, sha256_of(path), chunk_tokens)


Part = list[tuple[int, bytes]]      # lines with their numbers


def parts_of(path: str) -> Iterator[Part]:
    """A corpus, a part at a time."""
    size = 0

    def part_of(numbered: tuple[int, bytes]) -> int:
        nonlocal size
        size += len(numbered[1])
        return size // PART_BYTES
    yield from (list(part) for _, part in itertools.groupby(numbered_lines(path), part_of))


def on_all_cores(job: Callable, path: str, title: str) -> Iterator:
    """job(part) of every part of a corpus, in their order; several are shared among the cores."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0     # reading it says what is wrong
    if size <= PART_BYTES or multiprocessing.current_process().daemon:      # which may not have processes of its own
        yield from map(job, parts_of(path))
        return
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool, progress_bar(size, title) as bar:
        for found in pool.imap(job, parts_of(path)):
            yield found
            bar.update(PART_BYTES)


def sealed(value) -> bytes:
    """A value of plain types, after a checksum."""
    content = marshal.dumps(value)
    return zlib.crc32(content).to_bytes(4) + content


def unsealed(record: bytes):
    """The inverse of `sealed`. Raises ValueError where a byte of it is another."""
    if zlib.crc32(record[4:]).to_bytes(4) != record[:4]:
        raise ValueError("damaged; delete it, and it is made anew")
    return marshal.loads(record[4:])


def tokens_of_part(part: Part, source: Source, encoding: str) -> set[bytes]:
    records = (read_record(source.path, *numbered) for numbered in part)
    return {token for text in texts_of(records, encoding, source.chunk_tokens) for token in split(text, encoding)}


def vocabulary(source: Source, encoding: str) -> set[bytes]:
    """The tokens that occur in a corpus. Raises ValueError with file:line."""
    def read(file: Path) -> set[bytes]:
        return set(unsealed(file.read_bytes()))

    def make(file: Path) -> None:
        job = partial(tokens_of_part, source=source, encoding=encoding)
        tokens = set().union(*on_all_cores(job, source.path, "vocabulary"))
        with whole_file(file) as out:
            out.write(sealed(sorted(tokens)))
    return source.cached(f"{encoding}.vocabulary", read, make)


def tokenizer_of_corpora(sources: Iterable[Source], encoding: str, start: dict | None = None) -> Tokenizer:
    """The tokenizer that a start brings along, see `read_start` in train.py, else the one that knows just the tokens of
    some corpora."""
    if start:
        return tokenizer_from(start["tokenizer"])
    return Tokenizer(encoding, tuple(sorted(set().union(*(vocabulary(source, encoding) for source in sources)))))


# ---- the tokenised corpus --------------------------------------------------------------------------------------

def to_bytes(document: Document) -> bytes:
    """What training needs of a document."""
    return sealed([(c.suffix, c.latent, c.given, c.draws, c.weights) for c in document.chunks])


def from_bytes(index: int, record: bytes) -> Document:
    """The inverse of `to_bytes`. Raises ValueError where a byte of it is another."""
    return Document(index, [Chunk(*parts) for parts in unsealed(record)], {})


def tokenize_part(part: Part, source: Source, tokenizer: Tokenizer) -> list[bytes]:
    return [to_bytes(read_document(source.path, *numbered, tokenizer, source.chunk_tokens)) for numbered in part]


class TokenizedCorpus:
    """Documents by number, read from the disk when they are asked for; made where it is not there yet."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        name = hashlib.sha256(repr(tokenizer).encode()).hexdigest()[:16]
        self.source = source
        self.file, self.starts = source.cached(f"{name}.documents", self.read, partial(self.make, source, tokenizer))

    def read(self, path: Path):
        """The open file and its starts, which stand where the last document ends: what the last of them says. Raises
        ValueError where that is not so."""
        file, size = open(path, "rb"), path.stat().st_size
        file.seek(max(0, size - 8))
        end = int.from_bytes(file.read(), "little")
        starts = np.memmap(path, np.int64, "r", end) if end < size else [-1]
        if starts[0] != 0:
            raise ValueError(f"{path} is not whole; delete it")
        return file, starts

    def make(self, source: Source, tokenizer: Tokenizer, path: Path) -> None:
        job, sizes = partial(tokenize_part, source=source, tokenizer=tokenizer), [np.zeros(1, np.int64)]
        with whole_file(path) as file:
            for records in on_all_cores(job, source.path, "tokens"):
                sizes.append(np.array([len(record) for record in records]))
                file.write(b"".join(records))
            file.write(np.cumsum(np.concatenate(sizes)).tobytes())

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Document:
        if index >= len(self):
            raise IndexError(index)     # ends a loop over the documents
        start, end = self.starts[index:index + 2].tolist()
        self.file.seek(start)
        try:
            return from_bytes(index, self.file.read(end - start))
        except ValueError as error:
            raise ValueError(f"{self.file.name} is {error}") from None
