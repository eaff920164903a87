"""Laws of cache.py: a tokenised corpus holds the documents of its file, is made once, and is never taken for
another."""
import json
import os
from pathlib import Path

import pytest

from data import cache
from data.cache import TokenizedCorpus, from_bytes, open_source, to_bytes, vocabulary
from data.corpus import read_corpus, texts_of
from tests.conftest import RECORDS, encode_corpus, tokenizer_for

DRAWN = {"text": "a c", "chunks": [{"suffix": "a"}, {"suffix": " c", "latent": " d", "draws": [
    {"latent": " d", "latent_ids": None, "weight": 0.75}, {"latent": "", "latent_ids": [], "weight": 0.25}]}]}


@pytest.fixture
def corpus(tmp_path, tokenizer):
    drawn = json.loads(json.dumps(DRAWN))
    drawn["chunks"][1]["draws"][0]["latent_ids"] = tokenizer.encode(" d")
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*RECORDS, drawn, {"text": "b c. d e."}] * 3))
    return str(path)


@pytest.fixture
def records(corpus):
    return read_corpus(corpus)


def test_a_document_comes_back_from_its_bytes(records, tokenizer):
    """Given chunks, empty latents, no latents, and all draws with their weights."""
    for document in encode_corpus(records[:6], wide(records)):
        assert from_bytes(document.index, to_bytes(document)) == document


def wide(records):
    return tokenizer_for([*texts_of(records, "words"), "a b c d e", " d"], "words")


@pytest.mark.parametrize("part_bytes", [2 ** 23, 300])
def test_a_tokenised_corpus_has_the_documents_of_its_file(corpus, records, monkeypatch, part_bytes):
    """In one part, and in several that are shared among processes."""
    monkeypatch.setattr(cache, "PART_BYTES", part_bytes)
    source = open_source(corpus)
    assert (len(list(cache.parts_of(corpus))) > 1) == (part_bytes == 300)
    assert vocabulary(source, "words") == set(tokenizer_for(texts_of(records, "words"), "words").tokens)
    tokenized, expected = TokenizedCorpus(source, wide(records)), encode_corpus(records, wide(records))
    assert len(tokenized) == len(expected) and list(tokenized) == expected
    assert tokenized[7] == expected[7]


def test_it_is_made_once_and_anew_where_anything_changes(corpus, records, monkeypatch):
    """The corpus, the vocabulary, or the code that splits and encodes."""
    tokenizer = wide(records)
    TokenizedCorpus(open_source(corpus), tokenizer)
    monkeypatch.setattr(cache, "tokenize_part", None)           # nobody may tokenise
    assert len(TokenizedCorpus(open_source(corpus), tokenizer)) == len(records)
    with pytest.raises(TypeError):
        TokenizedCorpus(open_source(corpus), tokenizer_for(["z"], "words"))
    monkeypatch.setattr(cache, "CODE", "other")
    with pytest.raises(TypeError):
        TokenizedCorpus(open_source(corpus), tokenizer)
    monkeypatch.undo()
    with open(corpus, "a") as file:
        file.write(json.dumps(RECORDS[2]) + "\n")
    assert len(TokenizedCorpus(open_source(corpus), tokenizer)) == len(records) + 1


def spoil(folder, how):
    """The files of a cache as a user, a disk or another user leaves them."""
    for file in list(folder.iterdir()):
        content = file.read_bytes()
        if how == "forbidden":
            file.unlink()
            file.mkdir()
        elif how == "partly deleted":
            file.unlink(missing_ok=file.suffix != ".vocabulary")
        else:
            file.write_bytes({"cut": content[:len(content) // 2], "empty": b"", "garbage": b"x" * len(content),
                              "longer": content + b"\0" * 8}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "garbage", "longer", "partly deleted", "forbidden"])
def test_what_is_not_whole_is_made_anew_in_the_next_place_that_can_be_written(corpus, records, monkeypatch, tmp_path,
                                                                              how):
    """Quietly: the same vocabulary and documents, whatever became of the files."""
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(cache.tempfile, "mkdtemp", lambda: str(tmp_path / "last"))
    for name in ("temporary", "last"):
        (tmp_path / name).mkdir()
    source, tokenizer = open_source(corpus), wide(records)
    for place in (tmp_path / "corpus.jsonl.tokens", tmp_path / "temporary" / "corpus.jsonl.tokens", None):
        tokens, documents = vocabulary(source, "words"), list(TokenizedCorpus(source, tokenizer))
        assert tokens == set(tokenizer_for(texts_of(records, "words"), "words").tokens)
        assert documents == encode_corpus(records, tokenizer)
        if place and place.exists():
            spoil(place, how)
    assert any((tmp_path / "last").iterdir()) == (how == "forbidden")


def test_a_flipped_byte_is_noticed_and_named(corpus, records):
    """In any place of any document."""
    tokenized = TokenizedCorpus(open_source(corpus), wide(records))
    path, end = Path(tokenized.file.name), int(tokenized.starts[-1])
    content = path.read_bytes()
    for place in range(0, end, 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        with pytest.raises(ValueError, match=f"{path} is damaged; delete it"):
            list(TokenizedCorpus(open_source(corpus), wide(records)))


def test_a_vocabulary_with_a_flipped_byte_is_made_anew(corpus):
    source = open_source(corpus)
    tokens, (path,) = vocabulary(source, "words"), Path(f"{corpus}.tokens").glob("*.vocabulary")
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        assert vocabulary(source, "words") == tokens and path.read_bytes() == content


def test_what_a_killed_or_a_second_process_left_does_not_count(corpus, records, monkeypatch):
    source = open_source(corpus)
    monkeypatch.setattr(os, "replace", lambda *paths: None)       # killed before the first rename
    with pytest.raises(FileNotFoundError):
        TokenizedCorpus(source, wide(records))
    monkeypatch.undo()
    monkeypatch.setattr(os, "getpid", lambda: 1)                    # another process
    assert list(TokenizedCorpus(source, wide(records))) == encode_corpus(records, wide(records))


@pytest.mark.parametrize("part_bytes", [2 ** 23, 300])
def test_a_bad_line_is_named(corpus, records, monkeypatch, part_bytes):
    """With its number in the file, also where another process reads it."""
    monkeypatch.setattr(cache, "PART_BYTES", part_bytes)
    with open(corpus, "a") as file:
        file.write('{"txt": 3}\n')
    for job in (lambda source: vocabulary(source, "words"), lambda source: TokenizedCorpus(source, wide(records))):
        with pytest.raises(ValueError, match=f"corpus.jsonl:{len(records) + 1}: a document needs"):
            job(open_source(corpus))
