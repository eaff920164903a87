"""What people read: the figures of an E-step, a chunk with its thoughts, the table and the verdicts of a bolt.py run.

    python -m data.report runs/seed0 runs/seed1 runs/seed2        the table over several runs: mean ± standard error

An E-step's figures come from the corpus it wrote, a run's from the evaluations in its folder. A record is the evaluation
of one model: lists have an entry per held-out document, such as its observed `tokens`, `correct` (only in corpora with
answers) and `nll` (nats); `passes` is what making the model took, in forward passes of a token. See `evaluate` in bolt.py.
"""
import itertools
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

import numpy as np


# ---- an E-step -------------------------------------------------------------------------------------------------

def figures_of_chunk(chunk: dict) -> dict[str, float]:
    """What a drawn chunk adds to the sums of `summarize`."""
    log_w = [p - q for p, q in zip(chunk["log_joint"], chunk["log_proposal"]) if p is not None]
    sums = {"chunks": 1, "draws": len(chunk["finished"]), "finished": len(log_w), "tokens": sum(chunk["lengths"]), "log_w": sum(log_w)}
    if log_w:
        shares = [math.exp(x - max(log_w)) for x in log_w]
        entropy = math.log(sum(shares)) - sum(share * math.log(share) for share in shares if share) / sum(shares)
        sums |= {"usable": 1, "ess": chunk["ess"], "entropy": entropy, "bound": chunk["bound"]}
    return sums


def summarize(records: Iterable[dict]) -> dict:
    """Figures of an E-step's output, one document at a time, over its chunks that were drawn for.

    Nats and tokens; means over the chunks of which a draw finished, of elbo_finished over the finished draws.
    """
    total: Counter = Counter()
    for record in records:
        total.update({f"{kind}_tokens": tokens for kind, tokens in record.get("cost", {}).items()})
        for chunk in record["chunks"]:
            if "log_proposal" in chunk:
                total.update(figures_of_chunk(chunk))

    def ratio(name, over):
        return total[name] / total[over] if total[over] else math.nan
    return {"chunks": total["chunks"], "left_plain": total["chunks"] - total["usable"],
            "ess": ratio("ess", "usable"), "weight_entropy": ratio("entropy", "usable"),
            "unfinished": 1 - ratio("finished", "draws"), "latent_tokens": ratio("tokens", "draws"),
            "bound": ratio("bound", "usable"), "elbo_finished": ratio("log_w", "finished"),
            **{f"{kind}_tokens": total[f"{kind}_tokens"] for kind in ("prefilled", "sampled", "scored")}}


def show_chunk(layout, place, annotation: dict) -> str:
    """A chunk as a person wants to see it: what comes before, the thoughts with their weights as bars, the text, ess, bound."""
    (document, c), decode = place, layout.tokenizer.decode
    weights, times = Counter(), Counter()       # of equal thoughts together
    for draw, finished in zip(annotation["draws"], annotation["finished"]):
        thought = (draw["latent"], finished)
        weights[thought] += draw["weight"]
        times[thought] += 1
    lines = [f"document {document.index}, chunk {c}", f"  prefix   {decode(layout.context(document, c)[1:])!r}",
             f"  text     {decode(document.chunks[c].suffix)!r}"]
    for (thought, finished), weight in weights.most_common():
        mark = "kept" if finished and thought == annotation["latent"] else "" if finished else "unfinished"
        lines.append(f"  {'█' * round(20 * weight):20s} {weight:.2f} {times[thought, finished]:3d} x {mark:10s} {thought!r}")
    if annotation["bound"] is not None:
        lines.append(f"  ess {annotation['ess']:.1f} of {len(annotation['draws'])}, bound {annotation['bound']:.2f} nats")
    return "\n".join(lines)


# ---- statistics ------------------------------------------------------------------------------------------------

def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def gain(ours: list, theirs: list) -> tuple[float, float]:
    """Mean and standard error of ours - theirs, document by document, where both are there."""
    pairs = np.array([float(a) - float(b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None])
    return float(pairs.mean()), float(pairs.std(ddof=1) / len(pairs) ** 0.5)


def better(ours: list, theirs: list, errors: float = 3.0) -> tuple[bool, str]:
    """Whether ours exceeds theirs by more than so many standard errors of the paired difference, and the figures.

    With negative `errors`: whether ours is at most so many standard errors worse.
    """
    difference, error = gain(ours, theirs)
    enough = difference > errors * error if errors > 0 else difference >= errors * error
    return enough, f"{difference:+.3f} ± {error:.3f}"


def per_unit(nll: list, units: list[int]) -> float:
    """Nats per token, or per byte, over the documents whose nll is finite."""
    pairs = [(value, unit) for value, unit in zip(nll, units) if value is not None]
    return sum(value for value, _ in pairs) / sum(unit for _, unit in pairs) if pairs else math.nan


def where_hidden(record: dict) -> list[bool]:
    """Right or wrong on the documents that need a hidden fact."""
    return [right for right, hidden in zip(record["correct"], record["hidden"]) if hidden]


# ---- records ---------------------------------------------------------------------------------------------------

def read_records(out: str) -> dict[str, dict]:
    """The evaluations in a run folder, {"em/round_1": ...}; of several on the way of a baseline, its best in each figure."""
    records: dict[str, dict] = {}
    for path in sorted(Path(out).glob("**/step_*.json")):
        record = json.loads(path.read_text())
        best = records.setdefault(str(path.parent.relative_to(out)), record)
        best["passes"] = max(best["passes"], record["passes"])
        best["known"] = max(best.get("known", 0.0), record.get("known", 0.0))
        for name in {"correct", "correct_direct"} & record.keys():
            best[name] = max(best[name], record[name], key=sum)
        for name in ("nll", "nll_direct"):
            best[name] = min(best[name], record[name], key=lambda nll: mean(x for x in nll if x is not None))
    return records


def rounds_of(records: dict[str, dict]) -> list[dict]:
    """Warm start, round 1, round 2, ..."""
    names = sorted((name for name in records if name.startswith("em/")), key=lambda name: int(name.split("_")[1]))
    return [records[name] for name in ["warm", *names]]


# ---- verdicts --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Verdict:
    claim: str
    shown: bool
    why: str


def figures(record: dict) -> dict[str, list]:
    """What models are compared in, document by document: the more the better."""
    accuracy = {"accuracy": record["correct"]} if "correct" in record else {}
    return accuracy | {"nats per document": [None if nll is None else -nll for nll in record["nll"]]}


def beats_all(claim: str, ours: dict, others: list[dict]) -> Verdict:
    found = {name: [better(values, figures(other)[name]) for other in others] for name, values in figures(ours).items()}
    return Verdict(claim, all(ok for results in found.values() for ok, _ in results),
                   "; ".join(f"{name} {', '.join(text for _, text in results)}" for name, results in found.items()))


def learns_hidden_facts(last: dict, controls: list[dict]) -> Verdict:
    hidden = [better(where_hidden(last), where_hidden(control)) for control in controls]
    return Verdict("C2 EM learns what no gold thought states", all(ok for ok, _ in hidden),
                   f"accuracy where a hidden fact is needed {', '.join(text for _, text in hidden)}; hidden facts known "
                   f"{last['known']:.2f} against {max(control['known'] for control in controls):.2f}")


def rounds_improve(rounds: list[dict]) -> Verdict:
    shown, why = True, []
    for name in figures(rounds[0]):
        values = [figures(record)[name] for record in rounds]
        end, steps = better(values[-1], values[0]), [better(after, before, -1) for before, after in zip(values, values[1:])]
        shown = shown and all(ok for ok, _ in [end, *steps])
        why.append(f"{name} {end[1]}, by rounds {', '.join(text for _, text in steps)}")
    return Verdict("C3 rounds improve: the last beats the first, none is clearly worse than the one before", shown, "; ".join(why))


def verdicts(records: dict[str, dict], num_latents: int) -> list[Verdict]:
    """What the run shows, decided by rules that know no figures; a claim whose arms did not run is left out.

    A figure beats another where the mean of the paired differences over held-out documents exceeds three of its standard
    errors. A round may not be worse than the one before by more than one standard error.
    """
    rounds = rounds_of(records)
    if len(rounds) == 1:
        return []
    last, found = rounds[-1], []
    raws = [records[arm] for arm in ("raw_observed", "raw_m_step", "raw_total") if arm in records]
    if raws:
        found.append(beats_all("C1 latents beat raw text at every budget", last, raws))
    controls = [records[arm] for arm in ("warm", "warm_long", "gold_plus_raw") if arm in records]
    if any(last["hidden"]):
        found.append(learns_hidden_facts(last, controls))
    found.append(rounds_improve(rounds))
    for arm in sorted(name for name in records if name.startswith(("k1/", "k4/"))):
        draws = int(arm[1])
        if arm.endswith(f"round_{len(rounds) - 1}") and draws < num_latents:
            name = next(iter(figures(last)))        # accuracy, where there is one
            ok, text = better(figures(last)[name], figures(records[arm])[name])
            found.append(Verdict(f"C4 K = {num_latents} beats K = {draws}", ok, f"{name} {text}"))
    if "valid_before" in last:
        shares = [(record["valid_before"], record["valid_after"]) for record in rounds]
        found.append(Verdict("C5 resampling improves the thoughts, for every model", all(a < b for a, b in shares),
                             "share of valid thoughts " + ", ".join(f"{a:.2f} -> {b:.2f}" for a, b in shares)))
    return found


# ---- tables ----------------------------------------------------------------------------------------------------

def model_rows(records: dict[str, dict], labels: dict[str, str]) -> dict[str, dict[str, float]]:
    """The figures of every model, by its label; compute relative to the whole loop."""
    loop, rows = rounds_of(records)[-1]["passes"], {}
    for name, label in labels.items():
        if name in records:
            record, row = records[name], {}
            if "correct" in record:
                row["accuracy"] = mean(record["correct"])
            if any(record["hidden"]):
                row |= {"needs a hidden fact": mean(where_hidden(record)), "hidden facts known": record["known"]}
            if "correct" in record:
                row["without a thought"] = mean(record["correct_direct"])
            rows[label] = row | {"nats per token": per_unit(record["nll"], record["tokens"]),
                                 "bits per byte": per_unit(record["nll"], record["bytes"]) / math.log(2),
                                 "compute": record["passes"] / loop}
    return rows


def models_table(runs: list[dict[str, dict[str, float]]]) -> list[str]:
    """Markdown: the figures of one run, or the means over several (each one's model_rows) and their standard errors."""
    columns = list(next(iter(runs[0].values())))
    lines = [f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label in runs[0]:
        values = np.array([[run[label][column] for column in columns] for run in runs])
        errors = values.std(axis=0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else [None] * len(columns)
        cells = [f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")
                 for value, error in zip(values.mean(axis=0), errors)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def rounds_table(records: dict[str, dict]) -> list[str]:
    """Markdown: thoughts on held-out documents, by round, and the E-step that led to each model.

    The nats of a row are over the documents whose bound is finite for every K, so that they compare.
    """
    rounds = rounds_of(records)
    graded, bounds = "valid_before" in rounds[-1], [name for name in rounds[-1] if name.startswith("nll_by_")]
    rows = [f"| round | nats per token: elbo | {' | '.join(f'K = {name[7:]}' for name in bounds)} | no thought | "
            + "valid thoughts | distance to the posterior | " * graded
            + "documents left out | E-step: ess | unfinished | thought tokens |", "|---" * (7 + len(bounds) + 2 * graded) + "|"]
    for number, record in enumerate(rounds):
        finite = [all(values) for values in zip(*([nll is not None for nll in record[name]] for name in bounds))]
        kept = {name: list(itertools.compress(record[name], finite)) for name in (*bounds, "nll_direct", "tokens")}
        nats = [-record["elbo_per_token"]] + [per_unit(kept[name], kept["tokens"]) for name in (*bounds, "nll_direct")]
        marks = (f"{record['valid_before']:.2f} -> {record['valid_after']:.2f} | "
                 f"{record['distance_before']:.2f} -> {record['distance_after']:.2f} | ") if graded else ""
        step = record.get("e_step")
        drawn = f"{step['ess']:.1f} | {step['unfinished']:.3f} | {step['latent_tokens']:.1f} |" if step else "| | |"
        rows.append(f"| {number or 'warm start'} | {' | '.join(f'{x:.3f}' for x in nats)} | {marks}{finite.count(False)} | {drawn}")
    return rows


def main(folders: list[str]) -> None:
    """Print the table over finished runs; each left its figures in report.json."""
    missing = [folder for folder in folders if not Path(folder, "report.json").exists()]
    if missing or not folders:
        sys.exit(f"error: no report.json in {', '.join(missing) or 'no folder'}; name folders of finished runs of bolt.py")
    runs = [json.loads(Path(folder, "report.json").read_text()) for folder in folders]
    shapes = [{label: list(row) for label, row in run.items()} for run in runs]
    if any(shape != shapes[0] for shape in shapes):
        sys.exit(f"error: the runs have different models or figures; name runs with the corpus, --arms, --rounds and K of {folders[0]}")
    print("\n".join(models_table(runs)))


if __name__ == "__main__":
    main(sys.argv[1:])
