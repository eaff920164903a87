"""Laws of report.py and claims.py: verdicts follow from the records, differences are paired, the best of a baseline
counts."""
import json
import re
import sys
from pathlib import Path

import pytest

from data.alchemy.claims import better, gain, verdicts
from data.report import curves_of, main, model_rows, per_unit, plot, read_records, rounds_table


def test_verdicts_follow_from_the_records():
    """Clearly better rounds are shown, a round that falls back is not, and a strong control takes C2 away."""
    def record(right, nll, known=0.0, before=0.2, after=0.5):
        return {"correct": [i < right for i in range(20)], "correct_direct": [False] * 20,
                "nll": [nll + 0.01 * (i % 3) for i in range(20)], "nll_direct": [nll] * 20, "hidden": [1] * 20,
                "passes": 1.0, "known": known, "valid_before": before, "valid_after": after}

    records = {"warm": record(2, 3.0), "em/round_1": record(10, 2.0), "em/round_2": record(20, 1.0, known=1.0),
               "raw_total": record(4, 2.5), "k1/round_2": record(3, 2.8), "warm_long": record(3, 3.0),
               "gold_plus_raw": record(3, 3.0)}
    assert all(verdict.shown for verdict in verdicts(records, 16))
    assert [v.claim[:2] for v in verdicts(records, 16)] == ["C1", "C2", "C3", "C4", "C5"]

    def shown(changed):
        return {verdict.claim[:2]: verdict.shown for verdict in verdicts(records | changed, 16)}
    assert not shown({"em/round_1": record(1, 4.0)})["C3"]
    assert not shown({"raw_total": record(20, 0.5)})["C1"]
    assert not shown({"gold_plus_raw": record(20, 1.0)})["C2"]
    assert not shown({"k1/round_2": record(20, 1.0)})["C4"]
    assert not shown({"em/round_1": record(10, 2.0, before=0.5, after=0.4)})["C5"]
    assert verdicts({"warm": record(2, 3.0)}, 16) == []


def test_a_corpus_without_answers_is_judged_by_nats():
    """No claim is lost for want of an accuracy that no one asked for."""
    def record(nll, by):
        nll = [nll + 0.01 * (i % 3) for i in range(20)]
        return {"nll": nll, "nll_direct": nll, "nll_by_4": nll, "tokens": [2] * 20, "bytes": [5] * 20,
                "hidden": [None] * 20, "passes": 1.0, "elbo_per_token": -by}
    records = {"warm": record(3.0, 4), "em/round_1": record(1.0, 2), "k1/round_1": record(2.0, 3),
               "raw_total": record(2.5, 3)}
    assert [(v.claim[:2], v.shown) for v in verdicts(records, 16)] == [("C1", True), ("C3", True), ("C4", True)]
    assert not any(v.shown for v in verdicts(records | {"em/round_1": record(3.5, 4)}, 16))
    row = model_rows(records, {"warm": "warm start"})["warm start"]
    assert list(row) == ["nats per token", "bits per byte", "compute"]
    assert rounds_table(records)[-1].startswith("| 1 | 2.000 | 0.505 | 0.505 |")
    short = {"nll_by_4": [None, 3.0] + [1.0] * 18, "nll_by_16": [9.0, None] + [0.8] * 18,
             "nll_direct": [5.0, 5.0] + [2.0] * 18}
    row = rounds_table({name: record | short for name, record in records.items()})[-1]
    assert row.startswith("| 1 | 2.000 | 0.500 | 0.400 | 1.000 | 2 |")        # on the 18 documents that every bound has


def test_a_gain_is_paired_and_needs_three_standard_errors():
    assert gain([2.0, 3.0, None], [1.0, 1.0, 5.0]) == (pytest.approx(1.5), pytest.approx(0.5))
    assert better([True] * 50, [False] * 10 + [True] * 40)[0] and not better([True, False] * 25, [False, True] * 25)[0]


def test_a_round_that_answers_like_the_one_before_is_not_worse():
    assert better([True, False], [True, False], -1)[0] and not better([True, False], [True, False])[0]


def test_nats_per_token_leave_out_what_is_not_finite():
    assert per_unit([4.0, None, 2.0], [2, 5, 1]) == pytest.approx(2.0)


def test_of_a_baseline_on_its_way_the_best_figure_of_each_kind_counts(tmp_path):
    folder = tmp_path / "warm_long"
    folder.mkdir()
    for name, right, nll in (("step_5", [True, True], 3.0), ("step_last", [True, False], 1.0)):
        figures = {"passes": 10.0 * (name == "step_last") + 5, "known": nll / 10, "correct": right,
                   "correct_direct": right, "nll": [nll, None], "nll_direct": [nll, nll]}
        (folder / f"{name}.json").write_text(json.dumps(figures))
    best, on_the_way = read_records(str(tmp_path))
    best = best["warm_long"]
    assert [record["passes"] for record in on_the_way["warm_long"]] == [5.0, 15.0]
    assert best["correct"] == [True, True] and best["nll"] == [1.0, None]
    assert best["known"] == 0.3 and best["passes"] == 15.0


def report_of(folder, accuracies):
    """A finished run with some models and a curve of the loop."""
    curve = [{"accuracy": accuracy, "compute": number} for number, accuracy in enumerate(accuracies.values())]
    folder.mkdir()
    models = {label: {"accuracy": accuracy} for label, accuracy in accuracies.items()}
    (folder / "report.json").write_text(json.dumps({"models": models, "curves": {"EM": curve, "raw": curve[:1]}}))
    return str(folder)


def test_the_table_over_runs_has_means_and_standard_errors(tmp_path, capsys):
    folders = [report_of(tmp_path / name, {"warm start on gold": accuracy})
               for name, accuracy in (("a", 0.2), ("b", 0.4))]
    main(folders)
    assert "| warm start on gold | 0.300 ± 0.100 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="different models"):
        main([folders[0], report_of(tmp_path / "c", {"warm start on gold": 0.5, "EM": 0.5})])
    with pytest.raises(ValueError, match="no report.json"):
        main([str(tmp_path / "d")])


def test_the_figure_is_small_and_needs_matplotlib(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folders = [report_of(tmp_path / name, {"warm start on gold": x, "EM, round 1": 2 * x})
               for name, x in (("a", 0.2), ("b", 0.4))]
    for count in (1, 2):
        plot(folders[:count], str(tmp_path / "figure.svg"))
        assert 1000 < (tmp_path / "figure.svg").stat().st_size < 200_000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot(folders, str(tmp_path / "other.svg"))


def test_curves_are_the_rounds_of_a_loop_and_the_checks_of_a_baseline():
    def record(passes, right):
        return {"passes": passes, "correct": [right], "correct_direct": [right], "hidden": [None], "nll": [1.0],
                "tokens": [1], "bytes": [1]}
    on_the_way = {"warm": [record(1, False)], "em/round_1": [record(2, False)], "em/round_2": [record(4, True)],
                  "raw_total": [record(2, False), record(4, False)]}
    curves = curves_of(on_the_way, {"warm": "warm start", "em": "EM", "k4": "EM, K = 4", "raw_total": "raw"})
    assert {label: [point["compute"] for point in points] for label, points in curves.items()} == {
        "warm start": [0.25], "EM": [0.25, 0.5, 1.0], "raw": [0.5, 1.0]}


def test_the_learning_curve_of_the_readme_is_drawn(tmp_path, monkeypatch):
    """From metrics.jsonl as train.py writes it."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    readme = Path(__file__).resolve().parent.parent / "README.md"
    code = re.findall(r"```python\n(import json.*?)```", readme.read_text(), re.DOTALL)[0]
    (tmp_path / "runs" / "train").mkdir(parents=True)
    rows = [{"kind": kind, "tokens": 10 * n, "nll_text": 1 / n} for n in (1, 2) for kind in ("train", "held-out")]
    (tmp_path / "runs" / "train" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    drawn = {}
    monkeypatch.setattr(pyplot, "plot", lambda x, y: drawn.update(zip(x, y)))
    exec(code, {})
    assert drawn == {10: 1.0, 20: 0.5}
