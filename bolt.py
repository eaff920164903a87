"""EM over latent thoughts: the whole of "Reasoning to Learn from Latent Thoughts" (arXiv:2503.18866), in one loop.

    model = train(gold)                                  warm start: a few documents come with their thoughts
    repeat:
        latents = e_step(model, raw)                     K thoughts a chunk from q(z | x, C), one kept by p(z, x | C) / q
        model   = train(latents, from=warm start)        fit p(z, x) and q(z | x) on text with the thoughts inserted

    python bolt.py                                       the embedded corpus, every baseline, a table: under 6 minutes
    python bolt.py --seed 1 --out runs/seed1             another table of reactions and other documents
    python bolt.py --arms em --rounds 3                  only what you name
    python bolt.py --data data/gsm8k --encoding gpt2     a prepared corpus: FOLDER/{gold,raw,held_out}.jsonl

Everything lands in --out; killed and started again with the same command, it continues. On a machine with two cores the
baselines run beside the loop, in a second process.

    config -> lab (the corpora) -> evaluate -> the arms -> report -> main
"""
import itertools
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data.alchemy.world import World
from data.corpus import Document, encode_corpus, make_embedded, observed_places, read_corpus, texts_of
from data.layout import Layout
from data.loader import Position, score_sequences, training_batches
from data.report import mean, model_rows, models_table, per_unit, read_records, rounds_table, verdicts
from data.run import Ranks, open_run, option, parse_config, require_positive, script, sha256_of, start_ranks, write_whole
from data.tokens import Tokenizer, tokenizer_for
from model import GPT
from sample_latents import Evidence, SampleConfig, complete, e_step, importance_bound, infer, think_and_answer
from train import TrainConfig, TrainState, train

# ---- config ----------------------------------------------------------------------------------------------------

ARMS = {"warm": "warm start on gold", "em": "EM", "k1": "EM, K = 1: no weighing", "k4": "EM, K = 4",
        "gold_plus_raw": "gold + raw as no-thought, no E-step", "raw_observed": "raw text, same observed tokens",
        "raw_m_step": "raw text, FLOPs of one trained model", "oracle": "oracle: true thoughts for all",
        "raw_total": "raw text, FLOPs of the whole loop", "warm_long": "warm start, FLOPs of the whole loop"}
# What this process does, and what a second one does beside it; a phase needs what the phases before it made.
PHASES = ((("warm",), ("raw_m_step",)),
          (("em", "k4"), ("k1", "gold_plus_raw", "raw_observed", "oracle")),
          (("raw_total",), ("warm_long",)))


@dataclass(frozen=True)
class BoltConfig:
    data: str = option("", "folder of a prepared corpus; empty: the embedded one, made in --out/corpus with --seed")
    encoding: str = option("words", "tokens of the text: words, or an encoding of tiktoken such as gpt2")
    out: str = option("runs/bolt", "run folder: report.md, config.json, one folder per model")
    seed: int = option(0, "of the embedded corpus, the weights and the draws")
    rounds: int = option(5, "EM rounds")
    warm_steps: int = option(1200, "optimizer steps of the warm start, on gold documents alone")
    arms: str = option("all", f"what to run, a list with commas: all, study (all and k4), or of {', '.join(ARMS)}")
    processes: Literal[0, 1, 2] = option(0, "2: baselines run beside the loop in a second process; 0: 2 on a CPU with two cores")
    device: str = option("auto", "auto, cpu, cuda or mps")
    bound_draws: int = option(16, "thoughts a chunk for the K-sample bound on held-out documents, for every model")
    checks: int = option(3, "times a long baseline (raw_total, warm_long, gold_plus_raw) is evaluated; its best counts")
    train: TrainConfig = option(TrainConfig(), "an M-step; see train.py")
    sample: SampleConfig = option(SampleConfig(), "an E-step; see sample_latents.py")

    def __post_init__(self):
        if self.train.seed or self.sample.seed:
            raise ValueError("--train.seed and --sample.seed follow from --seed here; set that")
        require_positive(self, "rounds", "warm_steps", "bound_draws", "checks")
        if self.train.row_tokens > self.train.model.context:
            raise ValueError(f"--train.row_tokens {self.train.row_tokens} exceeds --train.model.context {self.train.model.context}")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} is not allowed; give 0 or more")

    @property
    def arm_names(self) -> list[str]:
        names = {"all": [a for a in ARMS if a != "k4"], "study": list(ARMS)}.get(self.arms, self.arms.split(","))
        for name in names:
            if name not in ARMS:
                raise ValueError(f"--arms {name} is not allowed; give all, study, or some of {', '.join(ARMS)}")
        if {"raw_total", "warm_long"} & set(names) and "em" not in names:
            raise ValueError("--arms raw_total and warm_long get the FLOPs of the loop, so name em too")
        return ["warm"] + [name for name in names if name != "warm"]


# ---- the lab: corpora, tokenizer, machine ----------------------------------------------------------------------

@dataclass(frozen=True)
class Lab:
    """What every arm works with: the corpora of `folder`. gold has thoughts, raw has none; held_out and probes are for
    evaluation only; oracle is raw with its true thoughts; world is the table behind the embedded corpus (None for others)."""
    config: BoltConfig
    ranks: Ranks
    folder: Path
    tokenizer: Tokenizer
    layout: Layout
    corpora: dict[str, list[Document]]
    world: World | None


def observed_tokens(document: Document) -> int:
    return sum(len(chunk.suffix) for chunk in document.chunks if not chunk.given)


def observed_bytes(document: Document) -> int:
    return sum(len(chunk["suffix"].encode()) for chunk in document.record["chunks"] if not chunk.get("given"))


CORPORA = ("gold", "raw", "held_out", "probes", "oracle")     # of a lab's folder; only the embedded corpus has probes


def corpus_digest(folder: str) -> str:
    """Hashes of what there is of a prepared corpus. Raises FileNotFoundError where a part is missing."""
    for name in CORPORA[:3]:
        if not Path(folder, f"{name}.jsonl").is_file():
            raise FileNotFoundError(f"--data {folder} has no {name}.jsonl; its prepare.py writes it")
    paths = [Path(folder, name) for name in (*(f"{name}.jsonl" for name in CORPORA), "world.json")]
    return " ".join(sha256_of(path)[:16] for path in paths if path.exists())


def open_lab(config: BoltConfig, ranks: Ranks) -> Lab:
    """Read the corpora; the embedded one is made first where it is missing. Raises ValueError for what would only show up late."""
    folder = Path(config.data or f"{config.out}/corpus")
    if not config.data and ranks.main and not (folder / "world.json").exists():
        make_embedded(folder, config.seed)
    ranks.barrier()
    paths = {name: folder / f"{name}.jsonl" for name in CORPORA}
    records = {name: read_corpus(str(path)) for name, path in paths.items() if path.exists() or name in CORPORA[:3]}
    texts = texts_of([record for part in records.values() for record in part], config.encoding)
    tokenizer = tokenizer_for(texts, config.encoding)
    corpora = {name: encode_corpus(part, tokenizer) for name, part in records.items()}
    corpora["held_out"] = [document for document in corpora["held_out"] if observed_tokens(document)]
    for name in CORPORA[:3]:
        if not any(map(observed_tokens, corpora[name])):
            raise ValueError(f"{paths[name]} has no text to predict; every chunk is given, or empty")
    world = World.from_json((folder / "world.json").read_text()) if (folder / "world.json").exists() else None
    return Lab(config, ranks, folder, tokenizer, Layout(tokenizer), corpora, world)


# ---- evaluate --------------------------------------------------------------------------------------------------

def final_answer(text: str) -> str:
    """What an answer comes to: what follows "####" where the text has it, without full stop."""
    return text.split("####")[-1].strip(" .\n")


def answers_right(lab: Lab, model: GPT, documents: list[Document], mode: str) -> list[bool]:
    """Whether the greedy answer in the last chunk is the document's. mode: thought, no_thought or raw."""
    layout, sample, places = lab.layout, lab.config.sample, [(document, len(document.chunks) - 1) for document in documents]
    longest = max(len(document.chunks[c].suffix) for document, c in places) + 2
    if mode == "thought":
        prompts = [layout.prior_prompt(*place) for place in places]
        _, answers = think_and_answer(model, layout, prompts, sample.max_latent_tokens, longest, sample.slots)
    else:
        prompts = [layout.direct_prompt(*place, no_thought=mode == "no_thought") for place in places]
        answers = complete(model, layout, prompts, [layout.eos, layout.sol], longest, sample.slots)
    return [final_answer(layout.tokenizer.decode(ids)) == document.record.get("answer")
            for ids, document in zip(answers, documents)]


def per_document(places, values: list[float]) -> list[float | None]:
    """Sums of a value of chunks over their documents; None where it is infinite."""
    sums: dict[int, float] = {}
    for (document, _), value in zip(places, values, strict=True):
        sums[document.index] = sums.get(document.index, 0.0) + value
    return [value if math.isfinite(value) else None for value in sums.values()]


def direct_nll_per_document(lab: Lab, model: GPT, no_thought: bool) -> list[float]:
    """-log p(x | C) without a thought, nats per document."""
    places = observed_places(lab.corpora["held_out"])
    log_p = score_sequences(model, [lab.layout.direct(*place, no_thought) for place in places],
                            lab.config.sample.score_tokens)
    return per_document(places, (-log_p).tolist())


def bounds(places, evidence: Evidence) -> dict:
    """K-sample bounds from the same draws, taken in groups of K, as nats of a document, positive; and the elbo of the draws
    that finished, per observed token."""
    log_w, finished = evidence.log_weights, evidence.finished                                 # (N, K)
    tokens = torch.tensor([len(document.chunks[c].suffix) for document, c in places])[:, None]
    scores = {"elbo_per_token": (log_w[finished].sum() / (tokens * finished).sum()).item(), "unfinished": 1 - finished.float().mean().item()}
    for draws in sorted({4, log_w.shape[1]}):
        if log_w.shape[1] % draws == 0:
            groups = importance_bound(log_w.view(len(log_w), -1, draws))                      # (N, K / draws)
            scores[f"nll_by_{draws}"] = per_document(places, (-groups.mean(dim=-1)).tolist())
    return scores | {"nll": scores[f"nll_by_{log_w.shape[1]}"]}


def thought_quality(lab: Lab, places, evidence: Evidence) -> dict:
    """Against the exact posterior of the world: the share of valid thoughts among the draws and after resampling, and the
    mean total variation distance of the draws, then of the weighed draws, to the posterior."""
    marks = []
    for (document, c), latents, after in zip(places, evidence.latents, evidence.weights.tolist()):
        prefix, suffix = document.record["chunks"][0]["suffix"], document.record["chunks"][c]["suffix"]
        thoughts = [lab.tokenizer.decode(latent) for latent in latents]
        marks.append([*lab.world.grade(prefix, suffix, thoughts, [1 / len(thoughts)] * len(thoughts)),
                      *lab.world.grade(prefix, suffix, thoughts, after)])
    names = ("valid_before", "distance_before", "valid_after", "distance_after")
    return {name: mean(column) for name, column in zip(names, zip(*marks))}


def evaluate(lab: Lab, model: GPT, thinks: bool, weigh: bool = True) -> dict:
    """Everything measured of a model on held-out documents; lists have an entry per document.

    tokens, bytes: observed; hidden: facts it needs that no gold thought states, None in other corpora. correct, in corpora
    with answers: greedy answer right (a model that thinks writes its thought first); correct_direct: without a thought.
    nll: nats of the observed text, positive: minus the K-sample bound of a model that thinks, else exact; None where
    every draw was unfinished. known: share of hidden facts that a majority of their probes shows. With weigh=False
    the draws are left out.
    """
    held_out = lab.corpora["held_out"]
    scores = {"tokens": [observed_tokens(document) for document in held_out], "bytes": [observed_bytes(document) for document in held_out],
              "hidden": [document.record.get("hidden") for document in held_out]}
    scores["nll"] = scores["nll_direct"] = direct_nll_per_document(lab, model, no_thought=thinks)
    if "answer" in held_out[0].record:
        scores["correct_direct"] = answers_right(lab, model, held_out, "no_thought" if thinks else "raw")
        scores["correct"] = answers_right(lab, model, held_out, "thought") if thinks else scores["correct_direct"]
    if "probes" in lab.corpora:
        right: dict[tuple, list[bool]] = {}
        probes = lab.corpora["probes"]
        for probe, correct in zip(probes, answers_right(lab, model, probes, "thought" if thinks else "raw")):
            right.setdefault(tuple(probe.record["fact"]), []).append(correct)
        scores["known"] = sum(sum(one) > len(one) / 2 for one in right.values()) / len(right)
    if thinks and weigh:
        places = observed_places(held_out)
        sample = replace(lab.config.sample, num_latents=lab.config.bound_draws, seed=lab.config.seed)
        evidence = infer(model, lab.layout, places, sample, round=0)
        scores |= bounds(places, evidence)
        if lab.world:
            scores |= thought_quality(lab, places, evidence)
    return scores


# ---- the arms --------------------------------------------------------------------------------------------------

def fit(lab: Lab, documents: list[Document], config: TrainConfig, name: str, base: GPT | None = None,
        at_checkpoint=lambda model, state: None) -> tuple[GPT, TrainState]:
    """Train a fresh model, or one that starts from the weights of `base`, in --out/name."""
    folder = f"{lab.config.out}/{name}"
    os.makedirs(folder, exist_ok=True)
    model = GPT(replace(config.model, vocab_size=lab.tokenizer.vocab_size), config.seed).to(lab.ranks.device)
    if base is not None:
        model.load_state_dict(base.state_dict())
    state = train(model, lab.tokenizer, documents, config, folder, lab.ranks, title=name,
                  at_checkpoint=lambda state: at_checkpoint(model, state))
    return model, state


def measured(lab: Lab, name: str, passes: float, score) -> None:
    """Keep the evaluation of a model in --out/name.json; `score()` makes it where it is not there yet.

    passes: what making the model took, in forward passes of a token; training a token counts as three (a backward pass
    is two), prefilling, drawing and scoring one as one. FLOPs are 2 x parameters x passes.
    """
    path = Path(lab.config.out) / f"{name}.json"
    if lab.ranks.main and not path.exists():
        record = {"passes": passes} | score()
        write_whole(path, json.dumps(record))
        known = f", hidden facts known {record['known']:.2f}" if "known" in record else ""
        accuracy = f"accuracy {mean(record['correct']):.3f}, " if "correct" in record else ""
        lab.ranks.say(f"  {name:24s} {accuracy}{per_unit(record['nll'], record['tokens']):.3f} nats per observed token{known}")
    lab.ranks.barrier()


def warm_start(lab: Lab) -> tuple[GPT, TrainState]:
    config = replace(lab.config.train, steps=lab.config.warm_steps, seed=lab.config.seed)
    model, state = fit(lab, lab.corpora["gold"], config, "warm")
    measured(lab, "warm/step_last", 3 * state.tokens, lambda: evaluate(lab, model, thinks=True))
    return model, state


def m_step(lab: Lab, round: int) -> TrainConfig:
    return replace(lab.config.train, seed=lab.config.seed + 1000 * round)


def em(lab: Lab, arm: str, num_latents: int) -> None:
    """The loop of the paper. Every M-step starts again from the warm start, so only the thoughts carry over.

    A single draw is not weighed, so with K = 1 it comes from the model as it is, at temperature 1.
    """
    base, state = warm_start(lab)
    passes, model = 3 * state.tokens, base
    sample = replace(lab.config.sample, num_latents=num_latents, seed=lab.config.seed)
    sample = replace(sample, temperature=1.0) if num_latents == 1 else sample
    for t in tqdm(range(1, lab.config.rounds + 1), desc=f"{arm} rounds", leave=False, disable=not lab.ranks.main):
        name = f"{arm}/round_{t}"
        out = f"{lab.config.out}/{name}/latents.jsonl"
        summary = e_step(model, lab.tokenizer, f"{lab.folder}/raw.jsonl", sample, t, out, lab.ranks)   # z ~ q, kept by p / q
        latents = encode_corpus(read_corpus(out), lab.tokenizer)
        model, state = fit(lab, latents, m_step(lab, t), name, base)                              # fit p(z, x), q(z | x)
        passes += summary["prefilled_tokens"] + summary["sampled_tokens"] + summary["scored_tokens"] + 3 * state.tokens
        weigh = arm == "em" or t == lab.config.rounds
        measured(lab, f"{name}/step_last", passes, lambda: {"e_step": summary} | evaluate(lab, model, thinks=True, weigh=weigh))


def per_step(lab: Lab, documents: list[Document], config: TrainConfig) -> tuple[float, float]:
    """Tokens and observed tokens of a training step, the mean of the first twenty."""
    batches = training_batches(documents, lab.layout, config, Position(), lab.ranks)
    pairs = [(batch.num_tokens, batch.num_observed) for batch in itertools.islice(batches, 20)]
    return mean(a for a, b in pairs), mean(b for a, b in pairs)


def steps_of_budget(lab: Lab, arm: str, documents: list[Document], config: TrainConfig) -> int:
    """Optimizer steps that a baseline gets: of one trained model (warm start and an M-step), or of the whole loop."""
    one_model = lab.config.warm_steps + lab.config.train.steps
    tokens, observed = per_step(lab, documents, config)
    gold_tokens, gold_observed = per_step(lab, lab.corpora["gold"], config)
    if arm == "raw_observed":
        return round(one_model * gold_observed / observed)
    if arm == "raw_m_step":
        return round(one_model * gold_tokens / tokens)
    if arm == "gold_plus_raw":
        return lab.config.rounds * lab.config.train.steps       # as many as all M-steps together
    loop = Path(lab.config.out, f"em/round_{lab.config.rounds}/step_last.json")         # of raw_total, warm_long
    return round(json.loads(loop.read_text())["passes"] / 3 / tokens)


def baseline(lab: Lab, arm: str) -> None:
    """Train one of the models without an E-step for its budget, evaluated `checks` times on the way where it is long.

    gold_plus_raw goes on from the warm start, as every M-step does; the others are fresh.
    """
    gold, raw = lab.corpora["gold"], lab.corpora["raw"]
    documents, thinks = {"gold_plus_raw": (gold + raw, True), "warm_long": (gold, True)}.get(arm, (raw, False))
    config = replace(m_step(lab, 0), plain_as="no_thought" if arm == "gold_plus_raw" else "plain")
    steps = steps_of_budget(lab, arm, documents, config)
    checks = 1 if arm in ("raw_observed", "raw_m_step") else lab.config.checks
    config = replace(config, steps=steps, checkpoint_every=math.ceil(steps / checks))
    base, state = warm_start(lab) if arm == "gold_plus_raw" else (None, TrainState())
    before = 3 * state.tokens

    def check(model, state):
        last = state.step == steps
        measured(lab, f"{arm}/step_{'last' if last else state.step}", before + 3 * state.tokens,
                 lambda: evaluate(lab, model, thinks, weigh=last))

    fit(lab, documents, config, arm, base, check)


def oracle(lab: Lab) -> None:
    """An M-step on the true thoughts: the ceiling of what any E-step could reach."""
    base, before = warm_start(lab)
    model, state = fit(lab, lab.corpora["oracle"], m_step(lab, 0), "oracle", base)
    measured(lab, "oracle/step_last", 3 * (before.tokens + state.tokens), lambda: evaluate(lab, model, thinks=True))


def run_arm(lab: Lab, arm: str) -> None:
    if arm == "warm":
        warm_start(lab)
    elif arm in ("em", "k1", "k4"):
        em(lab, arm, lab.config.sample.num_latents if arm == "em" else int(arm[1:]))
    elif arm == "oracle":
        oracle(lab)
    else:
        baseline(lab, arm)


def run_arms(lab: Lab, names: list[str]) -> None:
    for number, name in enumerate(names, 1):
        lab.ranks.say(f"{number}/{len(names)} {ARMS[name]} [{name}]")
        run_arm(lab, name)


# ---- report ----------------------------------------------------------------------------------------------------

def floors(lab: Lab) -> str:
    """What can be had without learning, and what cannot be beaten."""
    def last_ingredient(record: dict) -> str:
        return record["chunks"][0]["suffix"].split(";")[0].split()[-1]

    answers: dict[str, list[str]] = {}
    for document in lab.corpora["gold"] + lab.corpora["raw"]:
        answers.setdefault(last_ingredient(document.record), []).append(document.record["answer"])
    guesses = {word: max(sorted(set(given)), key=given.count) for word, given in answers.items()}
    held_out = [document.record for document in lab.corpora["held_out"]]
    right = [guesses.get(last_ingredient(record)) == record["answer"] for record in held_out]
    log_p = [lab.world.log_evidence_of(*(chunk["suffix"] for chunk in record["chunks"])) for record in held_out]
    return (f"Guessing from the last ingredient gives accuracy {mean(right):.3f}, where a hidden fact is needed "
            f"{mean(ok for ok, record in zip(right, held_out) if record['hidden']):.3f}. An ideal reader who knows the table "
            f"needs {-sum(log_p) / sum(map(observed_tokens, lab.corpora['held_out'])):.3f} nats per observed token.")


def model_labels(config: BoltConfig) -> dict[str, str]:
    """Folder of each model -> its name in the table, in the order of the table."""
    labels = {}
    for arm, label in ARMS.items():
        if arm == "em":
            labels |= {f"em/round_{t}": f"EM, K = {config.sample.num_latents}, round {t}" for t in range(1, config.rounds + 1)}
        else:
            labels |= {f"{arm}/round_{config.rounds}": f"{label}, round {config.rounds}"} if arm in ("k1", "k4") else {arm: label}
    return labels


def report(lab: Lab) -> str:
    """Write report.json (the figures of every model) and report.md: the tables, what they show, how they were made."""
    config, records = lab.config, read_records(lab.config.out)
    run = json.loads(Path(f"{config.out}/config.json").read_text())
    rows = model_rows(records, model_labels(config))
    lines = ["# nanoBoLT: EM over latent thoughts", "", *models_table([rows]), ""]
    if lab.world:
        lines += [floors(lab), ""]
    for verdict in verdicts(records, config.sample.num_latents):
        lines.append(f"* **{'shown' if verdict.shown else 'NOT SHOWN'}** {verdict.claim}: {verdict.why}")
    lines += ["", *rounds_table(records), "",
              "Accuracy: greedy answers. " * ("correct" in records["warm"]) + f"{len(lab.corpora['held_out'])} held-out documents. Nats per "
              f"token, bits per byte: of the observed text, exact for raw models, minus the {config.bound_draws}-sample bound for models that think. Compute: forward "
              "and backward passes, E-steps counted, relative to the whole loop. Of a baseline that is evaluated several times "
              "its best figure stands, its exact nats without a thought included. ± is one standard error over documents.",
              "", f"`{run['command']}` at commit {run['commit']}, seed {config.seed}, torch {torch.__version__}, "
              f"{lab.ranks.device}, {time.strftime('%Y-%m-%d')}"]
    write_whole(f"{config.out}/report.json", json.dumps(rows, indent=1) + "\n")
    write_whole(f"{config.out}/report.md", "\n".join(lines) + "\n")
    return "\n".join(lines)


# ---- main ------------------------------------------------------------------------------------------------------

def run_beside(config: BoltConfig, names: list[str]) -> None:
    """Some arms in a second process, which ends with the first; its progress bars go to beside.log, its lines where all go."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    sys.stderr = open(f"{config.out}/beside.log", "a", buffering=1)
    torch.set_num_threads(max(1, os.cpu_count() // 2))
    script(lambda argv: run_arms(open_lab(config, start_ranks(config.device)), names))


def run_phase(lab: Lab, mine: list[str], beside: list[str]) -> None:
    """Run some arms here, and some beside them."""
    if not beside:
        return run_arms(lab, mine)
    process = multiprocessing.get_context("spawn").Process(target=run_beside, args=(lab.config, beside), daemon=True)
    process.start()
    run_arms(lab, mine)
    process.join()
    if process.exitcode:
        raise ValueError(f"a baseline failed; {lab.config.out}/beside.log says why")


def main(argv=None) -> None:
    config, start = parse_config(BoltConfig(), argv, __doc__), time.time()
    names, ranks = config.arm_names, start_ranks(config.device)
    digest = corpus_digest(config.data) if config.data else ""
    lab = open_lab(config, ranks)
    open_run(config.out, config, ranks, data_sha256=digest)
    wanted = 2 if ranks.device.type == "cpu" and os.cpu_count() > 1 else 1
    two = ranks.world == 1 and (config.processes or wanted) == 2
    if two:
        torch.set_num_threads(max(1, os.cpu_count() // 2))
    ranks.say(f"{config.out}: {', '.join(f'{len(d)} {name}' for name, d in lab.corpora.items())} documents, {ranks.device}")
    for phase in PHASES:
        mine, beside = ([name for name in part if name in names and (name != "oracle" or name in lab.corpora)] for part in phase)
        run_phase(lab, mine if two else mine + beside, beside if two else [])
    if ranks.main:
        ranks.say(f"\n{report(lab)}\n\n{config.out}/report.md, after {time.time() - start:.0f} s")


if __name__ == "__main__":
    script(main)
