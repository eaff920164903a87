"""The M-step: pretrain one model on text with the thoughts inserted, plain cross-entropy on joint sequences.

    python train.py                                             the embedded corpus, on what this machine has
    torchrun --standalone --nproc_per_node=2 train.py           the same global batches over two processes
    python train.py --data latents.jsonl --out runs/mine        any corpus of the data contract: text, chunks, latents

Killed and started again with the same command it continues, and on a CPU ends with the same weights bit for bit.

    config -> state -> schedule and optimizer -> precision -> train step -> evaluate -> log -> train -> main

Shapes: R rows of the global batch, B rows of a micro-batch, T positions.
"""
import contextlib
import datetime
import itertools
import math
import os
import time
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Callable, Iterator, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.cache import Source, TokenizedCorpus, survey_source, vocabulary
from data.corpus import make_embedded
from data.layout import LATENT, MARKER, TEXT, Layout
from data.loader import Position, Recipe, StepBatch, collate, epoch_rows, training_batches
from data.run import (Ranks, append_metrics, main_first, open_run, option, parse_config, peak_memory, require_positive, script,
                      sha256_of, start_ranks, trim_metrics)
from data.tokens import Tokenizer, tokenizer_of
from model import GPT, GPTConfig, load_checkpoint, read_checkpoint, save_checkpoint


PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "4090": 165e12, "3090": 71e12}       # dense bfloat16, of the datasheets

# ---- config ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig(Recipe):
    steps: int = option(300, "optimizer steps")
    micro_batch_rows: int = option(0, "rows that go through the model at once on a process; 0: all of them")
    optimizer: Literal["muon", "adamw"] = option("muon", "of the matrices of the blocks; all other weights have AdamW")
    learning_rate: float = option(3e-3, "peak of AdamW's learning rate")
    muon_learning_rate: float = option(0.015, "peak of Muon's")
    schedule: Literal["wsd", "cosine", "constant"] = option("wsd", "after the warm-up; wsd: constant, then down to zero; cosine: to zero")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises")
    decay: float = option(0.5, "share of the steps, at the end, in which wsd falls")
    weight_decay: float = option(0.1, "of the matrices")
    clip: float = option(1.0, "largest norm of the gradient")
    checkpoint_every: int = option(100, "steps between checkpoints, from which a killed run continues")
    log_every: int = option(25, "steps between lines of the log")
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile; auto: on CUDA")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of the products; auto: bfloat16 on CUDA, and on a CPU with AMX from width 256")
    model: GPTConfig = option(GPTConfig(), "shape of a fresh model")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "steps", "learning_rate", "muon_learning_rate", "warmup", "decay", "clip", "checkpoint_every", "log_every")
        if self.micro_batch_rows < 0:
            raise ValueError(f"--micro_batch_rows {self.micro_batch_rows} is not allowed; give 0 or more")
        if self.model.vocab_size:
            raise ValueError("--model.vocab_size follows from the tokenizer; leave it out")


def check_rows(config: TrainConfig, context: int) -> None:
    """Raise ValueError where rows do not fit the model."""
    if config.row_tokens > context:
        raise ValueError(f"--row_tokens {config.row_tokens} exceeds --model.context {context}; lower it")


# ---- state -----------------------------------------------------------------------------------------------------

@dataclass
class TrainState:
    """What a resume needs besides weights, optimizer and torch's random state. Data and coins follow from the position."""
    step: int = 0
    tokens: int = 0                 # that went through the model, padding apart
    observed_tokens: int = 0        # targets that are observed text
    latent_tokens: int = 0          # targets that are thoughts
    position: tuple = (0, 0, 0)     # of the stream of rows, see `Position`
    dtype: str = ""                 # what the products are computed in, chosen at the start

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


# ---- precision -------------------------------------------------------------------------------------------------

def choose_dtype(config: TrainConfig, width: int, device: torch.device) -> str:
    """What the products are computed in where --dtype leaves it open: bfloat16 on CUDA, and from width 256 on a CPU with AMX.

    On such CPUs it trains models of width 256 and 768 two and three times as fast as float32, and one of width 64 slower,
    since that spends more on conversions than it gains.
    """
    if config.dtype != "auto":
        return config.dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and width >= 256 and torch.cpu._is_amx_tile_supported() else "float32"


@contextlib.contextmanager
def tensor_cores():
    """What is left of float32 products on CUDA in TF32, in here alone: the log-probabilities of an E-step want all of float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ---- train step ------------------------------------------------------------------------------------------------

def backward(forward, batch: StepBatch, micro_batch_rows: int, ranks: Ranks, autocast) -> Tensor:
    """Gradients of the mean nll per target of the global batch; returns this rank's nll sums of (latent, text, all).

    The loss is summed over targets and divided once by the global count. A mean of micro-batch means would weigh the
    tokens of ragged rows unequally; so would DDP's mean over ranks, which `world` undoes.
    """
    scale = ranks.world / max(1, batch.num_targets)
    mine, sums = batch.mine.to(ranks.device), torch.zeros(3, device=ranks.device)
    rows = len(mine.ids)
    size = micro_batch_rows or rows
    for start in range(0, rows, size):
        part = mine.rows(slice(start, start + size))
        last = start + size >= rows
        with contextlib.nullcontext() if last or ranks.world == 1 else forward.no_sync():
            with autocast:
                nll = -forward(part.ids, part.targets, part.document)                         # (B, T)
            (nll.sum() * scale).backward()
        nll = nll.detach()
        sums += torch.stack([(nll * (part.kinds == kind)).sum() for kind in (LATENT, TEXT)] + [nll.sum()])
    return sums


def train_step(model: GPT, forward, optimizers, batch: StepBatch, step: int, config: TrainConfig, ranks: Ranks,
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

@torch.no_grad()
def validate(model: GPT, tokenizer: Tokenizer, documents, config: TrainConfig, ranks: Ranks, batch_rows: int = 16) -> dict:
    """Nats per target of held-out documents laid out as `config` says, by kind, and bits per byte of the observed text;
    nothing where that layout has no targets. The coins are those of the first epoch, so that it is always the same measure.
    """
    rows = epoch_rows(documents, Layout(tokenizer), config)
    mine = (row for number, (row, _) in enumerate(rows) if number % ranks.world == ranks.rank)
    sizes = torch.tensor([len(token) for token in tokenizer.tokens] + [0] * len(tokenizer.marker))
    sums = torch.zeros(7, dtype=torch.float64)      # nll and count of latent, text and marker targets; bytes of text
    while rows_of_batch := list(itertools.islice(mine, batch_rows)):
        batch = collate(rows_of_batch, config.row_tokens)
        there = batch.to(ranks.device)
        nll = -model(there.ids, there.targets, there.document)
        kinds = [there.kinds == kind for kind in (LATENT, TEXT, MARKER)]
        sums[:6] += torch.stack([(nll * kind).sum() for kind in kinds] + [kind.sum() for kind in kinds]).cpu()
        sums[6] += sizes[batch.targets[batch.kinds == TEXT]].sum()
    if ranks.world > 1:
        everywhere = sums.to(ranks.device)
        dist.all_reduce(everywhere)
        sums = everywhere.cpu()
    nll, counts, (text_bytes,) = sums.tensor_split([3, 6])
    per_kind = {f"val_nll_{name}": (nll[i] / counts[i]).item() for i, name in enumerate(("latent", "text", "marker")) if counts[i]}
    bits = {"val_bits_per_byte": (nll[1] / text_bytes).item() / math.log(2)} if text_bytes else {}
    return {"val_loss": (nll.sum() / counts.sum()).item()} | per_kind | bits if counts.any() else {}


# ---- log -------------------------------------------------------------------------------------------------------

class Meter:
    """Sums what the steps report and makes a record of it now and then. Reading it waits for the device."""

    def __init__(self, model: GPT, config: TrainConfig, folder: str, ranks: Ranks, dtype: str):
        self.config, self.folder, self.ranks = config, folder, ranks
        self.flops = model.training_flops(config.row_tokens)
        name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" and dtype == "bfloat16" else ""
        self.peak_flops = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
        self.clear()

    def clear(self) -> None:
        self.nll, self.counts, self.per_step = torch.zeros(3, device=self.ranks.device), torch.zeros(3), []
        self.tokens, self.since, self.waited = 0, time.perf_counter(), 0.0

    def next(self, batches: Iterator[StepBatch]) -> StepBatch:
        """The next batch, with the time it takes to make."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, batch: StepBatch, sums: Tensor, norm: Tensor) -> None:
        self.nll += sums
        self.counts += torch.tensor([batch.num_latent, batch.num_observed, batch.num_targets])
        self.per_step.append(torch.stack([sums[2], norm]))
        self.tokens += batch.num_tokens

    def record(self, step: int) -> dict:
        """The figures since the last record, the nll over all ranks. Raises ValueError where loss or gradient is not finite."""
        if self.ranks.world > 1:
            dist.all_reduce(self.nll)
        self.check_finite(step, torch.stack(self.per_step).cpu())
        latent, text, loss = (self.nll.cpu() / self.counts.clamp(min=1)).tolist()
        seconds, config = time.perf_counter() - self.since, self.config
        speed, (num_latent, num_text, _) = self.tokens / seconds, self.counts.tolist()
        record = {"step": step, "loss": loss}
        record |= {"nll_text": text} if num_text else {}
        record |= {"nll_latent": latent} if num_latent else {}
        record |= {"grad_norm": self.per_step[-1][1].item(), "learning_rate": config.learning_rate * schedule(step - 1, config),
                   "tokens_per_second": speed}
        record |= {"mfu": speed * self.flops / self.peak_flops / self.ranks.world} if self.peak_flops else {}
        record |= {"waiting_for_data": self.waited / seconds, "memory_gib": peak_memory(self.ranks.device) / 2 ** 30,
                   "seconds_left": (config.steps - step) * seconds / len(self.per_step)}
        self.clear()
        return record

    def check_finite(self, step: int, per_step: Tensor) -> None:
        """per_step (steps, 2): this rank's sum of nll, and the norm of the gradient, which is that of all ranks."""
        bad = (~per_step.isfinite()).nonzero()
        if not len(bad) and self.nll.isfinite().all():
            return
        first, is_norm = bad[0].tolist() if len(bad) else (len(per_step) - 1, 1)
        where = f"step {step - len(per_step) + 1 + first}" + ("" if is_norm else f", rank {self.ranks.rank}")
        kept = os.path.join(self.folder, "ckpt.pt")
        kept = f"the last good checkpoint is {kept}" if os.path.exists(kept) else "no checkpoint was written yet"
        raise ValueError(f"loss or gradient is not a number at {where}; {kept}; lower --learning_rate, with another --out")


LINE = {"loss": "loss {:.3f}", "nll_text": "text {:.3f}", "nll_latent": "latent {:.3f} nats/token", "grad_norm": "grad {:.2f}",
        "learning_rate": "lr {:.1e}", "tokens_per_second": "{:,.0f} tok/s", "mfu": "mfu {:.1%}", "waiting_for_data": "data {:.0%}",
        "memory_gib": "{:.1f} GiB"}


def line_of(record: dict, steps: int) -> str:
    """A record for people."""
    figures = [form.format(record[name]) for name, form in LINE.items() if name in record]
    return "  ".join([f"step {record['step']}/{steps}", *figures, f"{datetime.timedelta(seconds=round(record['seconds_left']))} left"])


# ---- train -----------------------------------------------------------------------------------------------------

def save(path: str, model: GPT, optimizers, tokenizer: Tokenizer, state: TrainState, config: TrainConfig, ranks: Ranks) -> None:
    """Write all that a resume needs, and what whoever uses the model needs to know of it."""
    if ranks.main:
        save_checkpoint(path, model, optimizers=[optimizer.state_dict() for optimizer in optimizers], state=vars(state),
                        tokenizer=tokenizer.state(), config=asdict(config), random=torch.get_rng_state())
    ranks.barrier()


def resume(path: str, model: GPT, optimizers, tokenizer: Tokenizer) -> TrainState:
    """Put a checkpoint's weights into the model and the optimizers, and return how far it was."""
    saved = read_checkpoint(path)
    if saved["model_config"] != model.config:
        raise ValueError(f"{path} is of another model ({saved['model_config']}); give another --out")
    if saved["tokenizer"] != tokenizer.state():
        raise ValueError(f"{path} is of another vocabulary; give another --out")
    model.load_state_dict(saved["model"])
    for optimizer, saved_optimizer in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(saved_optimizer)
    torch.set_rng_state(saved["random"])
    return TrainState(**saved["state"])


def check_same_step(step: int, folder: str, ranks: Ranks) -> None:
    """Raise ValueError where the processes found different checkpoints, as on several nodes that do not share a disk."""
    if ranks.world > 1:
        lowest, highest = (torch.tensor(float(step), device=ranks.device) for _ in range(2))
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        if lowest != highest:
            raise ValueError(f"{folder} is at step {lowest:.0f} on one node and at {highest:.0f} on another; put --out on a shared disk")


def train(model: GPT, tokenizer: Tokenizer, documents, config: TrainConfig, folder: str, ranks: Ranks, title: str = "train",
          at_checkpoint: Callable[[TrainState], None] = lambda state: None,
          at_record: Callable[[dict], None] = lambda record: None) -> TrainState:
    """Train the model in place for config.steps steps, or what is left of them, keeping folder/ckpt.pt.

    documents: a list of Document, or a TokenizedCorpus. at_checkpoint(state) is called before each checkpoint is saved,
    at_record(record) with what goes to metrics.jsonl. Raises ValueError where rows do not fit, or the loss is not a number.
    """
    check_rows(config, model.config.context)
    path, device = os.path.join(folder, "ckpt.pt"), ranks.device
    optimizers, state = make_optimizers(model, config, device), TrainState()
    if os.path.exists(path):
        state = resume(path, model, optimizers, tokenizer)
    check_same_step(state.step, folder, ranks)
    trim_metrics(folder, state.step, ranks)
    state.dtype = state.dtype or choose_dtype(config, model.config.width, device)
    forward = torch.compile(model) if config.compile == "on" or config.compile == "auto" and device.type == "cuda" else model
    forward = DistributedDataParallel(forward, broadcast_buffers=False) if ranks.world > 1 else forward
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=state.dtype == "bfloat16")
    batches = training_batches(documents, Layout(tokenizer), config, Position(*state.position), ranks)
    meter = Meter(model, config, folder, ranks, state.dtype)
    bar = tqdm(range(state.step + 1, config.steps + 1), desc=title, initial=state.step, total=config.steps, unit="step",
               leave=False, disable=not ranks.main)
    for state.step in bar:
        batch = meter.next(batches)
        with tensor_cores():
            sums, norm = train_step(model, forward, optimizers, batch, state.step - 1, config, ranks, autocast)
        state.count(batch)
        meter.add(batch, sums, norm)
        at_save = state.step % config.checkpoint_every == 0 or state.step == config.steps
        if at_save or state.step % config.log_every == 0:
            record = meter.record(state.step)
            bar.set_postfix_str(f"loss {record['loss']:.3f}")
            if ranks.main:
                append_metrics(folder, record)
            at_record(record)
        if at_save:
            at_checkpoint(state)
            save(path, model, optimizers, tokenizer, state, config, ranks)
            meter.clear()
    return state


# ---- main ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MainConfig(TrainConfig):
    data: str = option("data/alchemy/gold.jsonl", "corpus to train on, JSONL; the embedded one is made where it is missing")
    held_out: str = option("auto", "corpus to validate on at each checkpoint; auto: held_out.jsonl beside --data, if there; empty: none")
    encoding: str = option("words", "tokens of the text: words, or an encoding of tiktoken such as gpt2")
    init_from: str = option("", "run folder or checkpoint whose weights, shape and vocabulary to start from; empty: fresh ones")
    out: str = option("runs/train", "run folder: config.json, metrics.jsonl, ckpt.pt")
    device: str = option("auto", "auto, cpu, cuda or mps")

    def __post_init__(self):
        super().__post_init__()
        if self.init_from and self.model != GPTConfig():
            raise ValueError("--init_from brings the shape of its model along; leave --model.* out")
        if self.init_from and self.encoding != "words":
            raise ValueError("--init_from brings its vocabulary along; leave --encoding out")


def open_sources(config: MainConfig) -> list[Source]:
    """The corpus to train on, and the one to validate on where there is one."""
    if config.data == MainConfig().data and not os.path.exists(config.data):
        make_embedded(Path(config.data).parent)
    beside = str(Path(config.data).with_name("held_out.jsonl"))
    held_out = (beside if os.path.exists(beside) else "") if config.held_out == "auto" else config.held_out
    return [survey_source(path) for path in (config.data, held_out) if path]


def checkpoint_of(run: str) -> str:
    return os.path.join(run, "ckpt.pt") if os.path.isdir(run) else run


def open_model(config: MainConfig, sources: list[Source]) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of --init_from, or a fresh model with the vocabulary of the corpora.

    Latents drawn by a model are ids of its vocabulary: to train on them, start from its checkpoint or one of its family.
    """
    if config.init_from:
        model, state = load_checkpoint(checkpoint_of(config.init_from))
        return model, Tokenizer(**state["tokenizer"])
    tokens = set().union(*(vocabulary(source, config.encoding) for source in sources))
    tokenizer = tokenizer_of(tokens, config.encoding)
    return GPT(replace(config.model, vocab_size=tokenizer.vocab_size), config.seed), tokenizer


def validation_config(config: TrainConfig, state: TrainState) -> TrainConfig:
    """The settings of the training, but that a held-out chunk without a thought stands after SOL EOL where the layout is joint or
    posterior and there were thoughts to train on: there the posterior form teaches text without a thought so, not bare."""
    taught = config.layout in ("joint", "posterior") and state.latent_tokens > 0
    return replace(config, plain_as="no_thought") if taught else config


def report_held_out(model: GPT, tokenizer: Tokenizer, held_out: list, config: MainConfig, state: TrainState, ranks: Ranks) -> None:
    """Print and log the validation, where there is a held-out corpus."""
    for part in held_out:
        record = validate(model, tokenizer, part, validation_config(config, state), ranks)
        ranks.say("  held-out: " + (", ".join(f"{name[4:]} {value:.3f}" for name, value in record.items()) or "nothing to predict"))
        if ranks.main:
            append_metrics(config.out, {"step": state.step, **record})


def main(argv=None) -> None:
    config = parse_config(MainConfig(), argv, __doc__)
    ranks = start_ranks(config.device)
    if not config.init_from:
        check_rows(config, config.model.context)
    with main_first(ranks):
        sources = open_sources(config)
        model, tokenizer = open_model(config, sources)
        check_rows(config, model.config.context)
        documents, *held_out = [TokenizedCorpus(source, tokenizer) for source in sources]
    model.to(ranks.device)
    open_run(config.out, config, ranks, data_sha256=" ".join(source.digest[:16] for source in sources),
             init_sha256=sha256_of(checkpoint_of(config.init_from))[:16] if config.init_from else "")
    ranks.say(f"training {model.num_parameters():,} parameters on {len(documents):,} documents of {config.data}, {ranks.world} "
              f"process(es) on {ranks.device}, in {choose_dtype(config, model.config.width, ranks.device)}")

    state = train(model, tokenizer, documents, config, config.out, ranks,
                  at_checkpoint=lambda state: report_held_out(model, tokenizer, held_out, config, state, ranks),
                  at_record=lambda record: ranks.say(line_of(record, config.steps)))
    ranks.say(f"{config.out}/ckpt.pt: {state.step} steps in {state.dtype}, {state.tokens:,} tokens, {state.observed_tokens:,} observed")


if __name__ == "__main__":
    script(main)
