"""The M-step: pretrain one model on text with the thoughts inserted, plain cross-entropy on joint sequences.

    python train.py                                             the embedded corpus, on what this machine has
    torchrun --standalone --nproc_per_node=2 train.py           the same global batches over two processes
    python train.py --data latents.jsonl --out runs/mine        any corpus of the data contract: text, chunks, latents

Killed and started again with the same command it continues, and on a CPU ends with the same weights bit for bit.

    config -> state -> schedule and optimizer -> train step -> evaluate -> train -> main

Shapes: R rows of the global batch, B rows of a micro-batch, T positions.
"""
import contextlib
import math
import os
import time
from dataclasses import dataclass, replace
from typing import Callable, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.corpus import Document, encode_corpus, observed_places, read_corpus, texts_of
from data.layout import LATENT, TEXT, Layout
from data.loader import Batch, score_sequences, training_batches
from data.run import (Ranks, append_metrics, open_run, option, parse_config, require_positive, script, start_ranks,
                      trim_metrics)
from data.tokens import Tokenizer, tokenizer_for
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint


LOG_EVERY = 25      # steps


# ---- config ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig:
    steps: int = option(300, "optimizer steps")
    batch_tokens: int = option(512, "tokens of a global batch, over all processes and micro-batches")
    row_tokens: int = option(128, "tokens of a row that documents are packed into; at most --model.context")
    micro_batch_rows: int = option(0, "rows that go through the model at once on a process; 0: all of them")
    learning_rate: float = option(3e-3, "peak of AdamW's learning rate")
    muon_learning_rate: float = option(0.015, "peak of Muon's, for the matrices of the blocks; 0: AdamW for all")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises")
    decay: float = option(0.5, "share of the steps, at the end, in which it falls linearly to zero")
    weight_decay: float = option(0.1, "of the matrices")
    clip: float = option(1.0, "largest norm of the gradient")
    plain_as: Literal["plain", "no_thought"] = option("plain", "how a chunk without a latent is laid out")
    seed: int = option(0, "of the initial weights, the order of the documents and the coins")
    checkpoint_every: int = option(100, "steps between checkpoints, from which a killed run continues")
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile; auto: on CUDA")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of the network's products; auto: bfloat16 on CUDA")
    model: GPTConfig = option(GPTConfig(), "shape of a fresh model")

    def __post_init__(self):
        require_positive(self, "steps", "batch_tokens", "row_tokens", "learning_rate", "warmup", "decay", "clip", "checkpoint_every")
        if self.micro_batch_rows < 0 or self.seed < 0:
            raise ValueError("--micro_batch_rows and --seed must not be negative")
        if self.model.vocab_size:
            raise ValueError("--model.vocab_size follows from the tokenizer; leave it out")
        if self.row_tokens > self.model.context:
            raise ValueError(f"--row_tokens {self.row_tokens} exceeds --model.context {self.model.context}; lower it")
        if self.batch_tokens < self.row_tokens:
            raise ValueError(f"--batch_tokens {self.batch_tokens} is less than a row of --row_tokens {self.row_tokens}")
        if self.batch_tokens % self.row_tokens:
            raise ValueError(f"--batch_tokens {self.batch_tokens} is no multiple of --row_tokens {self.row_tokens}; make it one")


# ---- state -----------------------------------------------------------------------------------------------------

@dataclass
class TrainState:
    """What a resume needs besides weights and optimizer. Data order and coins follow from (seed, step)."""
    step: int = 0
    tokens: int = 0             # that went through the model, padding apart
    observed_tokens: int = 0    # targets that are observed text


# ---- schedule and optimizer ------------------------------------------------------------------------------------

def schedule(step: int, config: TrainConfig) -> float:
    """The share of the peak learning rate: linear warm-up, constant, linear decay to zero; `step` counts from 0."""
    warmup, decay = max(1, round(config.warmup * config.steps)), max(1, round(config.decay * config.steps))
    return min(1.0, (step + 1) / warmup, (config.steps - step) / decay)


def nearest_orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Stacked matrices (n, r, c) with their singular values brought near 1, by a Newton-Schulz iteration in float32."""
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    for _ in range(iterations):
        gram = x @ x.mT
        # x <- 3.4445 x + (2.0315 gram^2 - 4.7750 gram) x
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal. Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.

    torch.optim.Muon is the same, a matrix at a time in bfloat16: on a CPU without bfloat16 units that took 70 ms a step
    at width 64, and matrices of one shape stacked in float32 take 3 ms.
    """

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        stacks: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            stacks.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": stack} for stack in stacks.values()]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights, state = group["params"], self.state[group["params"][0]]
            gradient = torch.stack([weight.grad for weight in weights])                       # (n, r, c)
            momentum = state.setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = nearest_orthogonal(gradient.lerp(momentum, group["momentum"]))
            scale = max(1.0, gradient.shape[1] / gradient.shape[2]) ** 0.5
            for weight, direction in zip(weights, update):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * scale)


def make_optimizers(model: GPT, config: TrainConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks where it has a learning rate, AdamW for all other weights.

    Weight decay on matrices only. `base_lr` keeps the peak of each group for the schedule.
    """
    muon, matrices, vectors = [], [], []
    for name, weight in model.named_parameters():
        is_muon = config.muon_learning_rate > 0 and name.startswith("blocks.") and weight.ndim == 2
        (muon if is_muon else matrices if weight.ndim == 2 else vectors).append(weight)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = device.type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)]
    if muon:
        optimizers.append(Muon(muon, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


# ---- train step ------------------------------------------------------------------------------------------------

def backward(forward, batch: Batch, micro_batch_rows: int, ranks: Ranks, autocast) -> Tensor:
    """Gradients of the mean nll per target of the global batch; returns this rank's nll sums of (latent, text, all).

    The loss is summed over targets and divided once by the global count. A mean of micro-batch means would weigh the
    tokens of ragged rows unequally; so would DDP's mean over ranks, which `world` undoes.
    """
    count = max(1, batch.num_targets)
    mine = batch.rows(slice(ranks.rank, None, ranks.world)).to(ranks.device)
    rows, sums = len(mine.ids), torch.zeros(3, device=ranks.device)
    size = micro_batch_rows or rows
    for start in range(0, rows, size):
        part = mine.rows(slice(start, start + size))
        last = start + size >= rows
        with contextlib.nullcontext() if last or ranks.world == 1 else forward.no_sync():
            with autocast:
                nll = -forward(part.ids, part.targets, part.document)                         # (B, T)
            (nll.sum() * (ranks.world / count)).backward()
        sums += torch.stack([nll[part.kinds == LATENT].sum(), nll[part.kinds == TEXT].sum(), nll.sum()]).detach()
    return sums


def train_step(model: GPT, forward, optimizers, batch: Batch, step: int, config: TrainConfig, ranks: Ranks,
               autocast) -> tuple[Tensor, Tensor]:
    """One update of the weights; returns the nll sums of `backward` and the norm of the gradient."""
    sums = backward(forward, batch, config.micro_batch_rows, ranks, autocast)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(step, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sums, norm


# ---- evaluate --------------------------------------------------------------------------------------------------

def direct_nll(model: GPT, layout: Layout, documents: list[Document], no_thought: bool, batch_tokens: int = 16384) -> float:
    """-log p(x | C) without a thought, in nats per observed token of the documents; `no_thought` marks x with SOL EOL."""
    places = observed_places(documents)
    log_p = score_sequences(model, [layout.direct(d, c, no_thought) for d, c in places], batch_tokens)
    return -log_p.sum().item() / sum(len(d.chunks[c].suffix) for d, c in places)


# ---- train -----------------------------------------------------------------------------------------------------

class Meter:
    """Sums what the steps report and writes it to metrics.jsonl now and then. Reading it waits for the device."""

    def __init__(self, config: TrainConfig, folder: str, ranks: Ranks):
        self.config, self.folder, self.ranks = config, folder, ranks
        self.clear()

    def clear(self) -> None:
        self.nll, self.counts, self.tokens, self.since = torch.zeros(3, device=self.ranks.device), torch.zeros(3), 0, time.time()

    def add(self, step: int, batch: Batch, sums: Tensor, norm: Tensor, bar: tqdm) -> None:
        self.nll += sums
        self.counts += torch.tensor([(batch.kinds == LATENT).sum(), (batch.kinds == TEXT).sum(), batch.num_targets])
        self.tokens += batch.num_tokens
        if step % LOG_EVERY == 0 or step % self.config.checkpoint_every == 0 or step == self.config.steps:
            self.write(step, norm, bar)
            self.clear()

    def write(self, step: int, norm: Tensor, bar: tqdm) -> None:
        if self.ranks.world > 1:
            dist.all_reduce(self.nll)
        latent, text, loss = (self.nll.cpu() / self.counts.clamp(min=1)).tolist()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}; lower --learning_rate, with another --out "
                             f"(the last good checkpoint, if any, is {self.folder}/ckpt.pt)")
        bar.set_postfix_str(f"loss {loss:.3f}")
        if self.ranks.main:
            append_metrics(self.folder, {
                "step": step, "loss": loss, "nll_latent": latent, "nll_text": text, "grad_norm": norm.item(),
                "learning_rate": self.config.learning_rate * schedule(step - 1, self.config),
                "tokens_per_second": self.tokens / (time.time() - self.since)})


def train(model: GPT, tokenizer: Tokenizer, documents: list[Document], config: TrainConfig, folder: str, ranks: Ranks,
          title: str = "train", at_checkpoint: Callable[[TrainState], None] = lambda state: None) -> TrainState:
    """Train the model in place for config.steps steps, or what is left of them, keeping folder/ckpt.pt.

    at_checkpoint(state) is called before each checkpoint is saved. Raises ValueError where the rows of a batch cannot be
    dealt evenly, or the loss is not a number.
    """
    rows = config.batch_tokens // config.row_tokens
    if rows % ranks.world:
        raise ValueError(f"{rows} rows of a batch cannot be dealt to {ranks.world} processes; change --batch_tokens")
    path, device = os.path.join(folder, "ckpt.pt"), ranks.device
    optimizers, state = make_optimizers(model, config, device), TrainState()
    if os.path.exists(path):
        state = resume(path, model, optimizers, device)
    trim_metrics(folder, state.step, ranks)
    forward = torch.compile(model) if config.compile == "on" or config.compile == "auto" and device.type == "cuda" else model
    forward = DistributedDataParallel(forward) if ranks.world > 1 else forward
    low = config.dtype == "bfloat16" or config.dtype == "auto" and device.type == "cuda"
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)
    batches = training_batches(documents, Layout(tokenizer), plain_as=config.plain_as, row_tokens=config.row_tokens,
                               rows=rows, seed=config.seed, start=state.step)
    meter = Meter(config, folder, ranks)
    bar = tqdm(range(state.step + 1, config.steps + 1), desc=title, initial=state.step, total=config.steps, unit="step",
               leave=False, disable=not ranks.main)
    for state.step in bar:
        batch = next(batches)
        sums, norm = train_step(model, forward, optimizers, batch, state.step - 1, config, ranks, autocast)
        state.tokens += batch.num_tokens
        state.observed_tokens += batch.num_observed
        meter.add(state.step, batch, sums, norm, bar)
        if state.step % config.checkpoint_every == 0 or state.step == config.steps:
            at_checkpoint(state)
            if ranks.main:
                save_checkpoint(path, model, optimizers=[o.state_dict() for o in optimizers], state=vars(state),
                                tokenizer=tokenizer.state())
            ranks.barrier()
    return state


def resume(path: str, model: GPT, optimizers, device) -> TrainState:
    """Put a checkpoint's weights into the model and the optimizers, and return how far it was."""
    saved, state = load_checkpoint(path, device)
    if saved.config != model.config:
        raise ValueError(f"{path} is of another model ({saved.config}); give another --out")
    model.load_state_dict(saved.state_dict())
    for optimizer, saved_optimizer in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved_optimizer)
    return TrainState(**state["state"])


# ---- main ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MainConfig(TrainConfig):
    data: str = option("data/alchemy/gold.jsonl", "corpus to train on, JSONL")
    held_out: str = option("data/alchemy/held_out.jsonl", "corpus to evaluate on at the end; empty: none")
    encoding: str = option("words", "tokens of the text: words, or an encoding of tiktoken such as gpt2")
    init_from: str = option("", "checkpoint whose weights, shape and vocabulary to start from; empty: fresh ones")
    out: str = option("runs/train", "run folder: config.json, metrics.jsonl, ckpt.pt")
    device: str = option("auto", "auto, cpu, cuda or mps")


def starting_point(config: MainConfig, records: list[dict]) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of --init_from, or a fresh model with the vocabulary of the corpora.

    Latents drawn by a model are ids of its vocabulary: to train on them, start from its checkpoint or one of its family.
    """
    if config.init_from:
        model, state = load_checkpoint(config.init_from)
        return model, Tokenizer(**state["tokenizer"])
    tokenizer = tokenizer_for(texts_of(records, config.encoding), config.encoding)
    return GPT(replace(config.model, vocab_size=tokenizer.vocab_size), config.seed), tokenizer


def main(argv=None) -> None:
    config = parse_config(MainConfig(), argv, __doc__)
    ranks = start_ranks(config.device)
    corpora = [read_corpus(path) for path in (config.data, config.held_out) if path]
    model, tokenizer = starting_point(config, [record for records in corpora for record in records])
    documents, *held_out = (encode_corpus(records, tokenizer) for records in corpora)
    model.to(ranks.device)
    open_run(config.out, config, ranks)
    ranks.say(f"training {model.num_parameters():,} parameters on {len(documents)} documents of {config.data}, {ranks.world} "
              f"process(es) on {ranks.device}")
    state = train(model, tokenizer, documents, config, config.out, ranks)
    ranks.say(f"{config.out}/ckpt.pt: {state.step} steps, {state.tokens:,} tokens, {state.observed_tokens:,} observed")
    for no_thought, name in ((False, "raw"), (True, "no-thought")):
        for documents in held_out:
            nll = direct_nll(model, Layout(tokenizer), documents, no_thought)
            ranks.say(f"held-out {name} nll: {nll:.3f} nats per observed token")


if __name__ == "__main__":
    script(main)
