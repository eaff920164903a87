"""Documents, chunks and the one joint sequence: every token that is trained on, sampled from or scored is laid out here.

    document   BOS chunk chunk ... EOS                  a chunk is one of
    prior      SOL PRIOR z EOL x                        trains p(z | C) and p(x | z, C)
    posterior  SOL EOL x SOL POST z EOL                 trains p(x | C) without a thought, and q(z | x, C)
    plain      x                                        a chunk without a latent
    no-thought SOL EOL x                                a plain chunk, told that there is no thought

    sampling   BOS C SOL EOL x SOL POST  ->  z EOL      log_proposal counts z and EOL
    scoring    BOS C SOL PRIOR  z EOL x                 log_joint counts z, EOL and x

x is a chunk's observed text (its suffix), z its thought (its latent), C the observed text of up to three chunks before.
Pieces are encoded apart and their ids concatenated, so training, sampling, scoring and evaluation see the same ids.
"""
import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from typing import Callable, Iterator

import numpy as np

from data.tokens import BOS, EOL, EOS, POST, PRIOR, SOL, Tokenizer, split

GIVEN, MARKER, LATENT, TEXT = range(4)      # the kind of a token; a GIVEN one is seen, but neither trained on nor scored
CONTEXT_CHUNKS = 3                          # C is the text of at most so many chunks, the paper's rule
CHUNK_TOKENS = 256                          # cap of a chunk where text is split


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


def encode_corpus(records: list[dict], tokenizer: Tokenizer) -> list[Document]:
    return [encode_document(i, record, tokenizer) for i, record in enumerate(records)]


def encode_document(index: int, record: dict, tokenizer: Tokenizer) -> Document:
    """Encode one line of a corpus. Sampled latents come with their ids, which are used as they are, never re-encoded.

    Raises ValueError where those ids are of another vocabulary.
    """
    record, chunks = with_chunks(record, tokenizer.encoding), []
    for piece in record["chunks"]:
        latent, ids = piece.get("latent"), None
        if latent is not None:
            ids = checked_ids(piece, tokenizer) if piece.get("latent_ids") is not None else tokenizer.encode(latent)
        draws = piece.get("draws", []) if latent is not None else []
        chunks.append(Chunk(tokenizer.encode(piece["suffix"]), ids, piece.get("given", False),
                            [checked_ids(draw, tokenizer) for draw in draws], [draw["weight"] for draw in draws]))
    return Document(index, chunks, record)


def checked_ids(drawn: dict, tokenizer: Tokenizer) -> list[int]:
    """The ids of a thought that was drawn. Raises ValueError where in this vocabulary they are not those of its text."""
    ids, latent = drawn["latent_ids"], drawn["latent"]
    if max(ids, default=0) >= tokenizer.vocab_size or tokenizer.decode(ids) != latent:
        raise ValueError(f"the latent_ids of {latent[:40]!r} are of another vocabulary; use the checkpoint that drew them "
                         "(train.py --init_from CKPT), or draw anew (sample_latents.py --redraw true)")
    return ids


@contextlib.contextmanager
def naming_the_line(path: str, number: int):
    """A ValueError in here gets the file and the line, which counts from 0, in front."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}:{number + 1}: {error}") from None


def read_document(path: str, number: int, line: bytes, tokenizer: Tokenizer, without_latents: bool = False) -> Document:
    """A line of a corpus, encoded. Raises ValueError with file:line."""
    with naming_the_line(path, number):
        record = check_record(json.loads(line))
        if without_latents and record.get("chunks"):
            dropped = ("latent", "latent_ids", "draws")
            record["chunks"] = [{key: chunk[key] for key in chunk if key not in dropped} for chunk in record["chunks"]]
        return encode_document(number, record, tokenizer)


def with_chunks(record: dict, encoding: str) -> dict:
    """A document that has only `text`, with the chunks it splits into; others as they are."""
    if record.get("chunks") is not None:
        return record
    parts = split_into_chunks(record["text"], lambda text: len(split(text, encoding)), CHUNK_TOKENS)
    return record | {"chunks": [{"suffix": part} for part in parts]}


def observed_places(documents: list[Document]) -> list[tuple[Document, int]]:
    """Every chunk that is evaluated, as (document, its number there): all but the given ones."""
    return [(document, c) for document in documents for c, chunk in enumerate(document.chunks) if not chunk.given]


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(number from 0, line) of a corpus, one at a time. Raises FileNotFoundError, ValueError where it is empty."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no corpus at {path}; python data/alchemy/prepare.py makes the embedded one")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty; a corpus has one JSON document a line")
    with open(path, "rb") as file:
        yield from enumerate(file)


def stream_corpus(path: str) -> Iterator[dict]:
    """The documents of a corpus, one at a time. Raises FileNotFoundError, ValueError with file:line."""
    for number, line in numbered_lines(path):
        with naming_the_line(path, number):
            record = check_record(json.loads(line))
        yield record


def read_corpus(path: str) -> list[dict]:
    """All documents of a corpus. Raises what `stream_corpus` does."""
    return list(stream_corpus(path))


def texts_of(records, encoding: str) -> Iterator[str]:
    """Every text of a corpus, piece by piece as it is encoded: for making a tokenizer."""
    for record in records:
        for piece in with_chunks(record, encoding)["chunks"]:
            yield piece["suffix"]
            if piece.get("latent") is not None:
                yield piece["latent"]
                yield from (drawn["latent"] for drawn in piece.get("draws", []))


def check_record(record: dict) -> dict:
    """A document of the data contract, or a ValueError that says what is wrong with it."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('a document needs a "text"')
    chunks = record.get("chunks")
    if chunks is None:
        return record
    if not isinstance(chunks, list) or not all(isinstance(c, dict) and isinstance(c.get("suffix"), str)
               and isinstance(c.get("latent"), str | None) for c in chunks):
        raise ValueError('each chunk needs a "suffix", and its "latent" is a text or null')
    if "".join(chunk["suffix"] for chunk in chunks) != record["text"]:
        raise ValueError('the suffixes of the chunks do not add up to "text"')
    return record


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


# ---- the joint sequence ----------------------------------------------------------------------------------------

@dataclass
class Sequence:
    """Ids with the kind of each."""
    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def add(self, kind: int, ids: list[int]) -> "Sequence":
        self.ids += ids
        self.kinds += [kind] * len(ids)
        return self

    def after(self, given: list[int]) -> "Sequence":
        """The sequence with ids before it that are seen, but neither trained on nor scored."""
        return Sequence([*given, *self.ids], [GIVEN] * len(given) + self.kinds)


class Layout:
    """Builds every sequence of the project for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.bos, self.eos, self.sol, self.eol, self.prior, self.post = (
            tokenizer.marker[name] for name in (BOS, EOS, SOL, EOL, PRIOR, POST))

    def context(self, document: Document, chunk: int) -> list[int]:
        """BOS C: the observed text of up to CONTEXT_CHUNKS chunks before, without latents."""
        before = document.chunks[max(0, chunk - CONTEXT_CHUNKS):chunk]
        return [self.bos] + [i for other in before for i in other.suffix]

    # training

    def document(self, document: Document, coins, plain_as: str = "plain") -> Sequence:
        """The training sequence of a document; coins[c] True lays chunk c out as prior, False as posterior."""
        sequence = Sequence().add(GIVEN, [self.bos])
        for chunk, coin in zip(document.chunks, coins, strict=True):
            if chunk.given:
                sequence.add(GIVEN, chunk.suffix)
            elif chunk.latent is None:
                self.add_plain(sequence, chunk, plain_as)
            elif coin:
                sequence.add(MARKER, [self.sol, self.prior])
                sequence.add(LATENT, chunk.latent).add(MARKER, [self.eol]).add(TEXT, chunk.suffix)
            else:
                sequence.add(MARKER, [self.sol, self.eol]).add(TEXT, chunk.suffix)
                sequence.add(MARKER, [self.sol, self.post]).add(LATENT, chunk.latent).add(MARKER, [self.eol])
        return sequence.add(MARKER, [self.eos])

    def add_plain(self, sequence: Sequence, chunk: Chunk, plain_as: str) -> None:
        if plain_as == "no_thought":
            sequence.add(MARKER, [self.sol, self.eol])
        sequence.add(TEXT, chunk.suffix)

    # E-step

    def posterior_prompt(self, document: Document, chunk: int) -> list[int]:
        """BOS C SOL EOL x SOL POST: what q(z | x, C) is sampled from."""
        return [*self.context(document, chunk), self.sol, self.eol, *document.chunks[chunk].suffix, self.sol, self.post]

    def joint(self, document: Document, chunk: int, latent: list[int]) -> Sequence:
        """BOS C SOL PRIOR z EOL x: the sum over all but the given ids is log p(z, x | C)."""
        return self.thought_and_text(document, chunk, latent).after(self.prior_prompt(document, chunk))

    def thought_and_text(self, document: Document, chunk: int, latent: list[int]) -> Sequence:
        """z EOL x: what follows the prior prompt, all of it scored."""
        return Sequence().add(LATENT, latent).add(MARKER, [self.eol]).add(TEXT, document.chunks[chunk].suffix)

    # evaluation

    def prior_prompt(self, document: Document, chunk: int) -> list[int]:
        """BOS C SOL PRIOR: what p(z | C) is sampled from."""
        return [*self.context(document, chunk), self.sol, self.prior]

    def direct_prompt(self, document: Document, chunk: int, no_thought: bool) -> list[int]:
        """BOS C [SOL EOL]: what x is written after where there is no thought."""
        return self.context(document, chunk) + [self.sol, self.eol] * no_thought

    def direct(self, document: Document, chunk: int, no_thought: bool) -> Sequence:
        """BOS C [SOL EOL] x: the sum over x is log p(x | C) without a thought."""
        sequence = Sequence().add(GIVEN, self.direct_prompt(document, chunk, no_thought))
        return sequence.add(TEXT, document.chunks[chunk].suffix)
