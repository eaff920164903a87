"""Laws of loader.py: nothing lost in packing, batches a function of (seed, step), fair and fresh coins."""
import collections
import itertools
from dataclasses import replace

import torch

from data.alchemy import prepare
from data.corpus import Chunk, Document, read_corpus, texts_of
from data.layout import GIVEN, LATENT, TEXT, Layout, Sequence
from data.loader import (GROUP, Position, Recipe, collate, deal, epoch_rows, lay_out, pack, packed_rows,
                         training_batches, windows)
from data.run import Ranks
from data.tokens import BOS, EOS, POST, PRIOR
from tests.conftest import encode_corpus, tokenizer_for


def sequence(n, start=0):
    return Sequence(list(range(start, start + n)), [GIVEN] + [TEXT] * (n - 1))


def unpack(batch):
    """The sequences of a batch, from its ids and targets."""
    found = []
    for row in range(len(batch.ids)):
        for number in range(int(batch.document[row].max()) + 1):
            here = batch.document[row] == number
            found.append(batch.ids[row, here].tolist() + batch.targets[row, here][-1:].tolist())
    return found


def test_packing_then_unpacking_gives_the_sequences_back():
    """Every sequence once, none cut, none mixed."""
    sequences = [sequence(n, start=100 * n) for n in (5, 9, 3, 12, 7, 2, 10, 4, 6)]
    rows = packed_rows(iter(sequences), row_tokens=12)
    assert sorted(unpack(collate(rows, 12))) == sorted(s.ids for s in sequences)


def test_each_thing_goes_into_the_fullest_row_with_room_for_it():
    """Those over a quarter of a row first, by length; the small ones in their order."""
    assert pack([1, 3, 6, 2, 5, 10, 2, 1], row_tokens=10) == [[5], [2, 1, 0], [4, 3, 6, 7]]


def test_packing_wastes_less_than_a_twentieth_of_the_embedded_corpus(tmp_path):
    prepare.main(["--out", str(tmp_path), "--raw", "10", "--held_out", "10"])
    records = read_corpus(str(tmp_path / "gold.jsonl"))
    tokenizer = tokenizer_for(texts_of(records, "words"), "words")
    rows = list(epoch_of(encode_corpus(records, tokenizer), Layout(tokenizer), Recipe(512, 256)))
    assert sum(len(s.ids) - 1 for row in rows for s in row) > 0.95 * 256 * len(rows)


def test_a_long_sequence_is_cut_into_windows_that_predict_every_token_once():
    parts = list(windows(sequence(11), row_tokens=4))
    assert [p.ids for p in parts] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10]]
    assert [i for p in parts for i in p.ids[1:]] == list(range(1, 11))


def test_given_tokens_are_no_targets(alone):
    rows = [[Sequence([7, 8, 9], [GIVEN, GIVEN, TEXT])]]
    batch, step = collate(rows, 4), deal(rows, 4, Position(), alone)
    assert batch.ids.tolist() == [[7, 8, 0, 0]] and batch.targets.tolist() == [[-1, 9, -1, -1]]
    assert batch.document.tolist() == [[0, 0, -1, -1]]
    assert step.num_targets == step.num_observed == 1 and step.num_tokens == 2


def epoch_of(documents, layout, recipe, epoch=0):
    """The rows of one epoch."""
    return [row for row, _ in epoch_rows(documents, layout, recipe, Position(epoch))]


def ids_of(rows):
    return [tuple(s.ids) for row in rows for s in row]


def test_coins_are_fair_and_fresh_each_epoch(documents, layout):
    """Over many epochs a chunk is prior half of the time, and no two epochs are alike."""
    epochs = [ids_of(epoch_of(documents, layout, Recipe(64, 64), epoch)) for epoch in range(400)]
    priors = sum(layout.prior in ids for epoch in epochs for ids in epoch if layout.prior in ids or layout.post in ids)
    assert abs(priors / (400 * 3) - 0.5) < 0.05
    assert epochs[0] != epochs[1] and len(set(map(tuple, map(sorted, epochs)))) > 3


def test_an_epoch_has_every_document_once(layout):
    """Also over several groups, whatever the number of processes the rows are dealt to."""
    documents = [Document(i, [Chunk([i % 5] * (i % 7 + 1))], {}) for i in range(2 * GROUP + 30)]
    rows = epoch_of(documents, layout, Recipe(64, 16))
    assert sorted(ids_of(rows)) == sorted(tuple(layout.raw(document).ids) for document in documents)
    parts = [next(training_batches(documents, layout, Recipe(64, 16), Position(), Ranks(rank, 3, torch.device("cpu"))))
             for rank in range(3)]
    whole = collate(rows[:4], 16)
    for rank, part in enumerate(parts):
        dealt = len(whole.ids[rank::3])
        assert torch.equal(part.mine.ids[:dealt], whole.ids[rank::3])
        assert part.num_tokens == int((whole.document >= 0).sum())
        assert len(part.mine.ids) == 2 and part.mine.targets[dealt:].eq(-1).all()
        assert part.num_targets == int((whole.targets >= 0).sum())
        assert part.num_observed == int((whole.kinds == TEXT).sum())


def test_the_layouts_of_training(documents, layout):
    """joint has both forms, prior and posterior one each, raw no thought, latent_only nothing else; raw_mix some of
    raw."""
    def forms(**settings):
        rows = [row for epoch in range(20) for row in epoch_of(documents, layout, Recipe(64, 64, **settings), epoch)]
        spelled = [layout.tokenizer.decode(ids) for ids in ids_of(rows)]
        markers = (("prior", PRIOR), ("posterior", POST))
        return {name for name, marker in markers if any(marker in text for text in spelled)}, set(spelled)
    assert forms()[0] == {"prior", "posterior"}
    assert forms(layout="prior")[0] == {"prior"} and forms(layout="posterior")[0] == {"posterior"}
    assert forms(layout="raw") == (set(), {f"{BOS}{text}{EOS}" for text in ("a b c", "a a c d", "b d", "a e b c c")})
    assert forms(layout="latent_only") == (set(), {f"{BOS} d e{EOS}", f"{BOS} b{EOS}", f"{BOS}{EOS}"})
    mixed = [ids for epoch in range(200)
             for ids in ids_of(epoch_of(documents, layout, Recipe(64, 64, raw_mix=0.25), epoch))]
    plain = sum(layout.sol not in ids for ids in mixed)                      # one document of the four always is
    assert abs(plain / 800 - (0.25 + 0.75 * 0.25)) < 0.06


def test_training_can_go_on_from_any_position(layout):
    """From the position after a batch come the batches of the uninterrupted stream, over groups and epochs."""
    documents = [Document(i, [Chunk([i % 5] * (i % 7 + 1), latent=[1])], {}) for i in range(GROUP + 100)]
    alone, recipe = Ranks(0, 1, torch.device("cpu")), Recipe(1920, 32, seed=5)
    whole = list(itertools.islice(training_batches(documents, layout, recipe, Position(), alone), 12))
    assert whole[-1].position.epoch > 0 and whole[2].position.group > 0
    for step in (0, 2, 6, 10):
        again = next(training_batches(documents, layout, recipe, whole[step].position, alone))
        assert torch.equal(again.mine.ids, whole[step + 1].mine.ids) and again.position == whole[step + 1].position
    other = next(training_batches(documents, layout, replace(recipe, seed=6), Position(), alone))
    assert not torch.equal(whole[0].mine.ids, other.mine.ids)


def test_one_of_several_thoughts_is_picked_by_weight_afresh_each_epoch(layout):
    """A thought of weight 0 (an unfinished draw) is never picked; the others as often as their weights say."""
    chunk = Chunk([0], latent=[1], draws=[[1], [2, 2], [3]], weights=[0.25, 0.0, 0.75])
    documents = [Document(i, [chunk], {}) for i in range(500)]
    epochs = []
    for epoch in range(4):
        laid_out = lay_out(documents, layout, Recipe(64, 64), epoch, group=0)
        epochs.append(["".join(str(i) for i, kind in zip(s.ids, s.kinds) if kind == LATENT) for s in laid_out])
    counts = collections.Counter(itertools.chain(*epochs))
    assert set(counts) == {"1", "3"} and abs(counts["3"] / 2000 - 0.75) < 0.05 and epochs[0] != epochs[1]
