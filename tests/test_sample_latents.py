"""Laws of sample_latents.py: the estimator by exact enumeration, the sampler against one row at a time, the E-step's
file.

The enumerable world: three words and six markers, of which only the words and EOL can be drawn, so that all thoughts of
up to two words can be listed with their exact probabilities.
"""
import codecs
import copy
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sample_latents
from data import cache
from data.corpus import encode_document, read_corpus
from data.layout import TEXT, Layout, Sequence
from data.run import Ranks
from model import read_checkpoint, restore, save_checkpoint
from sample_latents import (SampleConfig, annotate, at_precision, effective_sample_size, e_step, generate,
                            importance_bound, infer, inverse_cdf, latent_uniforms, length_batches, load,
                            log_importance_weights, main, places_to_infer, proposal_log_probs, propose, resample, score,
                            score_joint, survey, think, uniform_numbers, vocabulary_mask, weigh)
from tests.conftest import full_disk, log_prob_of, random_model, tokenizer_for

CAP = 3        # max_latent_tokens of the enumerated world: thoughts of 0, 1 or 2 words finish, others do not


@pytest.fixture(scope="module")
def small():
    """A model, a layout and a chunk whose thoughts can be listed: words a, b, c after a given prefix."""
    tokenizer = tokenizer_for([" a b c"], "words")
    layout = Layout(tokenizer)
    record = {"text": " a b c", "chunks": [{"suffix": " a b", "given": True}, {"suffix": " c"}]}
    model = random_model(tokenizer.vocab_size, seed=3, heads=4, kv_heads=4)
    return model, layout, (encode_document(0, record, tokenizer), 1)


def joint(layout, place, latent):
    """BOS C SOL PRIOR z EOL x: the sum over all but the given ids is log p(z, x | C)."""
    return layout.thought_and_text(*place, list(latent)).after(layout.prior_prompt(*place))


def enumerate_thoughts(model, layout, place, temperature):
    """Every finished thought with its exact log p(z, x | C) and log q(z | x, C), each from one uncached forward
    pass."""
    others = [i for i in layout.tokenizer.marker.values() if i != layout.eol]
    banned, table = vocabulary_mask(model, others), []
    for length in range(CAP):
        for thought in itertools.product(range(3), repeat=length):
            log_p = log_prob_of(model, joint(layout, place, thought))
            drawn = [*thought, layout.eol]
            prompt = layout.posterior_prompt(*place)
            logits = model.logits(model.hidden(torch.tensor([prompt + drawn[:-1]])))[0, len(prompt) - 1:]
            log_q = proposal_log_probs(logits, temperature, banned).gather(1, torch.tensor(drawn)[:, None]).sum().item()
            table.append((thought, log_p, log_q))
    return table


def infer_many(small, temperature, chunks, draws):
    """`chunks` copies of the chunk with `draws` thoughts each, all with random numbers of their own."""
    model, layout, (document, c) = small
    places = [(type(document)(i, document.chunks, document.record), c) for i in range(chunks)]
    config = SampleConfig(num_latents=draws, temperature=temperature, max_latent_tokens=CAP, rows=64)
    return infer(model, layout, places, config, round=1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_the_mean_weight_is_the_evidence(small, temperature):
    """E_q[p(z, x) / q(z | x)] is the sum of p(z, x) over the thoughts within the cap, at any temperature of the
    proposal; unfinished draws count with weight zero."""
    evidence = infer_many(small, temperature, chunks=300, draws=40)
    exact = math.log(sum(math.exp(log_p) for _, log_p, _ in enumerate_thoughts(*small, temperature)))
    weights = evidence.log_weights.exp().flatten()
    error = (weights.std() / len(weights) ** 0.5).item()
    assert 0 < (~evidence.finished).sum() < evidence.finished.numel()
    assert abs(weights.mean().item() - math.exp(exact)) < 4 * error and error < 0.05 * math.exp(exact)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_joint_and_proposal_of_every_draw_are_the_enumerated_ones(small, temperature):
    """Cached, batched, in lock-step: each draw has the log p and log q of an uncached pass; EOL counts once on each
    side."""
    evidence = infer_many(small, temperature, chunks=60, draws=8)
    exact = {thought: (log_p, log_q) for thought, log_p, log_q in enumerate_thoughts(*small, temperature)}
    seen = set()
    for n, latents in enumerate(evidence.latents):
        for k, latent in enumerate(latents):
            if evidence.finished[n, k]:
                seen.add(tuple(latent))
                assert exact[tuple(latent)][0] == pytest.approx(evidence.log_joint[n, k].item(), abs=1e-4)
                assert exact[tuple(latent)][1] == pytest.approx(evidence.log_proposal[n, k].item(), abs=1e-4)
            else:
                assert len(latent) == CAP and evidence.log_weights[n, k] == -math.inf
    assert () in seen and len(seen) > 5


def test_draws_follow_the_proposal(small):
    """The frequency of each thought is exp(log q)."""
    evidence = infer_many(small, 1.0, chunks=500, draws=16)
    total = 500 * 16
    for thought, _, log_q in enumerate_thoughts(*small, 1.0):
        q = math.exp(log_q)
        count = sum(tuple(latent) == thought and bool(evidence.finished[n, k])
                    for n, latents in enumerate(evidence.latents) for k, latent in enumerate(latents))
        assert abs(count - total * q) < 5 * math.sqrt(total * q * (1 - q)) + 1


def test_the_resampled_thought_tends_to_the_exact_posterior(small):
    """Total variation distance to p(z | x) falls with K and is small at K = 64."""
    table = enumerate_thoughts(*small, 1.0)
    evidence = math.log(sum(math.exp(log_p) for _, log_p, _ in table))
    posterior = {thought: math.exp(log_p - evidence) for thought, log_p, _ in table}

    def distance(draws, chunks=400):
        e = infer_many(small, 1.0, chunks, draws)
        usable = e.finished.any(-1)
        weights = e.log_weights.where(usable[:, None], 0.0).softmax(-1)
        kept = resample(weights, uniform_numbers(0, "test", (draws,), (chunks,)))
        counts = {}
        for n in usable.nonzero().flatten().tolist():
            thought = tuple(e.latents[n][kept[n]])
            counts[thought] = counts.get(thought, 0) + 1
        return sum(abs(counts.get(z, 0) / int(usable.sum()) - p) for z, p in posterior.items()) / 2
    assert distance(64) < 0.12 and distance(64) < distance(1)


def test_the_bound_rises_with_K_and_stays_under_the_evidence(small):
    """The mean K-sample bound, over chunks where it is finite for every K, grows towards log p(x)."""
    log_w = infer_many(small, 1.0, chunks=400, draws=64).log_weights
    log_w = log_w[(log_w.view(400, 16, 4) > -math.inf).any(-1).all(-1)]        # chunks where it is finite for every K
    assert len(log_w) > 100
    exact = math.log(sum(math.exp(log_p) for _, log_p, _ in enumerate_thoughts(*small, 1.0)))
    means = []
    for draws in (4, 16, 64):
        means.append(importance_bound(log_w.view(-1, draws)).mean().item())
    assert means[0] < means[1] < means[2] < exact + 0.02


def test_the_estimator_on_numbers_worked_by_hand():
    """Weights 1, 3, 0 of an unfinished draw: w = 1/4, 3/4, 0; ess 1.6; bound log 4/3."""
    log_joint = torch.tensor([[-2.0, -1.0, -math.inf]])
    log_proposal = torch.tensor([[-2.0, -1.0 - math.log(3), -5.0]])
    log_w = log_importance_weights(log_joint, log_proposal)
    w = log_w.softmax(-1)
    torch.testing.assert_close(w, torch.tensor([[0.25, 0.75, 0.0]]))
    torch.testing.assert_close(effective_sample_size(w), torch.tensor([1.6]))
    torch.testing.assert_close(importance_bound(log_w), torch.tensor([math.log(4 / 3)]))
    kept = [resample(w, torch.tensor([u])).item() for u in (0.0, 0.2499, 0.2501, 1 - 2 ** -23)]
    assert kept == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="differ in shape"):
        log_importance_weights(log_joint, log_proposal[:, :2])


LARGEST = 1 - 2 ** -53       # of the uniform numbers


def test_an_id_of_probability_zero_is_never_picked():
    """Banned ids at either end of the vocabulary, and the largest uniform number there is."""
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(3, -1)
    assert inverse_cdf(probabilities, torch.tensor([0.0, 0.5, LARGEST]).double()).tolist() == [1, 3, 3]
    random = torch.rand(2000, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert inverse_cdf(random, torch.full((2000,), LARGEST).double()).max() < 50


def test_the_two_steps_of_the_inverse_cdf_are_one():
    """Block, then entry: every entry gets its share of the uniforms, in order, for vocabularies of any size."""
    for V in (1, 2, 5, 64, 1000):
        p = torch.rand(1, V, generator=torch.Generator().manual_seed(V)).double().softmax(-1)
        grid = (torch.arange(20000).double() + 0.5) / 20000
        picked = inverse_cdf(p.expand(20000, -1), grid)
        assert (picked.diff() >= 0).all()
        torch.testing.assert_close(picked.bincount(minlength=V) / 20000, p[0].float(), atol=1e-4, rtol=0)


def test_every_id_of_a_large_vocabulary_can_be_drawn():
    """128,256 ids, the rarest with a probability of 1e-13: the number in the middle of an id's share picks it, and
    numbers have bits enough to fall there."""
    log_q = (3 * torch.randn(128256, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    q = log_q.exp()
    cdf = q.double().cumsum(0)
    middles = ((cdf - q.double() / 2) / cdf[-1] * 2 ** 53).round() / 2 ** 53
    rare = q.argsort()[:3000]
    ids = torch.cat([rare, torch.arange(0, 128256, 97)])
    for some in ids.split(500):
        assert torch.equal(inverse_cdf(q.expand(len(some), -1), middles[some]), some)
    numbers = uniform_numbers(0, "bits", (), (4096,))
    assert numbers.dtype == torch.float64 and (numbers * 2 ** 53 % 2 ** 20 > 0).float().mean() > 0.99


def test_markers_are_never_drawn(small):
    evidence = infer_many(small, 1.5, chunks=50, draws=16)
    assert {i for latents in evidence.latents for latent in latents for i in latent} == {0, 1, 2}


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_rows_decode_what_each_would_alone(small, rows):
    """Fewer rows than draws of a prompt, rows that do not divide them, all at once: same ids, log-probs up to float
    error."""
    model, layout, (document, c) = small
    prompts = [layout.posterior_prompt(document, c), [layout.bos, 0], [layout.bos, 1, 2, 0, 0, 1, 2]]
    uniforms = uniform_numbers(1, "rows", (), (3, 5, 9))
    arguments = dict(stop=[layout.eol], banned=[layout.bos])
    ours = generate(model, prompts, uniforms, rows=rows, **arguments)
    for n, prompt in enumerate(prompts):
        for k in range(5):
            alone = generate(model, [prompt], uniforms[n:n + 1, k:k + 1], rows=1, **arguments)
            assert alone.ids[0] == ours.ids[n * 5 + k] and alone.finished[0] == ours.finished[n * 5 + k]
            torch.testing.assert_close(alone.log_prob[0], ours.log_prob[n * 5 + k], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_number_of_rows_changes_neither_ids_nor_evidence(small, rows):
    """Eight thoughts for each of twenty chunks, one row at a time or all at once."""
    model, layout, (document, c) = small
    places = [(type(document)(i, document.chunks, document.record), c) for i in range(20)]
    ours, other = (infer(model, layout, places, SampleConfig(num_latents=8, max_latent_tokens=CAP, rows=n), 1)
                   for n in (rows, 160))
    assert ours.latents == other.latents and torch.equal(ours.finished, other.finished)
    torch.testing.assert_close(ours.log_joint, other.log_joint, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.log_proposal, other.log_proposal, atol=1e-4, rtol=0)


def test_few_rows_wait(small):
    """Rows whose draw has ended are dropped before an eighth of them is idle."""
    model, layout, (document, c) = small
    prompts, uniforms = [layout.posterior_prompt(document, c)] * 40, uniform_numbers(3, "x", (), (40, 8, 20))
    drawn = generate(model, prompts, uniforms, rows=320, stop=[layout.eol], banned=[])
    assert len(set(map(len, drawn.ids))) > 5 and drawn.num_tokens <= drawn.row_steps < 8 / 7 * drawn.num_tokens


def test_progress_counts_every_draw_once(small):
    model, layout, (document, c) = small
    told = []
    generate(model, [layout.posterior_prompt(document, c)] * 5, uniform_numbers(3, "x", (), (5, 7, 9)), rows=14,
             stop=[layout.eol], banned=[], progress=told.append)
    assert sum(told) == pytest.approx(35) and len([n for n in told if n]) > 3
    told.clear()
    infer(model, layout, [(document, c)] * 5, SampleConfig(num_latents=7, max_latent_tokens=9), 0, told.append)
    assert sum(told) == pytest.approx(2 * 35)       # drawn and scored


def test_rows_that_are_looked_at_now_and_then_draw_the_same(small, monkeypatch):
    """As on a device that is asked only every eighth step which draws have ended: the same draws, a few steps for
    nobody."""
    model, layout, (document, c) = small
    arguments = dict(stop=[layout.eol], banned=[layout.bos], rows=9)
    prompts = [layout.posterior_prompt(document, c), [layout.bos, 0]]
    uniforms = uniform_numbers(1, "rows", (), (2, 9, 20))
    every = generate(model, prompts, uniforms, **arguments)
    monkeypatch.setattr(sample_latents, "CHECK_EVERY", {"cpu": 8})
    seldom = generate(model, prompts, uniforms, **arguments)
    assert seldom.ids == every.ids and torch.equal(seldom.finished, every.finished)
    torch.testing.assert_close(seldom.log_prob, every.log_prob, atol=1e-5, rtol=1e-5)
    assert seldom.row_steps > every.row_steps


class Recording(TorchDispatchMode):
    """A CUDA graph as a CPU can have it: operations on fixed tensors, noted without effect and run again by `replay`.

    Fails where one would make the host wait, or reads a number off a tensor.
    """

    def __init__(self, job):
        super().__init__()
        self.calls, self.before = [], []
        with self:
            job()
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        assert operation not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), operation
        for place, value in zip(operation._schema.arguments, arguments):
            if place.alias_info and place.alias_info.is_write:
                self.before.append((value, value.clone()))
        out = operation(*arguments, **(keywords or {}))
        self.calls.append((operation, arguments, keywords or {}, out))
        return out

    def replay(self):
        for operation, arguments, keywords, out in self.calls:
            again = operation(*arguments, **keywords)
            for old, new in zip(*(x if isinstance(x, list | tuple) else [x] for x in (out, again))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self):
        return None


def recorded_arguments(layout, model):
    prompts = [[layout.bos] + [n % 3] * (n % 5) for n in range(60)]
    return model, prompts, uniform_numbers(5, "record", (), (60, 6, 40)), dict(
        stop=[layout.eol], banned=[layout.bos])


@pytest.mark.parametrize("rows", [5, 48, 1000])
@pytest.mark.parametrize("look", [1, 8])
def test_a_recorded_step_draws_the_same(small, monkeypatch, rows, look):
    """Replayed steps read and write the same memory as called ones, over batches of different prompts, with idle
    rows."""
    model, prompts, uniforms, others = recorded_arguments(small[1], small[0])
    called = generate(model, prompts, uniforms, rows=rows, **others)
    recordings = []
    monkeypatch.setattr(sample_latents, "record",
                        lambda job, pool: (recordings.append(Recording(job)), recordings[-1])[1])
    monkeypatch.setattr(sample_latents, "RECORDS", ("cpu",))
    monkeypatch.setattr(sample_latents, "CHECK_EVERY", {"cpu": look})
    replayed = generate(model, prompts, uniforms, rows=rows, **others)
    assert replayed.ids == called.ids and torch.equal(replayed.finished, called.finished)
    torch.testing.assert_close(replayed.log_prob, called.log_prob, atol=1e-5, rtol=1e-5)
    assert 1 <= len(recordings) <= 8 * math.ceil(360 / min(rows, 360))        # a few shapes a batch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_replays_what_it_would_call(small, monkeypatch):
    recordings, record = [], sample_latents.record
    monkeypatch.setattr(sample_latents, "record", lambda job, pool: (recordings.append(1), record(job, pool))[1])
    model, prompts, uniforms, others = recorded_arguments(small[1], copy.deepcopy(small[0]).cuda())
    replayed = generate(model, prompts, uniforms, rows=48, **others)
    assert recordings
    monkeypatch.setattr(sample_latents, "RECORDS", ())
    called = generate(model, prompts, uniforms, rows=48, **others)
    assert replayed.ids == called.ids
    torch.testing.assert_close(replayed.log_prob, called.log_prob, atol=1e-4, rtol=1e-4)


def test_a_single_draw_is_kept_with_weight_one(small):
    evidence = infer_many(small, 1.0, chunks=10, draws=1)
    annotations = annotate([small[2]] * 10, evidence, small[1].tokenizer, SampleConfig(num_latents=1, keep="all"), 1)
    for latents, annotation in zip(evidence.latents, annotations):
        done = annotation["finished"][0]
        assert annotation["draws"][0]["weight"] == (1.0 if done else 0.0)
        assert annotation["latent_ids"] == (latents[0] if done else None)


def test_bfloat16_keeps_logits_in_float32(small):
    """The copy computes its products in bfloat16; what is summed into log-probs is float32, and they come near."""
    model, layout, place = small
    low = at_precision(model, "bfloat16")
    assert at_precision(model, "float32") is model and model.dtype == torch.float32 and low.dtype == torch.bfloat16
    ids = torch.randint(0, 9, (3, 12), generator=torch.Generator().manual_seed(0))
    assert low.logits(low.hidden(ids)).dtype == low(ids, ids).dtype == torch.float32
    difference = (low(ids, ids) - model(ids, ids)).abs()
    assert 0 < difference.max() < 0.1
    config = SampleConfig(num_latents=20, max_latent_tokens=CAP)
    evidence = infer(low, layout, [place], config, 1)
    exact = dict((z, p) for z, p, _ in enumerate_thoughts(*small, 1.3))
    for ids, log_p in zip(evidence.latents[0], evidence.log_joint[0].tolist()):
        assert log_p == -math.inf or abs(exact[tuple(ids)] - log_p) < 0.3


def test_step_log_probs_are_the_rescored_ones(small):
    """At temperature 1, with no banned id of weight, the sampler's sums agree with GPT.forward on the same ids."""
    model, layout, (document, c) = small
    prompt = layout.posterior_prompt(document, c)
    drawn = generate(model, [prompt], uniform_numbers(2, "x", (), (1, 20, 8)), stop=[layout.eol], banned=[])
    for ids, log_prob, finished in zip(drawn.ids, drawn.log_prob, drawn.finished):
        new = ids + [layout.eol] * int(finished)
        whole = torch.tensor([prompt + new])
        targets = whole[:, 1:].clone()
        targets[:, :len(prompt) - 1] = -1
        torch.testing.assert_close(model(whole[:, :-1], targets).sum(), log_prob, atol=1e-5, rtol=1e-5)


def test_greedy_decoding_is_the_argmax(small):
    model, layout, _ = small
    drawn = generate(model, [[layout.bos, 0]], torch.zeros(1, 1, 4), stop=[], banned=[], greedy=True)
    ids = [layout.bos, 0]
    for _ in range(4):
        ids.append(int(model.logits(model.hidden(torch.tensor([ids])))[0, -1].argmax()))
    assert drawn.ids[0] == ids[2:]


def test_equal_draws_are_scored_once_and_alike(small):
    model, layout, place = small
    log_joint, tokens = score_joint(model, layout, [place], [[[0, 1], [2], [0, 1]]])
    assert log_joint[0, 0] == log_joint[0, 2] != log_joint[0, 1]
    assert tokens == len(layout.prior_prompt(*place)) + len([0, 1]) + len([2]) + 2 * 2      # EOL and x after each
    some, fewer = score_joint(model, layout, [place], [[[0, 1], [2], [0, 1]]], torch.tensor([[False, True, False]]))
    assert some[0, 0] == some[0, 2] == -math.inf and fewer == tokens - len([0, 1]) - 2
    torch.testing.assert_close(some[0, 1], log_joint[0, 1])


@pytest.mark.parametrize("batch_tokens", [1, 20, 10 ** 6])
def test_scoring_after_a_shared_prompt_equals_scoring_whole(documents, layout, monkeypatch, batch_tokens):
    """Ragged prompts, ragged thoughts, any batch: the sum over one uncached pass of BOS C SOL PRIOR z EOL x."""
    monkeypatch.setattr(sample_latents, "BATCH_TOKENS", {"cpu": batch_tokens})
    model = random_model(layout.tokenizer.vocab_size, context=16)
    places = [(documents[0], 1), (documents[1], 1), (documents[1], 0), (documents[3], 1)]
    latents = [[[0], [1, 2, 3, 4, 0]], [[], [2, 2]], [[1], [1]], [[3, 3, 3], []]]
    log_joint, _ = score_joint(model, layout, places, latents)
    whole = [[log_prob_of(model, joint(layout, place, z)) for z in draws] for place, draws in zip(places, latents)]
    torch.testing.assert_close(log_joint, torch.tensor(whole), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="context of 16"):
        score_joint(model, layout, places[:1], [[[0] * 12]])


def test_sequences_without_a_prompt_of_their_own_are_scored_after_BOS(layout):
    model = random_model(layout.tokenizer.vocab_size)
    texts = [Sequence().add(TEXT, [i % 5 for i in range(n)]) for n in (4, 9, 3, 20, 9, 15)]
    whole = [log_prob_of(model, text.after([layout.bos])) for text in texts]
    torch.testing.assert_close(score(model, [[layout.bos]], [0] * 6, texts), torch.tensor(whole), atol=1e-5, rtol=1e-5)


def test_an_empty_text_costs_nothing(layout):
    """As of a chunk without text: log 1, alone or beside others."""
    model, texts = random_model(layout.tokenizer.vocab_size), [Sequence(), Sequence().add(TEXT, [1, 2])]
    for prompt in ([layout.bos], [layout.bos, 3, 4]):
        assert score(model, [prompt], [0], texts[:1]).tolist() == [0.0]
        both = score(model, [prompt], [0, 0], texts)
        assert both[0] == 0 and both[1].item() == pytest.approx(log_prob_of(model, texts[1].after(prompt)), abs=1e-5)


def test_length_batches_hold_everything_once_within_the_budget():
    """Longest first, an eighth padding at most, and as many tokens as fit; one thing that is too long stands alone."""
    lengths = [4, 9, 3, 20, 9, 15, 8]
    assert list(length_batches(lengths, 25)) == [[3], [5], [1, 4], [6], [0], [2]]
    assert list(length_batches(lengths, 27)) == [[3], [5], [1, 4, 6], [0], [2]]
    assert list(length_batches(lengths, 1)) == [[3], [5], [1], [4], [6], [0], [2]]


def test_a_draw_depends_on_its_labels_only(small):
    """Document, chunk, round and seed decide, not what is drawn beside it."""
    model, layout, (document, c) = small
    places = [(type(document)(i, document.chunks, document.record), c) for i in range(4)]
    config = SampleConfig(num_latents=3, max_latent_tokens=CAP)
    together = propose(model, layout, places, config, 1).ids
    assert propose(model, layout, places[2:3], config, 1).ids == together[6:9]
    assert propose(model, layout, places, config, 2).ids != together
    assert propose(model, layout, places, SampleConfig(num_latents=2, max_latent_tokens=CAP), 1).ids[:2] == together[:2]


def test_neither_the_number_of_draws_nor_the_cap_changes_a_random_number():
    whole = latent_uniforms(0, 1, 2, 3, num_latents=6, max_tokens=80)
    assert torch.equal(latent_uniforms(0, 1, 2, 3, num_latents=2, max_tokens=40), whole[:2, :40])
    assert whole.unique().numel() > 470 and not torch.equal(latent_uniforms(0, 1, 2, 4, 6, 80), whole)


def test_a_prompt_without_room_is_an_error(small):
    model, layout, _ = small
    with pytest.raises(ValueError, match="context of 64"):
        generate(model, [[0] * 60], torch.zeros(1, 1, 5), stop=[], banned=[])


# ---- the E-step's file -----------------------------------------------------------------------------------------

WORDS = ["a", " a", " b", " c", " d", " e"]
CORPUS = [{"text": f"a {x} {y}", "chunks": [{"suffix": f"a {x}", "given": True}, {"suffix": f" {y}", "latent": None}]}
          for x in "abcde" for y in "abcde"] + [{"text": "a b", "chunks": [{"suffix": "a b", "latent": " c"}]}]


@pytest.fixture
def stage(tmp_path):
    """A checkpoint and a corpus on disk, as train.py and prepare.py leave them."""
    tokenizer = tokenizer_for(WORDS, "words")
    model = random_model(tokenizer.vocab_size, context=32)
    save_checkpoint(str(tmp_path / "ckpt.pt"), model, tokenizer=tokenizer.state())
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in CORPUS))
    return tmp_path


def flags_of(stage, out, *more):
    return ["--checkpoint", str(stage / "ckpt.pt"), "--data", str(stage / "corpus.jsonl"), "--out", str(stage / out),
            "--device", "cpu", "--num_latents", "4", "--max_latent_tokens", "6", "--block_chunks", "7", *more]


def run_main(stage, out, *flags):
    main(flags_of(stage, out, *flags))
    return (stage / out).read_bytes()


def test_the_output_is_the_corpus_with_latents_and_evidence(stage):
    """Every chunk that wanted a thought has one, or none where no draw finished; the kept one can be recomputed."""
    run_main(stage, "latents.jsonl")
    records = read_corpus(str(stage / "latents.jsonl"))
    assert [r["text"] for r in records] == [r["text"] for r in CORPUS] and records[-1]["chunks"] == CORPUS[-1]["chunks"]
    for record in records[:-1]:
        chunk = record["chunks"][1]
        log_w = [-math.inf if p is None else p - q for p, q in zip(chunk["log_joint"], chunk["log_proposal"])]
        assert [w > -math.inf for w in log_w] == chunk["finished"]
        if any(chunk["finished"]):
            assert chunk["bound"] == pytest.approx(importance_bound(torch.tensor(log_w)).item(), abs=1e-5)
            assert len(chunk["latent_ids"]) in [n for n, ok in zip(chunk["lengths"], chunk["finished"]) if ok]
        else:
            assert chunk.get("latent") is None and chunk.get("bound") is None


def test_a_chunk_without_a_finished_draw_stays_plain_and_is_counted(stage):
    run_main(stage, "short.jsonl", "--max_latent_tokens", "1", "--num_latents", "1")
    records = read_corpus(str(stage / "short.jsonl"))
    plain = [r for r in records[:-1] if r["chunks"][1].get("latent") is None]
    figures = figures_in(stage, "short.jsonl")
    assert 0 < len(plain) < 25 and figures["left_plain"] == len(plain) and figures["chunks"] == 25
    assert figures["unfinished"] == pytest.approx(len(plain) / 25) and math.isfinite(figures["bound"])


def figures_in(stage, out):
    return json.loads((stage / f"{out}.run" / "figures.json").read_text())


def test_the_figures_are_those_of_the_lines(stage):
    """Recomputed from the evidence that the output holds."""
    run_main(stage, "latents.jsonl")
    drawn = [chunk for record in read_corpus(str(stage / "latents.jsonl")) for chunk in record["chunks"]
             if "log_joint" in chunk]
    usable, log_w = [chunk for chunk in drawn if any(chunk["finished"])], []
    for chunk in drawn:
        log_w.append([p - q for p, q in zip(chunk["log_joint"], chunk["log_proposal"]) if p is not None])
    weights = [torch.tensor(row).softmax(0) for row in log_w if row]
    mean = lambda values: pytest.approx(sum(values) / len(values), rel=1e-4)
    figures = figures_in(stage, "latents.jsonl")
    assert figures["chunks"] == len(drawn) and figures["left_plain"] == len(drawn) - len(usable)
    assert figures["ess"] == mean([chunk["ess"] for chunk in usable])
    assert figures["bound"] == mean([chunk["bound"] for chunk in usable])
    assert figures["weight_entropy"] == mean([-(w * w.log()).sum().item() for w in weights])
    assert figures["elbo_finished"] == mean([x for row in log_w for x in row])
    assert figures["latent_tokens"] == mean([n for chunk in drawn for n in chunk["lengths"]])
    assert figures["sampled_tokens"] == sum(n + done for c in drawn for n, done in zip(c["lengths"], c["finished"]))


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_a_killed_run_continues_to_the_same_bytes(stage, monkeypatch, stop_at):
    """Stopped in any block; finished blocks are not drawn again, and a file that was not finished is not read."""
    whole = run_main(stage, "whole.jsonl")
    annotate_block, calls = sample_latents.annotate_block, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return annotate_block(*arguments)
    monkeypatch.setattr(sample_latents, "annotate_block", failing)
    with pytest.raises(KeyboardInterrupt):
        run_main(stage, "killed.jsonl")
    assert not (stage / "killed.jsonl").exists()
    blocks = stage / "killed.jsonl.run" / "blocks"
    blocks.mkdir(exist_ok=True)
    (blocks / "000000003.jsonl.tmp").write_text('{"text": "half a li')
    assert run_main(stage, "killed.jsonl") == whole and len(calls) == 5
    assert not blocks.exists() and figures_in(stage, "killed.jsonl") == figures_in(stage, "whole.jsonl")


def test_a_full_disk_is_named_and_the_same_command_goes_on(stage):
    """Nothing half-written is left, and the end is that of a run that had room."""
    whole = run_main(stage, "whole.jsonl")
    with full_disk(2500), pytest.raises(OSError, match="could not write .*blocks/000000000.jsonl .*make room"):
        run_main(stage, "out.jsonl")
    assert not list(stage.rglob("*.tmp")) and not (stage / "out.jsonl").exists()
    with full_disk(len(whole) // 2), pytest.raises(OSError, match="could not write .*joined"):
        run_main(stage, "out.jsonl")
    assert run_main(stage, "out.jsonl") == whole and not list(stage.rglob("*.tmp"))


def test_ranks_divide_the_blocks_and_write_the_same_bytes(stage):
    """Rank 1 of two does every second block; rank 0 the others and the merging."""
    whole = run_main(stage, "whole.jsonl")
    state = read_checkpoint(str(stage / "ckpt.pt"))
    model = restore(state)
    tokenizer = sample_latents.Tokenizer(**state["tokenizer"])
    config = SampleConfig(num_latents=4, max_latent_tokens=6, block_chunks=7, dtype="float32")
    out = str(stage / "two.jsonl")
    corpus = str(stage / "corpus.jsonl")
    [blocks] = survey(corpus, Layout(tokenizer), config)
    Silent = type("Silent", (Ranks,), {"barrier": lambda self: None})
    with pytest.raises(FileNotFoundError):
        e_step(model, tokenizer, corpus, blocks, config, 1, out, Silent(1, 2, torch.device("cpu")))
    assert len(list((stage / "two.jsonl.run" / "blocks").glob("*.json"))) == 2
    e_step(model, tokenizer, corpus, blocks, config, 1, out, Silent(0, 2, torch.device("cpu")))
    assert (stage / "two.jsonl").read_bytes() == whole


def test_jobs_that_know_nothing_of_each_other_draw_parts_and_the_last_joins_them(stage, capsys):
    whole = run_main(stage, "whole.jsonl")
    for number in (3, 1, 2):
        assert not (stage / "parts.jsonl").exists()
        main(flags_of(stage, "parts.jsonl", "--part", f"{number}/3"))
    assert (stage / "parts.jsonl").read_bytes() == whole and "are left to others" in capsys.readouterr().out
    main(flags_of(stage, "parts.jsonl", "--part", "1/3"))          # once more does no harm
    for part in ("0/3", "4/3", "x", "1", "1/2/3"):
        with pytest.raises(ValueError, match="--part"):
            main(flags_of(stage, "x.jsonl", "--part", part))


@pytest.mark.slow
def test_jobs_at_different_times_of_which_one_is_killed_draw_the_same_bytes(stage):
    """The killed one's part is done by the same command again; two with one part are one too many. One thread each, as
    here: more may round otherwise."""
    whole, root = run_main(stage, "whole.jsonl"), Path(sample_latents.__file__).parent

    def job(number):
        command = [sys.executable, "sample_latents.py", *flags_of(stage, "parts.jsonl", "--part", f"{number}/3")]
        return subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    first, killed = job(1), job(2)
    while not (stage / "parts.jsonl.run" / "part_2_of_3" / ".lock").exists():
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert first.wait() == 0
    again, last = job(2), job(3)
    assert again.wait() == last.wait() == 0 or b"in use" in again.stderr.read() + last.stderr.read()
    assert job(1).wait() == 0
    assert (stage / "parts.jsonl").read_bytes() == whole and not list(stage.rglob("*.jsonl.*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_gloo_processes_write_the_same_bytes(stage, processes):
    """torchrun over several processes, one thread each: the file of one process."""
    whole = run_main(stage, "whole.jsonl")
    flags = ["--checkpoint", "ckpt.pt", "--data", "corpus.jsonl", "--out", "two.jsonl", "--device", "cpu",
             "--num_latents", "4", "--max_latent_tokens", "6", "--block_chunks", "7"]
    script = str(Path(sample_latents.__file__))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    subprocess.run([sys.executable, *launcher, script, *flags], cwd=stage, check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (stage / "two.jsonl").read_bytes() == whole


def test_an_output_of_other_settings_is_refused(stage):
    run_main(stage, "latents.jsonl")
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        run_main(stage, "latents.jsonl", "--seed", "1")


def test_an_output_without_its_settings_is_not_taken_for_new(stage):
    run_main(stage, "latents.jsonl")
    shutil.rmtree(stage / "latents.jsonl.run")
    with pytest.raises(ValueError, match="without its"):
        run_main(stage, "latents.jsonl")


def test_the_config_of_a_run_repeats_it(stage):
    whole = run_main(stage, "whole.jsonl", "--seed", "3")
    main(["--config", str(stage / "whole.jsonl.run" / "config.json"), "--out", str(stage / "again.jsonl")])
    assert (stage / "again.jsonl").read_bytes() == whole


@pytest.mark.parametrize("flag, value", [("--num_latents", "0"), ("--temperature", "-1"), ("--max_latent_tokens", "0")])
def test_a_setting_that_makes_no_sense_is_named(stage, flag, value):
    with pytest.raises(ValueError, match=f"{flag}: {value}"):
        run_main(stage, "x.jsonl", flag, value)


def test_keep_all_writes_every_draw_with_its_weight(stage):
    """The weights are the softmax of the log-weights, an unfinished draw has none, and what is kept is among the
    draws."""
    one, every = (run_main(stage, f"{keep}.jsonl", "--keep", keep) for keep in ("one", "all"))
    for a, b in zip(map(json.loads, one.splitlines()), map(json.loads, every.splitlines())):
        a, b = a["chunks"][-1], b["chunks"][-1]
        if "log_joint" in b:
            log_w = torch.tensor([-math.inf if p is None else p - q for p, q in zip(b["log_joint"], b["log_proposal"])])
            expected = log_w.softmax(-1) if any(b["finished"]) else torch.zeros(4)
            draws = b.pop("draws")
            torch.testing.assert_close(torch.tensor([draw["weight"] for draw in draws]), expected)
            ids = [draw["latent_ids"] for draw in draws]
            assert [len(draw) for draw in ids] == b["lengths"] and (b["latent"] is None or b["latent_ids"] in ids)
        assert a == b


def test_chunks_with_a_latent_are_drawn_anew_only_where_asked(stage):
    """An annotated corpus is left as it is; --redraw true draws for every observed chunk, and drops what was there."""
    again = ["--data", str(stage / "first.jsonl"), "--round", "2"]
    run_main(stage, "first.jsonl", "--keep", "all")
    run_main(stage, "same.jsonl", *again)
    run_main(stage, "other.jsonl", *again, "--redraw", "true")
    first, same, other = (read_corpus(str(stage / f"{name}.jsonl")) for name in ("first", "same", "other"))
    with_latent = [n for n, record in enumerate(first) if record["chunks"][-1].get("latent") is not None]
    assert len(with_latent) > 10
    for n in with_latent:
        old, kept = first[n]["chunks"][-1], same[n]["chunks"][-1]
        assert kept == {name: old[name] for name in ("suffix", "latent", "latent_ids", "draws") if name in old}
    assert figures_in(stage, "same.jsonl")["chunks"] == len(CORPUS) - len(with_latent)
    assert all("draws" not in record["chunks"][-1] and len(record["chunks"][-1]["finished"]) == 4 for record in other)
    assert figures_in(stage, "other.jsonl")["chunks"] == len(CORPUS)
    assert [record["text"] for record in other] == [record["text"] for record in CORPUS]


def test_a_corpus_that_changed_is_refused(stage):
    """A finished block of other lines is never joined."""
    run_main(stage, "latents.jsonl")
    with open(stage / "corpus.jsonl", "a") as file:
        file.write('{"text": "a c"}\n')
    with pytest.raises(ValueError, match="data_sha256"):
        run_main(stage, "latents.jsonl")


def test_ids_of_another_vocabulary_are_refused(stage):
    """Kept latents and all draws alike, with file and line; --redraw true does not read them."""
    chunk = {"suffix": "a b", "latent": " c", "latent_ids": [55]}
    (stage / "corpus.jsonl").write_text(json.dumps({"text": "a b", "chunks": [chunk]}) + "\n")
    with pytest.raises(ValueError, match="corpus.jsonl:1: .*another vocabulary"):
        run_main(stage, "x.jsonl")
    run_main(stage, "x.jsonl", "--redraw", "true")
    draws = [{"latent": " c", "latent_ids": [0], "weight": 1.0}]
    record = {"text": "a", "chunks": [{"suffix": "a", "latent": "a", "draws": draws}]}
    with pytest.raises(ValueError, match="another vocabulary"):
        encode_document(0, record, tokenizer_for(WORDS, "words"))


def test_blocks_hold_whole_documents_with_about_so_many_chunks(tmp_path, layout):
    """A document is never cut; chunks count, so that no block of long documents takes hours, and documents that have
    nothing to draw for, so that none of them fills the memory."""
    path = tmp_path / "corpus.jsonl"
    counts = [1, 1, 0, 5, 1, 1, 1, 1, 0]
    documents = [{"text": "a" * n, "chunks": [{"suffix": "a"}] * n} for n in counts]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    config = SampleConfig(block_chunks=3, max_latent_tokens=4)
    assert survey(str(path), layout, config) == [[(0, 3, 2), (3, 1, 5), (4, 3, 3), (7, 2, 1)]]
    assert survey(str(path), layout, config, slices=2) == [[(0, 3, 2), (3, 1, 5)], [(4, 3, 3), (7, 2, 1)]]
    assert survey(str(path), layout, config, slices=9)[1:3] == [[(1, 1, 1)], [(2, 1, 0)]]


def test_all_cores_survey_a_large_corpus_alike(tmp_path, layout, monkeypatch):
    """The same blocks, and a line that is no document named all the same."""
    path, config = tmp_path / "corpus.jsonl", SampleConfig(block_chunks=4, max_latent_tokens=4, chunk_tokens=16)
    path.write_text("".join(json.dumps({"text": "a" + " a" * (n % 5)}) + "\n" for n in range(40)))
    [blocks] = survey(str(path), layout, config)
    monkeypatch.setattr(cache, "PART_BYTES", 200)
    assert survey(str(path), layout, config) == [blocks] and len(blocks) == 10
    with open(path, "a") as file:
        file.write('{"text": 1}\n')
    with pytest.raises(ValueError, match="corpus.jsonl:41: "):
        survey(str(path), layout, config)


@pytest.mark.parametrize("line, message", [
    ("{\"text\": ", "corpus.jsonl:2: "), ('{"text": "zebra"}', "corpus.jsonl:2: 'zebra'.*vocabulary")])
def test_a_bad_line_is_named_before_the_model_is_loaded(stage, monkeypatch, line, message):
    monkeypatch.setattr(sample_latents, "restore", lambda *arguments: pytest.fail("the model was loaded"))
    (stage / "corpus.jsonl").write_text('{"text": "a b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        run_main(stage, "x.jsonl")
    assert not list(stage.glob("x.jsonl*"))


def test_show_prints_thoughts_with_their_weights(stage, capsys):
    """Equal draws together, their weights adding up to one, the kept one marked; no file is written."""
    main(["--checkpoint", str(stage / "ckpt.pt"), "--data", str(stage / "corpus.jsonl"),
          "--out", str(stage / "x.jsonl"), "--device", "cpu", "--num_latents", "8", "--max_latent_tokens", "6",
          "--show", "2"])
    shown = capsys.readouterr().out
    assert shown.count("document ") == 2 and shown.count(" kept ") <= 2 and "ess" in shown
    assert not (stage / "x.jsonl").exists()
    first = [line.lstrip(" █") for line in shown.split("\n\n")[0].splitlines() if " x " in line]
    assert sum(float(line.split()[0]) for line in first) == pytest.approx(1, abs=0.05)
    assert sum(int(line.split()[1]) for line in first) == 8


def test_prompt_thinks_then_answers(stage, capsys):
    """The greedy thought after BOS text SOL PRIOR, then the greedy text after it."""
    main(["--checkpoint", str(stage / "ckpt.pt"), "--device", "cpu", "--prompt", "a b c", "--max_latent_tokens", "6"])
    lines = capsys.readouterr().out.splitlines()
    shown = dict(line.split(maxsplit=1) if " " in line.strip() else (line.strip(), "") for line in lines)
    assert set(shown) == {"prompt", "thought", "answer"} and shown["prompt"] == "a b c"


def test_several_prompts_come_from_the_standard_input_and_thoughts_are_drawn(stage, capsys, monkeypatch):
    """As lines of a corpus are read: a byte order mark, CRLF and blank lines do no harm."""
    flags = ["--checkpoint", str(stage), "--device", "cpu", "--prompt", "-", "--thoughts", "3", "--temperature", "2",
             "--max_latent_tokens", "6"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(codecs.BOM_UTF8 + b"a b\r\n\n \na c d\n")))
    main(flags)
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert words == (["prompt"] + ["thought", "answer"] * 3) * 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b\n\xe9\n")))
    with pytest.raises(ValueError, match="--prompt:2: the file is not UTF-8"):
        main(flags)


def test_a_text_of_ones_own_is_thought_about_and_weighed(stage):
    """From a run folder, as functions: the figures are those of the E-step on the same text."""
    model, layout = load(str(stage))
    config = SampleConfig(num_latents=6, max_latent_tokens=6)
    thoughts, bound = weigh(model, layout, "a b", " c", config)
    assert sum(weight for weight, _ in thoughts) == pytest.approx(1, abs=1e-5)
    assert thoughts == sorted(thoughts, reverse=True) and len(thoughts) == 6
    document = encode_document(0, CORPUS[7], layout.tokenizer)
    assert document.record["text"] == "a b c"
    evidence = infer(model, layout, [(document, 1)], config, round=0)
    assert bound == importance_bound(evidence.log_weights).item()
    (thought, answer), = think(model, layout, "a b", config)
    assert think(model, layout, "a b", config, draws=4) == think(model, layout, "a b", config, draws=4)
    assert isinstance(thought, str) and isinstance(answer, str)


def test_places_to_infer_are_the_observed_chunks_without_thought(documents, layout):
    assert [c for _, c in places_to_infer(layout, documents[1])] == [0]
    assert places_to_infer(layout, documents[0]) == []


# ---- texts that do not fit -------------------------------------------------------------------------------------

def test_where_C_has_no_room_the_evidence_is_that_of_the_C_that_is_left(small):
    """C loses its oldest chunks first, in sampling and scoring alike; by enumeration the mean weight is then the sum of
    p(z, x | that C)."""
    model, layout, _ = small
    record = {"text": " a b c a", "chunks": [{"suffix": " a", "given": True}, {"suffix": " b c", "given": True},
                                             {"suffix": " a"}]}
    document = encode_document(0, record, layout.tokenizer)
    texts = {}
    for room, left in ((4, " a b c"), (3, " b c"), (2, ""), (1, "")):
        tight = Layout(layout.tokenizer, room + CAP + 5, CAP)
        assert tight.fits(document, 2) and len(tight.posterior_prompt(document, 2)) + CAP <= room + CAP + 5
        texts[left] = [layout.tokenizer.decode(prompt[1:1 + len(left.split())]) for prompt in (
            tight.context(document, 2), tight.prior_prompt(document, 2), tight.posterior_prompt(document, 2),
            tight.direct_prompt(document, 2, True))]
        assert set(texts[left]) == {left}
    tight = Layout(layout.tokenizer, 3 + CAP + 5, CAP)
    evidence = infer_many((model, tight, (document, 2)), 1.0, chunks=300, draws=40)
    exact = sum(math.exp(log_p) for _, log_p, _ in enumerate_thoughts(model, tight, (document, 2), 1.0))
    weights = evidence.log_weights.exp().flatten()
    assert abs(weights.mean().item() - exact) < 4 * (weights.std() / len(weights) ** 0.5).item()
    other = sum(math.exp(log_p) for _, log_p, _ in enumerate_thoughts(model, layout, (document, 2), 1.0))
    assert abs(other - exact) > 8 * (weights.std() / len(weights) ** 0.5).item()


def test_one_long_document_does_not_stop_a_corpus(stage):
    """Its chunks without room stay plain, others lose C; both are counted, and everything else is drawn as before."""
    run_main(stage, "before.jsonl")
    lines = (stage / "corpus.jsonl").read_text()
    chunks = [{"suffix": "a" + " b" * 16}, {"suffix": " c" * 40}, {"suffix": " d" * 5}]
    record = {"text": "".join(chunk["suffix"] for chunk in chunks), "chunks": chunks}
    (stage / "corpus.jsonl").write_text(lines + json.dumps(record) + "\n")
    run_main(stage, "after.jsonl")
    before, after = (read_corpus(str(stage / name)) for name in ("before.jsonl", "after.jsonl"))
    assert after[:21] == before[:21]        # but for the block that it is in
    figures = figures_in(stage, "after.jsonl")
    assert (figures["chunks"], figures["too_long"], figures["cut_context"]) == (27, 1, 1)
    assert ["log_joint" in chunk for chunk in after[-1]["chunks"]] == [True, False, True]


def test_a_text_is_split_so_that_it_fits_a_small_model(stage):
    """The cap of a chunk is a quarter of the context where nothing else is said; C then has its three chunks."""
    tokenizer = tokenizer_for(["a b c\n"], "words")
    save_checkpoint(str(stage / "ckpt.pt"), random_model(tokenizer.vocab_size, context=32), tokenizer=tokenizer.state())
    (stage / "corpus.jsonl").write_text(json.dumps({"text": "a b c\n" * 30}) + "\n")
    run_main(stage, "out.jsonl")
    record, = read_corpus(str(stage / "out.jsonl"))
    assert {chunk["suffix"].count("\n") for chunk in record["chunks"]} == {2}         # of 4 tokens each; 8 are allowed
    assert figures_in(stage, "out.jsonl")["too_long"] == 0
    run_main(stage, "small.jsonl", "--chunk_tokens", "4")
    record, = read_corpus(str(stage / "small.jsonl"))
    assert {chunk["suffix"] for chunk in record["chunks"]} == {"a b c\n"}
    with pytest.raises(ValueError, match="leave no room for text in a context of 32"):
        run_main(stage, "x.jsonl", "--max_latent_tokens", "27")
    assert not list(stage.glob("x.jsonl*"))
