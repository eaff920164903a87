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

Told from the top down:  main -> the loop -> config -> models without an E-step -> evaluate -> the corpora ->
                         a second process -> report
"""
from __future__ import annotations

import copy
import itertools
import json
import math
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data.alchemy import claims
from data.alchemy.prepare import prepare as make_embedded
from data.alchemy.world import World
from data.corpus import Document, encode_corpus, read_corpus, texts_of
from data.layout import TEXT, Layout, Sequence
from data.loader import Position, training_batches
from data.report import (curves_of, mean, model_rows, models_table, paired_table, per_unit, plot, read_records,
                         rounds_table)
from data.run import Ranks, open_run, option, parse_config, script, sha256_of, start_ranks, write_whole
from data.tokens import Tokenizer, tokenizer_for, tokenizer_from
from model import GPT, read_checkpoint, restore
from sample_latents import (Block, Evidence, Place, SampleConfig, at_precision, check_room, chosen_dtype, complete,
                            e_step, figures_of, importance_bound, infer, score, sums_of, survey, think_and_answer)
from train import TrainConfig, TrainState, new_model, read_start, settled, train, with_optimizer, with_steps


# ---- main ------------------------------------------------------------------------------------------------------

def main(argv=None) -> None:
    config, start = parse_config(BoltConfig(), argv, __doc__), time.time()
    names, ranks = config.arm_names, start_ranks(config.device)
    digest = corpus_digest(config.data) if config.data else ""
    lab = open_lab(config, ranks)
    config = lab.config
    base = sha256_of(config.base)[:16] if config.base and ranks.main else ""
    open_run(config.out, config, ranks, data_sha256=digest, base_sha256=base)
    counts = ", ".join(f"{len(documents)} {name}" for name, documents in lab.corpora.items())
    ranks.say(f"{config.out}: {counts} documents, {ranks.device}")
    names = [name for name in names if name != "oracle" or name in lab.corpora]
    beside = [name for name in BESIDE if name in names] if two_processes(ranks) else []
    second = start_beside(config, beside) if beside else None
    run_arms(lab, [name for name in names if name not in beside])
    if second:
        second.join()
        if second.exitcode:
            raise ValueError("a baseline failed, see above; the same command goes on")
    if ranks.main:
        ranks.say(f"\n{report(lab)}\n\n{config.out}/report.md, after {time.time() - start:.0f} s")


def run_arms(lab: Lab, names: list[str]) -> None:
    for name in names:
        lab.ranks.say(f"{ARMS[name].label} [{name}]")
        if ARMS[name].draws is None:
            train_arm(lab, name)
        else:
            em(lab, name)


# ---- the loop --------------------------------------------------------------------------------------------------

def em(lab: Lab, name: str) -> None:
    """The loop of the paper. Every M-step starts again from the warm start, or what --restart says, so only thoughts
    carry over. A loop that was killed goes on after the last round that was measured.

    `passes` is what a model took, in forward passes of a token: training a token counts as three (a backward pass is
    two), prefilling, drawing and scoring one as one. FLOPs are 2 x parameters x passes.
    """
    config, folder, raw = lab.config, f"{lab.config.out}/{name}", f"{lab.folder}/raw.jsonl"
    warm, passes = warm_start(lab)
    model, sample, done = warm, sample_config(config, ARMS[name].draws), rounds_done(folder, config.rounds)
    for t in range(1, done):
        drop_model(lab, f"{folder}/round_{t}")
    if 0 < done < config.rounds:
        model = restore(read_checkpoint(f"{folder}/round_{done}"), lab.ranks.device)
        passes = json.loads(Path(f"{folder}/round_{done}/step_last.json").read_text())["passes"]
    for t in tqdm(range(done + 1, config.rounds + 1), f"{name} rounds", leave=False, disable=lab.ranks.no_bar):
        out = f"{folder}/round_{t}"
        drawn = f"{out}/latents.jsonl"
        figures = e_step(model, lab.tokenizer, raw, lab.blocks, sample, t, drawn, lab.ranks)     # z ~ q, kept by p / q
        latents = encode_corpus(read_corpus(drawn), lab.tokenizer)
        start = {"warm": warm, "base": None, "previous": model}[config.restart]
        model, state = fit(lab, latents, m_step(config, t), out, start)                          # fit p and q
        passes += sum(figures[f"{kind}_tokens"] for kind in ("prefilled", "sampled", "scored")) + 3 * state.tokens
        weigh = name == "em" or t == config.rounds
        measure(lab, f"{out}/step_last.json", passes, lambda: {"e_step": figures} | evaluate(lab, model, weigh=weigh))
        drop_model(lab, f"{folder}/round_{t - 1}")
    if name != "em":
        drop_model(lab, f"{folder}/round_{config.rounds}")


def rounds_done(folder: str, rounds: int) -> int:
    """The last round that was trained and measured; 0: none."""
    return max((t for t in range(1, rounds + 1) if os.path.exists(f"{folder}/round_{t}/step_last.json")), default=0)


def drop_model(lab: Lab, folder: str) -> None:
    """Delete the weights of a model that is trained and measured, where the last round's alone are to be kept."""
    if lab.config.keep_models == "last" and lab.ranks.main:
        for name in ("ckpt.pt", "ckpt.pt.tmp"):         # a kill may have left the latter
            Path(folder, name).unlink(missing_ok=True)


def m_step(config: BoltConfig, round: int) -> TrainConfig:
    return replace(config.train, seed=config.seed + 1000 * round)


def sample_config(config: BoltConfig, draws: int) -> SampleConfig:
    """An E-step's settings. A single draw is not weighed, so it comes from the model as it is, at temperature 1."""
    sample = replace(config.sample, num_latents=draws or config.sample.num_latents, seed=config.seed)
    return replace(sample, temperature=1.0) if sample.num_latents == 1 else sample


def fit(lab: Lab, documents: list[Document], config: TrainConfig, folder: str, start: GPT | None = None,
        at_checkpoint=lambda model, state: None) -> tuple[GPT, TrainState]:
    """Train a model that has the weights of `start`, or those of the base, or fresh ones where there is no base."""
    os.makedirs(folder, exist_ok=True)
    config = with_steps(config, documents, lab.layout)
    model = new_model(config, copy.deepcopy(lab.base), lab.tokenizer).to(lab.ranks.device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    title = os.path.relpath(folder, lab.config.out)
    state = train(model, lab.tokenizer, documents, config, folder, lab.ranks, title,
                  at_checkpoint=lambda state, forward: at_checkpoint(model, state))
    return model, state


def warm_start(lab: Lab) -> tuple[GPT, float]:
    """The model that draws first and what it took, once it is there: another process may be making it."""
    path = f"{lab.config.out}/warm/ckpt.pt"
    wait_for(path, lambda: not read_checkpoint(path)["optimizers"])         # the last one has none
    saved = read_checkpoint(path)
    return restore(saved, lab.ranks.device), 3 * saved["state"]["tokens"]


def wait_for(path: str, ready=lambda: True) -> None:
    while not os.path.exists(path) or not ready():
        time.sleep(0.1)


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


ARMS = {
    "warm": Arm("warm start on gold", "gold", "warm start"),
    "em": Arm("EM", "raw", "M-step", "warm", draws=0),
    "k1": Arm("EM, K = 1: no weighing", "raw", "M-step", "warm", draws=1),
    "k4": Arm("EM, K = 4", "raw", "M-step", "warm", draws=4),
    "gold_plus_raw": Arm("gold + raw as no-thought, no E-step", "gold+raw", "all M-steps", "warm"),
    "gold_raw_best": Arm("gold + raw as no-thought, at its best length", "gold+raw", "best length", "warm"),
    "raw_observed": Arm("raw text, same observed tokens", "raw", "observed tokens", thinks=False),
    "raw_m_step": Arm("raw text, FLOPs of one trained model", "raw", "one model", thinks=False),
    "raw_best": Arm("raw text, at its best length", "raw", "best length", thinks=False),
    "oracle": Arm("oracle: true thoughts for all", "oracle", "M-step", "warm"),
    "raw_total": Arm("raw text, FLOPs of the whole loop", "raw", "loop", thinks=False),
    "warm_long": Arm("warm start, FLOPs of the whole loop", "gold", "loop"),
}
ON_REQUEST = ("k4", "raw_best", "gold_raw_best")        # not in --arms all
# what a second process does
BESIDE = ("raw_m_step", "raw_observed", "k1", "gold_plus_raw", "gold_raw_best", "oracle", "warm_long")


@dataclass(frozen=True)
class BoltConfig:
    data: str = option("", "folder of a prepared corpus; empty: the embedded one, made in --out/corpus with --seed")
    base: str = option("", "folder of an open base, or a run, whose weights and vocabulary every model starts from")
    encoding: str = option("words", "tokens of the text: words, or an encoding of tiktoken such as gpt2")
    out: str = option("runs/bolt", "run folder: report.md, config.json, one folder per model")
    seed: int = option(0, "of the embedded corpus, the weights and the draws", above=-1)
    rounds: int = option(5, "EM rounds", above=0)
    restart: Literal["warm", "base", "previous"] = option(
        "warm", "where M-steps start: from the warm start, the base (else fresh weights), or the round before")
    warm_steps: int = option(1200, "optimizer steps of the warm start, on gold documents alone", above=0)
    warm_epochs: float = option(0.0, "passes of the warm start over the gold documents, instead of --warm_steps")
    arms: str = option("all", f"what to run, a list with commas: all, study (all and k4), or of {', '.join(ARMS)}")
    device: str = option("auto", "auto, cpu, cuda or mps")
    bound_draws: int = option(16, "thoughts a chunk for the K-sample bound on held-out documents", above=0)
    keep_models: Literal["all", "last"] = option("all", "weights left on the disk; last: warm start and last round")
    checks: int = option(3, "times a baseline as long as the loop is evaluated; its best counts", above=0)
    train: TrainConfig = option(TrainConfig(), "an M-step; see train.py")
    sample: SampleConfig = option(SampleConfig(), "an E-step; see sample_latents.py")

    def __post_init__(self):
        if self.train.seed or self.sample.seed:
            raise ValueError("--train.seed and --sample.seed follow from --seed here; set that")
        if self.base and self.encoding != "words":
            raise ValueError("--base brings its vocabulary along; leave --encoding out")
        if self.warm_epochs < 0:
            raise ValueError(f"--warm_epochs {self.warm_epochs} is not allowed; give a number of at least 0")

    @property
    def arm_names(self) -> list[str]:
        """In the order of ARMS, since some need what others make; the warm start always."""
        every = [name for name in ARMS if name not in ON_REQUEST]
        names = {"all": every, "study": [*every, "k4"]}.get(self.arms, self.arms.split(","))
        for name in names:
            if name not in ARMS:
                raise ValueError(f"--arms {name} is not allowed; give all, study, or some of {', '.join(ARMS)}")
            if ARMS[name].budget == "loop" and "em" not in names:
                raise ValueError(f"--arms {name} gets the FLOPs of the loop, so name em too")
        return [name for name in ARMS if name == "warm" or name in names]


# ---- models without an E-step: the warm start and the baselines ------------------------------------------------

def train_arm(lab: Lab, name: str) -> None:
    """Train and evaluate the model of an arm without E-steps: several where its best length is wanted, each with a
    schedule of its own; a long one is evaluated several times on the way."""
    arm, config, folder = ARMS[name], lab.config, f"{lab.config.out}/{name}"
    start, before = warm_start(lab) if arm.starts == "warm" and config.restart != "base" else (None, 0)
    documents = [document for part in arm.corpus.split("+") for document in lab.corpora[part]]
    settings = replace(m_step(config, 0), plain_as="no_thought" if arm.corpus == "gold+raw" else "plain")
    lengths, long = steps_of_budget(lab, arm, documents, settings), arm.budget in ("loop", "all M-steps")

    def record_at(step: int) -> str:
        return f"{folder}/step_{'last' if step == lengths[-1] else step}.json"

    def check(model: GPT, state: TrainState, steps: int) -> None:
        if state.step == steps or long:
            measure(lab, record_at(state.step), before + 3 * state.tokens,
                    lambda: evaluate(lab, model, arm.thinks, weigh=state.step == steps))
    for steps in lengths:
        settings = replace(settings, steps=steps, epochs=0.0)
        settings = replace(settings, checkpoint_every=math.ceil(steps / config.checks)) if long else settings
        place = folder if steps == lengths[-1] else f"{folder}/{steps}_steps"
        if config.keep_models == "all" or name == "warm" or not os.path.exists(record_at(steps)):
            fit(lab, documents, settings, place, start, partial(check, steps=steps))
        if name != "warm":
            drop_model(lab, place)


def steps_of_budget(lab: Lab, arm: Arm, documents: list[Document], settings: TrainConfig) -> list[int]:
    """Optimizer steps of an arm: those of the settings, or what gives it the observed tokens or the FLOPs of one
    trained model (warm start and M-step), or the FLOPs of the whole loop, E-steps counted; or several lengths."""
    config, gold = lab.config, lab.corpora["gold"]
    warm = with_steps(replace(settings, steps=config.warm_steps, epochs=config.warm_epochs), gold, lab.layout).steps
    m = with_steps(settings, documents, lab.layout).steps
    known = {"warm start": [warm], "M-step": [m], "all M-steps": [config.rounds * m],
             "best length": [math.ceil(m / 2), m, 2 * m]}
    if arm.budget in known:
        return known[arm.budget]
    tokens, observed = per_step(lab, documents, settings)
    if arm.budget == "loop":
        record = f"{config.out}/em/round_{config.rounds}/step_last.json"
        wait_for(record)
        return [max(1, round(json.loads(Path(record).read_text())["passes"] / 3 / tokens))]
    gold_tokens, gold_observed = per_step(lab, gold, settings)
    if settings.epochs:         # thoughts that are not drawn yet are taken to be as long as gold ones
        m = settings.epochs * sum(map(observed_tokens, lab.corpora["raw"])) / gold_observed
    share = gold_observed / observed if arm.budget == "observed tokens" else gold_tokens / tokens
    seen = {"warm": warm + m, "base": m, "previous": warm + config.rounds * m}[config.restart]     # by the last model
    return [max(1, round(seen * share))]


def per_step(lab: Lab, documents: list[Document], settings: TrainConfig) -> tuple[float, float]:
    """Tokens and observed tokens of a training step, the mean of the first twenty."""
    batches = training_batches(documents, lab.layout, settings, Position(), lab.ranks)
    pairs = [(batch.num_tokens, batch.num_observed) for batch in itertools.islice(batches, 20)]
    return mean(a for a, b in pairs), mean(b for a, b in pairs)


# ---- evaluate --------------------------------------------------------------------------------------------------

def measure(lab: Lab, path: str, passes: float, score) -> None:
    """Keep the evaluation of a model in a file; `score()` makes it where it is not there yet."""
    if lab.ranks.main and not os.path.exists(path):
        record = {"passes": passes} | score()
        write_whole(path, json.dumps(record))
        known = f", hidden facts known {record['known']:.2f}" if "known" in record else ""
        accuracy = f"accuracy {mean(record['correct']):.3f}, " if "correct" in record else ""
        lab.ranks.say(f"  {os.path.relpath(path[:-5], lab.config.out):24s} {accuracy}"
                      f"{per_unit(record['nll'], record['tokens']):.3f} nats per observed token{known}")
    lab.ranks.barrier()


def evaluate(lab: Lab, model: GPT, thinks: bool = True, weigh: bool = True) -> dict:
    """Everything measured of a model on held-out documents; lists have an entry per document.

    tokens, bytes: observed. correct, in corpora with answers: greedy answer right (a model that thinks writes its
    thought first); correct_direct: without a thought. nll: nats of the observed text, positive: minus the K-sample
    bound of a model that thinks, else exact; None where every draw was unfinished. drawn: figures of the draws.
    hidden, known: see data/alchemy/claims.py. With weigh=False nothing is drawn.
    """
    model = at_precision(model, lab.dtype)
    held_out, records = lab.corpora["held_out"], [document.record for document in lab.corpora["held_out"]]
    places = [(document, c) for document in held_out for c, chunk in enumerate(document.chunks) if not chunk.given]
    scores = {"tokens": [observed_tokens(document) for document in held_out],
              "bytes": [observed_bytes(record) for record in records], "hidden": [r.get("hidden") for r in records]}
    scores["nll"] = scores["nll_direct"] = nll_direct(lab, model, places, no_thought=thinks)
    if "answer" in records[0]:
        scores["correct_direct"] = answers_right(lab, model, held_out, "no_thought" if thinks else "raw")
        scores["correct"] = answers_right(lab, model, held_out, "thought") if thinks else scores["correct_direct"]
    if "probes" in lab.corpora:
        probes = lab.corpora["probes"]
        scores["known"] = claims.facts_known(probes, answers_right(lab, model, probes, "thought" if thinks else "raw"))
    if thinks and weigh:
        sample = replace(lab.config.sample, num_latents=lab.config.bound_draws, seed=lab.config.seed)
        evidence = infer(model, lab.layout, places, sample, round=0)
        scores |= bounds(places, evidence) | {"drawn": figures_of(sums_of(evidence))}
        if lab.world:
            thoughts = [[lab.tokenizer.decode(ids) for ids in latents] for latents in evidence.latents]
            scores |= claims.thought_quality(lab.world, places, thoughts, evidence.weights.tolist())
    return scores


def observed_tokens(document: Document) -> int:
    return sum(len(chunk.suffix) for chunk in document.chunks if not chunk.given)


def observed_bytes(record: dict) -> int:
    return sum(len(chunk["suffix"].encode()) for chunk in record["chunks"] if not chunk.get("given"))


def nll_direct(lab: Lab, model: GPT, places: list[Place], no_thought: bool) -> list[float | None]:
    """-log p(x | C) without a thought, nats per document."""
    prompts = [lab.layout.direct_prompt(*place, no_thought) for place in places]
    texts = [Sequence().add(TEXT, document.chunks[c].suffix) for document, c in places]
    return per_document(places, (-score(model, prompts, range(len(prompts)), texts)).tolist())


def bounds(places: list[Place], evidence: Evidence) -> dict:
    """K-sample bounds from the same draws, taken in groups of K, as nats of a document, positive; and the elbo of the
    draws that finished, per observed token."""
    log_w, finished = evidence.log_weights, evidence.finished                                 # (N, K)
    tokens = torch.tensor([len(document.chunks[c].suffix) for document, c in places])[:, None]
    scores = {"elbo_per_token": (log_w[finished].sum() / (tokens * finished).sum()).item()}
    for draws in sorted({4, log_w.shape[1]}):
        if log_w.shape[1] % draws == 0:
            groups = importance_bound(log_w.view(len(log_w), -1, draws))                      # (N, K / draws)
            scores[f"nll_by_{draws}"] = per_document(places, (-groups.mean(dim=-1)).tolist())
    return scores | {"nll": scores[f"nll_by_{log_w.shape[1]}"]}


def per_document(places: list[Place], values: list[float]) -> list[float | None]:
    """Sums of a value of chunks over their documents; None where it is infinite."""
    sums: dict[int, float] = {}
    for (document, _), value in zip(places, values, strict=True):
        sums[document.index] = sums.get(document.index, 0.0) + value
    return [value if math.isfinite(value) else None for value in sums.values()]


def answers_right(lab: Lab, model: GPT, documents: list[Document], mode: str) -> list[bool]:
    """Whether the greedy answer in the last chunk is the document's. mode: thought, no_thought or raw."""
    layout, places = lab.layout, [(document, len(document.chunks) - 1) for document in documents]
    longest, sample = longest_answer(documents), lab.config.sample
    if mode == "thought":
        prompts = [layout.prior_prompt(*place) for place in places]
        _, answers = think_and_answer(model, layout, prompts, sample.max_latent_tokens, longest, sample.rows)
    else:
        prompts = [layout.direct_prompt(*place, no_thought=mode == "no_thought") for place in places]
        answers = complete(model, layout, prompts, [layout.eos, layout.sol], longest, sample.rows)
    return [final_answer(layout.tokenizer.decode(ids)) == document.record.get("answer")
            for ids, document in zip(answers, documents)]


def longest_answer(documents: list[Document]) -> int:
    """Tokens that an answer may take."""
    return max(len(document.chunks[-1].suffix) for document in documents) + 2


def final_answer(text: str) -> str:
    """What an answer comes to: what follows "####" where the text has it, without full stop."""
    return text.split("####")[-1].strip(" .\n")


# ---- the corpora -----------------------------------------------------------------------------------------------

CORPORA = ("gold", "raw", "held_out", "probes", "oracle")     # only the embedded corpus has probes


@dataclass(frozen=True)
class Lab:
    """What every arm works with: the corpora of `folder`. gold has thoughts, raw has none; held_out and probes are for
    evaluation only; oracle is raw with its true thoughts; blocks are those of raw, see `survey`; world is the table
    behind the embedded corpus, else None; dtype is what evaluations compute in; base: see `read_start`."""
    config: BoltConfig
    ranks: Ranks
    folder: Path
    base: dict | None
    tokenizer: Tokenizer
    layout: Layout
    corpora: dict[str, list[Document]]
    blocks: list[Block]
    world: World | None
    dtype: str


def corpus_digest(folder: str) -> str:
    """Hashes of what there is of a prepared corpus. Raises FileNotFoundError where a part is missing."""
    for name in CORPORA[:3]:
        if not Path(folder, f"{name}.jsonl").is_file():
            raise FileNotFoundError(f"--data {folder} has no {name}.jsonl; its prepare.py writes it")
    paths = [Path(folder, name) for name in (*(f"{name}.jsonl" for name in CORPORA), "world.json")]
    return " ".join(sha256_of(path)[:16] for path in paths if path.exists())


def open_lab(config: BoltConfig, ranks: Ranks) -> Lab:
    """Read the corpora; the embedded one is made where it is missing. ValueError for what would only show up late."""
    folder, base = Path(config.data or f"{config.out}/corpus"), read_start(config.base, ranks)
    if not config.data and ranks.main and not Path(config.out, "config.json").exists():
        make_embedded(folder, config.seed)
    ranks.barrier()
    paths = {name: folder / f"{name}.jsonl" for name in CORPORA}
    records = {name: read_corpus(str(path)) for name, path in paths.items() if path.exists() or name in CORPORA[:3]}
    texts = texts_of(itertools.chain(*records.values()), config.encoding)
    tokenizer = tokenizer_from(base["tokenizer"]) if base else tokenizer_for(texts, config.encoding)
    config = replace(config, train=with_optimizer(settled(config.train, base), tokenizer))
    corpora = {name: encode_corpus(part, tokenizer) for name, part in records.items()}
    corpora["held_out"] = [document for document in corpora["held_out"] if observed_tokens(document)]
    for name in CORPORA[:3]:
        if not any(map(observed_tokens, corpora[name])):
            raise ValueError(f"{paths[name]} has no text to predict; every chunk is given, or empty")
    world = World.from_json((folder / "world.json").read_text()) if (folder / "world.json").exists() else None
    layout = Layout(tokenizer)
    blocks = survey(f"{folder}/raw.jsonl", layout, config.sample, config.train.model.context)
    for name in ("held_out", "probes"):
        check_context(layout, corpora.get(name, []), config, f"{folder}/{name}.jsonl")
    dtype = chosen_dtype(config.out, config.sample, base["model_config"] if base else config.train.model, ranks)
    return Lab(config, ranks, folder, base, tokenizer, layout, corpora, blocks, world, dtype)


def check_context(layout: Layout, documents: list[Document], config: BoltConfig, path: str) -> None:
    """Raise ValueError where the evaluation of a document would not fit the model, before anything is trained."""
    context, thought = config.train.model.context, config.sample.max_latent_tokens
    answers = any("answer" in document.record for document in documents)
    answer = thought + 1 + longest_answer(documents) if answers else 0
    for document in documents:
        last, what = len(document.chunks) - 1, f"a prompt of {path}:{document.index + 1}"
        for c, chunk in enumerate(document.chunks):
            if not chunk.given:
                check_room(context, len(layout.posterior_prompt(document, c)), thought, what)
        check_room(context, len(layout.prior_prompt(document, last)), answer, what)


# ---- a second process ------------------------------------------------------------------------------------------

def two_processes(ranks: Ranks) -> bool:
    """Small models gain little from a second thread and much from a second process (OMP_NUM_THREADS=1: neither)."""
    return ranks.world == 1 and ranks.device.type == "cpu" and torch.get_num_threads() > 1


def start_beside(config: BoltConfig, names: list[str]) -> multiprocessing.Process:
    """Run some arms in a second process, which ends with this one and shows no progress bars."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    arguments = (config, names, torch.get_num_threads())
    process = multiprocessing.get_context("spawn").Process(target=run_beside, args=arguments, daemon=True)
    process.start()
    return process


def run_beside(config: BoltConfig, names: list[str], threads: int) -> None:
    """The second process."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    script(lambda argv: run_arms(open_lab(config, replace(start_ranks(config.device), quiet=True)), names))


# ---- report ----------------------------------------------------------------------------------------------------

def report(lab: Lab) -> str:
    """Write report.json, report.md (tables, what they show, how they were made) and figure.svg; returns report.md."""
    config, (records, on_the_way) = lab.config, read_records(lab.config.out)
    run = json.loads(Path(f"{config.out}/config.json").read_text())
    labels, lines = model_labels(config), ["# nanoBoLT: EM over latent thoughts", ""]
    rows = model_rows(records, labels)
    lines += [*models_table([rows]), ""]
    if lab.world:
        written = {name: [document.record for document in part] for name, part in lab.corpora.items()}
        lines += [claims.floors(lab.world, written, sum(records["warm"]["tokens"])), ""]
    for verdict in claims.verdicts(records, config.sample.num_latents):
        lines.append(f"* **{'shown' if verdict.shown else 'NOT SHOWN'}** {verdict.claim}: {verdict.why}")
    lines += ["", *rounds_table(records), "", *paired_table(records, labels), "",
              "Accuracy: greedy answers. " * ("correct" in records["warm"])
              + f"{len(lab.corpora['held_out'])} held-out documents. Nats per token, bits per byte: of the observed "
              f"text, exact for raw models, minus the {config.bound_draws}-sample bound for those that think. Compute: "
              "forward and backward passes, E-steps counted, relative to the whole loop. Of a baseline evaluated "
              "several times its best figure stands; before its end it writes without a thought, so that its best nats "
              "may be exact ones. ± is one standard error over documents.", "",
              f"`{run['command']}` at commit {run['commit']}, seed {config.seed}, torch {torch.__version__}, "
              f"{lab.ranks.device}, {time.strftime('%Y-%m-%d')}"]
    curves = curves_of(on_the_way, {name: arm.label for name, arm in ARMS.items()})
    write_whole(f"{config.out}/report.json", json.dumps({"models": rows, "curves": curves}, indent=1) + "\n")
    write_whole(f"{config.out}/report.md", "\n".join(lines) + "\n")
    try:
        plot([config.out], f"{config.out}/figure.svg")
    except ValueError as error:         # matplotlib is not needed to run
        lines += ["", f"no figure: {error}"]
    return "\n".join(lines)


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
