"""The E-step: draw K thoughts for every chunk of text, weigh each by p(z, x | C) / q(z | x, C), keep one by its weight.

    python sample_latents.py --checkpoint runs/train/ckpt.pt --data data/alchemy/raw.jsonl --out latents.jsonl
    torchrun --standalone --nproc_per_node=2 sample_latents.py ...        the same file, drawn by two processes

The output is the corpus with a latent per chunk and the evidence to recompute the choice; train.py reads it as it is.
Ids are sampled, the same ids are scored, and the same ids are trained on: no text stands between.

    config -> drawing a token -> decoding in slots -> propose and score -> the estimator -> E-step over a corpus -> for people -> main

Shapes: N chunks, K draws each, L most new tokens of a draw, S slots (rows that decode together), V vocabulary.
"""
import copy
import itertools
import json
import math
import os
import re
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.corpus import Chunk, Document, naming_the_line, numbered_lines, read_document, stream_corpus
from data.layout import Layout, Sequence
from data.loader import length_batches, padded
from data.report import show_chunk, summarize
from data.run import (Ranks, join_files, open_run, option, parse_config, random_stream, require_positive, script, sha256_of,
                      start_ranks, write_jsonl)
from data.tokens import Tokenizer
from model import GPT, Branches, DecodingBranches, Prompts, read_checkpoint, restore


PREFILL_TOKENS = 4096       # of the prompts that are prefilled together
CHECK_EVERY = {"cpu": 1, "cuda": 8, "mps": 8}       # steps between looks at which draws have ended
RECORDS = ("cuda",)         # devices that replay a recorded step

# ---- config ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SampleConfig:
    num_latents: int = option(16, "K, the thoughts drawn per chunk")
    temperature: float = option(1.3, "of the proposal, which log_proposal counts; above 1 it explores more")
    max_latent_tokens: int = option(32, "a draw that is longer is unfinished: weight zero, never trained on")
    slots: int = option(512, "rows that decode together")
    block_documents: int = option(1000, "documents per block, which is drawn, scored and written as one; a killed run does at most this much again")
    score_tokens: int = option(4096, "tokens per batch when scoring")
    keep: Literal["one", "all"] = option("one", "what stays of the K thoughts: the chosen one, or all with their weights, of which "
                                                "training picks one afresh each epoch")
    redraw: bool = option(False, "draw anew for chunks that have a latent")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "what the blocks compute in; auto: bfloat16 on CUDA")
    compile: Literal["auto", "on", "off"] = option("auto", "auto: on CUDA the decode step is recorded as a CUDA graph; on: torch.compile comes "
                                                           "first, minutes that only a long E-step pays back")
    seed: int = option(0, "of the draws and of the choice among them")

    def __post_init__(self):
        require_positive(self, "num_latents", "temperature", "max_latent_tokens", "slots", "block_documents", "score_tokens")


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
    """The first entry where the running sum of masses (B, n) exceeds the target (B,), and the target less what is before it.

    No binary search: a parallel cumsum, as on CUDA, is not quite monotone, and an entry of mass 0 could be hit.
    """
    cdf = masses.cumsum(dim=-1).where(masses > 0, 0.0)
    targets = torch.minimum(targets, cdf.amax(dim=-1) * (1 - 2 ** -23))[:, None]
    index = (cdf > targets).int().argmax(dim=-1, keepdim=True)
    rest = targets - (cdf - masses).gather(1, index)
    return index.squeeze(1), rest.clamp(min=0).squeeze(1)


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The index that each uniform number picks: (B, V) and (B,) -> (B,). An entry of probability 0 is never picked.

    First a block of about sqrt(V) entries by the masses of the blocks, then an entry of it. The uniforms are multiples of
    2^-23 below 1, so that uniform x total stays below the total in float32.
    """
    V = probabilities.shape[-1]
    size = 1 << V.bit_length() // 2
    blocks = F.pad(probabilities, (0, -V % size)).unflatten(-1, (-1, size))                   # (B, V / size, size)
    masses = blocks.sum(dim=-1)
    block, rest = first_above(masses, uniforms * masses.sum(dim=-1))
    inside, _ = first_above(blocks[torch.arange(len(block), device=block.device), block], rest)
    return block * size + inside


def uniform_numbers(seed: int, purpose: str, labels: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """float32 multiples of 2^-23 in [0, 1), a function of (seed, purpose, labels)."""
    return torch.from_numpy(random_stream(seed, purpose, *labels).integers(2 ** 23, size=shape)).float() / 2 ** 23


# ---- decoding in slots -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Generated:
    """What was decoded after each of N x K prompts: new ids without the stop id, nats of the distribution that was
    sampled (the stop id's counted once), and whether a stop id came within the cap."""
    ids: list[list[int]]
    log_prob: Tensor        # (N K,) float32
    finished: Tensor        # (N K,) bool
    row_steps: int          # that were computed: tokens drawn, and those of rows whose draw had ended

    @property
    def num_tokens(self) -> int:
        """Tokens drawn, stop ids included."""
        return sum(map(len, self.ids)) + int(self.finished.sum())


def prefill(model: GPT, prompts: list[list[int]]) -> Prompts:
    """Keys and values of some prompts, but for the last token of each: what continues a prompt feeds that one first."""
    device, longest = model.embedding.weight.device, max(map(len, prompts)) - 1
    cache = Prompts(model.config, len(prompts), longest, device, model.dtype)
    cache.lengths[:] = torch.tensor([len(prompt) - 1 for prompt in prompts])
    if longest:
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, :len(prompt) - 1] = torch.tensor(prompt[:-1])
        model.hidden(ids.to(device), cache=cache)
    return cache


def round_up(n: int, step: int) -> int:
    return math.ceil(n / step) * step


def compaction(used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What moves where so that the places in use come first: (places that are free, used places from beyond)."""
    count = int(used.sum())
    return np.flatnonzero(~used[:count]), count + np.flatnonzero(used[count:])


def decode_step(model: GPT, branches: DecodingBranches, choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], stop: Tensor, *,
                uniforms: Tensor, ids: Tensor, log_prob: Tensor, token: Tensor, age: Tensor, draw: Tensor,
                own_slots: int, prompt_slots: int) -> None:
    """Every row draws a token: tensors alone, changed in place, so that the step can be compiled, recorded and replayed.

    Of each row: its last token, its age, its draw. Of each draw, and last of nobody, to whom a row goes whose draw has
    ended: the numbers it draws by, its ids, its log-probability.
    """
    nobody, oldest = len(ids) - 1, ids.shape[1] - 1
    branches.place(age[:, None], own_slots, prompt_slots)
    hidden = model.hidden(token[:, None], cache=branches)
    new, log_q = choose(model.logits(hidden[:, 0]), uniforms[draw, age])
    token.copy_(new)
    ids[draw, age] = new
    log_prob[draw] += log_q
    draw.masked_fill_(stop[new], nobody)
    age.add_(1).clamp_(max=oldest)      # only of a row for nobody


def record(job: Callable[[], None], pool) -> "torch.cuda.CUDAGraph":
    """A job that ran before as a CUDA graph, whose kernels are launched all at once; `pool` is memory shared with other graphs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        job()
    return graph


ROW = ("live", "age", "seat", "prompt_tokens", "draw", "token", "age_there")       # what Slots know of each row


class Slots:
    """The rows that decode together. When a draw ends its row takes the next one at once, of whatever prompt.

    What decides lies on the host: of each row its age (tokens drawn so far) and its seat, the place of its prompt among
    those at hand. The device is asked only which draws have ended: after every step on a CPU, where that is free, else now
    and then. Rows and seats in use come first, so that each are read in one piece. With `few_shapes`, for a step that is
    compiled or recorded, rows are halved when half of them are idle, all seats are read, and idle rows have the last one, which
    has no prompt.
    """

    def __init__(self, model: GPT, prompts: list[list[int]], uniforms: Tensor, rows: int, choose, stop: Tensor, compile: str):
        (N, K, L), device = uniforms.shape, model.embedding.weight.device
        self.model, self.prompts, self.K, self.L, self.nobody = model, prompts, K, L, N * K
        self.few_shapes = compile == "on" or compile == "auto" and device.type in RECORDS
        self.steps = self.row_steps = self.done = 0
        rows, self.most_slots = min(rows, N * K), tuple(round_up(n, 16) for n in (L, max(map(len, prompts)) - 1))
        self.check_every, self.recorded = CHECK_EVERY[device.type], {}
        self.arrivals, self.waiting, self.waiting_seat = self.prefilled(), range(0), 0    # prompts; draws of the last seated
        self.seated = Prompts(model.config, min(rows, 2 + 2 * rows // K) + 1, self.most_slots[1], device, model.dtype)
        self.branches = DecodingBranches(self.seated, rows, self.most_slots[0])
        # of each row, on the host; `age` on the device too, so that no step has to wait for it
        self.live, (self.age, self.seat, self.prompt_tokens) = np.zeros(rows, bool), np.zeros((3, rows), int)
        self.draw, self.token, self.age_there = (torch.full((rows,), value, device=device) for value in (self.nobody, 0, 0))
        # of each draw, and of nobody
        uniforms = F.pad(uniforms.reshape(N * K, L), (0, 0, 0, 1)).to(device)
        self.ids = torch.zeros(N * K + 1, L, dtype=torch.long, device=device)
        self.log_prob = torch.zeros(N * K + 1, device=device)
        self.decode = partial(torch.compile(decode_step, dynamic=True) if compile == "on" else decode_step, model, self.branches,
                              choose, stop, uniforms=uniforms, ids=self.ids, log_prob=self.log_prob)

    def prefilled(self) -> Iterator[tuple[int, Prompts, int]]:
        """Every prompt with its place in a cache; those of like length are prefilled together, when they are wanted."""
        for batch in length_batches([len(prompt) for prompt in self.prompts], PREFILL_TOKENS):
            cache = prefill(self.model, [self.prompts[n] for n in batch])
            for place, n in enumerate(batch):
                yield n, cache, place

    def seat_next(self) -> bool:
        """Give the next prompt a seat that no row uses, so that its draws wait for rows. False where there is none."""
        n, cache, place = next(self.arrivals, (None, None, 0))
        if n is None:
            return False
        self.waiting = range(n * self.K, (n + 1) * self.K)
        self.waiting_seat = min(set(range(len(self.seat) + 1)).difference(self.seat[self.live].tolist()))
        if self.waiting_seat == len(self.seated.lengths) - 1:
            self.seated.grow()
            self.recorded.clear()
        self.seated.copy(self.waiting_seat, cache, place)
        return True

    def refill(self) -> int:
        """Rows whose draw has ended take the next ones, or are closed where none waits; the number of rows that draw."""
        ended = self.age == self.L
        if self.steps % self.check_every == 0:
            ended |= (self.draw == self.nobody).cpu().numpy()
        ended &= self.live
        self.done += int(ended.sum())
        self.live &= ~ended
        rows, draws = np.flatnonzero(~self.live), []
        while len(draws) < len(rows) and (self.waiting or self.seat_next()):
            taken = self.waiting[:len(rows) - len(draws)]
            filled = rows[len(draws):len(draws) + len(taken)]
            self.seat[filled], self.live[filled] = self.waiting_seat, True
            self.waiting = self.waiting[len(taken):]
            draws += taken
        if draws:
            self.start_draws(rows[:len(draws)], draws)
        if self.live.any() and (draws or ended.any()):
            self.close_rows()
            self.arrange()
        return int(self.live.sum())

    def start_draws(self, rows: np.ndarray, draws: list[int]) -> None:
        prompts = [self.prompts[draw // self.K] for draw in draws]
        self.prompt_tokens[rows] = [len(prompt) - 1 for prompt in prompts]
        self.age[rows] = self.age_there[rows] = 0
        self.draw[rows] = torch.tensor(draws, device=self.draw.device)
        self.token[rows] = torch.tensor([prompt[-1] for prompt in prompts], device=self.draw.device)

    def close_rows(self) -> None:
        """Bring the rows that draw to the front and drop the others, but for idle ones that keep the shape."""
        drawing = int(self.live.sum())
        rows = min(len(self.live), max(16, 1 << (drawing - 1).bit_length())) if self.few_shapes else drawing
        if rows < len(self.live):
            free, moved = compaction(self.live)
            self.branches.move(free, moved)
            for name in ROW:
                column = getattr(self, name)
                column[free] = column[moved]
                setattr(self, name, column[:rows])
            self.live[drawing:] = False

    def close_seats(self) -> None:
        """Bring the seats in use to the front."""
        for free, moved in zip(*compaction(np.bincount(self.seat) > 0)):
            self.seated.copy(free, self.seated, moved)
            self.seat[self.seat == moved] = free
            self.waiting_seat = free if self.waiting_seat == moved else self.waiting_seat

    def arrange(self) -> None:
        """Say to the branches which row has which seat."""
        if self.few_shapes:
            idle, seats = np.flatnonzero(~self.live), len(self.seated.lengths)
            self.seat[idle], self.draw[idle] = seats - 1, self.nobody
            self.branches.arrange(self.seat, (seats, self.K))
        else:
            self.close_seats()
            self.branches.arrange(self.seat)

    def step(self) -> None:
        """Every row draws a token."""
        slots = int(self.age[self.live].max()) + 1, int(self.prompt_tokens[self.live].max())
        steps = (64, 64) if self.few_shapes else (16, 1)        # matrix products of a few entries take a slow path on CPUs
        slots = tuple(min(round_up(n, step), most) for n, step, most in zip(slots, steps, self.most_slots))
        shape = (len(self.live), *slots)
        job = partial(self.decode, token=self.token, age=self.age_there, draw=self.draw, own_slots=slots[0], prompt_slots=slots[1])
        if shape in self.recorded:
            self.recorded[shape].replay()
        else:
            job()
            if self.few_shapes and self.draw.device.type in RECORDS:
                self.recorded[shape] = record(job, next((graph.pool() for graph in self.recorded.values()), None))
        self.age = self.age + 1
        self.steps += 1
        self.row_steps += len(self.live)


def check_room(context: int, tokens: int, new_tokens: int, what: str = "a prompt") -> None:
    if tokens + new_tokens > context:
        raise ValueError(f"{what} has {tokens} tokens; with {new_tokens} new ones it exceeds the context of {context}; "
                         "lower --max_latent_tokens, split the chunk, or train with a larger --model.context")


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], uniforms: Tensor, *, stop: list[int], banned: list[int],
             temperature: float = 1.0, slots: int = 512, greedy: bool = False, compile: str = "off",
             progress: Callable[[int, int], None] = lambda draws, tokens: None) -> Generated:
    """Decode K continuations of each of N prompts, until an id of `stop` or for L tokens at most.

    uniforms: (N, K, L), a number for every token that may be drawn; none of the ids `banned` is. Each prompt is prefilled
    once for its K draws; `slots` rows decode together. compile: see SampleConfig. progress(draws, tokens) is told how far
    it is before each step.
    """
    check_room(model.config.context, max(map(len, prompts)), uniforms.shape[2])
    total = uniforms.shape[0] * uniforms.shape[1]
    stops, bans = vocabulary_mask(model, stop), vocabulary_mask(model, banned)

    def choose(logits, uniforms):
        log_q = proposal_log_probs(logits, temperature, bans)                                 # (S, V)
        token = log_q.argmax(dim=-1) if greedy else inverse_cdf(log_q.exp(), uniforms)
        return token, log_q.gather(1, token[:, None]).squeeze(1)

    rows = Slots(model, prompts, uniforms, slots, choose, stops, compile)
    while rows.refill():
        progress(rows.done, rows.row_steps)
        rows.step()
    ids, stopped = rows.ids[:total].cpu(), stops[rows.ids[:total]].cpu()
    finished = stopped.any(dim=-1)
    lengths = stopped.int().argmax(dim=-1).where(finished, ids.shape[1]).tolist()
    return Generated([row[:n] for row, n in zip(ids.tolist(), lengths)], rows.log_prob[:total].cpu(), finished, rows.row_steps)


# ---- propose and score -----------------------------------------------------------------------------------------

Place = tuple[Document, int]        # a chunk: its document and its number there


def places_to_infer(document: Document) -> list[Place]:
    """The chunks of a document that want a thought: observed, and without one."""
    return [(document, c) for c, chunk in enumerate(document.chunks) if not chunk.given and chunk.latent is None]


def latent_uniforms(seed: int, round: int, document: int, chunk: int, num_latents: int, max_tokens: int) -> Tensor:
    """A number for each draw and position, (K, L): a function of (seed, round, document, chunk, draw, position) alone.

    Each 32 positions have a stream of their own, drawn row by row, so neither K nor the cap L changes any number.
    """
    blocks = [uniform_numbers(seed, "latent", (round, document, chunk, block), (num_latents, 32))
              for block in range(math.ceil(max_tokens / 32))]
    return torch.cat(blocks, dim=1)[:, :max_tokens]


def markers_but(layout: Layout, ids: list[int]) -> list[int]:
    return [marker for marker in layout.tokenizer.marker.values() if marker not in ids]


def propose(model: GPT, layout: Layout, places: list[Place], config: SampleConfig, round: int,
            progress=lambda draws, tokens: None) -> Generated:
    """K thoughts z ~ q(. | x, C) for each of N chunks, and log q of each (log_prob counts z and EOL).

    Only EOL among the markers can be drawn. A draw's numbers depend on (seed, round, document, chunk, draw, position).
    """
    uniforms = torch.stack([
        latent_uniforms(config.seed, round, document.index, c, config.num_latents, config.max_latent_tokens)
        for document, c in places])                                                           # (N, K, L)
    prompts = [layout.posterior_prompt(document, c) for document, c in places]
    return generate(model, prompts, uniforms, stop=[layout.eol], banned=markers_but(layout, [layout.eol]),
                    temperature=config.temperature, slots=config.slots, compile=config.compile, progress=progress)


def complete(model: GPT, layout: Layout, prompts: list[list[int]], ends: list[int], max_tokens: int, slots: int = 512) -> list[list[int]]:
    """Greedy continuations of N prompts until one of the markers `ends`, which is left out, or for max_tokens."""
    return generate(model, prompts, torch.zeros(len(prompts), 1, max_tokens), stop=ends, banned=markers_but(layout, ends),
                    slots=slots, greedy=True).ids


def think_and_answer(model: GPT, layout: Layout, prompts: list[list[int]], thought_tokens: int, answer_tokens: int,
                     slots: int = 512) -> tuple[list[list[int]], list[list[int]]]:
    """The greedy thought after each prior prompt, and the greedy text after that. A thought that reaches its cap is closed there,
    since an answer is wanted all the same."""
    thoughts = complete(model, layout, prompts, [layout.eol], thought_tokens, slots)
    prompts = [[*prompt, *thought, layout.eol] for prompt, thought in zip(prompts, thoughts)]
    return thoughts, complete(model, layout, prompts, [layout.eos, layout.sol], answer_tokens, slots)


@torch.inference_mode()
def score_after_prompts(model: GPT, prompts: list[list[int]], owners: list[int], sequences: list[Sequence],
                        batch_tokens: int) -> Tensor:
    """The log-probability of each sequence after the prompt `owners` gives it, (len(sequences),) float32 nats.

    A sequence starts with the last token of its prompt. Prompts of like length are prefilled together and kept while
    what follows them is scored, batched by length; `batch_tokens` bounds both (attention pads a batch to the prompt with most rows).
    """
    device, log_p = model.embedding.weight.device, torch.zeros(len(sequences))
    of_prompt: list[list[int]] = [[] for _ in prompts]
    for place, owner in enumerate(owners):
        of_prompt[owner].append(place)
        check_room(model.config.context, len(prompts[owner]), len(sequences[place].ids) - 2)
    for group in length_batches([len(prompt) for prompt in prompts], batch_tokens):
        branches = Branches(prefill(model, [prompts[n] for n in group]))
        places = [place for n in group for place in of_prompt[n]]
        owner = np.repeat(np.arange(len(group)), [len(of_prompt[n]) for n in group])
        for part in length_batches([len(sequences[place].ids) for place in places], batch_tokens):
            batch = padded([sequences[places[i]] for i in part]).to(device)
            branches.arrange(owner[part])
            T = batch.ids.shape[1]
            branches.place(torch.arange(T, device=device).expand(len(part), T), T, int(branches.starts.max()))
            log_p[[places[i] for i in part]] = model(batch.ids, batch.targets, cache=branches).sum(dim=-1).cpu()
    return log_p


def score_joint(model: GPT, layout: Layout, places: list[Place], latents: list[list[list[int]]], batch_tokens: int,
                finished: Tensor | None = None) -> tuple[Tensor, int]:
    """log p(z, x | C) of K thoughts for each of N chunks, (N, K) float32 nats, and the tokens that went through the model.

    Counts z, EOL and x, at temperature 1. C SOL PRIOR is prefilled once a chunk and equal draws of a chunk are scored once;
    draws that are not `finished` (N, K), where that is given, are not scored and have -inf.
    """
    order, owners, sequences = {}, [], []
    prompts = [layout.prior_prompt(*place) for place in places]
    rows, columns = (torch.ones(len(places), len(latents[0])) if finished is None else finished).nonzero(as_tuple=True)
    draws = [(n, tuple(latents[n][k])) for n, k in zip(rows.tolist(), columns.tolist())]
    for n, latent in draws:
        if (n, latent) not in order:
            order[n, latent] = len(sequences)
            owners.append(n)
            sequences.append(layout.thought_and_text(*places[n], list(latent)).after(prompts[n][-1:]))
    log_p = score_after_prompts(model, prompts, owners, sequences, batch_tokens)
    log_joint = torch.full((len(places), len(latents[0])), -math.inf)
    log_joint[rows, columns] = log_p[[order[draw] for draw in draws]]
    return log_joint, sum(map(len, prompts)) + sum(len(sequence.ids) - 1 for sequence in sequences)


# ---- the estimator ---------------------------------------------------------------------------------------------

def log_importance_weights(log_joint: Tensor, log_proposal: Tensor) -> Tensor:
    """log w_k = log p(z_k, x | C) - log q(z_k | x, C), unnormalised.

    log_joint, log_proposal: (N, K) float32, nats; N chunks, K draws each. An unfinished draw has log_joint -inf.
    Raises ValueError where the shapes differ. Source: arXiv:2503.18866, the Monte Carlo E-step.
    """
    if log_joint.shape != log_proposal.shape:
        raise ValueError(f"log_joint {tuple(log_joint.shape)} and log_proposal {tuple(log_proposal.shape)} differ in shape")
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
          progress=lambda draws, tokens: None) -> Evidence:
    """Draw and weigh K thoughts for every chunk: all of the E-step but the choice.

    cost: tokens prefilled (once per chunk), sampled, and scored.
    """
    K = config.num_latents
    drawn = propose(model, layout, places, config, round, progress)
    latents = [drawn.ids[n * K:(n + 1) * K] for n in range(len(places))]
    finished = drawn.finished.view(-1, K)
    log_joint, scored = score_joint(model, layout, places, latents, config.score_tokens, finished)
    assert torch.equal(log_joint.isfinite(), finished) and drawn.log_prob.isfinite().all(), "log-probabilities must be finite"
    prefilled = sum(len(layout.posterior_prompt(document, c)) for document, c in places)
    cost = {"prefilled": prefilled, "sampled": drawn.num_tokens, "scored": scored}
    return Evidence(latents, log_joint, drawn.log_prob.view(-1, K), cost)


# ---- the E-step over a corpus ----------------------------------------------------------------------------------

EVIDENCE = ("log_joint", "log_proposal", "finished", "lengths", "ess", "bound")


def annotate(places: list[Place], evidence: Evidence, tokenizer: Tokenizer, config: SampleConfig, round: int) -> list[dict]:
    """What the E-step writes for each chunk: the kept latent and the evidence to recompute the choice."""
    uniforms = torch.stack([uniform_numbers(config.seed, "resample", (round, document.index, c), ())
                            for document, c in places])                                       # (N,)
    weights, usable = evidence.weights, evidence.usable
    ess, bound, kept = effective_sample_size(weights), importance_bound(evidence.log_weights), resample(weights, uniforms)
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


class Progress:
    """The progress bar of an E-step: chunks, sampled tokens per second, ess, time left."""

    def __init__(self, chunks: int, num_latents: int, show: bool):
        self.bar = tqdm(total=chunks, desc="E-step", unit="chunk", leave=False, disable=not show)
        self.num_latents, self.chunks, self.tokens, self.ess, self.start = num_latents, 0, 0, "", time.time()

    def __call__(self, draws: int, tokens: int) -> None:
        """So far in this block."""
        self.bar.update(self.chunks + draws // self.num_latents - self.bar.n)
        rate = (self.tokens + tokens) / (time.time() - self.start)
        self.bar.set_postfix_str(f"{rate:,.0f} sampled tokens/s{self.ess}", refresh=False)

    def block_done(self, chunks: int, evidence: Evidence) -> None:
        self.chunks, self.tokens = self.chunks + chunks, self.tokens + evidence.cost["sampled"]
        self.ess = f", ess {effective_sample_size(evidence.weights[evidence.usable]).mean():.1f}"
        self.bar.update(self.chunks - self.bar.n)


def annotate_block(model: GPT, layout: Layout, block: list[Document], config: SampleConfig, round: int,
                   progress: Progress) -> list[dict]:
    """The lines of the output for a block of documents. The tokens it cost stand with its first document."""
    places = [place for document in block for place in places_to_infer(document)]
    records = [document.record | {"chunks": [dict(chunk) for chunk in document.record["chunks"]]} for document in block]
    for record in records:              # what an earlier E-step left is not this one's
        record.pop("cost", None)
        for chunk in record["chunks"]:
            for name in EVIDENCE:
                chunk.pop(name, None)
    if places:
        evidence = infer(model, layout, places, config, round, progress)
        first = block[0].index
        for (document, c), annotation in zip(places, annotate(places, evidence, layout.tokenizer, config, round)):
            chunk = records[document.index - first]["chunks"][c]
            chunk.pop("draws", None)
            chunk |= annotation
        records[0]["cost"] = evidence.cost
        progress.block_done(len(places), evidence)
    return records


def documents_of_blocks(corpus: str, tokenizer: Tokenizer, config: SampleConfig,
                        wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Document]]]:
    """(number, documents) of the blocks of a corpus that are wanted; the others' lines are not even parsed."""
    for number, lines in itertools.groupby(numbered_lines(corpus), key=lambda line: line[0] // config.block_documents):
        if wanted(number):
            yield number, [read_document(corpus, i, line, tokenizer, without_latents=config.redraw) for i, line in lines]


def survey(corpus: str, layout: Layout, config: SampleConfig, context: int, ranks: Ranks) -> dict[int, int]:
    """How many chunks each block of this process has to be drawn for: every line is read and laid out before work begins.

    Raises ValueError, naming file, line and chunk, for what could not be drawn for.
    """
    chunks = {}
    for number, block in documents_of_blocks(corpus, layout.tokenizer, config, lambda n: n % ranks.world == ranks.rank):
        places = [place for document in block for place in places_to_infer(document)]
        for document, c in places:
            with naming_the_line(corpus, document.index):
                check_room(context, len(layout.posterior_prompt(document, c)), config.max_latent_tokens, f"the prompt of chunk {c}")
        chunks[number] = len(places)
    return chunks


def at_precision(model: GPT, dtype: str) -> GPT:
    """The model as it is, or a copy whose blocks compute in bfloat16; auto: bfloat16 on CUDA."""
    wanted = {"auto": "bfloat16" if model.embedding.weight.is_cuda else "float32"}.get(dtype, dtype)
    if model.dtype == getattr(torch, wanted):
        return model
    model = copy.deepcopy(model)
    model.blocks.to(getattr(torch, wanted))
    return model


def e_step(model: GPT, tokenizer: Tokenizer, corpus: str, config: SampleConfig, round: int, out: str, ranks: Ranks,
           chunks: dict[int, int] | None = None) -> dict:
    """Write the corpus with a drawn latent per chunk to `out`; returns its `summarize`. chunks: what `survey` gave, if it ran.

    Blocks of documents are dealt to the ranks and written whole; a run that was killed goes on after the last of them.
    A block is computed alike on any rank, so the file has the same bytes for any number of them (CPU, float32, the
    same number of threads; elsewhere floating point may flip a rare token). One block is in memory at a time.
    """
    parts, layout, start = Path(f"{out}.parts"), Layout(tokenizer), time.time()
    if not os.path.exists(out):
        chunks = survey(corpus, layout, config, model.config.context, ranks) if chunks is None else chunks
        paths = {number: parts / f"{number:09d}.jsonl" for number in chunks}
        missing = {number for number in chunks if not paths[number].exists()}
        progress = Progress(sum(chunks[number] for number in missing), config.num_latents, ranks.main)
        model = at_precision(model, config.dtype)
        for number, block in documents_of_blocks(corpus, tokenizer, config, missing.__contains__):
            write_jsonl(paths[number], annotate_block(model, layout, block, config, round, progress))
        progress.bar.close()
        if missing:
            ranks.say(f"  {out}: {progress.tokens / (time.time() - start):,.0f} sampled tokens/s{progress.ess}")
        ranks.barrier()
        if ranks.main:
            blocks = math.ceil(sum(1 for _ in numbered_lines(corpus)) / config.block_documents)
            join_files([parts / f"{number:09d}.jsonl" for number in range(blocks)], out)
        ranks.barrier()
    if ranks.main:
        shutil.rmtree(parts, ignore_errors=True)
    return summarize(stream_corpus(out))


# ---- for people ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MainConfig(SampleConfig):
    checkpoint: str = option("runs/train/ckpt.pt", "the model that thinks; made by train.py")
    data: str = option("data/alchemy/raw.jsonl", "corpus to annotate; chunks that have a latent keep it")
    out: str = option("runs/latents.jsonl", "annotated corpus, which train.py --data reads")
    device: str = option("auto", "auto, cpu, cuda or mps")
    round: int = option(1, "number of the EM round; another number draws other thoughts")
    show: int = option(0, "print so many chunks with their thoughts, weights and bound instead")
    prompt: str = option("", "think about this text, then go on with it, instead")


def show(model: GPT, tokenizer: Tokenizer, config: MainConfig) -> Iterator[str]:
    """The first chunks of a corpus with their thoughts; nothing is written."""
    layout, everything = Layout(tokenizer), replace(config, keep="all")
    documents = (read_document(config.data, i, line, tokenizer, config.redraw) for i, line in numbered_lines(config.data))
    places = list(itertools.islice((place for document in documents for place in places_to_infer(document)), config.show))
    if places:
        annotations = annotate(places, infer(model, layout, places, config, config.round), tokenizer, everything, config.round)
        yield from (show_chunk(layout, place, annotation) for place, annotation in zip(places, annotations))


def think(model: GPT, tokenizer: Tokenizer, config: MainConfig) -> str:
    """The most likely thought after --prompt, token by token, and the most likely text after that."""
    layout, text = Layout(tokenizer), re.sub(r"\s+([,.;:!?])", r"\1", config.prompt)      # "fire , salt" is "fire, salt"
    document = Document(0, [Chunk(tokenizer.encode(text), given=True)], {})
    [thought], [answer] = think_and_answer(model, layout, [layout.prior_prompt(document, 1)], *[config.max_latent_tokens] * 2)
    return f"prompt   {text}\nthought  {tokenizer.decode(thought).strip()}\nanswer   {tokenizer.decode(answer).strip()}"


# ---- main ------------------------------------------------------------------------------------------------------

def annotate_corpus(state: dict, digest: str, tokenizer: Tokenizer, config: MainConfig, ranks: Ranks) -> None:
    """The E-step as a command: everything is checked first, the settings stand beside the output, the figures come last."""
    if (os.path.exists(config.out) or os.path.exists(f"{config.out}.parts")) and not os.path.exists(f"{config.out}.config"):
        raise ValueError(f"{config.out} is there without its {config.out}.config; "
                         "give another --out, or delete what there is of both")
    chunks = survey(config.data, Layout(tokenizer), config, state["model_config"].context, ranks)
    open_run(f"{config.out}.config", config, ranks, checkpoint_sha256=digest, data_sha256=sha256_of(config.data))
    ranks.say(f"drawing {config.num_latents} thoughts for each chunk of {config.data} on {ranks.device}")
    model = restore(state, ranks.device)
    ranks.say(json.dumps(e_step(model, tokenizer, config.data, config, config.round, config.out, ranks, chunks), indent=1))


def main(argv=None) -> None:
    config = parse_config(MainConfig(), argv, __doc__)
    ranks, state = start_ranks(config.device), read_checkpoint(config.checkpoint, mmap=True)
    digest, tokenizer = sha256_of(config.checkpoint), Tokenizer(**state["tokenizer"])
    if config.prompt:
        ranks.say(think(at_precision(restore(state, ranks.device), config.dtype), tokenizer, config))
    elif config.show:
        for text in show(at_precision(restore(state, ranks.device), config.dtype), tokenizer, config):
            ranks.say(text + "\n")
    else:
        annotate_corpus(state, digest, tokenizer, config, ranks)


if __name__ == "__main__":
    script(main)
