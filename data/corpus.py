"""The data contract: a corpus is JSONL, one document a line; a document is chunks; a chunk has text, perhaps a thought.

    {"text": ..., "chunks": [{"suffix": ..., "latent": ... or null, "given": true or absent}, ...]}

The suffixes of a document add up to its text; a document that has only text is split into chunks; one with {"text",
"latent"}, a rewriting of the whole, is one chunk. What an E-step wrote has more keys: the ids of the thought, the
evidence, and where it kept them the draws.
"""
import contextlib
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Callable, Iterator

import numpy as np

from data.tokens import Tokenizer, split

CHUNK_TOKENS = 256      # cap of a chunk where text is split


# ---- chunking: raw text -> suffixes ----------------------------------------------------------------------------

# A sentence ends after . ! ? (and closing quotes) before white space and no lower-case letter, or after line breaks;
# the white space stays with the sentence before it.
SENTENCE_END = re.compile(r"""(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)(?<!\bProf)(?<!\bvs)(?<!\be\.g)(?<!\bi\.e)
                              [.!?]["')\]”’]*\s+(?![a-z\s])  |  \s*\n\s*(?!\s)""", re.VERBOSE)


def split_into_sentences(text: str) -> list[str]:
    """Sentences with their white space; joined they give any text back."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)]) if a < b]


def split_into_chunks(text: str, count_tokens: Callable[[str], int], chunk_tokens: int) -> list[str]:
    """Chunks of Poisson(7) + 1 sentences, at most 20 and at most `chunk_tokens` tokens; joined they give the text back.

    Seeded by the text itself: a text always splits in the same way. A sentence over the cap is halved until it fits.
    """
    def fit(part: str) -> list[str]:
        half = len(part) // 2
        return [part] if half == 0 or count_tokens(part) <= chunk_tokens else fit(part[:half]) + fit(part[half:])

    random = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
    sentences = [part for sentence in split_into_sentences(text) for part in fit(sentence)]
    chunks = []
    while sentences:
        size = min(1 + int(random.poisson(7)), 20, len(sentences))
        while size > 1 and sum(count_tokens(sentence) for sentence in sentences[:size]) > chunk_tokens:
            size -= 1
        chunks.append("".join(sentences[:size]))
        sentences = sentences[size:]
    return chunks


# ---- documents -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Chunk:
    """Ids of the observed text, ids of the thought (None: it has none), and whether the text is only context.

    `draws` and `weights`: where an E-step kept them, all thoughts drawn and the normalised weight of each; else empty.
    """
    suffix: list[int]
    latent: list[int] | None = None
    given: bool = False
    draws: list[list[int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """An encoded document. `index` is its line in the corpus, `record` that line as it was read."""
    index: int
    chunks: list[Chunk]
    record: dict = field(repr=False, compare=False)


def with_chunks(record: dict, count_tokens: Callable[[str], int]) -> dict:
    """A document that has only `text`, with the chunks it splits into, or as one chunk where it has a `latent` of its
    own (a rewriting of the whole); others as they are."""
    if record.get("chunks") is not None:
        return record
    if record.get("latent") is not None:
        return record | {"chunks": [{"suffix": record["text"], "latent": record["latent"]}]}
    parts = split_into_chunks(record["text"], count_tokens, CHUNK_TOKENS)
    return record | {"chunks": [{"suffix": part} for part in parts]}


def ids_of(thought: dict, tokenizer: Tokenizer) -> list[int]:
    """The ids of a thought: those that were drawn, where it has them, else its text encoded.

    Raises ValueError where in this vocabulary the drawn ids are not those of the text.
    """
    ids, latent = thought.get("latent_ids"), thought["latent"]
    if ids is None:
        return tokenizer.encode(latent)
    if max(ids, default=0) >= tokenizer.vocab_size or tokenizer.decode(ids) != latent:
        raise ValueError(f"the latent_ids of {latent[:40]!r} are of another vocabulary; use the checkpoint that drew "
                         "them (train.py --init_from CKPT), or draw anew (sample_latents.py --redraw true)")
    return ids


def encode_document(index: int, record: dict, tokenizer: Tokenizer) -> Document:
    """Encode one line of a corpus. Sampled latents come with their ids, which are used as they are, never re-encoded.

    Raises ValueError where those ids are of another vocabulary.
    """
    record, chunks = with_chunks(record, tokenizer.count), []
    for piece in record["chunks"]:
        latent, ids = piece.get("latent"), None
        if latent is not None:
            ids = ids_of(piece, tokenizer)
        draws = piece.get("draws", []) if latent is not None else []
        chunks.append(Chunk(tokenizer.encode(piece["suffix"]), ids, piece.get("given", False),
                            [ids_of(draw, tokenizer) for draw in draws], [draw["weight"] for draw in draws]))
    return Document(index, chunks, record)


def encode_corpus(records: list[dict], tokenizer: Tokenizer) -> list[Document]:
    return [encode_document(i, record, tokenizer) for i, record in enumerate(records)]


@contextlib.contextmanager
def naming_the_line(path: str, number: int):
    """A ValueError in here gets the file and the line, which counts from 0, in front."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}:{number + 1}: {error}") from None


def check_record(record: dict) -> dict:
    """A document of the data contract, or a ValueError that says what is wrong with it."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('a document needs a "text"')
    if not isinstance(record.get("latent"), str | None):
        raise ValueError('the "latent" of a document is a text or null')
    chunks = record.get("chunks")
    if chunks is None:
        return record
    if not isinstance(chunks, list) or not all(isinstance(c, dict) and isinstance(c.get("suffix"), str)
               and isinstance(c.get("latent"), str | None) for c in chunks):
        raise ValueError('each chunk needs a "suffix", and its "latent" is a text or null')
    for draws in (chunk["draws"] for chunk in chunks if chunk.get("draws") and chunk.get("latent") is not None):
        if not all(isinstance(d, dict) and isinstance(d.get("latent"), str) and isinstance(d.get("weight"), float | int)
                   and 0 <= d["weight"] < math.inf for d in draws) or not sum(d["weight"] for d in draws):
            raise ValueError('each of the "draws" needs a "latent" and a "weight", at least 0 and not all 0')
    if "".join(chunk["suffix"] for chunk in chunks) != record["text"]:
        raise ValueError('the suffixes of the chunks do not add up to "text"')
    return record


def read_record(path: str, number: int, line: bytes) -> dict:
    """A line of a corpus as a document of the data contract. Raises ValueError with file:line."""
    with naming_the_line(path, number):
        return check_record(json.loads(line))


def read_document(path: str, number: int, line: bytes, tokenizer: Tokenizer, without_latents: bool = False) -> Document:
    """A line of a corpus, encoded. Raises ValueError with file:line."""
    record = read_record(path, number, line)
    if without_latents and record.get("chunks"):
        dropped = ("latent", "latent_ids", "draws")
        record["chunks"] = [{key: chunk[key] for key in chunk if key not in dropped} for chunk in record["chunks"]]
    with naming_the_line(path, number):
        return encode_document(number, record, tokenizer)


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(number from 0, line) of a corpus, one at a time. Raises FileNotFoundError, ValueError where it is empty."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no corpus at {path}; python data/alchemy/prepare.py makes the embedded one")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty; a corpus has one JSON document a line")
    with open(path, "rb") as file:
        yield from enumerate(file)


def read_corpus(path: str) -> list[dict]:
    """All documents of a corpus. Raises FileNotFoundError, ValueError with file:line."""
    return [read_record(path, number, line) for number, line in numbered_lines(path)]


def texts_of(records, encoding: str) -> Iterator[str]:
    """Every text of a corpus, piece by piece as it is encoded: for making a tokenizer."""
    for record in records:
        for piece in with_chunks(record, lambda text: len(split(text, encoding)))["chunks"]:
            yield piece["suffix"]
            if piece.get("latent") is not None:
                yield piece["latent"]
                yield from (drawn["latent"] for drawn in piece.get("draws", []))
