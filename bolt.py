"""EM over latent thoughts: the whole of "Reasoning to Learn from Latent Thoughts" (arXiv:2503.18866), in one loop.

    model = train(gold)                                  warm start: a few documents come with their thoughts
    repeat:
        latents = e_step(model, raw)                     K thoughts a chunk from q(z | x, C), one kept by weight
        model   = train(latents, from=warm start)        fit p(z, x) and q(z | x) on text with the thoughts inserted

    python bolt.py                                       the embedded corpus, every baseline, a table and a figure
    python bolt.py --seed 1 --out runs/seed1             another table of reactions and other documents
    python bolt.py --arms em --rounds 3                  only what you name
    python bolt.py --data data/gsm8k --encoding gpt2     a prepared corpus: FOLDER/{gold,raw,held_out}.jsonl
    python bolt.py --base bases/SmolLM2-135M ...         every model starts from an open base

Everything lands in --out; killed and started again with the same command, it continues. On a CPU with two cores the
baselines run beside the loop, in a second process.

Told from the top down:  main -> the loop -> config -> models without an E-step -> how long it takes -> the corpora ->
                         a second process -> report
"""
from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import timeit
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # a Ctrl-C ends the imports too, of which numpy's would lose it

import torch

from data.alchemy import claims
from data.alchemy.prepare import prepare as make_embedded
from data.alchemy.world import World
from data.cache import open_source, tokenizer_of_corpora
from data.corpus import Document, read_documents, split_corpus
from data.evaluate import HeldOut, evaluate, evaluate_alone, held_out_of, observed_tokens
from data.layout import Layout
from data.loader import Position, training_batches
from data.plan import Plan, in_words
from data.report import (curves_of, mean, model_rows, models_table, paired_table, per_unit, plot, read_records,
                         rounds_table)
from data.run import (Ranks, end_with_parent, hold, hold_early, open_run, option, parse_config, read_json, script,
                      sha256_of, start_ranks, whole_file, write_whole)
from data.tokens import Tokenizer
from model import GPT, read_checkpoint, restore, save_checkpoint
from sample_latents import Block, SampleConfig, e_step, room_line, settled_sample, survey
from train import (Forward, TrainConfig, TrainState, backward, new_model, read_start, settled, stable_steps, train,
                   with_steps)


# ---- main ------------------------------------------------------------------------------------------------------

def main(argv=None) -> None:
    config, start = parse_config(BoltConfig(), argv, __doc__), time.time()
    names, ranks = config.arm_names, start_ranks(config.device)
    if config.evaluate:
        if not os.path.isfile(config.data):
            raise ValueError(f"--evaluate needs a file of documents, and --data is {config.data!r}; give --data FILE")
        state = read_start(config.evaluate, ranks)
        return evaluate_alone(state, config.evaluate, config.data, bound_sample(config), ranks)
    hold_early(config.out, ranks)
    lab = open_lab(config, ranks)
    config, parts = lab.config, [f"{lab.folder}/{name}.jsonl" for name in lab.corpora]
    read = [config.data] if os.path.isfile(config.data) else [*parts, *lab.folder.glob("world.json")]
    open_run(config.out, config, ranks, ("rounds",), partial(set_aside, config),
             data_sha256=" ".join(sha256_of(path)[:16] for path in read if config.data and ranks.main),
             base_sha256=sha256_of(config.base)[:16] if config.base and ranks.main else "")
    names = [name for name in names if name != "oracle" or name in lab.corpora]
    beside = [name for name in BESIDE if name in names] if two_processes(ranks) else []
    todo = make_plan(lab, names)
    todo.guess = guess_seconds(lab, todo.left(), beside)
    ranks.say(announcement(lab, todo))
    ranks = replace(ranks, stage=todo.stage)
    with second_process(config, beside, todo, ranks):
        run_arms(replace(lab, ranks=ranks), [name for name in names if name not in beside])
    if ranks.main:
        ranks.say(f"\n{report(lab)}\n\n{config.out}/report.md, after {time.time() - start:.0f} s")
        try:
            plot([config.out], f"{config.out}/figure.svg")
        except ImportError as error:        # matplotlib is not needed to run
            ranks.say(f"no figure: {error}")


def run_arms(lab: Lab, names: list[str]) -> None:
    for name in names:
        lab.ranks.say(f"{ARMS[name].label} [{name}]")
        (train_arm if ARMS[name].draws is None else em)(lab, name)


# ---- the loop --------------------------------------------------------------------------------------------------

def em(lab: Lab, name: str) -> None:
    """The loop of the paper. Every M-step starts again from the warm start, or what --restart says, so only thoughts
    carry over. A loop that was killed goes on after the last round that was measured.

    `passes` is what a model took, in forward passes of a token: training a token counts as three (a backward pass is
    two), prefilling, drawing and scoring one as one. FLOPs are 2 x parameters x passes.
    """
    config, arm, folder = lab.config, ARMS[name], f"{lab.config.out}/{name}"
    sample, latest, done = sample_config(config, arm.draws), "warm", 0
    while done < config.rounds and os.path.exists(f"{folder}/round_{done + 1}/step_last.json"):
        drop_model(lab, f"{folder}/round_{done}", is_round=True)
        done, latest = done + 1, f"{name}/round_{done + 1}"
    if done == config.rounds:
        return
    model, passes = finished_model(lab, latest)
    for t in range(done + 1, config.rounds + 1):
        out = f"{folder}/round_{t}"
        blocks = lab.slices[0 if arm.is_fixed else (t - 1) % len(lab.slices)]
        raw, drawn = f"{lab.folder}/raw.jsonl", f"{out}/latents.jsonl"
        figures = e_step(model, lab.tokenizer, raw, blocks, sample, t, drawn, lab.ranks)         # z ~ q, kept by p / q
        earlier = range(1, t) if arm.accumulates(config) else []
        files = [*(f"{folder}/round_{r}/latents.jsonl" for r in earlier), drawn]
        latents = [document for file in files for document in read_documents(file, lab.tokenizer)]
        start = {"warm": "warm", "base": "", "previous": latest, "stable": latest}[config.restart]
        settings, tokens_before = m_step_of_round(lab, name, t, latest, latents)
        model, state = fit(lab, latents, settings, out, start)                                   # fit p and q
        passes += sum(figures[f"{kind}_tokens"] for kind in ("prefilled", "sampled", "scored"))
        passes += 3 * (state.tokens - tokens_before)
        weigh = name == "em" or t == config.rounds
        measure(lab, model, f"{out}/step_last.json", passes, state.step, weigh=weigh, e_step=figures)
        drop_model(lab, f"{folder}/round_{t - 1}", is_round=True)
        latest = f"{name}/round_{t}"


def drop_model(lab: Lab, folder: str, is_round: bool = False) -> None:
    """Delete the weights of a model that is trained and measured, where the last round's alone are to be kept; of a
    round that another follows always those that only that one goes on from."""
    keep = lab.config.keep_models if lab.config.keep_models != "auto" else "last" if lab.config.base else "all"
    names = ["ckpt.pt", "stable.pt"] if keep == "last" else ["stable.pt"] * is_round
    for name in names if lab.ranks.main else ():
        Path(folder, name).unlink(missing_ok=True)


def m_step_of_round(lab: Lab, name: str, t: int, latest: str, documents: list[Document]) -> tuple[TrainConfig, int]:
    """The settings of round t's M-step, and the tokens that its model has seen before it.

    With --restart stable a checkpoint is put into its folder, which training then finds and goes on from: that of the
    model before as it was before its learning rate fell, optimizer and all. The rate rises once, in the warm start; the
    part at the peak and the fall, which is for this round's model alone, are as long as those of a fresh M-step.
    """
    config, settings = lab.config, m_step(lab.config, t)
    if ARMS[name].is_fixed:         # as many passes over the first slice as the other arm makes over all so far
        settings = replace(settings, epochs=settings.epochs * t)
    if config.restart != "stable":
        return settings, 0
    out, before = Path(config.out, name, f"round_{t}"), Path(config.out, latest)
    settings = with_steps(settings, documents, lab.layout)
    saved, fall = read_checkpoint(str(before / "stable.pt")), settings.steps - stable_steps(settings)
    steps = saved["state"]["step"] + settings.steps
    if lab.ranks.main and not (out / "ckpt.pt").exists():
        with whole_file(out / "ckpt.pt") as file:
            state = saved["state"] | {"position": (0, 0, 0)}
            save_checkpoint(file, restore(saved), state=state, steps=steps, tokenizer=saved["tokenizer"],
                            optimizers=saved["optimizers"])
    lab.ranks.barrier()
    keep = "none" if t == config.raw_slices > 1 else "stable"       # no round follows that of the last slice
    return replace(settings, epochs=0.0, steps=steps, decay=fall / steps, keep=keep), saved["state"]["tokens"]


def m_step(config: BoltConfig, round: int) -> TrainConfig:
    return replace(config.train, seed=config.seed + 1000 * round, keep="none")


def bound_sample(config: BoltConfig) -> SampleConfig:
    """The settings of draws for the bound on held-out text."""
    return replace(config.sample, num_latents=config.bound_draws, seed=config.seed)


def sample_config(config: BoltConfig, draws: int) -> SampleConfig:
    """An E-step's settings. A single draw is not weighed, so it comes from the model as it is, at temperature 1."""
    sample = replace(config.sample, num_latents=draws or config.sample.num_latents, seed=config.seed)
    return replace(sample, temperature=1.0) if sample.num_latents == 1 else sample


def fit(lab: Lab, documents: list[Document], config: TrainConfig, folder: str, start: str,
        on_the_way=lambda model, state: None) -> tuple[GPT, TrainState]:
    """Train a model that has the weights of the model `start`, else those of the base, or fresh ones where there is no
    base. on_the_way(model, state) is called after every `checkpoint_every` steps but the last."""
    os.makedirs(folder, exist_ok=True)
    config = with_steps(config, documents, lab.layout)
    begin = read_checkpoint(f"{lab.config.out}/{start}") if start else copy.deepcopy(lab.base)
    model = new_model(config, begin, lab.tokenizer).to(lab.ranks.device)

    def at_checkpoint(state: TrainState, forward: Forward) -> None:
        if state.step < config.steps and state.step % config.checkpoint_every == 0:
            on_the_way(model, state)
    title = os.path.relpath(folder, lab.config.out)
    return model, train(model, lab.tokenizer, documents, config, folder, lab.ranks, title, at_checkpoint)


def finished_model(lab: Lab, name: str) -> tuple[GPT, float]:
    """A model that is trained and measured, and what it took."""
    passes = read_record(f"{lab.config.out}/{name}")["passes"]
    return restore(read_checkpoint(f"{lab.config.out}/{name}"), lab.ranks.device), passes


def read_record(folder: str) -> dict:
    """The last evaluation of a model, once it is there: another process may be making it."""
    path = Path(folder, "step_last.json")
    while not path.exists():
        time.sleep(0.1)
    return read_json(path)


# ---- config ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Arm:
    """What is compared: the loop, or a model that does without it. `budget` is how long it trains."""
    label: str
    corpus: str                     # what it trains on, parts joined by +
    budget: str
    starts: str = "fresh"           # or warm: where M-steps start, from the warm start but for --restart base
    thinks: bool = True             # its text is evaluated with thoughts
    draws: int | None = None        # K of its E-steps; 0: that of --sample.num_latents; None: it has no E-step
    is_fixed: bool = False          # its E-steps label the first of the --raw_slices again and again

    @property
    def is_long(self) -> bool:
        """Whether it trains as long as the loop."""
        return self.budget in ("loop", "all M-steps")

    def grows(self, restart: str) -> bool:
        """Whether it trains longer where there are more rounds."""
        return self.is_long or restart in ("previous", "stable") and self.budget in ("one model", "observed tokens")

    def accumulates(self, config: BoltConfig) -> bool:
        """Whether an M-step trains on the thoughts of the rounds before too: those about other slices."""
        return config.raw_slices > 1 and not self.is_fixed


ARMS = {
    "warm": Arm("warm start on gold", "gold", "warm start"),
    "em": Arm("EM", "raw", "M-step", "warm", draws=0),
    "k1": Arm("EM, K = 1: no weighing", "raw", "M-step", "warm", draws=1),
    "k4": Arm("EM, K = 4", "raw", "M-step", "warm", draws=4),
    "fixed": Arm("EM on the first slice alone", "raw", "M-step", "warm", draws=0, is_fixed=True),
    "gold_plus_raw": Arm("gold + raw as no-thought, no E-step", "gold+raw", "all M-steps", "warm"),
    "gold_raw_best": Arm("gold + raw as no-thought, at its best length", "gold+raw", "best length", "warm"),
    "raw_observed": Arm("raw text, same observed tokens", "raw", "observed tokens", thinks=False),
    "raw_m_step": Arm("raw text, FLOPs of one trained model", "raw", "one model", thinks=False),
    "raw_best": Arm("raw text, at its best length", "raw", "best length", thinks=False),
    "oracle": Arm("oracle: true thoughts for all", "oracle", "M-step", "warm"),
    "raw_total": Arm("raw text, FLOPs of the whole loop", "raw", "loop", thinks=False),
    "warm_long": Arm("warm start, FLOPs of the whole loop", "gold", "loop"),
}
ON_REQUEST = ("k4", "fixed", "raw_best", "gold_raw_best")       # not in --arms all, but fixed with --raw_slices
# what a second process does
BESIDE = ("raw_m_step", "raw_observed", "k1", "fixed", "gold_plus_raw", "gold_raw_best", "oracle", "warm_long")


@dataclass(frozen=True)
class BoltConfig:
    data: str = option("", "folder of a prepared corpus, or one file of documents, those with thoughts being the gold "
                           "ones; empty: the embedded corpus, made in --out/corpus with --seed", how=True)
    held_out: float = option(0.1, "share of the documents of a single file that is held out", above=0, at_most=0.9)
    evaluate: str = option("", "run, checkpoint or open base to evaluate on the file --data; nothing else is done")
    base: str = option("", "folder of an open base, or a run, whose weights and vocabulary every model starts from",
                       how=True)
    encoding: str = option("words", "tokens of the text: words, or an encoding of tiktoken such as gpt2")
    out: str = option("runs/bolt", "run folder: report.md, config.json, one folder per model", how=True)
    seed: int = option(0, "of the embedded corpus, the weights and the draws", at_least=0)
    rounds: int = option(5, "EM rounds; as many as --raw_slices where there are several", above=0)
    raw_slices: int = option(1, "parts of the raw corpus: each round labels another one and trains on all so far; 1: "
                                "each round labels all of it anew", above=0)
    restart: Literal["auto", "warm", "base", "previous", "stable"] = option(
        "auto", "where M-steps start: from the warm start, the base (else fresh weights), the round before, or that as "
                "it was before its learning rate fell, which then falls for each round's model alone; auto: warm, and "
                "stable with --raw_slices")
    warm_steps: int = option(1200, "optimizer steps of the warm start, on gold documents alone", above=0)
    warm_epochs: float = option(0.0, "passes of the warm start over the gold documents, instead of --warm_steps",
                                at_least=0)
    arms: str = option("all", f"what to run, a list with commas: all, study (all and k4), or of {', '.join(ARMS)}",
                       how=True)
    device: str = option("auto", "auto, cpu, cuda or mps", how=True)
    bound_draws: int = option(16, "thoughts a chunk for the K-sample bound on held-out documents", above=0)
    keep_models: Literal["auto", "all", "last"] = option(
        "auto", "weights left on the disk; last: warm start and last rounds; auto: all, and last from a base", how=True)
    checks: int = option(3, "times a baseline as long as the loop is evaluated; its best counts", above=0)
    train: TrainConfig = option(TrainConfig(), "an M-step; see train.py")
    sample: SampleConfig = option(SampleConfig(), "an E-step; see sample_latents.py")

    def __post_init__(self):
        if self.train.seed or self.sample.seed or self.train.chunk_tokens:
            raise ValueError("--train.seed and --sample.seed follow from --seed here, --train.chunk_tokens from "
                             "--sample.chunk_tokens; set those")
        if self.base and self.encoding != "words":
            raise ValueError("--base brings its vocabulary along; leave --encoding out")

    @property
    def arm_names(self) -> list[str]:
        """In the order of ARMS, since some need what others make; the warm start always."""
        every = [name for name in ARMS if name not in ON_REQUEST or name == "fixed" and self.raw_slices > 1]
        names = {"all": every, "study": [*every, "k4"]}.get(self.arms, self.arms.split(","))
        for name in names:
            if name not in ARMS:
                raise ValueError(f"--arms {name} is not allowed; give all, study, or some of {', '.join(ARMS)}")
            if ARMS[name].is_fixed and self.raw_slices == 1:
                raise ValueError(f"--arms {name} labels the first of several slices; give --raw_slices too")
            if ARMS[name].budget == "loop" and "em" not in names:
                raise ValueError(f"--arms {name} gets the FLOPs of the loop, so name em too")
        return [name for name in ARMS if name == "warm" or name in names]


# ---- models without an E-step: the warm start and the baselines ------------------------------------------------

def set_aside(config: BoltConfig) -> None:
    """Where a run gets more rounds, drop the evaluations of arms that now train longer, but for those from before the
    learning rate fell. Raises ValueError where it fell all along."""
    longer = [name for name, arm in ARMS.items()
              if arm.grows(config.restart) and os.path.exists(f"{config.out}/{name}/step_last.json")]
    if longer and config.train.schedule == "cosine":
        raise ValueError(f"more --rounds would train {', '.join(longer)} longer, and the learning rate of "
                         "--train.schedule cosine follows from the length; give another --out")
    for name in longer:
        last = Path(config.out, name, "step_last.json")
        stable = stable_steps(replace(config.train, steps=read_record(last.parent)["step"]))
        for path in sorted(last.parent.glob("step_*.json")):            # step_last last, which a kill must not hide
            if path == last or int(path.stem.removeprefix("step_")) > stable:
                path.unlink()


def train_arm(lab: Lab, name: str) -> None:
    """Train and evaluate the model of an arm without E-steps: several where its best length is wanted, each with a
    schedule of its own; a long one is evaluated several times on the way. That it is measured says that it is saved."""
    arm, config, folder = ARMS[name], lab.config, f"{lab.config.out}/{name}"
    start = "warm" if arm.starts == "warm" and config.restart != "base" else ""
    before = read_record(f"{config.out}/warm")["passes"] if start else 0
    documents = documents_of(lab, arm)
    keeps_stable = arm.grows(config.restart) or name == "warm" and config.restart == "stable"
    settings = replace(m_step(config, 0), plain_as="no_thought" if arm.corpus == "gold+raw" else "plain",
                       keep="stable" if keeps_stable else "none")
    lengths = steps_of_budget(lab, arm, documents, settings)

    def record_at(step: int) -> str:
        return f"{folder}/step_{'last' if step == lengths[-1] else step}.json"

    def check(model: GPT, state: TrainState) -> None:
        passes, weigh = before + 3 * state.tokens, state.step in lengths
        measure(lab, model, record_at(state.step), passes, state.step, arm.thinks, weigh)
    on_the_way = check if arm.is_long else lambda model, state: None
    for steps in lengths:
        every = math.ceil(steps / config.checks) if arm.is_long else settings.checkpoint_every
        settings = replace(settings, steps=steps, epochs=0.0, checkpoint_every=every)
        of_model = folder if steps == lengths[-1] else f"{folder}/{steps}_steps"
        if not os.path.exists(record_at(steps)):
            check(*fit(lab, documents, settings, of_model, start, on_the_way))
        if name != "warm":
            drop_model(lab, of_model)


def documents_of(lab: Lab, arm: Arm) -> list[Document]:
    return [document for part in arm.corpus.split("+") for document in lab.corpora[part]]


def steps_of_budget(lab: Lab, arm: Arm, documents: list[Document], settings: TrainConfig) -> list[int]:
    """Optimizer steps of an arm: those of the settings, or what gives it the observed tokens or the FLOPs of one
    trained model (warm start and M-step), or the FLOPs of the whole loop, E-steps counted; or several lengths."""
    config, gold = lab.config, lab.corpora["gold"]
    warm = with_steps(replace(settings, steps=config.warm_steps, epochs=config.warm_epochs), gold, lab.layout).steps
    m = with_steps(settings, documents, lab.layout).steps
    known = {"warm start": [warm], "M-step": [m], "all M-steps": [math.ceil(sum(steps_of_rounds(config, m)))],
             "best length": [math.ceil(m / 2), m, 2 * m]}
    if arm.budget in known:
        return known[arm.budget]
    tokens, observed = per_step(lab, documents, settings)
    if arm.budget == "loop":
        return [max(1, round(read_record(f"{config.out}/em/round_{config.rounds}")["passes"] / 3 / tokens))]
    gold_tokens, gold_observed = per_step(lab, gold, settings)
    if settings.epochs:         # thoughts that are not drawn yet are taken to be as long as gold ones
        m = settings.epochs * sum(map(observed_tokens, lab.corpora["raw"])) / gold_observed
    share = gold_observed / observed if arm.budget == "observed tokens" else gold_tokens / tokens
    return [max(1, round(share * steps_of_last_model(config, warm, m)))]


def steps_of_last_model(config: BoltConfig, warm: int, m: float) -> float:
    """Optimizer steps that the last round's model has behind it, where a warm start has so many and an M-step m:

        --restart warm    the warm start, and an M-step      previous    the warm start, and all M-steps
                  base    an M-step                          stable      all of them up to their falls, and one fall
    """
    rounds, fall = steps_of_rounds(config, m), 1 - stable_steps(replace(config.train, steps=m)) / m
    stable = stable_steps(replace(config.train, steps=warm)) + sum(rounds) * (1 - fall) + rounds[-1] * fall
    return {"warm": warm + m, "base": m, "previous": warm + sum(rounds), "stable": stable}[config.restart]


def steps_of_rounds(config: BoltConfig, m: float) -> list[float]:
    """Optimizer steps of every M-step, if one over all of the raw text has m."""
    grow = config.train.epochs and config.raw_slices > 1
    return [m * (t / config.rounds if grow else 1) for t in range(1, config.rounds + 1)]


def per_step(lab: Lab, documents: list[Document], settings: TrainConfig) -> tuple[float, float]:
    """Tokens and observed tokens of a training step, the mean of the first twenty."""
    batches = training_batches(documents, lab.layout, settings, Position(), lab.ranks)
    first = list(itertools.islice(batches, 20))
    return mean(batch.num_tokens for batch in first), mean(batch.num_observed for batch in first)


# ---- evaluate --------------------------------------------------------------------------------------------------

def measure(lab: Lab, model: GPT, path: str, passes: float, step: int, thinks: bool = True, weigh: bool = True,
            **more) -> None:
    """Keep the evaluation of a model in a file, with what more there is to say of it, where it is not there yet."""
    if lab.ranks.main and not os.path.exists(path):
        record = {"passes": passes, "step": step} | more
        name = os.path.relpath(path, lab.config.out).removesuffix(".json")
        record |= evaluate(lab.held_out, model, os.path.dirname(name), lab.ranks, thinks, weigh)
        write_whole(path, json.dumps(record))
        known = f", hidden facts known {record['known']:.2f}" if "known" in record else ""
        accuracy = f"accuracy {mean(record['correct']):.3f}, " if "correct" in record else ""
        nats = per_unit(record["nll"], record["tokens"])
        lab.ranks.say(f"  {name:24s} {accuracy}{nats:.3f} nats per observed token{known}")
    lab.ranks.barrier()


# ---- how long it takes -----------------------------------------------------------------------------------------

def make_plan(lab: Lab, names: list[str]) -> Plan:
    """A guess: thoughts are as long as the gold ones, and drawing and scoring a token costs as much as training it."""
    config, costs, settings = lab.config, {}, m_step(lab.config, 0)
    gold = [len(chunk.latent) for document in lab.corpora["gold"] for chunk in document.chunks if chunk.latent]
    draw = 3 * min(config.sample.max_latent_tokens, 1 + (mean(gold) if gold else math.inf))
    evaluation = draw * len(lab.held_out.documents) * (config.bound_draws + 4)
    for name in names:
        arm, documents = ARMS[name], documents_of(lab, ARMS[name])
        if arm.budget == "loop":
            costs[name] = sum(cost for other, cost in costs.items() if other.startswith(("warm", "em/")))
            continue
        steps = sum(steps_of_budget(lab, arm, documents, settings))
        cost = 3 * settings.batch_tokens * steps + evaluation
        if arm.draws is None:
            costs[name] = cost
        else:
            draws = sample_config(config, arm.draws).num_latents * sum(chunks for *_, chunks in lab.slices[0])
            costs |= {f"{name}/round_{t}": cost + draw * draws for t in range(1, config.rounds + 1)}
    return Plan(config.out, costs)


def guess_seconds(lab: Lab, costs: dict[str, float], beside: list[str]) -> float:
    """How long models of some costs take, from the time of a training step."""
    if not costs:
        return 0.0
    config, alone = lab.config, Ranks(0, 1, lab.ranks.device)
    model = new_model(config.train, copy.deepcopy(lab.base), lab.tokenizer).to(lab.ranks.device)
    forward = Forward(model, config.sample.dtype, False, alone)
    batch = next(training_batches(lab.corpora["gold"], lab.layout, config.train, Position(), alone))
    job = partial(backward, forward, batch, config.train.micro_batch_rows, alone)
    per_pass = min(timeit.repeat(job, number=1, repeat=3)) / (3 * batch.num_tokens) / lab.ranks.world
    second = sum(cost for name, cost in costs.items() if name.split("/")[0] in beside)
    return per_pass * max(sum(costs.values()) - second, second) * (1.5 if beside else 1)


def announcement(lab: Lab, todo: Plan) -> str:
    """What a run will do, and about how long that takes."""
    left, corpora = todo.left(), lab.corpora | {"held_out": lab.held_out.documents}
    if not left:
        return f"{todo.out}: all {len(todo.costs)} models are there"
    counts = ", ".join(f"{len(documents)} {name}" for name, documents in corpora.items())
    names = ", ".join(dict.fromkeys(name.split("/")[0] for name in left))
    return (f"{todo.out}: {counts} documents, {lab.ranks.device}\n"
            f"{len(left)} of {len(todo.costs)} models to train, about {in_words(todo.guess)}: {names}")


# ---- the corpora -----------------------------------------------------------------------------------------------

CORPORA = ("gold", "raw", "held_out", "probes", "oracle")     # only the embedded corpus has probes


@dataclass(frozen=True)
class Lab:
    """What every arm works with: the corpora of `folder`. gold has thoughts, raw has none, oracle is raw with its true
    thoughts; slices are the blocks of each of the --raw_slices, see `survey`; base: see `read_start`."""
    config: BoltConfig
    ranks: Ranks
    folder: Path
    base: dict | None
    tokenizer: Tokenizer
    layout: Layout
    corpora: dict[str, list[Document]]
    held_out: HeldOut
    slices: list[list[Block]]


def open_lab(config: BoltConfig, ranks: Ranks) -> Lab:
    """Read the corpora; the embedded one, or the parts of a single file, are written first. ValueError for what would
    only show up late."""
    config, base = with_rounds(config), read_start(config.base, ranks)
    is_folder = config.data and not os.path.isfile(config.data)
    folder = Path(config.data if is_folder else f"{config.out}/corpus")
    paths = {name: folder / f"{name}.jsonl" for name in CORPORA}
    if not is_folder and config.data and Path(config.data).resolve().parent == folder.resolve():
        raise ValueError(f"--data {config.data} lies where its parts are written, {folder}; give another --out")
    if not is_folder and ranks.main and not Path(config.out, "config.json").exists():
        parts = split_corpus(config.data, config.seed, config.held_out) if config.data else {}
        hold(config.out)
        for path in (*paths.values(), folder / "world.json"):       # of a run of another corpus, that did not begin
            path.unlink(missing_ok=True)
            shutil.rmtree(f"{path}.tokens", ignore_errors=True)
        for name, lines in parts.items():
            write_whole(paths[name], b"".join(lines).decode())
        if not parts:
            make_embedded(folder, config.seed)
    ranks.barrier()
    settings = settled(config.train, base)
    shape = replace(base["model_config"] if base else settings.model, context=settings.model.context)
    sample = settled_sample(config.sample, shape, ranks, config.out, "sample.dtype")
    sources = {name: open_source(str(path), sample.chunk_tokens) for name, path in paths.items()
               if path.exists() or name in CORPORA[:3]}
    tokenizer = tokenizer_of_corpora(sources.values(), config.encoding, base)
    config = replace(config, train=settings, sample=sample)
    layout = Layout(tokenizer, settings.model.context, sample.max_latent_tokens)
    corpora = {name: read_documents(source.path, tokenizer, sample.chunk_tokens) for name, source in sources.items()}
    for name in CORPORA[:2]:
        if not any(map(observed_tokens, corpora[name])):
            raise ValueError(f"{paths[name]} has no text to predict; every chunk is given, or empty")
    world = World.from_json((folder / "world.json").read_text()) if (folder / "world.json").exists() else None
    held_out, room = held_out_of(corpora["held_out"], str(paths["held_out"]), layout, bound_sample(config),
                                 corpora.get("probes", []), world)
    ranks.say(room_line(room, str(paths["held_out"])))
    if config.raw_slices > len(corpora["raw"]):
        raise ValueError(f"--raw_slices {config.raw_slices} is more than the {len(corpora['raw'])} documents of "
                         f"{paths['raw']}; give fewer")
    slices = survey(str(paths["raw"]), layout, sample, config.raw_slices)
    if not sum(chunks for blocks in slices for *_, chunks in blocks):
        raise ValueError(f"{paths['raw']} has no chunk to think about: all are given, have a thought, or have no room; "
                         "with --sample.redraw their thoughts are drawn anew")
    return Lab(config, ranks, folder, base, tokenizer, layout, corpora, held_out, slices)


def with_rounds(config: BoltConfig) -> BoltConfig:
    """The settings with the rounds and the start of M-steps that --raw_slices and auto come to."""
    if config.raw_slices > 1:
        config = replace(config, rounds=config.raw_slices)
    if config.restart == "auto":
        config = replace(config, restart="stable" if config.raw_slices > 1 else "warm")
    if config.restart == "stable" and config.train.schedule == "cosine":
        raise ValueError("--restart stable goes on from before the learning rate fell, and that of --train.schedule "
                         "cosine falls all along; take wsd, or another --restart")
    return config


# ---- a second process ------------------------------------------------------------------------------------------

def two_processes(ranks: Ranks) -> bool:
    """Small models gain little from a second thread and much from a second process (OMP_NUM_THREADS=1: neither)."""
    return ranks.world == 1 and ranks.device.type == "cpu" and torch.get_num_threads() > 1


@contextlib.contextmanager
def second_process(config: BoltConfig, names: list[str], todo: Plan, ranks: Ranks):
    """Run some arms, if any, in a second process meanwhile: it ends with this one, which says its lines, and is waited
    for with a bar of what it still has to do. Raises ValueError where it failed."""
    if not names:
        yield
        return
    threads, context = max(1, torch.get_num_threads() // 2), multiprocessing.get_context("spawn")
    torch.set_num_threads(threads)
    lines = context.SimpleQueue()
    second = context.Process(target=run_beside, args=(config, names, threads, lines), daemon=True)
    second.start()

    def say_its_lines() -> None:
        with contextlib.suppress(BrokenPipeError):      # nobody reads on: the main thread sees it too
            for line in iter(lines.get, None):
                ranks.say(line)
    threading.Thread(target=say_its_lines, daemon=True).start()
    yield
    left = todo.left()
    ranks.say(f"waiting for the second process: {', '.join(left)}" if left else "")
    with ranks.bar(sum(left.values()), "the second process") as bar:
        while second.is_alive():
            second.join(0.5)
            bar.update(sum(left.values()) - sum(todo.left().values()) - bar.n)
    if second.exitcode:
        raise ValueError("a baseline failed, see above; the same command goes on")


def run_beside(config: BoltConfig, names: list[str], threads: int, lines) -> None:
    """What the second process does."""
    end_with_parent()
    torch.set_num_threads(threads)
    ranks = start_ranks(config.device)
    lab = open_lab(config, replace(ranks, tell=lambda line: None))      # the first one has said it
    script(lambda argv: run_arms(replace(lab, ranks=replace(ranks, tell=lines.put)), names))


# ---- report ----------------------------------------------------------------------------------------------------

def report(lab: Lab) -> str:
    """Write report.json and report.md (tables, what they show, how they were made); returns the latter."""
    config, (records, on_the_way) = lab.config, read_records(lab.config.out)
    run = read_json(f"{config.out}/config.json")
    labels, lines = model_labels(config), ["# nanoBoLT: EM over latent thoughts", ""]
    rows = model_rows(records, labels)
    lines += [*models_table([rows]), ""]
    if lab.held_out.world:
        lines += [claims.floors(lab.held_out.world, lab.corpora, sum(records["warm"]["tokens"])), ""]
    for verdict in claims.verdicts(records, config.sample.num_latents):
        lines.append(f"* **{'shown' if verdict.shown else 'NOT SHOWN'}** {verdict.claim}: {verdict.why}")
    lines += ["", *rounds_table(records), "", *paired_table(records, labels), "",
              "Accuracy: greedy answers. " * ("correct" in records["warm"])
              + f"{len(lab.held_out.documents)} held-out documents. Nats per token, bits per byte: of the observed "
              f"text, exact for raw models, minus the {config.bound_draws}-sample bound for those that think. Compute: "
              "forward and backward passes, E-steps counted, relative to the whole loop. Of a baseline evaluated "
              "several times its best figure stands; before its end it writes without a thought, so that its best nats "
              "may be exact ones. ± is one standard error over documents.", "",
              f"`{run['command']}` at commit {run['commit']}, seed {config.seed}, torch {torch.__version__}, "
              f"{lab.ranks.device}, {time.strftime('%Y-%m-%d')}", "", *next_commands(lab, records)]
    curves = curves_of(on_the_way, {name: arm.label for name, arm in ARMS.items()})
    write_whole(f"{config.out}/report.json", json.dumps({"models": rows, "curves": curves}, indent=1) + "\n")
    write_whole(f"{config.out}/report.md", "\n".join(lines) + "\n")
    return "\n".join(lines)


def next_commands(lab: Lab, records: dict[str, dict]) -> list[str]:
    """What to try with a finished run."""
    config, last = lab.config, f"em/round_{lab.config.rounds}" if "em/round_1" in records else "warm"
    text = lab.tokenizer.decode(lab.held_out.documents[0].chunks[0].suffix[:40])
    model, held_out = f"{config.out}/{last}", f"{lab.folder}/held_out.jsonl"
    think = ["sample_latents.py", "--checkpoint", model]
    again = re.sub(r" --rounds[ =]\d+", "", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    more = ["bolt.py", "--evaluate", model, "--data", held_out]
    can_grow = config.raw_slices == 1 and config.train.schedule != "cosine"
    commands = [shlex.join([*think, "--data", held_out, "--redraw", "--show", "3"]),
                shlex.join([*think, "--prompt", text.rstrip()]),
                f"{again} --rounds {config.rounds + 2}" if can_grow else shlex.join(more)]
    return ["Next:", "", *(f"    python {command}" for command in commands)]


def model_labels(config: BoltConfig) -> dict[str, str]:
    """Folder of each model -> its name in the table, in the order of the table."""
    labels = {}
    for name, arm in ARMS.items():
        label = f"EM, K = {config.sample.num_latents}" if name == "em" else arm.label
        rounds = [] if arm.draws is None else range(1, config.rounds + 1) if name == "em" else [config.rounds]
        labels |= {f"{name}/round_{t}": f"{label}, round {t}" for t in rounds} or {name: label}
    return labels


if __name__ == "__main__":
    script(main)
