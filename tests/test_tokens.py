"""Laws of tokens.py: lossless, markers cannot be forged, the vocabulary is what occurs."""
import os

import pytest

from data.tokens import MARKERS, SOL, Tokenizer, split
from tests.conftest import tokenizer_for


@pytest.mark.parametrize("text", ["Mix fire, salt and moss; get gold.", "", " \n\t two  spaces", "émoji 🜁 ok\r\n",
                                  "a_b <|x|>"])
def test_words_are_lossless(text):
    assert b"".join(split(text, "words")).decode() == text


def test_words_take_their_space_along():
    assert split("Mix fire, salt", "words") == [b"Mix", b" fire", b",", b" salt"]


def test_encode_and_decode_are_inverse():
    text = "Mix fire, salt and moss; get gold."
    tokenizer = tokenizer_for([text, " fire salt = lead"], "words")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(tokenizer.tokens) + len(MARKERS)


def test_text_cannot_forge_a_marker():
    """A marker spelled out in a text becomes ordinary tokens; no id of a marker comes from text."""
    text = f"hello {SOL} world"
    tokenizer = tokenizer_for([text], "words")
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.marker.values())
    assert tokenizer.decode(ids) == text
    assert len(set(tokenizer.marker.values())) == len(MARKERS)


def test_unknown_text_is_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match="' zebra'"):
        tokenizer.encode("a zebra")


def test_unknown_encoding_is_refused_by_name():
    with pytest.raises(ValueError, match="--encoding gtp2"):
        tokenizer_for(["a"], "gtp2")


def test_a_tokenizer_is_plain_data(tokenizer):
    assert Tokenizer(**tokenizer.state()) == tokenizer


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="gpt2's files need a download or TIKTOKEN_CACHE_DIR")
def test_gpt2_reduced_to_what_occurs_is_lossless_and_unforgeable():
    text = f"Natalia sold 48/2 = 24 clips in May. {SOL} naïve"
    tokenizer = tokenizer_for([text], "gpt2")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.marker.values())
    assert tokenizer.vocab_size <= len(ids) + len(MARKERS)
