"""Text <-> token ids, through tiktoken.

A vocabulary is an encoding of tiktoken's ("gpt2", "cl100k_base", ...) or one token per word ("words"), reduced to the
tokens that a corpus uses, so that a small model is not all vocabulary; then the markers, as ids that text cannot spell.
The vocabulary of an open base is its own, see `BaseTokenizer` in data/bases.py, with the same methods.
"""
import re
from dataclasses import dataclass
from functools import cached_property

import tiktoken

BOS, EOS = "<|BEGIN_OF_TEXT|>", "<|END_OF_TEXT|>"
SOL, EOL = "<|START_OF_LATENT|>", "<|END_OF_LATENT|>"
PRIOR, POST = "<|PRIOR_PREFIX|>", "<|POSTERIOR_PREFIX|>"
MARKERS = (BOS, EOS, SOL, EOL, PRIOR, POST)

WORD = re.compile(r" ?\w+| ?[^\w\s]|\s")     # " moss", ",", "\n": a word takes the space before it along


def load_encoding(encoding: str) -> tiktoken.Encoding:
    """One of tiktoken's encodings, which it downloads once. Raises ValueError where it is unknown or out of reach."""
    if encoding not in tiktoken.list_encoding_names():
        raise ValueError(f"--encoding {encoding} is unknown; use words, {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(encoding)
    except OSError as error:
        raise ValueError(f"tiktoken could not download --encoding {encoding} ({type(error).__name__}); set "
                         "TIKTOKEN_CACHE_DIR to a folder that has its files, or use --encoding words") from None


def split(text: str, encoding: str) -> list[bytes]:
    """The tokens of a text, as bytes; joined they give the text back. A marker spelled out is text like any other."""
    if encoding == "words":
        return [word.encode() for word in WORD.findall(text)]
    base = load_encoding(encoding)
    return base.decode_tokens_bytes(base.encode_ordinary(text))


def count_tokens(text: str, encoding: str) -> int:
    return len(split(text, encoding))


class Marked:
    """What all vocabularies have: after the ids of text, `text_ids` of them, come those of the markers."""
    text_ids: int
    special: list[int] = []     # ids before the markers that are no text either, and never drawn

    @cached_property
    def marker(self) -> dict[str, int]:
        return {name: self.text_ids + i for i, name in enumerate(MARKERS)}

    @property
    def vocab_size(self) -> int:
        return self.text_ids + len(MARKERS)


@dataclass(frozen=True)
class Tokenizer(Marked):
    """`tokens` are the bytes of ids 0, 1, 2, ...; the markers follow. It is plain data: a checkpoint carries it."""
    encoding: str
    tokens: tuple[bytes, ...]

    @cached_property
    def id_of(self) -> dict[bytes, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @property
    def text_ids(self) -> int:
        return len(self.tokens)

    @property
    def sizes(self) -> list[int]:
        """Bytes of every text id."""
        return [len(token) for token in self.tokens]

    def count(self, text: str) -> int:
        """Tokens of any text, also of one with tokens that the vocabulary lacks."""
        return count_tokens(text, self.encoding)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, never a marker's. Raises ValueError where the vocabulary lacks a token."""
        try:
            return [self.id_of[token] for token in split(text, self.encoding)]
        except KeyError as error:
            raise ValueError(f"{error.args[0].decode(errors='replace')!r} in {text[:60]!r} is not among the "
                             f"{len(self.tokens)} tokens of this vocabulary; keep to its corpus") from None

    def decode(self, ids) -> str:
        """Text of ids; markers are spelled out."""
        return b"".join(self.tokens[i] if i < len(self.tokens) else MARKERS[i - len(self.tokens)].encode()
                        for i in ids).decode(errors="replace")

    def state(self) -> dict:
        """What a checkpoint keeps; `tokenizer_from` has it back."""
        return {"encoding": self.encoding, "tokens": self.tokens}


def is_of_base(state: dict) -> bool:
    """Whether the tokenizer of a checkpoint, as `state` has it, came with an open base."""
    return "spec" in state


def tokenizer_from(state: dict) -> Tokenizer:
    """The tokenizer of a checkpoint: a corpus's, or an open base's."""
    if is_of_base(state):
        from data.bases import BaseTokenizer
        return BaseTokenizer(**state)
    return Tokenizer(**state)
