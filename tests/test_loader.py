"""Laws of loader.py: nothing lost in packing, batches a function of (seed, step), fair and fresh coins."""
import collections
import itertools

import torch

from data.corpus import Chunk, Document
from data.layout import GIVEN, LATENT, TEXT, Sequence
from data.loader import collate, lay_out_epoch, length_batches, pack, pick_thought, score_sequences, training_batches, windows
from tests.conftest import random_model


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
    rows = list(pack(iter(sequences), row_tokens=12, open_rows=2))
    assert sorted(unpack(collate(rows, 12))) == sorted(s.ids for s in sequences)


def test_a_long_sequence_is_cut_into_windows_that_predict_every_token_once():
    parts = list(windows(sequence(11), row_tokens=4))
    assert [p.ids for p in parts] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10]]
    assert [i for p in parts for i in p.ids[1:]] == list(range(1, 11))


def test_given_tokens_are_no_targets():
    batch = collate([[Sequence([7, 8, 9], [GIVEN, GIVEN, TEXT])]], 4)
    assert batch.ids.tolist() == [[7, 8, 0, 0]] and batch.targets.tolist() == [[-1, 9, -1, -1]]
    assert batch.document.tolist() == [[0, 0, -1, -1]] and batch.num_targets == 1 and batch.num_tokens == 2


def test_coins_are_fair_and_fresh_each_epoch(documents, layout):
    """Over many epochs a chunk is prior half of the time, and no two epochs are alike."""
    epochs = [[tuple(s.ids) for s in lay_out_epoch(documents, layout, "plain", 0, epoch)] for epoch in range(400)]
    priors = sum(layout.prior in ids for epoch in epochs for ids in epoch if layout.prior in ids or layout.post in ids)
    assert abs(priors / (400 * 3) - 0.5) < 0.05
    assert epochs[0] != epochs[1] and len(set(map(tuple, map(sorted, epochs)))) > 3


def test_batches_are_a_function_of_seed_and_step(documents, layout):
    """Starting at step 3 gives the batches of an uninterrupted stream from there."""
    def stream(seed, start):
        return training_batches(documents, layout, plain_as="plain", rows=2, row_tokens=16, seed=seed, start=start)
    whole = list(itertools.islice(stream(5, 0), 6))
    for a, b in zip(whole[3:], stream(5, 3)):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets) and torch.equal(a.document, b.document)
    other = next(stream(6, 0))
    assert not torch.equal(whole[0].ids, other.ids)


def test_scoring_in_batches_equals_scoring_one_by_one(layout):
    """Batching by length changes nothing, whatever the token budget."""
    model = random_model(layout.tokenizer.vocab_size)
    ids = torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = [Sequence(ids[:n], [GIVEN] * 2 + [TEXT] * (n - 2)) for n in (4, 9, 3, 20, 9, 15)]
    expected = torch.stack([model(torch.tensor([s.ids[:-1]]), torch.tensor([s.ids[1:]]))[0, 1:].sum() for s in sequences])
    for budget in (1, 25, 1000):
        torch.testing.assert_close(score_sequences(model, sequences, budget), expected.detach())


def test_length_batches_hold_everything_once_within_the_budget():
    """Longest first, an eighth padding at most, and as many tokens as fit; one thing that is too long stands alone."""
    lengths = [4, 9, 3, 20, 9, 15, 8]
    assert list(length_batches(lengths, 25)) == [[3], [5], [1, 4], [6], [0], [2]]
    assert list(length_batches(lengths, 27)) == [[3], [5], [1, 4, 6], [0], [2]]
    assert list(length_batches(lengths, 1)) == [[3], [5], [1], [4], [6], [0], [2]]


def test_one_of_several_thoughts_is_picked_by_weight_afresh_each_epoch(layout):
    """A thought of weight 0 (an unfinished draw) is never picked; the others as often as their weights say."""
    chunk = Chunk([0], latent=[1], draws=[[1], [2, 2], [3]], weights=[0.25, 0.0, 0.75])
    documents = [Document(i, [chunk], {}) for i in range(500)]
    epochs = []
    for epoch in range(4):
        laid_out = lay_out_epoch(documents, layout, "plain", seed=0, epoch=epoch)
        epochs.append(["".join(str(i) for i, kind in zip(s.ids, s.kinds) if kind == LATENT) for s in laid_out])
    counts = collections.Counter(itertools.chain(*epochs))
    assert set(counts) == {"1", "3"} and abs(counts["3"] / 2000 - 0.75) < 0.05 and epochs[0] != epochs[1]
    assert pick_thought(Chunk([0], latent=[1]), 0.5).latent == [1]
