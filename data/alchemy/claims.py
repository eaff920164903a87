"""What grades a run on the embedded corpus: thoughts against the exact posterior, floors, and the claims of the paper.

A record is the evaluation of one model, see `evaluate` in bolt.py: lists have an entry per held-out document, such as
`correct` (only in corpora with answers), `hidden` (facts a document needs that no gold thought states) and `nll`.
The claims are decided by rules that know no figures, also for other corpora, as far as those have the figures.
"""
from dataclasses import dataclass

from data.alchemy.world import World
from data.report import gain, mean, rounds_of, where_hidden


# ---- what a model knows ----------------------------------------------------------------------------------------

def facts_known(probes, right: list[bool]) -> float:
    """The share of hidden facts of which most probes, documents that need just one, come out right."""
    of_fact: dict[tuple, list[bool]] = {}
    for probe, correct in zip(probes, right, strict=True):
        of_fact.setdefault(tuple(probe.record["fact"]), []).append(correct)
    return mean(sum(marks) > len(marks) / 2 for marks in of_fact.values())


def thought_quality(world: World, places, thoughts: list[list[str]], weights: list[list[float]]) -> dict:
    """Against the exact posterior: the share of valid thoughts among the draws (N x K, as text) and after resampling by
    the weights (N x K), and the mean total variation distance to the posterior of the draws and of the weighed ones."""
    marks = []
    for (document, c), texts, after in zip(places, thoughts, weights, strict=True):
        prefix, suffix = document.record["chunks"][0]["suffix"], document.record["chunks"][c]["suffix"]
        alike = [1 / len(texts)] * len(texts)
        marks.append([*world.grade(prefix, suffix, texts, alike), *world.grade(prefix, suffix, texts, after)])
    names = ("valid_before", "distance_before", "valid_after", "distance_after")
    return {name: mean(column) for name, column in zip(names, zip(*marks))}


def floors(world: World, corpora: dict[str, list], tokens: int) -> str:
    """What can be had without learning, and what cannot be beaten; `tokens`: those of held-out text."""
    gold, raw, held_out = ([document.record for document in corpora[part]] for part in ("gold", "raw", "held_out"))

    def last_ingredient(record: dict) -> str:
        return record["chunks"][0]["suffix"].split(";")[0].split()[-1]
    answers: dict[str, list[str]] = {}
    for record in gold + raw:
        answers.setdefault(last_ingredient(record), []).append(record["answer"])
    guesses = {word: max(sorted(set(given)), key=given.count) for word, given in answers.items()}
    right = [(guesses.get(last_ingredient(record)) == record["answer"], record["hidden"]) for record in held_out]
    log_p = [world.log_evidence_of(*(chunk["suffix"] for chunk in record["chunks"])) for record in held_out]
    return (f"Guessing from the last ingredient gives accuracy {mean(ok for ok, _ in right):.3f}, where a hidden fact "
            f"is needed {mean(ok for ok, hidden in right if hidden):.3f}. An ideal reader who knows the table needs "
            f"{-sum(log_p) / tokens:.3f} nats per observed token.")


# ---- claims ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Verdict:
    claim: str
    shown: bool
    why: str


def better(ours: list, theirs: list, errors: float = 3.0) -> tuple[bool, str]:
    """Whether ours exceeds theirs by more than so many standard errors of the paired difference, and the figures.

    With negative `errors`: whether ours is at most so many standard errors worse.
    """
    difference, error = gain(ours, theirs)
    enough = difference > errors * error if errors > 0 else difference >= errors * error
    return enough, f"{difference:+.3f} ± {error:.3f}"


def figures(record: dict) -> dict[str, list]:
    """What models are compared in, document by document: the more the better."""
    accuracy = {"accuracy": record["correct"]} if "correct" in record else {}
    return accuracy | {"nats per document": [None if nll is None else -nll for nll in record["nll"]]}


def beats(claim: str, pairs: list[tuple[dict, dict, float]], names=("accuracy", "nats per document")) -> Verdict:
    """Whether of each pair of records the first is better than the second by so many errors, in all figures."""
    found = {name: [better(figures(ours)[name], figures(other)[name], errors) for ours, other, errors in pairs]
             for name in names if name in figures(pairs[0][0])}
    return Verdict(claim, all(ok for results in found.values() for ok, _ in results),
                   "; ".join(f"{name} {', '.join(text for _, text in results)}" for name, results in found.items()))


def verdicts(records: dict[str, dict], num_latents: int) -> list[Verdict]:
    """What the run shows; a claim whose arms did not run is left out.

    A figure beats another where the mean of the paired differences over held-out documents exceeds three of its
    standard errors. A round may not be worse than the one before by more than one standard error.
    """
    rounds = rounds_of(records)
    if len(rounds) == 1:
        return []
    first, last, found = rounds[0], rounds[-1], []
    raws = [records[name] for name in ("raw_observed", "raw_m_step", "raw_best", "raw_total") if name in records]
    if raws:
        found.append(beats("C1 latents beat raw text at every budget", [(last, raw, 3.0) for raw in raws]))
    if any(last["hidden"]):
        controls = [records[name] for name in ("warm", "warm_long", "gold_plus_raw") if name in records]
        hidden = [better(where_hidden(last), where_hidden(control)) for control in controls]
        found.append(Verdict("C2 EM learns what no gold thought states", all(ok for ok, _ in hidden),
                             f"accuracy where a hidden fact is needed {', '.join(text for _, text in hidden)}; hidden "
                             f"facts known {last['known']:.2f} against "
                             f"{max(control['known'] for control in controls):.2f}"))
    steps = [(after, before, -1.0) for before, after in zip(rounds, rounds[1:])]
    found.append(beats("C3 rounds improve: the last beats the first; then none is clearly worse than the one before",
                       [(last, first, 3.0), *steps]))
    for draws in (1, 4):
        other, name = records.get(f"k{draws}/round_{len(rounds) - 1}"), next(iter(figures(last)))
        if other and draws < num_latents:
            found.append(beats(f"C4 K = {num_latents} beats K = {draws}", [(last, other, 3.0)], [name]))
    if "valid_before" in last:
        shares = [(record["valid_before"], record["valid_after"]) for record in rounds]
        found.append(Verdict("C5 resampling improves the thoughts, for every model", all(a < b for a, b in shares),
                             "share of valid thoughts " + ", ".join(f"{a:.2f} -> {b:.2f}" for a, b in shares)))
    if fixed := records.get(f"fixed/round_{len(rounds) - 1}"):
        found.append(beats("C6 fresh slices beat the first one at the same tokens", [(last, fixed, 3.0)]))
    return found
