"""The M-step: pretrain one model on text with the thoughts inserted, plain cross-entropy on joint sequences.

    python train.py                                             the embedded corpus, on what this machine has
    torchrun --standalone --nproc_per_node=2 train.py           the same global batches over two processes
    python train.py --data latents.jsonl --out runs/mine        any corpus of the data contract: text, chunks, latents

Killed and started again with the same command it continues, and on a CPU ends with the same weights bit for bit.

    config -> state -> schedule and optimizer -> train step -> evaluate -> log -> train -> main

Shapes: R rows of the global batch, B rows of a micro-batch, T positions.
"""
import contextlib
import itertools
import math
import os
import shutil
import signal
import time
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Callable, Iterable, Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # a Ctrl-C ends the imports too, of which numpy's would lose it

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data.alchemy.prepare import prepare as make_embedded
from data.cache import TokenizedCorpus, open_source, tokenizer_of_corpora
from data.corpus import chunk_cap
from data.layout import LATENT, TEXT, Layout
from data.loader import Position, Recipe, StepBatch, collate, epoch_rows, training_batches
from data.run import (Log, Ranks, choose_dtype, hold_early, open_run, option, parse_config, script, sha256_of,
                      start_ranks, whole_file)
from data.tokens import Tokenizer, is_of_base
from model import GPT, GPTConfig, Shape, checkpoint_path, read_checkpoint, restore, save_checkpoint


PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "4090": 165e12, "3090": 71e12}       # dense bfloat16, of the datasheets
COMPILE_FROM = {"cuda": 0.0, "cpu": 3e14}      # FLOPs of a run in which torch.compile, up to minutes, is made up for

# ---- config ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig(Recipe):
    steps: int = option(300, "optimizer steps", above=0)
    epochs: float = option(0.0, "passes over the documents, instead of --steps; 0: as many steps as --steps says",
                           at_least=0)
    micro_batch_rows: int = option(0, "rows that go through the model at once on a process; 0: all of them", at_least=0)
    recompute: bool = option(False, "compute each block again for its gradient: less memory, a third more time",
                             how=True)
    optimizer: Literal["auto", "muon", "adamw"] = option(
        "auto", "of the matrices of the blocks, all other weights have AdamW; auto: muon, and adamw from an open base")
    learning_rate: float | Literal["auto"] = option(
        "auto", "peak of AdamW's learning rate; auto: 3e-3, and 1e-4 from an open base", above=0, at_most=10)
    muon_learning_rate: float = option(0.015, "peak of Muon's", above=0, at_most=10)
    schedule: Literal["wsd", "cosine", "constant"] = option(
        "wsd", "after the warm-up; wsd: constant, then down to zero; cosine: to zero")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises", above=0, at_most=1)
    decay: float = option(0.5, "share of the steps, at the end, in which wsd falls", above=0, at_most=1)
    weight_decay: float = option(0.1, "of the matrices", at_least=0, at_most=10)
    clip: float = option(1.0, "largest norm of the gradient", above=0)
    keep: Literal["stable", "best", "both", "none"] = option(
        "stable", "what stays beside ckpt.pt; stable: the state before the learning rate falls, from which a run of "
        "more --steps goes on; best: the weights that are best on held-out text")
    checkpoint_every: int = option(100, "steps between checkpoints, from which a killed run continues", above=0,
                                  how=True)
    log_every: int = option(25, "steps between lines of the log", above=0, how=True)
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile; auto: on CUDA, and on CPUs in long runs")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the products; auto: bfloat16 on CUDA, and from width 192 on CPUs with units for it")
    model: Shape = option(Shape(context=0), "shape of a fresh model; of a base only --model.context may be set")


# ---- where a model starts --------------------------------------------------------------------------------------

def read_start(path: str, ranks: Ranks) -> dict | None:
    """model_config, model (the weights) and tokenizer of a run, a checkpoint or the folder of an open base; None where
    a model is to be a fresh one. Raises FileNotFoundError, ValueError."""
    if not path:
        return None
    if not os.path.exists(path):
        of_hub = f"; for a base of the hub: hf download {path} --local-dir bases/{os.path.basename(path)}"
        raise FileNotFoundError(f"no run, checkpoint or base at {path}{of_hub if path.count('/') == 1 else ''}")
    if os.path.isfile(checkpoint_path(path)):
        return read_checkpoint(path)
    from data.bases import read_base
    return read_base(path, ranks.say)


def settled(config: TrainConfig, start: dict | None) -> TrainConfig:
    """The settings with what auto, and a context of 0, come to for a model that starts there. Raises ValueError where
    they do not fit it. Weights of a base want small steps, and Muon's are all of one size."""
    context = start["model_config"].context if start else 256
    if start and replace(config.model, context=0) != Shape(context=0):
        raise ValueError("weights bring the shape of their model along; leave --model.* out, but for --model.context")
    if start and config.model.context > context:
        raise ValueError(f"--model.context {config.model.context} exceeds that of the weights, {context}; lower it")
    context = config.model.context or context
    if config.row_tokens > context:
        raise ValueError(f"--row_tokens {config.row_tokens} exceeds the context of the model, {context}; lower it")
    optimizer, rate = ("adamw", 1e-4) if start and is_of_base(start["tokenizer"]) else ("muon", 3e-3)
    return replace(config, model=replace(config.model, context=context),
                   optimizer=optimizer if config.optimizer == "auto" else config.optimizer,
                   learning_rate=rate if config.learning_rate == "auto" else config.learning_rate)


def new_model(config: TrainConfig, start: dict | None, tokenizer: Tokenizer) -> GPT:
    """A model of the weights of a start, which it takes over, or with fresh ones."""
    if not start:
        return GPT(GPTConfig(**asdict(config.model) | {"vocab_size": tokenizer.vocab_size}), config.seed)
    return restore(start | {"model_config": replace(start["model_config"], context=config.model.context)})


def with_steps(config: TrainConfig, documents, layout: Layout) -> TrainConfig:
    """The settings with the steps that --epochs come to, by the rows of the first epoch, in their place."""
    if not config.epochs:
        return config
    rows = sum(1 for _ in epoch_rows(documents, layout, config))
    return replace(config, steps=max(1, math.ceil(config.epochs * rows / config.rows)), epochs=0.0)


# ---- state -----------------------------------------------------------------------------------------------------

@dataclass
class TrainState:
    """What a resume needs besides weights and optimizer. Data and coins follow from the position."""
    step: int = 0
    tokens: int = 0                 # that went through the model, padding apart
    observed_tokens: int = 0        # targets that are observed text
    latent_tokens: int = 0          # targets that are thoughts
    position: tuple = (0, 0, 0)     # of the stream of rows, see `Position`
    dtype: str = ""                 # these three as the run began, see `chosen`
    compile: bool = False
    warmup: int = 0

    def count(self, batch: StepBatch) -> None:
        self.tokens += batch.num_tokens
        self.observed_tokens += batch.num_observed
        self.latent_tokens += batch.num_latent
        self.position = astuple(batch.position)


# ---- schedule and optimizer ------------------------------------------------------------------------------------

def warmup_steps(config: TrainConfig) -> int:
    return max(1, round(config.warmup * config.steps))


def stable_steps(config: TrainConfig) -> int:
    """How many steps are the same in a longer run: all before the learning rate falls."""
    falls = {"wsd": max(1, round(config.decay * config.steps)), "constant": 0, "cosine": config.steps}
    return config.steps - falls[config.schedule]


def schedule(step: int, config: TrainConfig, warmup: int) -> float:
    """The share of the peak learning rate; `step` counts from 0. A linear warm-up, then the shape of --schedule."""
    rise = min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        return rise * (1 + math.cos(math.pi * max(0, step + 1 - warmup) / max(1, config.steps + 1 - warmup))) / 2
    return min(rise, (config.steps - step) / max(1, config.steps - stable_steps(config)))


def nearest_orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Stacked matrices (n, r, c) with their singular values brought near 1, by a Newton-Schulz iteration.

    In float32; on CUDA in bfloat16, as in its source.
    """
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x.bfloat16() if x.is_cuda else x
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
        shapes = dict.fromkeys(matrix.shape for matrix in matrices)
        groups = [{"params": [matrix for matrix in matrices if matrix.shape == shape]} for shape in shapes]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights, state = group["params"], self.state[group["params"][0]]
            gradient = torch.stack([weight.grad for weight in weights])                       # (n, r, c)
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"]
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = nearest_orthogonal(gradient.lerp(momentum, group["momentum"]))
            scale = max(1.0, gradient.shape[1] / gradient.shape[2]) ** 0.5
            for weight, direction in zip(weights, update):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * scale)


def make_optimizers(model: GPT, config: TrainConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, or AdamW for these too; AdamW for all other weights.

    Weight decay on matrices only. `base_lr` keeps the peak of each group for the schedule.
    """
    assert "auto" not in (config.optimizer, config.learning_rate), "see settled"
    muon, matrices, vectors = [], [], []
    for name, weight in model.named_parameters():
        is_muon = config.optimizer == "muon" and name.startswith("blocks.") and weight.ndim == 2
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

class Forward:
    """The model as training calls it: compiled or not, in bfloat16 or float32, in one process or many."""

    def __init__(self, model: GPT, dtype: str, compile: bool, ranks: Ranks):
        self.module = torch.compile(model, dynamic=False) if compile else model
        self.module = DistributedDataParallel(self.module) if ranks.world > 1 else self.module
        self.autocast = torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
        self.no_sync = self.module.no_sync if ranks.world > 1 else contextlib.nullcontext

    def __call__(self, ids: Tensor, targets: Tensor, document: Tensor) -> Tensor:
        """log p of each target, (B, T) float32 nats; see `GPT.forward`."""
        with self.autocast:
            return self.module(ids, targets, document)


def backward(forward: Forward, batch: StepBatch, micro_batch_rows: int, ranks: Ranks) -> Tensor:
    """Gradients of the mean nll per target of the global batch; returns this rank's nll sums of (latent, text, all).

    The loss is summed over targets and divided once by the global count. A mean of micro-batch means would weigh the
    tokens of ragged rows unequally; so would DDP's mean over ranks, which `world` undoes.
    """
    scale = ranks.world / max(1, batch.num_targets)
    mine, sums = batch.mine.to(ranks.device), torch.zeros(3, device=ranks.device)
    size = micro_batch_rows or len(mine.ids)
    for start in range(0, len(mine.ids), size):
        part, last = mine.rows(slice(start, start + size)), start + size >= len(mine.ids)
        with contextlib.nullcontext() if last else forward.no_sync():
            nll = -forward(part.ids, part.targets, part.document)                             # (B, T)
            (nll.sum() * scale).backward()
        nll = nll.detach()
        sums += torch.stack([(nll * (part.kinds == kind)).sum() for kind in (LATENT, TEXT)] + [nll.sum()])
    return sums


def train_step(model: GPT, forward: Forward, optimizers, batch: StepBatch, rate: float, config: TrainConfig,
               ranks: Ranks) -> tuple[Tensor, Tensor]:
    """One update of the weights at a share of the peak learning rates; returns the nll sums of `backward` and the norm
    of the gradient."""
    sums = backward(forward, batch, config.micro_batch_rows, ranks)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sums, norm


# ---- evaluate --------------------------------------------------------------------------------------------------

@torch.no_grad()
def validate(forward: Forward, tokenizer: Tokenizer, documents, config: TrainConfig, ranks: Ranks,
             batch_rows: int = 16) -> dict:
    """Nats per token of the text of held-out documents laid out as `config` says, and bits per byte of it; of their
    thoughts too, where they have some. With the coins of the first epoch, so that it is always the same measure.

    What markers cost is left out: after the text of a document without a thought, training has never shown the end.
    """
    rows, sizes = epoch_rows(documents, Layout(tokenizer), config), torch.tensor(tokenizer.sizes)
    mine = (row for row, _ in itertools.islice(rows, ranks.rank, None, ranks.world))
    sums = torch.zeros(5, dtype=torch.float64)      # nll of text and latent targets, their counts, bytes of the text
    while rows_of_batch := list(itertools.islice(mine, batch_rows)):
        empty = [[]] * (batch_rows - len(rows_of_batch))        # one shape to compile
        batch = collate(rows_of_batch + empty, config.row_tokens)
        there = batch.to(ranks.device)
        nll = -forward(there.ids, there.targets, there.document)
        kinds = [there.kinds == kind for kind in (TEXT, LATENT)]
        sums[:4] += torch.stack([(nll * kind).sum() for kind in kinds] + [kind.sum() for kind in kinds]).cpu()
        sums[4] += sizes[batch.targets[batch.kinds == TEXT]].sum()
    text, latent, texts, latents, text_bytes = ranks.sum(sums).tolist()
    figures = (("nll_text", text, texts, 1), ("bits_per_byte", text, text_bytes, math.log(2)),
               ("nll_latent", latent, latents, 1))
    return {name: nll / count / unit for name, nll, count, unit in figures if count}


# ---- log -------------------------------------------------------------------------------------------------------

LINE = {"loss": "loss {:.3f}", "nll_text": "text {:.3f} nats/token", "nll_latent": "latent {:.3f}",
        "bits_per_byte": "{:.3f} bits/byte", "grad_norm": "grad {:.2f}", "learning_rate": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tok/s", "waiting": "data {:.0%}", "mfu": "mfu {:.1%}",
        "memory_gib": "{:.1f} GiB"}


def check_finite(tensors: Iterable[Tensor], what: str) -> None:
    """Raise ValueError, which says what, where a number is not finite: of such a run nothing is saved."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(f"{what}; ckpt.pt, if there, is of the steps before; lower --learning_rate, with another "
                         "--out")


class Meter:
    """Sums what the steps report, and makes a record of it now and then. Reading it waits for the device."""

    def __init__(self, model: GPT, config: TrainConfig, dtype: str, ranks: Ranks):
        self.ranks, self.flops = ranks, model.training_flops(config.row_tokens)
        name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" and dtype == "bfloat16" else ""
        self.peak = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
        self.clear()

    def clear(self) -> None:
        self.sums, self.counts, self.norms = torch.zeros(3, device=self.ranks.device), torch.zeros(3), []
        self.tokens, self.waited, self.since = 0, 0.0, time.perf_counter()

    def add(self, batch: StepBatch, sums: Tensor, norm: Tensor, waited: float) -> None:
        self.sums += sums
        self.counts += torch.tensor([batch.num_latent, batch.num_observed, batch.num_targets])
        self.norms.append(norm)
        self.tokens, self.waited = self.tokens + batch.num_tokens, self.waited + waited

    def record(self, step: int, learning_rate: float) -> dict:
        """The means since the last record, nats over all ranks. Raises ValueError where they are not finite."""
        norm, means = torch.stack(self.norms).mean(), self.ranks.sum(self.sums).cpu() / self.counts.clamp(min=1)
        check_finite([norm, means], f"loss or gradient is not a number in steps {step - len(self.norms) + 1} to {step}")
        (latent, text, loss), seconds = means.tolist(), time.perf_counter() - self.since
        speed = self.tokens / seconds
        record = {"loss": loss, "nll_text": text, "nll_latent": latent, "grad_norm": norm.item(),
                  "learning_rate": learning_rate, "tokens_per_second": speed, "waiting": self.waited / seconds}
        if self.peak:
            record |= {"mfu": speed * self.flops / self.peak / self.ranks.world,
                       "memory_gib": torch.cuda.max_memory_allocated(self.ranks.device) / 2 ** 30}
        absent = [name for name, count in zip(("nll_latent", "nll_text"), self.counts) if not count]
        return {name: value for name, value in record.items() if name not in absent}


# ---- train -----------------------------------------------------------------------------------------------------

def read_resume(folder: str, config: TrainConfig) -> dict | None:
    """The checkpoint from which a run goes on; None where it begins. That of a run of fewer steps counts only as far as
    the learning rate did not fall. Raises ValueError where there is none such."""
    paths = [os.path.join(folder, name) for name in ("ckpt.pt", "stable.pt")]
    if not os.path.exists(paths[0]):
        return None
    for saved in map(read_checkpoint, filter(os.path.exists, paths)):
        not_fallen = saved["state"]["step"] <= stable_steps(replace(config, steps=saved["steps"]))
        if saved["steps"] == config.steps or not_fallen and saved["optimizers"]:
            return saved
    if config.schedule == "cosine":
        raise ValueError(f"{folder} is of --steps {saved['steps']}, from which the learning rate of --schedule cosine "
                         f"follows at every step; give another --out for {config.steps}")
    raise ValueError(f"{folder} was trained for {saved['steps']} steps and without --keep stable; give another "
                     f"--out for {config.steps}")


def chosen(config: TrainConfig, model: GPT, ranks: Ranks) -> dict:
    """The dtype of the products, whether to compile (by hardware and size alone) and the steps of the warm-up."""
    flops = config.steps * config.batch_tokens * model.training_flops(config.row_tokens)
    worth = config.compile == "auto" and flops >= COMPILE_FROM.get(ranks.device.type, math.inf)
    if worth and ranks.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        ranks.say("not compiled: there is no g++ or clang++")
        worth = False
    dtype = choose_dtype(config.dtype, model.config.width, ranks.device)
    return {"dtype": dtype, "compile": worth or config.compile == "on", "warmup": warmup_steps(config)}


def resume(folder: str, config: TrainConfig, model: GPT, optimizers, tokenizer: Tokenizer, ranks: Ranks) -> TrainState:
    """Put a checkpoint's weights into model and optimizers; how far it was, or a new state where there is none."""
    saved, fresh = read_resume(folder, config), ranks.from_main(lambda: chosen(config, model, ranks))
    if not saved:
        return TrainState(**fresh)
    for what, ours in (("model_config", model.config), ("tokenizer", tokenizer.state())):
        if saved[what] != ours:
            raise ValueError(f"{folder}/ckpt.pt is of another {what}; give another --out")
    if not saved["state"].get("dtype"):
        raise ValueError(f"{folder}/ckpt.pt is of an older version, which did not keep its dtype; give another --out")
    model.load_state_dict(saved["model"])
    for optimizer, saved_optimizer in zip(optimizers, saved["optimizers"]):       # none in that of a finished run
        optimizer.load_state_dict(saved_optimizer)
    return TrainState(**saved["state"])


def is_stable(state: TrainState, config: TrainConfig) -> bool:
    """Whether this is the state from which a longer run may go on, and is to be kept."""
    return state.step == stable_steps(config) and config.keep in ("stable", "both")


def save(folder: str, state: TrainState, config: TrainConfig, model: GPT, optimizers, tokenizer: Tokenizer,
         rows: list[dict]) -> None:
    """Write the checkpoints that are due: ckpt.pt, with the optimizers as long as the run goes on, and those of --keep,
    by the rows of the log. They hold no time, path or device: the same run has the same bytes."""
    *before, last = [row.get("nll_text", math.inf) if row["kind"] == "held-out" else math.inf for row in rows]
    due = [("best.pt", False)] * (last < min(before, default=math.inf) and config.keep in ("best", "both"))
    due += [("stable.pt", True)] * is_stable(state, config)
    for name, goes_on in [*due, ("ckpt.pt", state.step < config.steps)]:
        with whole_file(os.path.join(folder, name)) as file:
            save_checkpoint(file, model, state=vars(state), steps=config.steps, tokenizer=tokenizer.state(),
                            optimizers=[optimizer.state_dict() for optimizer in optimizers] if goes_on else [])


def train(model: GPT, tokenizer: Tokenizer, documents, config: TrainConfig, folder: str, ranks: Ranks,
          title: str = "train", at_checkpoint: Callable[[TrainState, Forward], dict | None] = lambda *now: None,
          at_record: Callable[[dict], None] = lambda record: None) -> TrainState:
    """Train the model in place for config.steps steps, or what is left of them, keeping folder/ckpt.pt.

    documents: a list of Document, or a TokenizedCorpus. config: see `settled`. at_checkpoint(state, forward), called
    before a checkpoint is saved, may give figures of held-out text; at_record(record) is called with every line of
    metrics.jsonl. Raises ValueError where the loss is not a number.
    """
    model.recompute, optimizers = config.recompute, make_optimizers(model, config, ranks.device)
    state = resume(folder, config, model, optimizers, tokenizer, ranks)
    if ranks.sum(torch.tensor(state.step)) != ranks.world * state.step:
        raise ValueError(f"{folder} is not at the same step on every node; put --out on a shared disk")
    forward, meter = Forward(model, state.dtype, state.compile, ranks), Meter(model, config, state.dtype, ranks)
    if state.compile or state.dtype != "float32":
        ranks.say(f"{title}: in {state.dtype}" + ", compiled" * state.compile)
    batches = training_batches(documents, Layout(tokenizer), config, Position(*state.position), ranks)
    log, bar = Log(folder, state.step, ranks, at_record), ranks.bar(config.steps, title, done=state.step)
    for state.step in range(state.step + 1, config.steps + 1):
        start, rate = time.perf_counter(), schedule(state.step - 1, config, state.warmup)
        batch, waited = next(batches), time.perf_counter() - start
        sums, norm = train_step(model, forward, optimizers, batch, rate, config, ranks)
        state.count(batch)
        meter.add(batch, sums, norm, waited)
        bar.update()
        due = state.step == config.steps or state.step % config.checkpoint_every == 0 or is_stable(state, config)
        if due or state.step % config.log_every == 0:
            record = meter.record(state.step, config.learning_rate * rate)
            bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
            log.add("train", state.step, state.tokens, record)
            if due:
                check_finite(model.parameters(), f"weights are not numbers after step {state.step}")
                if figures := at_checkpoint(state, forward):
                    log.add("held-out", state.step, state.tokens, figures)
                if ranks.main:
                    save(folder, state, config, model, optimizers, tokenizer, log.rows)
                ranks.barrier()
            meter.clear()
    bar.close()
    return state


# ---- main ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MainConfig(TrainConfig):
    data: str = option("data/alchemy/gold.jsonl", "corpus to train on; the embedded one is made where it is missing",
                       how=True)
    held_out: str = option("auto", "corpus to validate on at each checkpoint; auto: held_out.jsonl beside --data, if "
                                   "there; empty: none", how=True)
    encoding: str = option("words", "tokens of the text: words, or an encoding of tiktoken such as gpt2")
    init_from: str = option("", "run folder, checkpoint or folder of an open base whose weights, shape and vocabulary "
                                "to start from", how=True)
    out: str = option("runs/train", "run folder: config.json, metrics.jsonl, ckpt.pt", how=True)
    device: str = option("auto", "auto, cpu, cuda or mps", how=True)

    def __post_init__(self):
        super().__post_init__()
        if self.init_from and self.encoding != "words":
            raise ValueError("--init_from brings its vocabulary along; leave --encoding out")


def open_corpora(config: MainConfig, start: dict | None) -> tuple[Tokenizer, list[TokenizedCorpus]]:
    """The tokenizer of --init_from, or that of the corpora's vocabulary; the corpus to train on, and the one to
    validate on where there is one.

    Latents drawn by a model are ids of its vocabulary: to train on them, start from its checkpoint or its family's.
    """
    if config.data == MainConfig().data and not os.path.exists(config.data):
        make_embedded(Path(config.data).parent)
    beside = str(Path(config.data).with_name("held_out.jsonl"))
    held_out = (beside if os.path.exists(beside) else "") if config.held_out == "auto" else config.held_out
    cap = chunk_cap(config.chunk_tokens, config.model.context)
    sources = [open_source(path, cap) for path in (config.data, held_out) if path]
    tokenizer = tokenizer_of_corpora(sources, config.encoding, start)
    return tokenizer, [TokenizedCorpus(source, tokenizer) for source in sources]


def validation_config(config: TrainConfig, state: TrainState) -> TrainConfig:
    """The settings of the training, but that held-out text without a thought stands after SOL EOL where the layout is
    joint or posterior and there were thoughts to train on: there the posterior form teaches it so, not bare."""
    taught = config.layout in ("joint", "posterior") and state.latent_tokens > 0
    return replace(config, plain_as="no_thought") if taught else config


def main(argv=None) -> None:
    config = parse_config(MainConfig(), argv, __doc__)
    ranks = start_ranks(config.device)
    hold_early(config.out, ranks)
    start = read_start(config.init_from, ranks)
    config = settled(config, start)
    if not ranks.main:
        ranks.barrier()         # the main rank makes first what the others then find
    tokenizer, corpora = open_corpora(config, start)
    if ranks.main:
        ranks.barrier()
    documents, *held_out = corpora
    config = with_steps(config, documents, Layout(tokenizer))
    model = new_model(config, start, tokenizer).to(ranks.device)
    open_run(config.out, config, ranks, ("steps",), before_growing=lambda: read_resume(config.out, config),
             data_sha256=" ".join(corpus.source.digest[:16] for corpus in corpora),
             init_sha256=sha256_of(config.init_from)[:16] if start and ranks.main else "")
    ranks.say(f"training {model.num_parameters():,} parameters on {len(documents):,} documents of {config.data}, "
              f"{ranks.world} process(es) on {ranks.device}")

    def say(row: dict) -> None:
        where = f"step {row['step']}/{config.steps}" if row["kind"] == "train" else "  held-out:"
        ranks.say("  ".join([where, *(form.format(row[name]) for name, form in LINE.items() if name in row)]))

    def on_held_out(state: TrainState, forward: Forward) -> dict:
        return validate(forward, tokenizer, *held_out, validation_config(config, state), ranks) if held_out else {}
    state = train(model, tokenizer, documents, config, config.out, ranks, at_checkpoint=on_held_out, at_record=say)
    ranks.say(f"{config.out}/ckpt.pt: {state.step} steps, {state.tokens:,} tokens, {state.observed_tokens:,} observed, "
              f"in {state.dtype}")


if __name__ == "__main__":
    script(main)
