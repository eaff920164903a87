"""The E-step: draw K thoughts for every chunk of text, weigh each by p(z, x | C) / q(z | x, C), keep one by its weight.

    python sample_latents.py --checkpoint runs/train/ckpt.pt --data data/alchemy/raw.jsonl --out latents.jsonl
    torchrun --standalone --nproc_per_node=2 sample_latents.py ...        the same file, drawn by two processes

The output is the corpus with a latent per chunk and the evidence to recompute the choice; train.py reads it as it is.
Ids are sampled, the same ids are scored, and the same ids are trained on: no text stands between.

    config -> drawing a token -> decoding in lock-step -> propose -> score -> the estimator -> a corpus -> main

Shapes: N chunks, K draws each, L most new tokens of a draw, B rows that decode together, V vocabulary.
"""
import copy
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # a Ctrl-C ends the imports too, of which numpy's would lose it

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.cache import on_all_cores
from data.corpus import Document, chunk_cap, encode_document, naming_the_line, numbered_lines, read_document, text_of
from data.layout import Layout, Sequence
from data.loader import collate
from data.report import show_chunk
from data.run import (Ranks, as_began, choose_dtype, folder_beside, hold, hold_early, open_run, option, parse_config,
                      random_stream, read_json, script, sha256_of, start_ranks, whole_file, write_whole)
from data.tokens import Tokenizer, tokenizer_from
from model import GPT, Branches, Prompts, Shape, read_checkpoint, restore


BATCH_TOKENS = {"cpu": 2 ** 12, "cuda": 2 ** 16, "mps": 2 ** 13}        # that are prefilled or scored at once
CHECK_EVERY = {"cpu": 1, "cuda": 8, "mps": 8}       # steps between looks at which draws have ended
RECORDS = ("cuda",)         # devices that replay a recorded step

# ---- config ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SampleConfig:
    num_latents: int = option(16, "K, the thoughts drawn per chunk", above=0)
    temperature: float = option(1.3, "of the proposal, which log_proposal counts; above 1 it explores more", above=1e-4)
    max_latent_tokens: int = option(32, "a draw that is longer is unfinished: weight zero, never trained on", above=0)
    rows: int = option(512, "draws that decode together", above=0)
    block_chunks: int = option(1000, "chunks drawn and written as one; a killed run does as many again", above=0)
    chunk_tokens: int = option(0, "tokens of a chunk at most, where a document is text alone and has to be split; 0: "
                                  "256, or a quarter of the context", at_least=0)
    keep: Literal["one", "all"] = option("one", "of the K thoughts: the chosen one, or all with their weights, and "
                                                "training picks one of them afresh each epoch")
    redraw: bool = option(False, "draw anew for chunks that have a latent")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the products; auto: bfloat16 on CUDA, and from width 192 on CPUs with units for it")
    seed: int = option(0, "of the draws and of the choice among them", at_least=0)


# ---- drawing a token -------------------------------------------------------------------------------------------

def vocabulary_mask(model: GPT, ids: list[int]) -> Tensor:
    """(V,) bool, True at the ids."""
    mask = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.embedding.weight.device)
    mask[ids] = True
    return mask


def proposal_log_probs(logits: Tensor, temperature: float, banned: Tensor) -> Tensor:
    """log q(next token), (B, V) float32 nats: softmax at a temperature over the ids that are not banned.

    logits (B, V), banned (V,) bool. Never truncated (no top-k, no top-p): importance sampling needs the whole support.
    """
    bias = torch.zeros(banned.shape, device=logits.device).masked_fill_(banned, -math.inf)
    return torch.add(bias, logits, alpha=1 / temperature).log_softmax(dim=-1)


def first_above(masses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry where the running sum of masses (B, n) tops the target (B,), and the target less what is before.

    No binary search: a parallel cumsum, as on CUDA, is not quite monotone, and an entry of mass 0 could be hit.
    """
    cdf = masses.cumsum(dim=-1).where(masses > 0, 0.0)
    targets = torch.minimum(targets, cdf.amax(dim=-1) * (1 - 2 ** -52))[:, None]
    index = (cdf > targets).int().argmax(dim=-1, keepdim=True)
    rest = targets - (cdf - masses).gather(1, index)
    return index.squeeze(1), rest.clamp(min=0).squeeze(1)


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The index that each uniform number picks, (B, V) float32 and (B,) float64 -> (B,); never one of probability 0.

    First a block of about sqrt(V) entries by the masses of the blocks, then an entry of it. Sums are float64: with
    numbers of 23 bits many ids of a vocabulary of 128k would have none that picks them.
    """
    if probabilities.device.type == "mps":      # has no float64
        return inverse_cdf(probabilities.cpu(), uniforms.cpu()).to(probabilities.device)
    V = probabilities.shape[-1]
    size = 1 << V.bit_length() // 2
    blocks = F.pad(probabilities, (0, -V % size)).unflatten(-1, (-1, size))                   # (B, V / size, size)
    masses = blocks.sum(dim=-1, dtype=torch.float64)
    block, rest = first_above(masses, uniforms * masses.sum(dim=-1))
    inside, _ = first_above(blocks[torch.arange(len(block), device=block.device), block].double(), rest)
    return block * size + inside


def uniform_numbers(seed: int, purpose: str, labels: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """float64 in [0, 1) with 53 random bits, a function of (seed, purpose, labels)."""
    return torch.from_numpy(np.asarray(random_stream(seed, purpose, *labels).random(shape)))


def latent_uniforms(seed: int, round: int, document: int, chunk: int, num_latents: int, max_tokens: int) -> Tensor:
    """A number for each draw and position, (K, L): a function of (seed, round, document, chunk, draw, position) alone.

    Each 32 positions have a stream of their own, drawn row by row, so neither K nor the cap L changes any number.
    """
    blocks = [uniform_numbers(seed, "latent", (round, document, chunk, block), (num_latents, 32))
              for block in range(math.ceil(max_tokens / 32))]
    return torch.cat(blocks, dim=1)[:, :max_tokens]


# ---- decoding in lock-step -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Generated:
    """What was decoded after each of N x K prompts: new ids without the stop id, nats of the distribution that was
    sampled (the stop id's counted once), and whether a stop id came within the cap."""
    ids: list[list[int]]
    log_prob: Tensor        # (N K,) float32
    finished: Tensor        # (N K,) bool
    num_tokens: int         # that were drawn, stop ids included
    row_steps: int          # that were computed: with those of rows whose draw had ended


def length_batches(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Numbers of things of like length, longest first, in batches of so many tokens at most, an eighth padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest, rows = lengths[order[0]], 1
        while rows < len(order) and (rows + 1) * longest <= tokens and lengths[order[rows]] >= 7 / 8 * longest:
            rows += 1
        yield order[:rows]
        order = order[rows:]


def prefill(model: GPT, prompts: list[list[int]]) -> Prompts:
    """Keys and values of prompts but for their last tokens, which what continues them reads first."""
    device, longest = model.embedding.weight.device, max(map(len, prompts)) - 1
    cache = Prompts(model.config, len(prompts), longest, device, model.dtype)
    cache.lengths[:] = torch.tensor([len(prompt) - 1 for prompt in prompts])
    at_once = max(1, BATCH_TOKENS[device.type] // max(1, longest))
    for cache.first in range(0, len(prompts) if longest else 0, at_once):
        part = prompts[cache.first:cache.first + at_once]
        ids = torch.tensor([prompt[:-1] + [0] * (longest + 1 - len(prompt)) for prompt in part])
        model.hidden(ids.to(device), cache=cache)
    return cache


def record(job: Callable[[], None], pool) -> "torch.cuda.CUDAGraph":
    """A job that ran before as a CUDA graph, launched all at once. `pool`: memory shared with other graphs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        job()
    return graph


def rows_to_keep(alive: np.ndarray, few_shapes: bool) -> np.ndarray | None:
    """Which rows (B,) to go on with, where that saves enough: those alive, and idle ones that keep the shape."""
    drawing = int(alive.sum())
    rows = max(16, 1 << (drawing - 1).bit_length()) if few_shapes else drawing
    if rows > 7 / 8 * len(alive):
        return None
    alive[np.flatnonzero(~alive)[:rows - drawing]] = True
    return alive


def decode_batch(model: GPT, prompts: list[list[int]], owner: np.ndarray, uniforms: Tensor, choose, stops: Tensor,
                 progress: Callable[[float], None]) -> tuple[Tensor, Tensor, int]:
    """Decode n draws in lock-step: draw i continues prompts[owner[i]], each step gives every row a token, and rows
    whose draw has ended are dropped, others moving up into their places, once they are an eighth.

    uniforms (n, L). Returns ids (n, L), -1 after a draw's end, log_prob (n,), and the row-steps that were computed.
    Where steps are recorded, shapes are few: rows are halved, own slots go in steps of 64, all prompts are read. A step
    changes tensors in place, so that it can be replayed: of each row (B,) its draw, its last token, and whether the
    draw is alive (the tokens of one that has ended come to nothing); `slot` (1,) is where all rows are.
    """
    (n, L), device = uniforms.shape, model.embedding.weight.device
    recorded, few_shapes = {}, device.type in RECORDS
    slot_step = 64 if few_shapes else 16        # products of a few entries take a slow path on CPUs
    own_sizes = range(slot_step, L + slot_step, slot_step)
    branches = Branches(prefill(model, prompts), owner, own_sizes[-1 if few_shapes else 0], fixed=few_shapes)
    uniforms = uniforms.to("cpu" if device.type == "mps" else device)                         # mps has no float64
    ids, log_prob = torch.full((n, L), -1, device=device), torch.zeros(n, device=device)
    slot, alive = torch.zeros(1, dtype=torch.long, device=device), torch.ones(n, dtype=torch.bool, device=device)
    draw, token = torch.arange(n, device=device), torch.tensor([prompts[i][-1] for i in owner], device=device)
    rows, row_steps = n, 0

    def step(rows: int, own_slots: int) -> None:
        here, last, drawing = draw[:rows], token[:rows], alive[:rows]
        branches.at(slot, 1, own_slots)
        hidden = model.hidden(last[:, None], cache=branches)                                  # (B, 1, E)
        u = uniforms[here.to(uniforms.device), slot.to(uniforms.device)]
        new, log_q = choose(model.logits(hidden[:, 0]), u)                                    # (B,), (B,)
        ids[here, slot] = new.where(drawing, -1)
        log_prob[here] += log_q.where(drawing, 0.0)
        last.copy_(new)
        drawing.logical_and_(~stops[new])
        slot.add_(1)
    for number in range(L):
        shape = rows, own_sizes[number // slot_step]
        if shape in recorded:
            recorded[shape].replay()
        else:
            step(*shape)
            if few_shapes:
                recorded[shape] = record(partial(step, *shape), next((g.pool() for g in recorded.values()), None))
        row_steps += rows
        progress(n / L)
        if (number + 1) % CHECK_EVERY[device.type] == 0:
            now = alive[:rows].cpu().numpy().copy()
            if not now.any():
                break
            if (kept := rows_to_keep(now, few_shapes)) is not None:
                order = torch.from_numpy(branches.keep(kept)).to(device)
                rows = len(order)
                for column in (draw, token, alive):
                    column[:rows] = column[order]
    progress(n * (1 - (number + 1) / L))        # what its last steps did not take
    return ids, log_prob, row_steps


def check_room(context: int, tokens: int, new_tokens: int) -> None:
    if tokens + new_tokens > context:
        raise ValueError(f"a prompt has {tokens} tokens; {new_tokens} new ones would exceed the context of {context}; "
                         "lower --max_latent_tokens, shorten it, or train with a larger --model.context")


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], uniforms: Tensor, *, stop: list[int], banned: list[int],
             temperature: float = 1.0, rows: int = 512, greedy: bool = False,
             progress=lambda draws: None) -> Generated:
    """Decode K continuations of each of N prompts, until an id of `stop` or for L tokens at most.

    uniforms: (N, K, L) float64, one for every token that may be drawn; none of the ids `banned` is. Each prompt is
    prefilled once for its K draws; `rows` draws decode together. progress(draws) is told how many more are done, parts
    of them too.
    """
    N, K, L = uniforms.shape
    check_room(model.config.context, max(map(len, prompts)), L)
    stops, bans = vocabulary_mask(model, stop), vocabulary_mask(model, banned)

    def choose(logits, uniforms):
        log_q = proposal_log_probs(logits, temperature, bans)                                 # (B, V)
        token = log_q.argmax(dim=-1) if greedy else inverse_cdf(log_q.exp(), uniforms)
        return token, log_q.gather(1, token[:, None]).squeeze(1)

    # draws of prompts of like length start together: with K = 2 and prompt 1 the shortest of three, 0 1 4 5 2 3
    order = np.argsort([-len(prompt) for prompt in prompts], kind="stable").repeat(K) * K + np.tile(np.arange(K), N)
    size, row_steps = rows - rows % K if K <= rows else rows, 0        # all draws of a prompt, if they are not too many
    ids, log_prob = torch.zeros(N * K, L, dtype=torch.long), torch.zeros(N * K)
    for draws in np.split(order, range(size, N * K, size)):
        used, owner = np.unique(draws // K, return_inverse=True)
        mine, numbers = [prompts[n] for n in used], uniforms.view(N * K, L)[draws].double()
        found = decode_batch(model, mine, owner, numbers, choose, stops, progress)
        ids[draws], log_prob[draws], row_steps = found[0].cpu(), found[1].cpu(), row_steps + found[2]
    drawn = ids >= 0
    finished = (stops.cpu()[ids] & drawn).any(dim=-1)
    lengths = (drawn.sum(dim=-1) - finished.long()).tolist()        # the stop id is the last of a draw that has one
    ids = [row[:n] for row, n in zip(ids.tolist(), lengths)]
    return Generated(ids, log_prob, finished, int(drawn.sum()), row_steps)


# ---- propose ---------------------------------------------------------------------------------------------------

Place = tuple[Document, int]        # a chunk: its document and its number there


def observed_places(layout: Layout, *documents: Document) -> list[Place]:
    """The chunks that can have a thought, and that an evaluation counts: observed ones that have room."""
    return [(document, c) for document in documents for c, chunk in enumerate(document.chunks)
            if not chunk.given and layout.fits(document, c)]


def places_to_infer(layout: Layout, *documents: Document) -> list[Place]:
    """Those of them that want a thought, since they have none."""
    return [(document, c) for document, c in observed_places(layout, *documents) if document.chunks[c].latent is None]


def write(model: GPT, layout: Layout, prompts: list[list[int]], uniforms: Tensor, ends: list[int],
          **how) -> Generated:
    """Text until one of the markers `ends`; no other is drawn, nor a base's special ids. how: see `generate`."""
    banned = [i for i in (*layout.tokenizer.marker.values(), *layout.tokenizer.special) if i not in ends]
    return generate(model, prompts, uniforms, stop=ends, banned=banned, **how)


def propose(model: GPT, layout: Layout, places: list[Place], config: SampleConfig, round: int,
            progress=lambda draws: None) -> Generated:
    """K thoughts z ~ q(. | x, C) for each of N chunks; log_prob counts z and EOL. Nothing else but text is drawn."""
    uniforms = torch.stack([
        latent_uniforms(config.seed, round, document.index, c, config.num_latents, config.max_latent_tokens)
        for document, c in places])                                                           # (N, K, L)
    prompts = [layout.posterior_prompt(document, c) for document, c in places]
    return write(model, layout, prompts, uniforms, [layout.eol], temperature=config.temperature, rows=config.rows,
                 progress=progress)


def complete(model: GPT, layout: Layout, prompts: list[list[int]], ends: list[int], max_tokens: int,
             rows: int, progress=lambda draws: None) -> list[list[int]]:
    """Greedy continuations of N prompts until one of the markers `ends`, which is left out, or for max_tokens."""
    no_numbers = torch.zeros(len(prompts), 1, max_tokens)
    return write(model, layout, prompts, no_numbers, ends, rows=rows, greedy=True, progress=progress).ids


# ---- score -----------------------------------------------------------------------------------------------------

@torch.inference_mode()
def score(model: GPT, prompts: list[list[int]], owners: list[int], sequences: list[Sequence],
          progress=lambda sequences: None) -> Tensor:
    """The log-probability of each sequence after the prompt that `owners` gives it, (len(sequences),) float32 nats.

    Prompts of like length are prefilled together and kept while what follows them is scored, in batches by length.
    """
    device, log_p = model.embedding.weight.device, torch.zeros(len(sequences))
    most = BATCH_TOKENS[device.type]
    longest = max(map(len, prompts)) + max((len(sequence.ids) for sequence in sequences), default=0)
    few = min(most, 2 ** 30 // (model.config.heads * longest))          # attention's scores take room too
    of_prompt: list[list[int]] = [[] for _ in prompts]
    for number, owner in enumerate(owners):
        of_prompt[owner].append(number)
        check_room(model.config.context, len(prompts[owner]), len(sequences[number].ids) - 1)
    for group in length_batches([len(prompt) for prompt in prompts], most):
        cache = prefill(model, [prompts[n] for n in group])
        members = [(number, place) for place, n in enumerate(group) for number in of_prompt[n]]
        for part in length_batches([len(sequences[number].ids) for number, _ in members], few):
            here, owner = map(list, zip(*(members[i] for i in part)))
            # a sequence starts with the last token of its prompt, which is not in the cache
            rows = [[sequences[number].after(prompts[owners[number]][-1:])] for number in here]
            batch = collate(rows, max(2, *(len(row[0].ids) for row in rows)) - 1).to(device)
            branches, tokens = Branches(cache, np.array(owner)), batch.ids.shape[1]
            branches.at(torch.zeros(1, dtype=torch.long, device=device), tokens, tokens)
            nothing_before = branches.prompt_slots == 0
            log_p[here] = model(batch.ids, batch.targets, cache=None if nothing_before else branches).sum(dim=-1).cpu()
            progress(len(here))
    return log_p


def score_joint(model: GPT, layout: Layout, places: list[Place], latents: list[list[list[int]]],
                finished: Tensor | None = None, progress=lambda draws: None) -> tuple[Tensor, int]:
    """log p(z, x | C) of K thoughts for each of N chunks, (N, K) float32 nats, and the tokens the model read for it.

    Counts z, EOL and x, at temperature 1. C SOL PRIOR is prefilled once a chunk and equal draws are scored once; those
    that are not `finished` (N, K), where that is given, are not scored and have -inf.
    """
    prompts = [layout.prior_prompt(*place) for place in places]
    rows, columns = (torch.ones(len(places), len(latents[0])) if finished is None else finished).nonzero(as_tuple=True)
    draws = [(n, tuple(latents[n][k])) for n, k in zip(rows.tolist(), columns.tolist())]
    different = list(dict.fromkeys(draws))
    sequences = [layout.thought_and_text(*places[n], list(latent)) for n, latent in different]
    log_joint = torch.full((len(places), len(latents[0])), -math.inf)
    of_each = log_joint.numel() / max(1, len(sequences))
    log_p = score(model, prompts, [n for n, _ in different], sequences, lambda scored: progress(scored * of_each))
    log_p_of = dict(zip(different, log_p.tolist()))
    log_joint[rows, columns] = torch.tensor([log_p_of[draw] for draw in draws])
    return log_joint, sum(map(len, prompts)) + sum(len(sequence.ids) for sequence in sequences)


# ---- the estimator ---------------------------------------------------------------------------------------------

def log_importance_weights(log_joint: Tensor, log_proposal: Tensor) -> Tensor:
    """log w_k = log p(z_k, x | C) - log q(z_k | x, C), unnormalised.

    log_joint, log_proposal: (N, K) float32, nats; N chunks, K draws each. An unfinished draw has log_joint -inf.
    Raises ValueError where the shapes differ. Source: arXiv:2503.18866, the Monte Carlo E-step.
    """
    if log_joint.shape != log_proposal.shape:
        raise ValueError(f"log_joint {(*log_joint.shape,)} and log_proposal {(*log_proposal.shape,)} differ in shape")
    return log_joint - log_proposal


def effective_sample_size(weights: Tensor) -> Tensor:
    """1 / sum w^2 of normalised weights, (N, K) -> (N,), in [1, K]."""
    return 1 / weights.square().sum(dim=-1)


def importance_bound(log_weights: Tensor) -> Tensor:
    """log mean w, the K-sample lower bound on log p(x | C): (N, K) -> (N,), nats; -inf where every draw is unfinished.

    Source: Burda et al. 2016 (IWAE).
    """
    return log_weights.logsumexp(dim=-1) - math.log(log_weights.shape[-1])


def resample(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One draw per chunk, with the probability of its weight: (N, K) and (N,) -> (N,)."""
    return inverse_cdf(weights, uniforms)


@dataclass(frozen=True)
class Evidence:
    """K weighed thoughts for each of N chunks. log_joint and log_proposal (N, K); `cost` in tokens, see `infer`."""
    latents: list[list[list[int]]]
    log_joint: Tensor
    log_proposal: Tensor
    cost: dict[str, int]

    @property
    def log_weights(self) -> Tensor:
        return log_importance_weights(self.log_joint, self.log_proposal)

    @property
    def finished(self) -> Tensor:
        return self.log_joint > -math.inf

    @property
    def usable(self) -> Tensor:
        """Whether a draw of the chunk finished, (N,); where none did the chunk stays plain."""
        return self.finished.any(dim=-1)

    @property
    def weights(self) -> Tensor:
        """Normalised over the draws of a chunk, (N, K); all 0 where none finished."""
        usable = self.usable[:, None]
        return self.log_weights.where(usable, 0.0).softmax(dim=-1).where(usable, 0.0)


def infer(model: GPT, layout: Layout, places: list[Place], config: SampleConfig, round: int,
          progress=lambda draws: None) -> Evidence:
    """Draw and weigh K thoughts for every chunk: all of the E-step but the choice. Every draw is progress twice.

    cost: tokens prefilled (once per chunk), sampled, and scored.
    """
    K = config.num_latents
    drawn = propose(model, layout, places, config, round, progress)
    latents = [drawn.ids[n * K:(n + 1) * K] for n in range(len(places))]
    finished = drawn.finished.view(-1, K)
    log_joint, scored = score_joint(model, layout, places, latents, finished, progress)
    assert torch.equal(log_joint.isfinite(), finished) and drawn.log_prob.isfinite().all(), "must be finite"
    prefilled = sum(len(layout.posterior_prompt(document, c)) for document, c in places)
    cost = {"prefilled_tokens": prefilled, "sampled_tokens": drawn.num_tokens, "scored_tokens": scored}
    return Evidence(latents, log_joint, drawn.log_prob.view(-1, K), cost)


# ---- a text of one's own ---------------------------------------------------------------------------------------

def load(path: str, device="cpu") -> tuple[GPT, Layout]:
    """A model that was trained, of a checkpoint or a run folder, and the layout of its sequences."""
    state = read_checkpoint(path)
    return restore(state, device), Layout(tokenizer_from(state["tokenizer"]))


def think(model: GPT, layout: Layout, text: str, config: SampleConfig = SampleConfig(),
          draws: int = 0) -> list[tuple[str, str]]:
    """What a model thinks after a text, and how it goes on: (thought, text) of so many thoughts drawn from the prior at
    config.temperature; with 0 draws of the most likely one. What follows a thought is the most likely text."""
    decode, longest, rows = layout.tokenizer.decode, config.max_latent_tokens, config.rows
    document = encode_document(0, {"text": text, "chunks": [{"suffix": text, "given": True}]}, layout.tokenizer)
    prompt = layout.prior_prompt(document, 1, text_tokens=0)
    uniforms = latent_uniforms(config.seed, 0, 0, 0, max(1, draws), longest)[None]
    thoughts = write(model, layout, [prompt], uniforms, [layout.eol], rows=rows, greedy=not draws,
                     temperature=config.temperature if draws else 1.0).ids
    prompts = [[*prompt, *thought, layout.eol] for thought in thoughts]
    texts = complete(model, layout, prompts, [layout.eos, layout.sol], longest, rows)
    return [(decode(thought), decode(after)) for thought, after in zip(thoughts, texts)]


def weigh(model: GPT, layout: Layout, before: str, text: str,
          config: SampleConfig = SampleConfig()) -> tuple[list[tuple[float, str]], float]:
    """K thoughts behind a text after what came before it, (weight, thought) with the heaviest first, and the K-sample
    bound on log p(text | before) in nats."""
    chunks = [{"suffix": before, "given": True}, {"suffix": text}]
    document = encode_document(0, {"text": before + text, "chunks": chunks}, layout.tokenizer)
    evidence = infer(model, layout, [(document, 1)], config, round=0)
    thoughts = zip(evidence.weights[0].tolist(), map(layout.tokenizer.decode, evidence.latents[0]))
    return sorted(thoughts, reverse=True), importance_bound(evidence.log_weights).item()


# ---- the E-step over a corpus ----------------------------------------------------------------------------------

def sums_of(evidence: Evidence) -> Counter:
    """What some chunks add to the figures of an E-step; see `figures_of`."""
    usable, finished, weights = evidence.usable, evidence.finished, evidence.weights
    return Counter({
        "chunks": len(usable), "usable": int(usable.sum()), "draws": finished.numel(),
        "finished": int(finished.sum()), "unfinished": int((~finished).sum()),
        "ess": effective_sample_size(weights[usable]).sum().item(), "entropy": torch.special.entr(weights).sum().item(),
        "bound": importance_bound(evidence.log_weights[usable]).sum().item(),
        "log_w": evidence.log_weights[finished].sum().item(),
        "lengths": sum(len(latent) for latents in evidence.latents for latent in latents), **evidence.cost})


def figures_of(sums: Counter) -> dict:
    """The figures of an E-step over its chunks that were drawn for: nats and tokens.

    Means are over the chunks of which a draw finished, of elbo_finished over finished draws; None where there is none.
    too_long: chunks without room for a thought, which stay plain; cut_context: those whose C lost chunks for room.
    """
    def ratio(name, over):
        return sums[name] / sums[over] if sums[over] else None
    return {"chunks": sums["chunks"], "left_plain": sums["chunks"] - sums["usable"], "ess": ratio("ess", "usable"),
            "weight_entropy": ratio("entropy", "usable"), "latent_tokens": ratio("lengths", "draws"),
            "unfinished": ratio("unfinished", "draws"), "bound": ratio("bound", "usable"),
            "elbo_finished": ratio("log_w", "finished"),
            **{name: sums[name] for name in ("too_long", "cut_context", "prefilled_tokens", "sampled_tokens",
                                             "scored_tokens")}}


EVIDENCE = ("log_joint", "log_proposal", "finished", "lengths", "ess", "bound")


def annotate(places: list[Place], evidence: Evidence, tokenizer: Tokenizer, config: SampleConfig,
             round: int) -> list[dict]:
    """What the E-step writes for each chunk: the kept latent and the evidence to recompute the choice."""
    uniforms = torch.stack([uniform_numbers(config.seed, "resample", (round, document.index, c), ())
                            for document, c in places])                                       # (N,)
    weights, usable, kept = evidence.weights, evidence.usable, resample(evidence.weights, uniforms)
    ess, bound = effective_sample_size(weights), importance_bound(evidence.log_weights)
    annotations = []
    for n, latents in enumerate(evidence.latents):
        ids = latents[kept[n]] if usable[n] else None
        annotations.append({
            "latent": None if ids is None else tokenizer.decode(ids), "latent_ids": ids,
            "log_joint": [x if x > -math.inf else None for x in evidence.log_joint[n].tolist()],
            "log_proposal": evidence.log_proposal[n].tolist(), "finished": evidence.finished[n].tolist(),
            "lengths": [len(latent) for latent in latents],
            "ess": ess[n].item() if usable[n] else None, "bound": bound[n].item() if usable[n] else None})
        if config.keep == "all":
            annotations[-1]["draws"] = [{"latent": tokenizer.decode(ids), "latent_ids": ids, "weight": weight}
                                        for ids, weight in zip(latents, weights[n].tolist())]
    return annotations


def count_room(layout: Layout, places: list[Place]) -> Counter:
    """Of some chunks those that have no room for a thought, and those that have none for all of C."""
    fitting, endless = [place for place in places if layout.fits(*place)], Layout(layout.tokenizer)
    cut = sum(len(layout.context(*place)) < len(endless.context(*place)) for place in fitting)
    return Counter(too_long=len(places) - len(fitting), cut_context=cut)


def room_line(figures: dict, what: str) -> str:
    """What one has to know of chunks that did not fit; nothing where all did."""
    if not (figures["too_long"] or figures["cut_context"]):
        return ""
    return (f"{what}: {figures['too_long']:,} chunks have no room for a thought and stay plain, "
            f"{figures['cut_context']:,} have fewer chunks before them")


def annotate_block(model: GPT, layout: Layout, documents: list[Document], config: SampleConfig, round: int,
                   progress) -> tuple[list[dict], Counter]:
    """The lines of the output for a block of documents, whose records they are, and what they add to the figures."""
    for chunk in itertools.chain(*(document.record["chunks"] for document in documents)):
        for key in EVIDENCE:        # what an earlier E-step left is not this one's
            chunk.pop(key, None)
    sums = count_room(layout, places_to_infer(Layout(layout.tokenizer), *documents))
    if places := places_to_infer(layout, *documents):
        evidence = infer(model, layout, places, config, round, progress)
        sums.update(sums_of(evidence))
        for (document, c), annotation in zip(places, annotate(places, evidence, layout.tokenizer, config, round)):
            document.record["chunks"][c].pop("draws", None)
            document.record["chunks"][c] |= annotation
    return [document.record for document in documents], sums


Block = tuple[int, int, int]    # first document, documents and chunks that are drawn for together, whoever and whenever


def settled_sample(config: SampleConfig, shape: Shape, ranks: Ranks, run: str = "",
                   name: str = "dtype") -> SampleConfig:
    """The settings with the cap of chunks that 0 comes to for a model, and the dtype that auto does: in a run folder
    that of the run, whose setting has this name."""
    dtype = ranks.from_main(lambda: choose_dtype(as_began(run, name, config.dtype), shape.width, ranks.device))
    return replace(config, chunk_tokens=chunk_cap(config.chunk_tokens, shape.context), dtype=dtype)


def count_places(lines: list[tuple[int, bytes]], corpus: str, layout: Layout, config: SampleConfig) -> list[int]:
    """Of some documents of a corpus the chunks that want a thought."""
    return [len(places_to_infer(layout, read_document(corpus, *line, layout.tokenizer, config.chunk_tokens,
                                                      config.redraw))) for line in lines]


def survey(corpus: str, layout: Layout, config: SampleConfig, slices: int = 1) -> list[list[Block]]:
    """Cut a corpus into slices of as many documents each, and these into blocks of whole documents; every line is read
    before work begins, by all cores. Raises ValueError, naming file and line, for what is no document."""
    count, cut = partial(count_places, corpus=corpus, layout=layout, config=config), []
    wanted = list(itertools.chain.from_iterable(on_all_cores(count, corpus, "survey")))
    for i in range(slices):
        blocks: list[Block] = []
        for number in range(i * len(wanted) // slices, (i + 1) * len(wanted) // slices):
            is_open = blocks and max(blocks[-1][1:]) < config.block_chunks
            first, documents, chunks = blocks.pop() if is_open else (number, 0, 0)
            blocks.append((first, documents + 1, chunks + wanted[number]))
        cut.append(blocks)
    return cut


def at_precision(model: GPT, dtype: str) -> GPT:
    """The model as it is, or a copy in bfloat16, whose sums and log-probabilities are float32 all the same."""
    return model if model.dtype == getattr(torch, dtype) else copy.deepcopy(model).to(getattr(torch, dtype))


def missing_blocks(folder: Path, blocks: list[Block]) -> list[int]:
    return [n for n in range(len(blocks)) if not (folder / f"{n:09d}.json").exists()]


def draw_blocks(model: GPT, layout: Layout, corpus: str, config: SampleConfig, round: int, folder: Path,
                blocks: list[Block], part: tuple[int, int], ranks: Ranks) -> None:
    """Write what is missing of every n-th block from the i-th on, part (i, n): lines, then the sums that say that they
    are whole."""
    mine = {n for n in missing_blocks(folder, blocks) if n % part[1] == part[0]}
    draws, total, start = sum(blocks[n][2] for n in mine) * config.num_latents, Counter(), time.time()
    bar = ranks.bar(2 * draws, f"E-step {round}")
    lines, summary = itertools.islice(numbered_lines(corpus), blocks[0][0], None), ""
    for n, (_, count, _) in enumerate(blocks):
        here = list(itertools.islice(lines, count))
        if n in mine:
            documents = [read_document(corpus, *numbered, layout.tokenizer, config.chunk_tokens, config.redraw)
                         for numbered in here]
            records, sums = annotate_block(model, layout, documents, config, round, bar.update)
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_whole(folder / f"{n:09d}.jsonl", text)
            write_whole(folder / f"{n:09d}.json", json.dumps(sums))
            total.update(sums)
            summary = (f"{total['sampled_tokens'] / (time.time() - start):,.0f} sampled tokens/s, "
                       f"ess {total['ess'] / max(1, total['usable']):.1f} of {config.num_latents}")
            bar.set_postfix_str(summary, refresh=False)
    bar.close()
    if summary:
        ranks.say(f"  {folder.parent.with_suffix('')}: {summary}")


def join_blocks(folder: Path, blocks: list[Block], out: str) -> None:
    """The blocks' lines as one file, which is there only once their figures are."""
    total = Counter()
    with whole_file(folder / "joined") as file:
        for n in range(len(blocks)):
            file.write((folder / f"{n:09d}.jsonl").read_bytes())
            total.update(read_json(folder / f"{n:09d}.json"))
    write_whole(folder.parent / "figures.json", json.dumps(figures_of(total), indent=1) + "\n")
    os.replace(folder / "joined", out)


def e_step(model: GPT, tokenizer: Tokenizer, corpus: str, blocks: list[Block], config: SampleConfig, round: int,
           out: str, ranks: Ranks, part: tuple[int, int] | None = None) -> dict | None:
    """Write a slice of a corpus, its blocks as `survey` gave them, with a drawn latent per chunk to `out`; returns its
    figures.

    Blocks are dealt to the ranks; a run that was killed goes on after the last whole one. A block is computed alike on
    any rank, so the file has the same bytes for any number of them (on a CPU, with as many threads; elsewhere floating
    point may flip a rare token). One block is in memory at a time. The folder `out`.run has what is not the corpus.
    part: which blocks to draw where they are dealt to jobs, see `draw_blocks`. Returns None where some of them are then
    left to others.
    """
    run = Path(f"{out}.run")
    if not os.path.exists(out):
        model = at_precision(model, config.dtype)
        layout = Layout(tokenizer, model.config.context, config.max_latent_tokens)
        mine = part or (ranks.rank, ranks.world)
        draw_blocks(model, layout, corpus, config, round, run / "blocks", blocks, mine, ranks)
        ranks.barrier()
        if part and (left := missing_blocks(run / "blocks", blocks)) and not os.path.exists(out):
            ranks.say(f"part {part[0] + 1}/{part[1]} is drawn; {len(left)} of {len(blocks)} blocks are left to others")
            return None
        if part:
            hold(run / "join")          # of several jobs that find nothing left
        if ranks.main and not os.path.exists(out):
            join_blocks(run / "blocks", blocks, out)
        ranks.barrier()
    figures = read_json(run / "figures.json")
    if ranks.main:
        shutil.rmtree(run / "blocks", ignore_errors=True)
        ranks.say(room_line(figures, out))
    return figures


# ---- main --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MainConfig(SampleConfig):
    checkpoint: str = option("runs/train/ckpt.pt", "the model that thinks; a checkpoint of train.py, or its run folder",
                             how=True)
    data: str = option("data/alchemy/raw.jsonl", "corpus to annotate; chunks that have a latent keep it", how=True)
    out: str = option("runs/latents.jsonl", "annotated corpus, which train.py --data reads", how=True)
    device: str = option("auto", "auto, cpu, cuda or mps", how=True)
    part: str = option("", "draw only a part, as 2/8: of eight jobs that need not run at a time; the last joins all",
                       how=True)
    round: int = option(1, "number of the EM round; another number draws other thoughts", at_least=0)
    show: int = option(0, "print so many chunks with their thoughts, weights and bound instead", at_least=0, how=True)
    prompt: str = option("", "think about this text, then go on with it, instead; -: each line of the standard input",
                         how=True)
    thoughts: int = option(0, "thoughts about --prompt, drawn at --temperature; 0: the most likely one", at_least=0,
                           how=True)


def show(model: GPT, tokenizer: Tokenizer, config: MainConfig) -> Iterator[str]:
    """The first chunks of a corpus with their thoughts; nothing is written."""
    layout = Layout(tokenizer, model.config.context, config.max_latent_tokens)
    documents = (read_document(config.data, *line, tokenizer, config.chunk_tokens, config.redraw)
                 for line in numbered_lines(config.data))
    wanted = (place for document in documents for place in places_to_infer(layout, document))
    if not (places := list(itertools.islice(wanted, config.show))):
        yield f"{config.data}: no chunk to show: all are given, have a thought, or have no room; --redraw draws anew"
    else:
        evidence, everything = infer(model, layout, places, config, config.round), replace(config, keep="all")
        for place, annotation in zip(places, annotate(places, evidence, tokenizer, everything, config.round)):
            yield show_chunk(layout, place, annotation) + "\n"


def show_thoughts(model: GPT, tokenizer: Tokenizer, config: MainConfig) -> Iterator[str]:
    """Every prompt with what the model thinks about it and how it goes on."""
    for number, line in enumerate(sys.stdin.buffer if config.prompt == "-" else [config.prompt.encode()]):
        with naming_the_line("--prompt", number):
            text = text_of(line).rstrip("\r\n")
            if not text.strip():
                continue
            found = think(model, Layout(tokenizer), text, config, config.thoughts)
        yield f"prompt   {text}"
        for thought, answer in found:
            yield f"thought  {thought.strip()}\nanswer   {answer.strip()}"


def read_part(part: str) -> tuple[int, int]:
    """2/8 -> (1, 8). Raises ValueError."""
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"--part {part} is not allowed; give the part and how many there are, as 2/8")
    return int(number) - 1, int(parts)


def annotate_corpus(state: dict, tokenizer: Tokenizer, config: MainConfig, ranks: Ranks) -> None:
    """The E-step as a command: everything is checked first, the settings stand beside the output, figures come last."""
    run = folder_beside(config.out)
    part = read_part(config.part) if config.part else None
    hold_early(run, ranks, shared=bool(part))
    if part and ranks.world > 1:
        raise ValueError("--part is for jobs on their own; torchrun deals the blocks to its processes, so leave it out")
    layout = Layout(tokenizer, state["model_config"].context, config.max_latent_tokens)
    [blocks] = ranks.from_main(lambda: survey(config.data, layout, config))
    hashes = {"checkpoint_sha256": config.checkpoint, "data_sha256": config.data} if ranks.main else {}
    mine = f"part_{part[0] + 1}_of_{part[1]}" if part else ""
    open_run(run, config, ranks, part=mine, **{name: sha256_of(path) for name, path in hashes.items()})
    chunks = sum(chunks for *_, chunks in blocks)
    nothing = "" if chunks else ": all are given, have one, or have no room; --redraw true draws anew"
    ranks.say(f"drawing {config.num_latents} thoughts for each of {chunks:,} chunks of {config.data} on "
              f"{ranks.device}, in {config.dtype}{nothing}")
    model = restore(state, ranks.device)
    figures = e_step(model, tokenizer, config.data, blocks, config, config.round, config.out, ranks, part)
    ranks.say(json.dumps(figures, indent=1) if figures else "")


def main(argv=None) -> None:
    config = parse_config(MainConfig(), argv, __doc__)
    ranks, state = start_ranks(config.device), read_checkpoint(config.checkpoint)
    tokenizer, annotates = tokenizer_from(state["tokenizer"]), not (config.prompt or config.show)
    config = settled_sample(config, state["model_config"], ranks, f"{config.out}.run" if annotates else "")
    if annotates:
        return annotate_corpus(state, tokenizer, config, ranks)
    model = at_precision(restore(state, ranks.device), config.dtype)
    for text in (show_thoughts if config.prompt else show)(model, tokenizer, config):
        ranks.say(text)


if __name__ == "__main__":
    script(main)
