"""Laws of model.py: cached == uncached, rows and packed documents do not see each other, forward is log p."""
import pytest
import torch

from model import GPT, GPTConfig, KVCache, load_checkpoint, same_document_and_causal, save_checkpoint
from tests.conftest import random_model

V = 11


def ids_of(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def test_forward_is_the_log_softmax_of_the_logits():
    """GPT.forward gives log p of each target in float32, and 0 where the target is negative."""
    model, ids, targets = random_model(V), ids_of(3, 9), ids_of(3, 9, seed=1)
    targets[0, :4] = -1
    targets[1, 2] = -7
    log_p = model(ids, targets)
    expected = model.logits(model.hidden(ids)).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, expected.where(targets >= 0, 0.0))
    assert log_p[0, :4].eq(0).all() and log_p[1, 2] == 0


def test_the_first_loss_is_the_log_of_the_vocabulary():
    """A fresh head is zero, so every token starts with probability 1 / V."""
    log_p = GPT(GPTConfig(vocab_size=V))(ids_of(2, 5), ids_of(2, 5))
    torch.testing.assert_close(log_p, torch.full((2, 5), -torch.log(torch.tensor(float(V)))))


@pytest.mark.parametrize("split", range(1, 12))
def test_cached_equals_uncached_at_every_split(split):
    """A prefix through the cache, then the rest, token by token or at once, gives the hidden states of one pass."""
    model, ids = random_model(V), ids_of(2, 12)
    cache, whole = KVCache(model.config, 2, 12, "cpu"), model.hidden(ids)
    positions = torch.arange(12).expand(2, 12)
    first = model.hidden(ids[:, :split], cache=cache, positions=positions[:, :split], slots=split)
    torch.testing.assert_close(first, whole[:, :split])
    for t in range(split, 12):
        step = model.hidden(ids[:, t:t + 1], cache=cache, positions=positions[:, t:t + 1], slots=t + 1)
        torch.testing.assert_close(step, whole[:, t:t + 1])


def test_ragged_rows_in_one_cache_equal_one_row_at_a_time():
    """Rows of different lengths, padded on the right, decode as if each were alone: padding is never seen."""
    model, lengths = random_model(V), [3, 7, 5]
    ids, new = ids_of(3, 7), ids_of(3, 4, seed=2)
    cache = KVCache(model.config, 3, 12, "cpu")
    model.hidden(ids, cache=cache, positions=torch.arange(7).expand(3, 7), slots=7)
    for t in range(4):
        positions = torch.tensor([[n + t] for n in lengths])
        step = model.hidden(new[:, t:t + 1], cache=cache, positions=positions, slots=int(positions.max()) + 1)
        for row, n in enumerate(lengths):
            alone = model.hidden(torch.cat([ids[row, :n], new[row, :t + 1]])[None])
            torch.testing.assert_close(step[row, 0], alone[0, -1])


def test_copied_cache_rows_continue_like_their_source():
    """A prompt prefilled once serves any number of draws."""
    model, prompt = random_model(V), ids_of(2, 6)
    source, cache = KVCache(model.config, 2, 6, "cpu"), KVCache(model.config, 4, 9, "cpu")
    model.hidden(prompt, cache=source, positions=torch.arange(6).expand(2, 6), slots=6)
    cache.copy_rows(torch.arange(4), source, torch.tensor([0, 0, 1, 1]))
    new = ids_of(4, 1, seed=3)
    step = model.hidden(new, cache=cache, positions=torch.full((4, 1), 6), slots=7)
    for row in range(4):
        torch.testing.assert_close(step[row, 0], model.hidden(torch.cat([prompt[row // 2], new[row]])[None])[0, -1])


def test_packed_documents_never_see_each_other():
    """The log-probs of a document do not depend on what is packed beside it, nor on its place in the row."""
    model, a, b = random_model(V), ids_of(1, 6), ids_of(1, 4, seed=5)
    document = torch.tensor([[0] * 6 + [1] * 4])
    packed = model(torch.cat([a, b], 1), torch.cat([a, b], 1), document)
    torch.testing.assert_close(packed[:, :6], model(a, a))
    torch.testing.assert_close(packed[:, 6:], model(b, b))


def test_a_later_token_never_changes_an_earlier_log_prob():
    model, ids = random_model(V), ids_of(1, 8)
    changed = ids.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % V
    torch.testing.assert_close(model(ids, ids)[:, :5], model(changed, ids)[:, :5])


def test_the_mask_is_the_one_drawn_in_its_docstring():
    assert same_document_and_causal(torch.tensor([[0, 0, 1, 1]]))[0, 0].int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_weights_are_a_function_of_the_seed():
    one, two, other = (GPT(GPTConfig(vocab_size=V), seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_checkpoint_comes_back_whole(tmp_path):
    """Weights, config and state survive; what is no checkpoint is refused in one line."""
    model, path = random_model(V), str(tmp_path / "ckpt.pt")
    save_checkpoint(path, model, step=7)
    loaded, state = load_checkpoint(path)
    assert loaded.config == model.config and state == {"step": 7} and not (tmp_path / "ckpt.pt.tmp").exists()
    torch.testing.assert_close(loaded(ids_of(1, 4), ids_of(1, 4)), model(ids_of(1, 4), ids_of(1, 4)))
    (tmp_path / "half.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(str(tmp_path / "half.pt"))
    with pytest.raises(FileNotFoundError, match="python train.py"):
        load_checkpoint(str(tmp_path / "none.pt"))


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="heads"):
        GPTConfig(width=30, heads=4)
    with pytest.raises(ValueError, match="kv_heads"):
        GPTConfig(width=32, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="context"):
        random_model(V, context=8).hidden(ids_of(1, 9))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_numbers_of_the_cpu():
    model, ids = random_model(V), ids_of(2, 12)
    on_cpu = model(ids, ids)
    torch.testing.assert_close(model.cuda()(ids.cuda(), ids.cuda()).cpu(), on_cpu, atol=1e-4, rtol=1e-4)
