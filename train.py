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
import time
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Callable, Literal

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.alchemy.prepare import prepare as make_embedded
from data.cache import Source, TokenizedCorpus, open_source, vocabulary
from data.layout import LATENT, MARKER, TEXT, Layout
from data.loader import Position, Recipe, StepBatch, collate, epoch_rows, training_batches
from data.run import (Ranks, append_metrics, choose_dtype, choose_once, open_run, option, parse_config, script,
                      sha256_of, start_ranks, trim_metrics)
from data.tokens import Tokenizer, tokenizer_from, tokenizer_of
from model import GPT, GPTConfig, Shape, checkpoint_path, read_checkpoint, restore, save_checkpoint


PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "4090": 165e12, "3090": 71e12}       # dense bfloat16, of the datasheets
COMPILE_FROM = {"cuda": 0.0, "cpu": 3e14}      # FLOPs of a run in which torch.compile, up to minutes, is made up for

# ---- config ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig(Recipe):
    steps: int = option(300, "optimizer steps", above=0)
    epochs: float = option(0.0, "passes over the documents, instead of --steps; 0: as many steps as --steps says")
    micro_batch_rows: int = option(0, "rows that go through the model at once on a process; 0: all of them", above=-1)
    recompute: bool = option(False, "compute each block again for its gradient: less memory, a third more time")
    optimizer: Literal["auto", "muon", "adamw"] = option(
        "auto", "of the matrices of the blocks, all other weights have AdamW; auto: muon, and adamw from an open base")
    learning_rate: float = option(0.0, "peak of AdamW's learning rate; 0: 3e-3, and 1e-4 from an open base")
    muon_learning_rate: float = option(0.015, "peak of Muon's", above=0)
    schedule: Literal["wsd", "cosine", "constant"] = option(
        "wsd", "after the warm-up; wsd: constant, then down to zero; cosine: to zero")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises", above=0)
    decay: float = option(0.5, "share of the steps, at the end, in which wsd falls", above=0)
    weight_decay: float = option(0.1, "of the matrices")
    clip: float = option(1.0, "largest norm of the gradient", above=0)
    checkpoint_every: int = option(100, "steps between checkpoints, from which a killed run continues", above=0)
    log_every: int = option(25, "steps between lines of the log", above=0)
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile; auto: on CUDA, and on CPUs in long runs")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the products; auto: bfloat16 on CUDA, and from width 192 on CPUs with units for it")
    model: Shape = option(Shape(context=0), "shape of a fresh model; of a base only --model.context may be set")

    def __post_init__(self):
        super().__post_init__()
        for name in ("epochs", "learning_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} is not allowed; give a number of at least 0")


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
    """The settings with the context of a model that starts there. Raises ValueError where they do not fit it."""
    context = start["model_config"].context if start else 256
    if start and replace(config.model, context=0) != Shape(context=0):
        raise ValueError("weights bring the shape of their model along; leave --model.* out, but for --model.context")
    if start and config.model.context > context:
        raise ValueError(f"--model.context {config.model.context} exceeds that of the weights, {context}; lower it")
    context = config.model.context or context
    if config.row_tokens > context:
        raise ValueError(f"--row_tokens {config.row_tokens} exceeds the context of the model, {context}; lower it")
    return replace(config, model=replace(config.model, context=context))


def with_optimizer(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The settings with the optimizer that auto and the learning rate that 0 come to.

    Weights of a base want small steps, and Muon's are all of one size.
    """
    optimizer, rate = ("adamw", 1e-4) if tokenizer.of_base else ("muon", 3e-3)
    return replace(config, optimizer=optimizer if config.optimizer == "auto" else config.optimizer,
                   learning_rate=config.learning_rate or rate)


def new_model(config: TrainConfig, start: dict | None, tokenizer: Tokenizer) -> GPT:
    """A model of the weights of a start, which it takes over, or with fresh ones."""
    if not start:
        return GPT(GPTConfig(**asdict(config.model) | {"vocab_size": tokenizer.vocab_size}), config.seed)
    return restore(start | {"model_config": replace(start["model_config"], context=config.model.context)})


def with_steps(config: TrainConfig, documents, layout: Layout) -> TrainConfig:
    """The settings with the steps that --epochs come to, by the rows of the first epoch."""
    if not config.epochs:
        return config
    rows = sum(1 for _ in epoch_rows(documents, layout, config))
    return replace(config, steps=max(1, math.ceil(config.epochs * rows / config.rows)))


# ---- state -----------------------------------------------------------------------------------------------------

@dataclass
class TrainState:
    """What a resume needs besides weights and optimizer. Data and coins follow from the position."""
    step: int = 0
    tokens: int = 0                 # that went through the model, padding apart
    observed_tokens: int = 0        # targets that are observed text
    latent_tokens: int = 0          # targets that are thoughts
    position: tuple = (0, 0, 0)     # of the stream of rows, see `Position`

    def count(self, batch: StepBatch) -> None:
        self.tokens += batch.num_tokens
        self.observed_tokens += batch.num_observed
        self.latent_tokens += batch.num_latent
        self.position = astuple(batch.position)


# ---- schedule and optimizer ------------------------------------------------------------------------------------

def schedule(step: int, config: TrainConfig) -> float:
    """The share of the peak learning rate; `step` counts from 0. A linear warm-up, then the shape of --schedule."""
    warmup, decay = max(1, round(config.warmup * config.steps)), max(1, round(config.decay * config.steps))
    rise = min(1.0, (step + 1) / warmup)
    if config.schedule == "constant":
        return rise
    if config.schedule == "cosine":
        return rise * (1 + math.cos(math.pi * max(0, step + 1 - warmup) / max(1, config.steps + 1 - warmup))) / 2
    return min(rise, (config.steps - step) / decay)


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
    assert config.optimizer != "auto" and config.learning_rate, "see with_optimizer"
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
        self.module = DistributedDataParallel(self.module, broadcast_buffers=False) if ranks.world > 1 else self.module
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


def train_step(model: GPT, forward: Forward, optimizers, batch: StepBatch, step: int, config: TrainConfig,
               ranks: Ranks) -> tuple[Tensor, Tensor]:
    """One update of the weights; returns the nll sums of `backward` and the norm of the gradient."""
    sums = backward(forward, batch, config.micro_batch_rows, ranks)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(step, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sums, norm


# ---- evaluate --------------------------------------------------------------------------------------------------

@torch.no_grad()
def validate(forward: Forward, tokenizer: Tokenizer, documents, config: TrainConfig, ranks: Ranks,
             batch_rows: int = 16) -> dict:
    """Nats per target of held-out documents laid out as `config` says, by kind, and bits per byte of the observed text;
    nothing where that layout has no targets. With the coins of the first epoch, so that it is always the same measure.
    """
    rows = epoch_rows(documents, Layout(tokenizer), config)
    mine = (row for number, (row, _) in enumerate(rows) if number % ranks.world == ranks.rank)
    sizes = torch.tensor([*tokenizer.sizes, *[0] * len(tokenizer.marker)])
    sums = torch.zeros(7, dtype=torch.float64)      # nll and count of latent, text and marker targets; bytes of text
    while rows_of_batch := list(itertools.islice(mine, batch_rows)):
        empty = [[]] * (batch_rows - len(rows_of_batch))        # one shape to compile
        batch = collate(rows_of_batch + empty, config.row_tokens)
        there = batch.to(ranks.device)
        nll = -forward(there.ids, there.targets, there.document)
        kinds = [there.kinds == kind for kind in (LATENT, TEXT, MARKER)]
        sums[:6] += torch.stack([(nll * kind).sum() for kind in kinds] + [kind.sum() for kind in kinds]).cpu()
        sums[6] += sizes[batch.targets[batch.kinds == TEXT]].sum()
    nll, counts, (text_bytes,) = ranks.sum(sums).tensor_split([3, 6])
    if not counts.any():
        return {}
    names = ("val_nll_latent", "val_nll_text", "val_nll_marker")
    per_kind = {name: (nll[i] / counts[i]).item() for i, name in enumerate(names) if counts[i]}
    bits = {"val_bits_per_byte": (nll[1] / text_bytes).item() / math.log(2)} if text_bytes else {}
    return {"val_loss": (nll.sum() / counts.sum()).item()} | per_kind | bits


# ---- log -------------------------------------------------------------------------------------------------------

LINE = {"loss": "loss {:.3f}", "nll_text": "text {:.3f}", "nll_latent": "latent {:.3f} nats/token",
        "grad_norm": "grad {:.2f}", "learning_rate": "lr {:.1e}", "tokens_per_second": "{:,.0f} tok/s",
        "waiting": "data {:.0%}", "mfu": "mfu {:.1%}", "memory_gib": "{:.1f} GiB"}


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
        norm = torch.stack(self.norms).mean().item()
        latent, text, loss = (self.ranks.sum(self.sums).cpu() / self.counts.clamp(min=1)).tolist()
        seconds = time.perf_counter() - self.since
        if not math.isfinite(loss + norm):
            raise ValueError(f"loss or gradient is not a number in steps {step - len(self.norms) + 1} to {step}; "
                             "ckpt.pt, if there, is of the steps before; lower --learning_rate, with another --out")
        speed = self.tokens / seconds
        record = {"step": step, "loss": loss, "nll_text": text, "nll_latent": latent, "grad_norm": norm,
                  "learning_rate": learning_rate, "tokens_per_second": speed, "waiting": self.waited / seconds}
        if self.peak:
            record |= {"mfu": speed * self.flops / self.peak / self.ranks.world,
                       "memory_gib": torch.cuda.max_memory_allocated(self.ranks.device) / 2 ** 30}
        absent = [name for name, count in zip(("nll_latent", "nll_text"), self.counts) if not count]
        self.clear()
        return {name: value for name, value in record.items() if name not in absent}


# ---- train -----------------------------------------------------------------------------------------------------

def resume(path: str, model: GPT, optimizers, tokenizer: Tokenizer) -> TrainState:
    """Put a checkpoint's weights into model and optimizers; how far it was, or a new state where there is none."""
    if not os.path.exists(path):
        return TrainState()
    saved = read_checkpoint(path)
    for what, ours in (("model_config", model.config), ("tokenizer", tokenizer.state())):
        if saved[what] != ours:
            raise ValueError(f"{path} is of another {what}; give another --out")
    model.load_state_dict(saved["model"])
    for optimizer, saved_optimizer in zip(optimizers, saved["optimizers"]):       # none in that of a finished run
        optimizer.load_state_dict(saved_optimizer)
    return TrainState(**saved["state"])


def check_weights(model: GPT, step: int) -> None:
    """Raise ValueError where weights are not finite: such ones are never saved. Alike on all ranks."""
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise ValueError(f"weights are not numbers after step {step}; ckpt.pt, if there, is of the steps before; lower "
                         "--learning_rate, with another --out")


def chosen(config: TrainConfig, model: GPT, folder: str, ranks: Ranks) -> dict:
    """The dtype of the products and whether to compile, as the run in this folder began: by hardware and size alone."""
    flops = config.steps * config.batch_tokens * model.training_flops(config.row_tokens)
    worth = flops >= COMPILE_FROM.get(ranks.device.type, math.inf)
    if worth and ranks.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        ranks.say("not compiled: there is no g++ or clang++")
        worth = False
    compile = worth if config.compile == "auto" else config.compile == "on"
    dtype = choose_dtype(config.dtype, model.config.width, ranks.device)
    return choose_once(folder, {"dtype": dtype, "compile": compile}, ranks)


def train(model: GPT, tokenizer: Tokenizer, documents, config: TrainConfig, folder: str, ranks: Ranks,
          title: str = "train", at_checkpoint: Callable[[TrainState, Forward], None] = lambda state, forward: None,
          at_record: Callable[[dict], None] = lambda record: None) -> TrainState:
    """Train the model in place for config.steps steps, or what is left of them, keeping folder/ckpt.pt.

    documents: a list of Document, or a TokenizedCorpus. at_checkpoint(state, forward) is called before a checkpoint is
    saved, at_record(record) with what goes to metrics.jsonl. Raises ValueError where the loss is not a number.
    """
    config, model.recompute = with_optimizer(config, tokenizer), config.recompute
    path, optimizers = os.path.join(folder, "ckpt.pt"), make_optimizers(model, config, ranks.device)
    state = resume(path, model, optimizers, tokenizer)
    if ranks.sum(torch.tensor(state.step)) != ranks.world * state.step:
        raise ValueError(f"{folder} is not at the same step on every node; put --out on a shared disk")
    if ranks.main:
        trim_metrics(folder, state.step)
    how = chosen(config, model, folder, ranks)
    forward, meter = Forward(model, **how, ranks=ranks), Meter(model, config, how["dtype"], ranks)
    batches = training_batches(documents, Layout(tokenizer), config, Position(*state.position), ranks)
    bar = tqdm(range(state.step + 1, config.steps + 1), desc=title, initial=state.step, total=config.steps, unit="step",
               leave=False, disable=ranks.no_bar)
    for state.step in bar:
        start = time.perf_counter()
        batch, waited = next(batches), time.perf_counter() - start
        sums, norm = train_step(model, forward, optimizers, batch, state.step - 1, config, ranks)
        state.count(batch)
        meter.add(batch, sums, norm, waited)
        save = state.step % config.checkpoint_every == 0 or state.step == config.steps
        if save or state.step % config.log_every == 0:
            record = meter.record(state.step, config.learning_rate * schedule(state.step - 1, config))
            bar.set_postfix_str(f"loss {record['loss']:.3f}")
            if ranks.main:
                append_metrics(folder, record)
            at_record(record)
        if save:
            check_weights(model, state.step)
            at_checkpoint(state, forward)
            if ranks.main:
                needed = [optimizer.state_dict() for optimizer in optimizers] if state.step < config.steps else []
                save_checkpoint(path, model, optimizers=needed, state=vars(state), tokenizer=tokenizer.state(),
                                config=asdict(config))
            ranks.barrier()
            meter.clear()
    return state


# ---- main ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MainConfig(TrainConfig):
    data: str = option("data/alchemy/gold.jsonl", "corpus to train on; the embedded one is made where it is missing")
    held_out: str = option("auto", "corpus to validate on at each checkpoint; auto: held_out.jsonl beside --data, if "
                                   "there; empty: none")
    encoding: str = option("words", "tokens of the text: words, or an encoding of tiktoken such as gpt2")
    init_from: str = option("", "run folder, checkpoint or folder of an open base whose weights, shape and vocabulary "
                                "to start from")
    out: str = option("runs/train", "run folder: config.json, metrics.jsonl, ckpt.pt")
    device: str = option("auto", "auto, cpu, cuda or mps")

    def __post_init__(self):
        super().__post_init__()
        if self.init_from and self.encoding != "words":
            raise ValueError("--init_from brings its vocabulary along; leave --encoding out")


def open_sources(config: MainConfig) -> list[Source]:
    """The corpus to train on, and the one to validate on where there is one."""
    if config.data == MainConfig().data and not os.path.exists(config.data):
        make_embedded(Path(config.data).parent)
    beside = str(Path(config.data).with_name("held_out.jsonl"))
    held_out = (beside if os.path.exists(beside) else "") if config.held_out == "auto" else config.held_out
    return [open_source(path) for path in (config.data, held_out) if path]


def open_tokenizer(config: MainConfig, start: dict | None, sources: list[Source]) -> Tokenizer:
    """The tokenizer of --init_from, or the vocabulary of the corpora.

    Latents drawn by a model are ids of its vocabulary: to train on them, start from its checkpoint or its family's.
    """
    if start:
        return tokenizer_from(start["tokenizer"])
    return tokenizer_of(set().union(*(vocabulary(source, config.encoding) for source in sources)), config.encoding)


def validation_config(config: TrainConfig, state: TrainState) -> TrainConfig:
    """The settings of the training, but that held-out text without a thought stands after SOL EOL where the layout is
    joint or posterior and there were thoughts to train on: there the posterior form teaches it so, not bare."""
    taught = config.layout in ("joint", "posterior") and state.latent_tokens > 0
    return replace(config, plain_as="no_thought") if taught else config


def main(argv=None) -> None:
    config = parse_config(MainConfig(), argv, __doc__)
    ranks = start_ranks(config.device)
    start = read_start(config.init_from, ranks)
    config = settled(config, start)
    if not ranks.main:
        ranks.barrier()         # the main rank makes first what the others then find
    sources = open_sources(config)
    tokenizer = open_tokenizer(config, start, sources)
    documents, *held_out = [TokenizedCorpus(source, tokenizer) for source in sources]
    if ranks.main:
        ranks.barrier()
    config = with_steps(with_optimizer(config, tokenizer), documents, Layout(tokenizer))
    model = new_model(config, start, tokenizer).to(ranks.device)
    open_run(config.out, config, ranks, data_sha256=" ".join(source.digest[:16] for source in sources),
             init_sha256=sha256_of(config.init_from)[:16] if start and ranks.main else "")
    how = chosen(config, model, config.out, ranks)
    ranks.say(f"training {model.num_parameters():,} parameters on {len(documents):,} documents of {config.data}, "
              f"{ranks.world} process(es) on {ranks.device}, in {how['dtype']}" + ", compiled" * how["compile"])

    def say(record: dict) -> None:
        figures = [form.format(record[name]) for name, form in LINE.items() if name in record]
        ranks.say("  ".join([f"step {record['step']}/{config.steps}", *figures]))

    def report_held_out(state: TrainState, forward: Forward) -> None:
        for part in held_out:
            record = validate(forward, tokenizer, part, validation_config(config, state), ranks)
            figures = ", ".join(f"{name[4:]} {value:.3f}" for name, value in record.items())
            ranks.say(f"  held-out: {figures or 'nothing to predict'}")
            if ranks.main:
                append_metrics(config.out, {"step": state.step, **record})
    state = train(model, tokenizer, documents, config, config.out, ranks, at_checkpoint=report_held_out, at_record=say)
    ranks.say(f"{config.out}/ckpt.pt: {state.step} steps, {state.tokens:,} tokens, {state.observed_tokens:,} observed")


if __name__ == "__main__":
    script(main)
