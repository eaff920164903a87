"""The data contract: a corpus is JSONL, one document a line; a document is chunks; a chunk has text, perhaps a thought.

    {"text": ..., "chunks": [{"suffix": ..., "latent": ... or null, "given": true or absent}, ...]}

The suffixes of a document add up to its text; a document that has only text is split into chunks; one with {"text",
"latent"}, a rewriting of the whole, is one chunk. What an E-step wrote has more keys: the ids of the thought, the
evidence, and where it kept them the draws. A null is as good as no key. Files are UTF-8; a line ends at "\n" alone, and
blank lines, CRLF and a byte order mark do no harm.
"""
import codecs
import contextlib
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Iterator

import numpy as np

from data.tokens import Tokenizer, count_tokens

CHUNK_TOKENS = 256      # cap of a chunk where text is split, see `chunk_cap`
LONGEST_PIECE = 2 ** 14     # characters that are tokenised at once to see whether they fit; some encodings take squares


# ---- chunking: raw text -> suffixes ----------------------------------------------------------------------------

# A sentence ends after . ! ? (and closing quotes) before white space and no lower-case letter, or after line breaks;
# the white space stays with the sentence before it.
SENTENCE_END = re.compile(r"""(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)(?<!\bProf)(?<!\bvs)(?<!\be\.g)(?<!\bi\.e)
                              [.!?]["')\]”’]*\s+(?![a-z\s])  |  \n\s*(?!\s)""", re.VERBOSE)


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
        fits = half == 0 or len(part) <= LONGEST_PIECE and count_tokens(part) <= chunk_tokens
        return [part] if fits else fit(part[:half]) + fit(part[half:])

    random = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
    sentences = [part for sentence in split_into_sentences(text) for part in fit(sentence)]
    tokens, chunks, start = list(map(count_tokens, sentences)), [], 0
    while start < len(sentences):
        size = min(1 + int(random.poisson(7)), 20, len(sentences) - start)
        while size > 1 and sum(tokens[start:start + size]) > chunk_tokens:
            size -= 1
        chunks.append("".join(sentences[start:start + size]))
        start += size
    return chunks


def chunk_cap(chunk_tokens: int, context: int) -> int:
    """Tokens of a chunk for a setting of --chunk_tokens: 0 leaves room for C and a thought in a model's context."""
    return chunk_tokens or min(CHUNK_TOKENS, max(1, context // 4))


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


def with_chunks(record: dict, count_tokens: Callable[[str], int], chunk_tokens: int) -> dict:
    """A document that has only `text`, with the chunks it splits into, or as one chunk where it has a `latent` of its
    own (a rewriting of the whole); others as they are."""
    if record.get("chunks") is not None:
        return record
    if record.get("latent") is not None:
        return record | {"chunks": [{"suffix": record["text"], "latent": record["latent"]}]}
    parts = split_into_chunks(record["text"], count_tokens, chunk_tokens)
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


def encode_document(index: int, record: dict, tokenizer: Tokenizer, chunk_tokens: int = CHUNK_TOKENS) -> Document:
    """Encode one line of a corpus. Sampled latents come with their ids, which are used as they are, never re-encoded.

    Raises ValueError where those ids are of another vocabulary.
    """
    record, chunks = with_chunks(record, tokenizer.count, chunk_tokens), []
    for piece in record["chunks"]:
        has_thought = piece.get("latent") is not None
        draws = piece.get("draws", []) if has_thought else []
        chunks.append(Chunk(tokenizer.encode(piece["suffix"]), ids_of(piece, tokenizer) if has_thought else None,
                            piece.get("given", False), [ids_of(draw, tokenizer) for draw in draws],
                            [draw["weight"] for draw in draws]))
    return Document(index, chunks, record)


@contextlib.contextmanager
def naming_the_line(path: str, number: int):
    """A ValueError in here gets the file and the line, which counts from 0, in front."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}:{number + 1}: {error}") from None


KEYS = {        # that are read of a document, a chunk and a draw, and what each holds; those with ! must be there
    "document": {"text": "! a text", "latent": "a text", "answer": "a text", "chunks": "a list of objects"},
    "chunk": {"suffix": "! a text", "latent": "a text", "latent_ids": "a list of ids", "given": "true or false",
              "draws": "a list of objects"},
    "draw": {"latent": "! a text", "latent_ids": "a list of ids", "weight": "! a weight of at least 0"}}
HOLDS = {
    "a text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a weight of at least 0": lambda value: type(value) in (int, float) and 0 <= value < 1e30,
    "a list of ids": lambda value: isinstance(value, list) and all(type(i) is int and i >= 0 for i in value),
    "a list of objects": lambda value: isinstance(value, list) and all(isinstance(part, dict) for part in value)}


def without_nulls(value):
    """JSON with the keys left out that hold null: what other tools write where a key is absent."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def check_keys(part: dict, kind: str) -> None:
    for key, what in KEYS[kind].items():
        needed, what = what.startswith("!"), what.removeprefix("! ")
        if needed and key not in part:
            raise ValueError(f'a {kind} needs a "{key}", {what}')
        if key in part and not HOLDS[what](part[key]):
            raise ValueError(f'the "{key}" of a {kind} is {what}, not {json.dumps(part[key], default=str)[:40]}')


def check_record(record: dict) -> dict:
    """A document of the data contract, less what is null, or a ValueError that says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError('a document is an object with a "text"')
    record = without_nulls(record)
    check_keys(record, "document")
    for chunk in record.get("chunks", []):
        check_keys(chunk, "chunk")
        draws = chunk.get("draws", []) if "latent" in chunk else []
        for draw in draws:
            check_keys(draw, "draw")
        if draws and not any(draw["weight"] for draw in draws):
            raise ValueError('the "weight" of one of the draws must be above 0')
    if "chunks" in record and "".join(chunk["suffix"] for chunk in record["chunks"]) != record["text"]:
        raise ValueError('the suffixes of the chunks do not add up to "text"')
    return record


def text_of(line: bytes) -> str:
    """Raises ValueError."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8 ({error.reason}); convert it") from None


def read_line(line: bytes, check: Callable[[dict], dict]) -> dict:
    """The JSON of a line, which `check` may change or refuse. Raises ValueError."""
    text = text_of(line)
    try:
        record = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(record, ensure_ascii=False).encode()
        return check(record)
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"half a character ({half}), which cannot be written; remove it") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def read_record(path: str, number: int, line: bytes) -> dict:
    """A line of a corpus as a document of the data contract. Raises ValueError with file:line."""
    with naming_the_line(path, number):
        return read_line(line, check_record)


def read_document(path: str, number: int, line: bytes, tokenizer: Tokenizer, chunk_tokens: int = CHUNK_TOKENS,
                  without_latents: bool = False) -> Document:
    """A line of a corpus, encoded. Raises ValueError with file:line."""
    record = with_chunks(read_record(path, number, line), tokenizer.count, chunk_tokens)
    if without_latents:
        dropped = ("latent", "latent_ids", "draws")
        record["chunks"] = [{key: chunk[key] for key in chunk if key not in dropped} for chunk in record["chunks"]]
        record.pop("latent", None)      # of a whole document
    with naming_the_line(path, number):
        return encode_document(number, record, tokenizer)


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(number from 0, line) of a corpus, one at a time, but for blank ones.

    Raises FileNotFoundError, ValueError where there is nothing.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no corpus at {path}; prepare.py of data/alchemy or another folder writes one")
    is_empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                is_empty = False
                yield number, line
    if is_empty:
        raise ValueError(f"{path} is empty; a corpus has one JSON document a line")


def read_corpus(path: str) -> list[dict]:
    """All documents of a corpus. Raises FileNotFoundError, ValueError with file:line."""
    return [read_record(path, number, line) for number, line in numbered_lines(path)]


def read_documents(path: str, tokenizer: Tokenizer, chunk_tokens: int = CHUNK_TOKENS) -> list[Document]:
    """All documents of a corpus, encoded. Raises FileNotFoundError, ValueError with file:line."""
    return [read_document(path, *numbered, tokenizer, chunk_tokens) for numbered in numbered_lines(path)]


def split_corpus(path: str, seed: int, held_out: float) -> dict[str, list[bytes]]:
    """The lines of one file as the parts of a corpus: documents with thoughts are gold, those without are raw, and a
    share of each is held out, by the seed. Raises ValueError where a part would be empty."""
    parts: dict[str, list[bytes]] = {"gold": [], "raw": [], "held_out": []}
    for number, line in numbered_lines(path):
        record = read_record(path, number, line)
        pieces = record.get("chunks", [record])
        has_thought = any("latent" in piece and not piece.get("given") for piece in pieces)
        parts["gold" if has_thought else "raw"].append(line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n") + b"\n")
    for kind, what in (("gold", "with a thought, which the warm start needs"), ("raw", "without a thought")):
        lines = parts[kind]
        order = np.random.default_rng([seed, len(kind)]).permutation(len(lines))
        first = math.ceil(held_out * len(lines))
        parts["held_out"] += [lines[i] for i in sorted(order[:first])]
        parts[kind] = [lines[i] for i in sorted(order[first:])]
        if not parts[kind]:
            raise ValueError(f"{path} has no document {what}, beside those held out; add some, or lower --held_out")
    return parts


def texts_of(records, encoding: str, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[str]:
    """Every text of a corpus, piece by piece as it is encoded: for making a tokenizer."""
    for record in records:
        for piece in with_chunks(record, partial(count_tokens, encoding=encoding), chunk_tokens)["chunks"]:
            yield piece["suffix"]
            if piece.get("latent") is not None:
                yield piece["latent"]
                yield from (drawn["latent"] for drawn in piece.get("draws", []))
