"""Laws of layout.py: the sequences of the docstring id by id, and chunking that loses nothing."""
import random

import pytest

from data.corpus import (check_record, CHUNK_TOKENS, encode_document, read_corpus, split_into_chunks,
                         split_into_sentences, texts_of)
from data.layout import GIVEN, LATENT, MARKER, TEXT, Layout
from data.tokens import Tokenizer
from tests.conftest import tokenizer_for


def spell(layout, ids):
    return layout.tokenizer.decode(ids)


def joint_of(layout, document, chunk):
    """What is scored of a chunk with a latent: BOS C SOL PRIOR z EOL x, of which the prompt is given."""
    scored = layout.thought_and_text(document, chunk, document.chunks[chunk].latent)
    return scored.after(layout.prior_prompt(document, chunk))


BOS, EOS, SOL, EOL = "<|BEGIN_OF_TEXT|>", "<|END_OF_TEXT|>", "<|START_OF_LATENT|>", "<|END_OF_LATENT|>"
PRIOR, POST = "<|PRIOR_PREFIX|>", "<|POSTERIOR_PREFIX|>"


def test_a_prior_chunk_reads_SOL_PRIOR_z_EOL_x(layout, documents):
    sequence = layout.document(documents[0], [False, True])
    assert spell(layout, sequence.ids) == f"{BOS}a b{SOL}{PRIOR} d e{EOL} c{EOS}"
    assert sequence.kinds == [GIVEN, GIVEN, GIVEN, MARKER, MARKER, LATENT, LATENT, MARKER, TEXT, MARKER]


def test_a_posterior_chunk_reads_SOL_EOL_x_SOL_POST_z_EOL(layout, documents):
    sequence = layout.document(documents[0], [False, False])
    assert spell(layout, sequence.ids) == f"{BOS}a b{SOL}{EOL} c{SOL}{POST} d e{EOL}{EOS}"
    assert sequence.kinds == [GIVEN, GIVEN, GIVEN, MARKER, MARKER, TEXT, MARKER, MARKER, LATENT, LATENT, MARKER, MARKER]


def test_a_chunk_without_latent_is_plain_or_told_that_there_is_no_thought(layout, documents):
    plain = layout.document(documents[1], [True, True])
    assert spell(layout, plain.ids) == f"{BOS}a a{SOL}{PRIOR} b{EOL} c d{EOS}"
    told = layout.document(documents[1], [True, True], plain_as="no_thought")
    assert spell(layout, told.ids) == f"{BOS}{SOL}{EOL}a a{SOL}{PRIOR} b{EOL} c d{EOS}"


def test_sampling_and_scoring_condition_on_the_same_context(layout, documents):
    """The prompt of q and the given part of p differ in markers and x only; z, EOL and x are what the joint counts."""
    assert spell(layout, layout.posterior_prompt(documents[1], 1)) == f"{BOS}a a{SOL}{EOL} c d{SOL}{POST}"
    joint = joint_of(layout, documents[1], 1)
    assert spell(layout, joint.ids) == f"{BOS}a a{SOL}{PRIOR} b{EOL} c d"
    assert [kind != GIVEN for kind in joint.kinds] == [False] * 5 + [True] * 4


def test_training_sampling_and_scoring_see_the_same_ids(layout, documents):
    """For a document with one latent chunk, the training sequence starts with exactly what is sampled from or
    scored."""
    document = documents[0]
    posterior = layout.document(document, [False, False]).ids
    prior = layout.document(document, [False, True]).ids
    assert posterior[:len(layout.posterior_prompt(document, 1))] == layout.posterior_prompt(document, 1)
    assert prior[:-1] == joint_of(layout, document, 1).ids


def test_a_latent_of_a_whole_document_makes_it_one_chunk():
    """As in corpora that rewrite each document: its synthetic text alone is what latent_only trains on."""
    document = encode_document(0, {"text": "a b. c", "latent": " d e"}, tokenizer_for(["a b. c", " d e"], "words"))
    layout = Layout(tokenizer_for(["a b. c", " d e"], "words"))
    assert spell(layout, layout.document(document, [True]).ids) == f"{BOS}{SOL}{PRIOR} d e{EOL}a b. c{EOS}"
    assert spell(layout, layout.latents(document).ids) == f"{BOS} d e{EOS}"


def test_weighted_latents_need_no_ids(tokenizer):
    """Their text is encoded; weights that cannot be drawn by are refused."""
    def document(*weights):
        draws = [{"latent": latent, "weight": weight} for latent, weight in zip((" d", " e"), weights)]
        return check_record({"text": "a", "chunks": [{"suffix": "a", "latent": " d", "draws": draws}]})
    chunk = encode_document(0, document(0.25, 0.75), tokenizer).chunks[0]
    assert chunk.draws == [tokenizer.encode(" d"), tokenizer.encode(" e")] and chunk.weights == [0.25, 0.75]
    for weights in ((0.0, 0.0), (-1.0, 2.0), (None, 1.0), (float("inf"), 1.0)):
        with pytest.raises(ValueError, match="weight"):
            document(*weights)


def test_an_empty_latent_is_a_latent(layout, documents):
    assert spell(layout, layout.document(documents[3], [True, True]).ids) == f"{BOS}a e b{SOL}{PRIOR}{EOL} c c{EOS}"


def test_context_is_the_text_of_three_chunks_without_latents(tokenizer, layout):
    chunks = [{"suffix": f" {word}", "latent": " e"} for word in "abcda"]
    document = encode_document(0, {"text": " a b c d a", "chunks": chunks}, tokenizer)
    assert spell(layout, layout.context(document, 4)) == f"{BOS} b c d"
    assert spell(layout, layout.context(document, 0)) == BOS


def test_sampled_ids_are_used_as_they_are():
    """latent_ids win over the text: what was drawn is what is trained on, even where the text re-encodes otherwise."""
    tokenizer = Tokenizer("words", (b"ab", b"a", b"b"))
    chunk = {"suffix": "a", "latent": "ab", "latent_ids": [1, 2]}
    assert tokenizer.encode("ab") == [0]
    assert encode_document(0, {"text": "a", "chunks": [chunk]}, tokenizer).chunks[0].latent == [1, 2]


STRINGS = ["", "One. Two! Three?", "no full stop", "a\r\n\r\nb\n\n\nc  ", "Dr. No met Mrs. Smith. \"Hi!\" he said.",
           "  lead", "...\n", "x" * 500, "e.g. this, i.e. that. The end.", "Ünï. Çödé. 漢字。終わり"]


@pytest.mark.parametrize("text", STRINGS)
def test_chunking_is_lossless(text):
    assert "".join(split_into_sentences(text)) == text
    chunks = split_into_chunks(text, len, chunk_tokens=40)
    assert "".join(chunks) == text and all(0 < len(chunk) <= 40 for chunk in chunks)


def test_chunking_is_lossless_on_random_strings():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab A.!?\n\r\t\"'é ") for _ in range(rng.randint(0, 200)))
        assert "".join(split_into_sentences(text)) == text
        assert "".join(split_into_chunks(text, len, chunk_tokens=30)) == text


def test_a_text_always_splits_in_the_same_way():
    text = "One is here. " * 100
    sizes = [chunk.count(".") for chunk in split_into_chunks(text, len, 10 ** 6)]
    assert sizes == [chunk.count(".") for chunk in split_into_chunks(text, len, 10 ** 6)]
    assert max(sizes) <= 20 and len(set(sizes)) > 1


def test_abbreviations_do_not_end_a_sentence():
    assert split_into_sentences("Dr. No is in. He said e.g. this.") == ["Dr. No is in. ", "He said e.g. this."]


def test_a_document_with_only_text_is_chunked():
    text = "Two words. " * 200 + "Then more. "
    record = {"text": text}
    tokenizer = tokenizer_for(texts_of([record], "words"), "words")
    document = encode_document(0, record, tokenizer)
    assert "".join(tokenizer.decode(chunk.suffix) for chunk in document.chunks) == text
    assert len(document.chunks) > 3 and max(len(chunk.suffix) for chunk in document.chunks) <= CHUNK_TOKENS


def test_ids_of_another_vocabulary_are_refused(tokenizer):
    chunk = {"suffix": "a", "latent": " b", "latent_ids": [3, 3, 3]}
    with pytest.raises(ValueError, match="another vocabulary.*--init_from"):
        encode_document(0, {"text": "a", "chunks": [chunk]}, tokenizer)


@pytest.mark.parametrize("line, complaint", [
    ("{", "corpus.jsonl:2"), ("[1]", '"text"'), ('{"text": 3}', '"text"'),
    ('{"text": "ab", "chunks": [{"suffix": "a"}]}', "add up"),
    ('{"text": "a", "chunks": [{"suffix": "a", "latent": 4}]}', "latent")])
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, complaint):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match="corpus.jsonl:2") as error:
        read_corpus(str(path))
    assert complaint in str(error.value)


def test_the_keys_of_the_official_dataset_are_read_as_they_are():
    chunks = [{"suffix": "a", "latent": "why", "other": 1}, {"suffix": "b", "latent": None}]
    record = {"text": "ab", "chunks": chunks, "url": "x"}
    assert check_record(record) == record | {"chunks": [chunks[0], {"suffix": "b"}]}


def test_missing_and_empty_corpora_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare.py"):
        read_corpus(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        read_corpus(str(tmp_path / "empty.jsonl"))
