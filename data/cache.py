"""A corpus tokenised once, by all cores, into compact files beside it, from which documents are read one at a time.

    CORPUS.jsonl.tokens/CONTENT.CODE.ENCODING.vocabulary         the tokens that occur
    CORPUS.jsonl.tokens/CONTENT.CODE.VOCABULARY.documents        the documents, one after the other, as `to_bytes` writes them
    CORPUS.jsonl.tokens/CONTENT.CODE.VOCABULARY.starts.npy       where each of them starts, and the end

CONTENT, CODE and VOCABULARY are hashes: a changed corpus, chunker or tokenizer never meets old files, and all of them may
be deleted at any time. Memory does not grow with the corpus, but for eight bytes a document.
"""
import hashlib
import itertools
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
from tqdm import tqdm

from data.corpus import Chunk, Document, numbered_lines, read_document, read_record, texts_of
from data.run import whole_file, write_whole
from data.tokens import Tokenizer, tokens_of

PART_BYTES = 2 ** 23        # of a corpus that a core tokenises at a time
CODE = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in ("cache.py", "corpus.py", "tokens.py")))


# ---- parts of a corpus -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """Whole lines of a corpus: where they start in the file, the number of the first, and how many they are."""
    offset: int
    first: int
    lines: int


@dataclass(frozen=True)
class Source:
    """A corpus as it lies on the disk."""
    path: str
    digest: str             # of its content
    parts: list[Part]

    def file(self, name: str) -> Path:
        """In a folder beside the corpus, or among the temporary files where that cannot be written."""
        folder, name = Path(f"{self.path}.tokens"), f"{self.digest[:16]}.{CODE.hexdigest()[:8]}.{name}"
        beside = (folder / name).exists() or os.access(folder if folder.exists() else folder.parent, os.W_OK)
        return folder / name if beside else Path(tempfile.gettempdir(), folder.name, name)


def survey_source(path: str) -> Source:
    """Read a corpus once, for its hash and the parts it is tokenised in. Raises what `numbered_lines` does."""
    next(numbered_lines(path))
    digest, parts, offset, first = hashlib.sha256(), [], 0, 0
    with open(path, "rb") as file:
        while lines := file.readlines(PART_BYTES):
            content = b"".join(lines)
            digest.update(content)
            parts.append(Part(offset, first, len(lines)))
            offset, first = offset + len(content), first + len(lines)
    return Source(path, digest.hexdigest(), parts)


def lines_of(path: str, part: Part) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        file.seek(part.offset)
        yield from enumerate(itertools.islice(file, part.lines), part.first)


def on_all_cores(job: Callable, parts: list[Part], title: str) -> Iterator:
    """job(part) of every part, in their order; several parts are shared among the cores."""
    if len(parts) == 1:
        yield job(parts[0])
        return
    with ProcessPoolExecutor(min(len(parts), os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
        yield from tqdm(pool.map(job, parts), desc=title, total=len(parts), unit="part", leave=False)


# ---- vocabulary ------------------------------------------------------------------------------------------------

def tokens_of_part(part: Part, path: str, encoding: str) -> set[bytes]:
    records = (read_record(path, number, line) for number, line in lines_of(path, part))
    return tokens_of(texts_of(records, encoding), encoding)


def vocabulary(source: Source, encoding: str) -> set[bytes]:
    """The tokens that occur in a corpus."""
    file = source.file(f"{encoding}.vocabulary")
    if not file.exists():
        tokens: set[bytes] = set()
        for part in on_all_cores(partial(tokens_of_part, path=source.path, encoding=encoding), source.parts, "vocabulary"):
            tokens |= part
        write_whole(file, json.dumps(sorted(token.decode("latin-1") for token in tokens)))
    return {token.encode("latin-1") for token in json.loads(file.read_text(encoding="utf-8"))}


# ---- a document as bytes ---------------------------------------------------------------------------------------

PIECE = np.dtype([("role", "u1"), ("length", "i4"), ("weight", "f8")])
SUFFIX, GIVEN_SUFFIX, LATENT, DRAW = range(4)       # the role of a piece; a chunk starts with its suffix


def to_bytes(document: Document, id_type: type) -> bytes:
    """The number of pieces, what each is, and the ids of all. Keys of the JSON that training does not need are left out."""
    pieces, ids = [], []
    for chunk in document.chunks:
        parts = [(GIVEN_SUFFIX if chunk.given else SUFFIX, 0.0, chunk.suffix)]
        parts += [(LATENT, 0.0, chunk.latent)] if chunk.latent is not None else []
        parts += [(DRAW, weight, draw) for weight, draw in zip(chunk.weights, chunk.draws)]
        pieces += [(role, len(part), weight) for role, weight, part in parts]
        ids += itertools.chain.from_iterable(part for _, _, part in parts)
    return np.int32(len(pieces)).tobytes() + np.array(pieces, PIECE).tobytes() + np.array(ids, id_type).tobytes()


def from_bytes(index: int, record: bytes, id_type: type) -> Document:
    """The inverse of `to_bytes`."""
    count, chunks, at = int.from_bytes(record[:4], "little"), [], 0
    ids = np.frombuffer(record, id_type, offset=4 + count * PIECE.itemsize).tolist()
    for role, length, weight in np.frombuffer(record, PIECE, count, offset=4).tolist():
        piece, at = ids[at:at + length], at + length
        if role in (SUFFIX, GIVEN_SUFFIX):
            chunks.append(Chunk(piece, given=role == GIVEN_SUFFIX))
        elif role == LATENT:
            chunks[-1] = replace(chunks[-1], latent=piece)
        else:
            chunks[-1].draws.append(piece)
            chunks[-1].weights.append(weight)
    return Document(index, chunks, {})


# ---- the tokenised corpus --------------------------------------------------------------------------------------

def tokenize_part(part: Part, path: str, tokenizer: Tokenizer, id_type: type) -> list[bytes]:
    return [to_bytes(read_document(path, number, line, tokenizer), id_type) for number, line in lines_of(path, part)]


class TokenizedCorpus:
    """Documents by number, read from the disk when they are asked for; made where it is not there yet."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self.id_type = np.uint16 if tokenizer.vocab_size <= 2 ** 16 else np.uint32
        name = hashlib.sha256(repr(tokenizer).encode()).hexdigest()[:16]
        documents, starts = source.file(f"{name}.documents"), source.file(f"{name}.starts.npy")
        if not starts.exists():
            self.make(source, tokenizer, documents, starts)
        self.file, self.starts = open(documents, "rb"), np.load(starts, mmap_mode="r")

    def make(self, source: Source, tokenizer: Tokenizer, documents: Path, starts: Path) -> None:
        job = partial(tokenize_part, path=source.path, tokenizer=tokenizer, id_type=self.id_type)
        documents.parent.mkdir(exist_ok=True)
        sizes = [np.zeros(1, np.int64)]
        with whole_file(documents) as file:
            for records in on_all_cores(job, source.parts, "tokens"):
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
        return from_bytes(index, self.file.read(end - start), self.id_type)
