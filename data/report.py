"""What people read: a chunk with its thoughts, and the tables and the figure of runs of bolt.py.

    python -m data.report runs/seed0 runs/seed1 runs/seed2                       the table: mean ± standard error
    python -m data.report runs/seed0 runs/seed1 runs/seed2 --plot figure.svg     and the figure (needs matplotlib)

A record is the evaluation of one model, see `evaluate` in bolt.py; its `passes` are what making the model took, in
forward passes of a token.
"""
import argparse
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np

from data.run import OneLineParser, read_json, script, whole_file


# ---- a chunk ---------------------------------------------------------------------------------------------------

def show_chunk(layout, place, annotation: dict) -> str:
    """A chunk as a person wants to see it: what comes before, its text, its thoughts with weights as bars, ess."""
    (document, c), decode = place, layout.tokenizer.decode
    thoughts = [(draw["latent"], finished) for draw, finished in zip(annotation["draws"], annotation["finished"])]
    weights, times = Counter(), Counter(thoughts)       # of equal thoughts together
    for thought, draw in zip(thoughts, annotation["draws"]):
        weights[thought] += draw["weight"]
    lines = [f"document {document.index}, chunk {c}", f"  prefix   {decode(layout.context(document, c)[1:])!r}",
             f"  text     {decode(document.chunks[c].suffix)!r}"]
    for (thought, finished), weight in weights.most_common():
        mark = "kept" if finished and thought == annotation["latent"] else "" if finished else "unfinished"
        bar, count = "█" * round(20 * weight), times[thought, finished]
        lines.append(f"  {bar:20s} {weight:.2f} {count:3d} x {mark:10s} {thought!r}")
    if annotation["bound"] is not None:
        lines.append(f"  ess {annotation['ess']:.1f} of {len(thoughts)}, bound {annotation['bound']:.2f} nats")
    return "\n".join(lines)


# ---- records ---------------------------------------------------------------------------------------------------

def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def per_unit(nll: list, units: list[int]) -> float:
    """Nats per token, or per byte, over the documents whose nll is finite."""
    pairs = [(value, unit) for value, unit in zip(nll, units, strict=True) if value is not None]
    return sum(value for value, _ in pairs) / (sum(unit for _, unit in pairs) or math.nan)


def where_hidden(record: dict) -> list[bool]:
    """Right or wrong on the documents that need a hidden fact."""
    return [right for right, hidden in zip(record["correct"], record["hidden"]) if hidden]


def read_records(out: str) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Of each model of a run folder its evaluation, {"em/round_1": ...}, and all of them in their order.

    Where a model was evaluated several times, the former has its best in each figure.
    """
    on_the_way: dict[str, list[dict]] = {}
    for path in Path(out).glob("**/step_*.json"):
        if path.with_name("step_last.json").exists():       # else it has not ended
            on_the_way.setdefault(str(path.parent.relative_to(out)), []).append(read_json(path))
    best = {}
    for name, records in on_the_way.items():
        records.sort(key=lambda record: record["passes"])
        best[name] = dict(records[-1])
        for figure in {"correct", "correct_direct", "known"} & best[name].keys():
            best[name][figure] = max((record[figure] for record in records), key=lambda x: np.mean(x))
        for figure in ("nll", "nll_direct"):
            best[name][figure] = min((record[figure] for record in records),
                                     key=lambda nll: (nll.count(None), mean(x for x in nll if x is not None)))
    return best, on_the_way


def rounds_of(records: dict[str, dict], arm: str = "em") -> list[dict]:
    """Warm start, round 1, round 2, ..."""
    names = sorted((name for name in records if name.startswith(f"{arm}/")), key=lambda name: int(name.split("_")[-1]))
    return [records[name] for name in ["warm", *names]]


# ---- tables ----------------------------------------------------------------------------------------------------

def row_of(record: dict, loop: float) -> dict[str, float | None]:
    """The figures of a model, None where there is none, as of a bound without a finished draw; compute relative to the
    `loop`'s passes."""
    row = {"accuracy": mean(record["correct"])} if "correct" in record else {}
    if any(record["hidden"]):
        row |= {"needs a hidden fact": mean(where_hidden(record)), "hidden facts known": record["known"]}
    row |= {"without a thought": mean(record["correct_direct"])} if "correct" in record else {}
    token, byte = (per_unit(record["nll"], record[unit]) for unit in ("tokens", "bytes"))
    row |= {"nats per token": token, "bits per byte": byte / math.log(2), "compute": record["passes"] / loop}
    return {name: None if math.isnan(figure) else figure for name, figure in row.items()}


def model_rows(records: dict[str, dict], labels: dict[str, str]) -> dict[str, dict[str, float]]:
    """The figures of every model, by its label."""
    loop = rounds_of(records)[-1]["passes"]
    return {label: row_of(records[name], loop) for name, label in labels.items() if name in records}


def models_table(runs: list[dict[str, dict[str, float]]]) -> list[str]:
    """Markdown: the figures of one run, or the means over several (each one's model_rows) and their standard errors."""
    columns = list(next(iter(runs[0].values())))
    lines = [f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label in runs[0]:
        values = np.array([[run[label][column] for column in columns] for run in runs], float)      # None: nan
        errors = values.std(axis=0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else [None] * len(columns)
        cells = [f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")
                 for value, error in zip(values.mean(axis=0), errors)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def two_places(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def rounds_table(records: dict[str, dict]) -> list[str]:
    """Markdown: thoughts on held-out documents, by round, and the E-step that led to each model.

    The nats of a row are over the documents whose bound is finite for every K, so that they compare.
    """
    rounds = rounds_of(records)
    graded, bounds = "valid_before" in rounds[-1], [name for name in rounds[-1] if name.startswith("nll_by_")]
    rows = [f"| round | nats per token: elbo | {' | '.join(f'K = {name[7:]}' for name in bounds)} | no thought | "
            + "valid thoughts | distance to the posterior | " * graded
            + "documents left out | E-step: ess | unfinished | thought tokens |",
            "|---" * (7 + len(bounds) + 2 * graded) + "|"]
    for number, record in enumerate(rounds):
        finite = [None not in values for values in zip(*(record[name] for name in bounds))]
        kept = {name: list(itertools.compress(record[name], finite)) for name in (*bounds, "nll_direct", "tokens")}
        elbo = math.nan if record["elbo_per_token"] is None else -record["elbo_per_token"]
        nats = [elbo, *(per_unit(kept[name], kept["tokens"]) for name in (*bounds, "nll_direct"))]
        cells = [str(number or "warm start"), *(f"{x:.3f}" for x in nats)]
        if graded:
            cells += [f"{record[f'{name}_before']:.2f} -> {record[f'{name}_after']:.2f}"
                      for name in ("valid", "distance")]
        step = [record.get("e_step", {}).get(name) for name in ("ess", "unfinished", "latent_tokens")]
        rows.append(f"| {' | '.join([*cells, str(finite.count(False)), *map(two_places, step)])} |")
    return rows


def gain(ours: list, theirs: list) -> tuple[float, float]:
    """Mean and standard error of ours - theirs, document by document, where both are there; nan where too few are."""
    less = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True) if None not in (a, b)]
    return mean(less), float(np.std(less, ddof=1) / len(less) ** 0.5) if len(less) > 1 else math.nan


def paired_table(records: dict[str, dict], labels: dict[str, str]) -> list[str]:
    """Markdown: nats of a held-out document and answers of every model, each less those of the last round of EM."""
    titles = {"nll_direct": "nats a document without a thought", "nll": "bound",
              "correct_direct": "right without a thought", "correct": "right"}
    last = rounds_of(records)[-1]
    figures = [name for name in titles if name in last]
    lines = [f"| model | {' | '.join(f'{titles[name]} | less EM' for name in figures)} | ess | unfinished |",
             "|---" * (2 * len(figures) + 3) + "|"]
    for record, label in [(records[name], label) for name, label in labels.items() if name in records]:
        cells = [label]
        for name in figures:
            less, error = gain(record[name], last[name])
            cells += [f"{mean(x for x in record[name] if x is not None):.2f}", f"{less:+.2f} ± {error:.2f}"]
        drawn = [record.get("drawn", {}).get(name) for name in ("ess", "unfinished")]
        lines.append(f"| {' | '.join([*cells, *map(two_places, drawn)])} |")
    return lines


# ---- figure ----------------------------------------------------------------------------------------------------

def curves_of(on_the_way: dict[str, list[dict]], labels: dict[str, str]) -> dict[str, list[dict[str, float]]]:
    """The figures of every arm as it goes on, by its label: of the rounds of a loop, of the checks of a baseline."""
    last = {name: records[-1] for name, records in on_the_way.items()}
    loop, curves = rounds_of(last)[-1]["passes"], {}
    for arm, label in labels.items():
        records = on_the_way.get(arm) or rounds_of(last, arm)
        if arm in on_the_way or len(records) > 1:
            alike = [record for record in records if "correct" in record or record.keys() == records[-1].keys()]
            curves[label] = [row_of(record, loop) for record in alike]      # nats of a bound or without, not of both
    return curves


def read_reports(folders: list[str]) -> list[dict]:
    """What finished runs left. Raises ValueError where one did not, or they do not compare."""
    missing = [folder for folder in folders if not Path(folder, "report.json").exists()]
    if missing or not folders:
        raise ValueError(f"no report.json in {', '.join(missing) or 'no folder'}; name finished runs of bolt.py")
    reports = [read_json(Path(folder, "report.json")) for folder in folders]
    if not all(isinstance(report, dict) and "curves" in report for report in reports):
        raise ValueError("a report.json is of an older version, or none; run bolt.py again, with another --out")
    if any([*report["models"]] != [*reports[0]["models"]] for report in reports):
        raise ValueError(f"the runs have different models; name some with the --arms, --rounds and K of {folders[0]}")
    return reports


def plot(folders: list[str], path: str) -> None:
    """Draw accuracy, where hidden facts are needed, against compute: means over runs, bands of a standard error.

    Raises ImportError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a figure needs matplotlib: pip install matplotlib") from None
    runs = [report["curves"] for report in read_reports(folders)]
    known = next(iter(runs[0].values()))[0]
    wanted = next(name for name in ("needs a hidden fact", "accuracy", "nats per token") if name in known)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, label in enumerate(runs[0]):
        points = np.array([[[p["compute"], p[wanted]] for p in run[label]] for run in runs], float)  # (run, point, 2)
        (x, y), error = points.mean(axis=0).T, points[:, :, 1].std(axis=0, ddof=len(runs) > 1) / len(runs) ** 0.5
        loop = label.startswith("EM")
        axes.plot(x, y, label=label, marker="os^vDPX*<>"[number % 10], linewidth=2.5 if label == "EM" else 1,
                  linestyle="-" if loop else ":", color=f"C{number}")
        axes.fill_between(x, y - error, y + error, alpha=0.2, color=f"C{number}", linewidth=0)
    axes.set_xlabel("compute, relative to the whole loop (E-steps counted)")
    axes.set_ylabel({"needs a hidden fact": "accuracy where a hidden fact is needed"}.get(wanted, wanted))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small", frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or "svg")


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="run folders of bolt.py")
    parser.add_argument("--plot", default="", help="draw the figure into this file, .svg or .png")
    args = parser.parse_args(argv)
    print("\n".join(models_table([report["models"] for report in read_reports(args.folders)])))
    if args.plot:
        plot(args.folders, args.plot)


if __name__ == "__main__":
    script(main)
