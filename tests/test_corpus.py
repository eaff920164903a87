"""Laws of corpus.py: text as the world has it is read as it is, or refused in one line before work is spent."""
import json

import pytest

from data import cache
from data.cache import TokenizedCorpus, open_source, vocabulary
from data.corpus import (check_record, numbered_lines, read_corpus, read_document, split_into_chunks,
                         split_into_sentences)
from data.layout import Layout
from data.loader import Position, Recipe, training_batches
from sample_latents import places_to_infer
import sample_latents
from model import save_checkpoint
from tests.conftest import encode_corpus, random_model, tokenizer_for

CHUNK = {"suffix": "a b", "latent": " c"}
DRAW = {"latent": " c", "weight": 1.0}


def record(**chunk) -> dict:
    return {"text": "a b", "chunks": [CHUNK | chunk]}


BAD = [     # a line of a corpus, and what the complaint says
    ("{", "Expecting"), ("[]", "is an object"), ('"a b"', "is an object"), ("3", "is an object"),
    ("null", "is an object"), ("[" * 100_000, "nested too deeply"),
    ('{"text": "a b"} x', "Extra data"), ("{'text': 'a'}", "Expecting"),
    ({}, 'needs a "text"'), ({"text": None}, 'needs a "text"'), ({"text": 3}, '"text" of a document is a text, not 3'),
    ({"text": ["a"]}, '"text" of a document'), ({"text": "a b", "latent": 3}, '"latent" of a document'),
    ({"text": "a b", "answer": 3}, '"answer" of a document'), ({"text": "a b", "chunks": {}}, '"chunks" of a document'),
    ({"text": "a b", "chunks": ["a b"]}, '"chunks" of a document'), ({"text": "a b", "chunks": "a b"}, '"chunks"'),
    ({"text": "a b", "chunks": [{}]}, 'a chunk needs a "suffix"'), ({"text": "a b", "chunks": []}, "do not add up"),
    ({"text": "a", "chunks": [CHUNK]}, "do not add up"), (record(suffix=None), 'a chunk needs a "suffix"'),
    (record(suffix=["a b"]), '"suffix" of a chunk'), (record(latent=3), '"latent" of a chunk'),
    (record(latent={"text": " c"}), '"latent" of a chunk'),
    (record(given="false"), '"given" of a chunk is true or false'),
    (record(given=0), '"given" of a chunk'), (record(given=[]), '"given" of a chunk'),
    (record(latent_ids="12"), '"latent_ids" of a chunk'), (record(latent_ids=[1.5]), '"latent_ids" of a chunk'),
    (record(latent_ids=[-1]), '"latent_ids" of a chunk'), (record(latent_ids=[True]), '"latent_ids" of a chunk'),
    (record(latent_ids=["1"]), '"latent_ids" of a chunk'), (record(latent_ids=[10 ** 9]), "another vocabulary"),
    (record(latent_ids=[]), "another vocabulary"), (record(draws=3), '"draws" of a chunk'),
    (record(draws=[3]), '"draws" of a chunk'), (record(draws=[{}]), 'a draw needs a "latent"'),
    (record(draws=[{"latent": " c"}]), 'a draw needs a "weight"'),
    (record(draws=[DRAW | {"weight": None}]), 'a draw needs a "weight"'),
    (record(draws=[DRAW | {"weight": "1"}]), '"weight" of a draw'), (record(draws=[DRAW | {"weight": -1}]), '"weight"'),
    (record(draws=[DRAW | {"weight": True}]), '"weight" of a draw'),
    (record(draws=[DRAW | {"weight": 1e308}] * 2), '"weight" of a draw'),
    (record(draws=[DRAW | {"weight": 10 ** 400}]), '"weight" of a draw'),
    *[('{"text": "a b", "x": ' + "[" * depth + "]" * depth + "}", "nested too deeply") for depth in (2000, 3000)],
    (record(draws=[DRAW | {"latent": 3}]), '"latent" of a draw'), (record(draws=[DRAW | {"weight": 0}]), "above 0"),
    (record(draws=[DRAW | {"latent_ids": 3}]), '"latent_ids" of a draw'),
    ('{"text": "a b", "chunks": [{"suffix": "a b", "latent": " c", "draws": [{"latent": " c", "weight": NaN}]}]}',
     '"weight" of a draw'),
    ('{"text": "a \\ud835 b"}', "half a character"), ('{"text": "a b", "note": "\\uDD1E"}', "half a character"),
    ('{"text": "a b", "chunks": [{"suffix": "a b", "latent": "\\ud835"}]}', "half a character"),
    ('{"\\ud835": 1, "text": "a b"}', "half a character"), ("a é".encode("latin-1"), "not UTF-8"),
    ('{"text": "a é"}'.encode("latin-1"), "not UTF-8"), ('{"text": "a b"}'.encode("utf-16"), "not UTF-8"),
]


@pytest.fixture
def words():
    return tokenizer_for(["a b c d", " a", " c", "b"], "words")


@pytest.mark.parametrize("line,complaint", BAD)
def test_a_line_that_cannot_be_read_is_one_line_with_its_number(line, complaint, words, tmp_path):
    """By every reader, with the number in the file; nothing is written."""
    line = json.dumps(line) if isinstance(line, dict) else line
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "a b"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")

    def whole():
        return encode_corpus(read_corpus(str(path)), words)

    def tokenised():
        return TokenizedCorpus(open_source(str(path)), words)

    def drawn():
        return sample_latents.survey(str(path), Layout(words), sample_latents.SampleConfig(chunk_tokens=9))
    for read in (whole, tokenised, drawn):
        if "another vocabulary" in complaint and read is whole:
            continue        # it has a corpus of its own, without a line
        with pytest.raises(ValueError) as error:
            read()
        assert str(error.value).startswith(f"{path}:3: ") and complaint in str(error.value), error.value
        assert "\n" not in str(error.value)
    assert not [name for name in tmp_path.rglob("*") if name.is_file() and name != path]


def test_null_is_as_good_as_no_key():
    """For every key, however deep: lines that went through pyarrow or datasets have all keys of all lines."""
    bare = {"text": "a b", "chunks": [{"suffix": "a b"}]}
    nulls = {"text": "a b", "latent": None, "answer": None, "url": None,
             "chunks": [{"suffix": "a b"} | dict.fromkeys(("latent", "given", "latent_ids", "draws", "ess"))]}
    assert check_record(nulls) == bare and check_record({"text": "a b", "chunks": None}) == {"text": "a b"}
    drawn = {"suffix": "a b", "latent": " c", "draws": [{"latent": " c", "latent_ids": None, "weight": 1}]}
    assert check_record({"text": "a b", "chunks": [drawn]})["chunks"][0]["draws"] == [{"latent": " c", "weight": 1}]
    in_a_list = check_record(record(log_joint=[None, -1.0]))["chunks"][0]["log_joint"]
    assert in_a_list == [None, -1.0]        # there it keeps a place


LINES = ['{"text": "a b"}', '{"text": "c\\u2028d\\u2029 \\u0085 x"}', '{"text": "a\u2028b"}']


@pytest.mark.parametrize("content", [
    "\n".join(LINES), "\n".join(LINES) + "\n", "\r\n".join(LINES) + "\r\n", "\n\n".join(LINES) + "\n \t\n",
    "\ufeff" + "\n".join(LINES), "\ufeff\n" + "\n".join(LINES), "\n\r\n" + "\n".join(LINES)])
def test_a_line_ends_at_a_newline_and_nothing_else(content, tmp_path, monkeypatch):
    """Byte order mark, CRLF and blank lines do no harm; separators inside a string are text."""
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content.encode())
    texts = [json.loads(line)["text"] for line in LINES]
    assert [record["text"] for record in read_corpus(str(path))] == texts
    monkeypatch.setattr(cache, "PART_BYTES", 1)         # a part a line
    monkeypatch.setattr(cache, "on_all_cores", lambda job, path, title: map(job, cache.parts_of(path)))
    source = open_source(str(path))
    tokenizer = tokenizer_for(texts, "words")
    assert vocabulary(source, "words") == set(tokenizer.tokens)
    assert [tokenizer.decode(document.chunks[0].suffix) for document in TokenizedCorpus(source, tokenizer)][0] == "a b"


@pytest.mark.parametrize("content", ["", "\n", "\ufeff", "\r\n \n"])
def test_a_corpus_without_a_line_is_refused(content, tmp_path):
    (tmp_path / "corpus.jsonl").write_text(content)
    with pytest.raises(ValueError, match="is empty"):
        list(numbered_lines(str(tmp_path / "corpus.jsonl")))
    with pytest.raises(ValueError, match="is empty"):
        open_source(str(tmp_path / "corpus.jsonl"))


@pytest.mark.parametrize("document", [
    {"text": "a b", "latent": " c"}, record(), record(latent_ids=[1], draws=[DRAW]), {"text": "a b"},
    record(latent=None)])
def test_redraw_takes_the_thought_of_every_form_away(document, words):
    """Of a chunk and of a whole document; what was not drawn yet is drawn in any case."""
    document = json.loads(json.dumps(document))
    if "latent_ids" in str(document):
        document["chunks"][0]["latent_ids"] = words.encode(" c")
    line = json.dumps(document).encode()
    again = read_document("corpus", 0, line, words, without_latents=True)
    assert len(places_to_infer(Layout(words), again)) == len(again.chunks) == 1 and not again.chunks[0].draws
    assert "latent" not in again.record and "latent" not in again.record["chunks"][0]
    has_one = " c" in str(document)
    assert len(places_to_infer(Layout(words), read_document("corpus", 0, line, words))) == (not has_one)


def test_a_corpus_with_nothing_to_draw_says_so(words, tmp_path, capsys):
    path, out = tmp_path / "gold.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps(record()) + "\n")
    save_checkpoint(str(tmp_path / "ckpt.pt"), random_model(words.vocab_size), tokenizer=words.state())
    sample_latents.main(["--checkpoint", str(tmp_path), "--data", str(path), "--out", str(out), "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "--redraw true" in shown and json.loads(shown[shown.index("{"):])["ess"] is None
    assert json.loads(out.read_text()) == record()


def test_the_thought_of_a_given_chunk_is_in_no_layout(words, alone):
    """It is context; neither joint sequences nor latents alone train on it."""
    given = {"suffix": "a b", "latent": " d", "given": True}
    documents = encode_corpus([{"text": "a b c", "chunks": [given, {"suffix": " c", "latent": " c"}]},
                               {"text": "a b", "chunks": [given]}], words)
    for layout in ("joint", "latent_only", "prior", "posterior"):
        batches = training_batches(documents, Layout(words), Recipe(32, 16, layout=layout), Position(), alone)
        ids = {i for _ in range(4) for i in next(batches).mine.targets.flatten().tolist()}
        assert words.encode(" c")[0] in ids and words.encode(" d")[0] not in ids, layout


def test_sentences_end_where_they_did():
    """A line break with white space around it ends one; the white space stays before."""
    assert split_into_sentences("a \n b\n\n  c.  \n d. E") == ["a \n ", "b\n\n  ", "c.  \n ", "d. ", "E"]
    text = "One two. Three " * 200
    assert "".join(split_into_chunks(text, len, 40)) == text
    assert max(map(len, split_into_chunks(text, len, 40))) <= 40


KINDS = {"letter": "a", "blank": " ", "newline": "\n", "tab": "\t", "full stop": ".", "digit": "7", "quote": '"',
         "bracket": ")", "accent": "é", "emoji": "🙂", "cjk": "語",
         "sentence": "A b. ", "blank line": "x \n\n ", "dots": ". . "}


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_document_of_one_kind_is_split_in_linear_time(kind):
    """The work is counted, not timed: characters handed to the tokeniser are a small multiple of the text's."""
    text, counted = (KINDS[kind] * 30_000)[:60_000], []
    chunks = split_into_chunks(text, lambda part: counted.append(len(part)) or len(part) // 3 + 1, 256)
    assert "".join(chunks) == text and sum(counted) < 20 * len(text)
