"""Laws of model.py: cached == uncached, rows and packed documents do not see each other, forward is log p."""
import numpy as np
import pytest
import torch

import model as gpt
from model import GPT, Branches, GPTConfig, Prompts, packed_mask, read_checkpoint, restore, save_checkpoint
from tests.conftest import graphs_compiled, random_model

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


def prompts_of(model, ids, lengths):
    """The first `lengths` tokens of each row of ids as prompts."""
    prompts = Prompts(model.config, len(ids), max(lengths), "cpu", torch.float32)
    prompts.lengths[:] = torch.tensor(lengths)
    if max(lengths):
        model.hidden(ids[:, :max(lengths)], cache=prompts)
    return prompts


def read(model, branches, ids, slot=0, own_slots=None):
    """The hidden states of the next tokens of every row."""
    branches.at(torch.tensor([slot]), ids.shape[1], own_slots or slot + ids.shape[1])
    return model.hidden(ids, cache=branches)


@pytest.mark.parametrize("split", range(12))
def test_cached_equals_uncached_at_every_split(split):
    """A prompt through the cache, then the rest, token by token or at once, gives the hidden states of one pass."""
    model, ids = random_model(V), ids_of(2, 12)
    whole, prompts = model.hidden(ids), prompts_of(model, ids, [split, split])
    at_once, stepwise = Branches(prompts, np.arange(2)), Branches(prompts, np.arange(2), slots=4)
    torch.testing.assert_close(read(model, at_once, ids[:, split:]), whole[:, split:])
    for t in range(split, 12):
        torch.testing.assert_close(read(model, stepwise, ids[:, t:t + 1], t - split), whole[:, t:t + 1])


@pytest.mark.parametrize("owner", [[0, 1, 2], [2, 2, 0, 2, 0], [1], [2, 1, 1, 1]])
@pytest.mark.parametrize("fixed", [False, True])
def test_ragged_branches_equal_one_row_at_a_time(owner, fixed):
    """Prompts of different lengths with any number of rows each, read in one shape or another: each row as if alone."""
    model, lengths, rows = random_model(V), [3, 7, 5], len(owner)
    ids, new = ids_of(3, 7), ids_of(rows, 4, seed=2)
    branches = Branches(prompts_of(model, ids, lengths), np.array(owner), slots=9, fixed=fixed)
    for t in range(4):
        step = read(model, branches, new[:, t:t + 1], t, own_slots=(t + 1, 9)[t % 2])
        for row, n in enumerate(owner):
            alone = model.hidden(torch.cat([ids[n, :lengths[n]], new[row, :t + 1]])[None])
            torch.testing.assert_close(step[row, 0], alone[0, -1])


@pytest.mark.parametrize("alive", [[1, 1, 0, 1, 1], [0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
@pytest.mark.parametrize("fixed", [False, True])
def test_rows_that_are_kept_go_on_as_if_the_others_had_never_been(alive, fixed):
    """Rows from the end move up into the gaps, and `keep` says which row each place has now."""
    model, owner, lengths = random_model(V), np.array([0, 0, 1, 1, 1]), [6, 4]
    ids, new = ids_of(2, 6), ids_of(5, 3, seed=3)
    branches = Branches(prompts_of(model, ids, lengths), owner, slots=3, fixed=fixed)
    read(model, branches, new[:, :1])
    order = branches.keep(np.array(alive, bool))
    assert sorted(order) == list(np.flatnonzero(alive))
    for t in (1, 2):
        step = read(model, branches, new[order, t:t + 1], t)
        for place, row in enumerate(order):
            alone = model.hidden(torch.cat([ids[owner[row], :lengths[owner[row]]], new[row, :t + 1]])[None])
            torch.testing.assert_close(step[place, 0], alone[0, -1])


def test_log_probs_and_gradients_do_not_depend_on_the_slab(monkeypatch):
    """Logits made a few positions at a time, and again for the gradient, are those made at once; no target, no
    logits."""
    network, ids = random_model(V), ids_of(3, 9)
    targets = ids.clone()
    targets[0, 2:5] = -1
    whole = network(ids, targets)
    expected = torch.autograd.grad(whole.sum(), list(network.parameters()))
    rows, logits = [], network.logits
    monkeypatch.setattr(network, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    monkeypatch.setitem(gpt.SLAB, "cpu", 2 * V)
    log_p = network(ids, targets)
    torch.testing.assert_close(log_p, whole)
    assert max(rows) == 2 and sum(rows) == 24 and (log_p[0, 2:5] == 0).all()
    for one, other in zip(torch.autograd.grad(log_p.sum(), list(network.parameters())), expected):
        torch.testing.assert_close(one, other)


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
    assert packed_mask(torch.tensor([[0, 0, 1, 1]]), head_size=16)[0, 0].int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def packed_batch(device="cpu", T=200, seed=0):
    """ids, targets and document numbers of three rows, each cut into documents in its own way."""
    ids, document = ids_of(3, T, seed=seed), (torch.arange(T) + 7 * seed) // torch.tensor([[30], [70], [200]])
    return ids.to(device), ids.roll(-1, 1).to(device), document.to(device)


@torch.no_grad()
def test_attention_by_blocks_gives_the_numbers_of_the_mask(monkeypatch):
    """The branch that a graph compiled for CUDA takes, here without code generation; short rows have the mask."""
    model = random_model(V, context=200, heads=4, kv_heads=2, width=64)
    calls, attend = [], gpt.flex_attention
    monkeypatch.setattr(gpt, "BLOCKWISE", ("cpu",))
    monkeypatch.setattr(gpt, "flex_attention", lambda *x, **y: (calls.append(1), attend(*x, **y))[1])
    blockwise = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(blockwise(*packed_batch()), model(*packed_batch()), atol=1e-5, rtol=1e-5)
    assert len(calls) == model.config.layers
    torch.testing.assert_close(blockwise(*packed_batch(T=100)), model(*packed_batch(T=100)), atol=1e-5, rtol=1e-5)
    assert len(calls) == model.config.layers


def test_training_compiles_into_one_graph():
    """Loss and gradients of the compiled model are the eager ones; other documents of the same shape compile
    nothing."""
    model, compiled_model = random_model(V, context=200), random_model(V, context=200)
    compiled = torch.compile(compiled_model, backend="aot_eager", fullgraph=True)
    graphs = []
    for seed in range(3):
        model(*packed_batch(seed=seed)).sum().backward()
        compiled(*packed_batch(seed=seed)).sum().backward()
        graphs.append(graphs_compiled())
    assert graphs[0] == graphs[2]
    for ours, other in zip(compiled_model.parameters(), model.parameters()):
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_weights_are_a_function_of_the_seed():
    one, two, other = (GPT(GPTConfig(vocab_size=V), seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_comes_back_whole(tmp_path, tied):
    """Weights, config and state survive, tied weights are one; what is no checkpoint is refused in one line."""
    model, path = random_model(V, tied=tied), str(tmp_path / "ckpt.pt")
    save_checkpoint(path, model, step=7)
    state = read_checkpoint(path)
    loaded = restore(state)
    assert loaded.config == model.config and state["step"] == 7 and not (tmp_path / "ckpt.pt.tmp").exists()
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    torch.testing.assert_close(loaded(ids_of(1, 4), ids_of(1, 4)), model(ids_of(1, 4), ids_of(1, 4)))
    (tmp_path / "half.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        read_checkpoint(str(tmp_path / "half.pt"))
    with pytest.raises(FileNotFoundError, match="give a run folder of train.py"):
        read_checkpoint(str(tmp_path / "none.pt"))


def test_a_changed_byte_of_a_checkpoint_is_noticed(tmp_path):
    """Wherever it is, weights or anything else: the file is refused, or says what it said."""
    path, random, refused = tmp_path / "ckpt.pt", np.random.default_rng(0), 0
    save_checkpoint(str(path), random_model(V, layers=1, width=8, ffn=8), step=7)
    content, before = path.read_bytes(), read_checkpoint(str(path))
    before["model"] = {name: weight.clone() for name, weight in before["model"].items()}
    for place in random.integers(len(content), size=300):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << random.integers(8)]) + content[place + 1:])
        try:
            state = read_checkpoint(str(path))
            assert state["step"] == 7 and state["model_config"] == before["model_config"]
            assert all(torch.equal(weight, before["model"][name]) for name, weight in state["model"].items())
        except ValueError:
            refused += 1
    assert refused > 100


def test_a_checkpoint_is_loaded_without_making_weights_first(tmp_path, monkeypatch):
    """No random numbers are drawn, and training the loaded model leaves the file as it is."""
    path = tmp_path / "ckpt.pt"
    save_checkpoint(str(path), random_model(V))
    before = path.read_bytes()
    monkeypatch.setattr(GPT, "initialize", lambda *arguments: pytest.fail("weights were made"))
    monkeypatch.setattr(torch, "randn", lambda *arguments, **named: pytest.fail("random numbers were drawn"))
    model = restore(read_checkpoint(str(path)))
    model(ids_of(1, 4), ids_of(1, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert path.read_bytes() == before and all(weight.device.type == "cpu" for weight in model.parameters())


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains_in_one_graph_to_the_gradients_of_the_mask():
    model, plain = (random_model(V, context=200, heads=2, kv_heads=1, width=64).cuda() for _ in range(2))
    compiled = torch.compile(model, fullgraph=True)
    graphs = []
    for seed in range(3):
        compiled(*packed_batch("cuda", seed=seed)).sum().backward()
        plain(*packed_batch("cuda", seed=seed)).sum().backward()
        graphs.append(graphs_compiled())
    assert graphs[0] == graphs[2]
    for ours, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-3, rtol=1e-3)
