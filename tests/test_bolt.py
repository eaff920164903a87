"""Laws of bolt.py: a small run end to end, continued where it was killed; verdicts that follow from the records."""
import json
import math
import re
from dataclasses import replace

import pytest
import torch

import bolt
from bolt import (BoltConfig, Lab, better, final_answer, gain, main, nats_per_token, open_lab, per_document,
                  read_records, thought_quality, verdicts)
from data.run import Ranks
from sample_latents import Evidence, places_to_infer

TINY = ["--rounds", "1", "--warm_steps", "6", "--train.steps", "3", "--sample.num_latents", "2", "--bound_draws", "4", "--checks", "2",
        "--train.model.width", "16", "--train.model.ffn", "16", "--processes", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    from data.alchemy.prepare import main as prepare
    folder = tmp_path_factory.mktemp("corpus")
    prepare(["--out", str(folder), "--gold", "40", "--raw", "30", "--held_out", "20"])
    return folder


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tiny"
    main(["--data", str(corpus), "--out", str(out), "--arms", "study", *TINY])
    return out


def test_every_arm_is_in_the_report(finished):
    """One row for each model, floors, and a verdict for every claim, computed."""
    report = (finished / "report.md").read_text()
    for label in ("warm start", *bolt.ARMS.values()):
        assert label in report
    assert "Guessing from the last ingredient" in report and "An ideal reader" in report
    for claim in ("C1", "C2", "C3", "C4 K = 2 beats K = 1", "C5"):
        assert claim in report
    assert not re.search(r"\bnan\b", report)


def test_every_model_leaves_its_records(finished):
    names = {str(path.relative_to(finished)) for path in finished.glob("**/ckpt.pt")}
    assert {"warm/ckpt.pt", "em/round_1/ckpt.pt", "k1/round_1/ckpt.pt", "raw_total/ckpt.pt", "warm_long/ckpt.pt"} <= names
    summary = json.loads((finished / "em" / "round_1" / "step_last.json").read_text())["e_step"]
    assert summary["chunks"] == 30 and summary["sampled_tokens"] > 0


def test_baselines_get_the_compute_they_claim(finished):
    """Raw text and the warm start at the FLOPs of the loop spend what the loop spent, up to one step."""
    records = read_records(replace(BoltConfig(), out=str(finished)))
    loop = records["em/round_1"]["passes"]
    for arm in ("raw_total", "warm_long"):
        assert abs(records[arm]["passes"] / loop - 1) < 0.15


def test_a_run_killed_after_any_stage_continues_to_the_same_report(corpus, finished, tmp_path, monkeypatch):
    """Stopped at the third evaluation, then the same command: figures as in the run that was never stopped."""
    write_whole, calls = bolt.write_whole, []

    def failing(path, text):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_whole(path, text)
    monkeypatch.setattr(bolt, "write_whole", failing)
    argv = ["--data", str(corpus), "--out", str(tmp_path / "killed"), "--arms", "study", *TINY]
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    monkeypatch.setattr(bolt, "write_whole", write_whole)
    main(argv)
    for path in finished.glob("**/step_*.json"):
        assert path.read_text() == (tmp_path / "killed" / path.relative_to(finished)).read_text()


def test_a_run_folder_of_other_settings_is_refused(corpus, finished):
    with pytest.raises(ValueError, match="rounds 1 -> 2"):
        main(["--data", str(corpus), "--out", str(finished), *TINY, "--rounds", "2"])


def test_unknown_arms_are_named(tmp_path):
    with pytest.raises(ValueError, match="--arms emm"):
        main(["--arms", "emm", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.fixture
def lab(corpus) -> Lab:
    return open_lab(replace(BoltConfig(), data=str(corpus), rounds=2), Ranks(0, 1, torch.device("cpu")))


def test_verdicts_follow_from_the_records(lab):
    """Clearly better rounds are shown, a round that falls back is not, and a strong control takes C2 away."""
    def record(right, nll, known=0.0, before=0.2, after=0.5):
        return {"correct": [i < right for i in range(20)], "correct_direct": [False] * 20, "nll": [nll + 0.01 * (i % 3) for i in range(20)],
                "nll_direct": [nll] * 20, "passes": 1.0, "known": known, "valid_before": before, "valid_after": after}

    records = {"warm": record(2, 3.0), "em/round_1": record(10, 2.0), "em/round_2": record(20, 1.0, known=1.0), "raw_total": record(4, 2.5),
               "k1/round_2": record(3, 2.8), "warm_long": record(3, 3.0), "gold_plus_raw": record(3, 3.0)}
    assert all(verdict.shown for verdict in verdicts(lab, records))
    assert [v.claim[:2] for v in verdicts(lab, records)] == ["C1", "C2", "C3", "C4", "C5"]

    def shown(changed):
        return {verdict.claim[:2]: verdict.shown for verdict in verdicts(lab, records | changed)}
    assert not shown({"em/round_1": record(1, 4.0)})["C3"]
    assert not shown({"raw_total": record(20, 0.5)})["C1"]
    assert not shown({"gold_plus_raw": record(20, 1.0)})["C2"]
    assert not shown({"k1/round_2": record(20, 1.0)})["C4"]
    assert not shown({"em/round_1": record(10, 2.0, before=0.5, after=0.4)})["C5"]
    assert verdicts(lab, {"warm": record(2, 3.0)}) == []


def test_a_gain_is_paired_and_needs_three_standard_errors():
    assert gain([2.0, 3.0, None], [1.0, 1.0, 5.0]) == (pytest.approx(1.5), pytest.approx(0.5))
    assert better([True] * 50, [False] * 10 + [True] * 40)[0] and not better([True, False] * 25, [False, True] * 25)[0]


def test_infinite_bounds_are_left_out_and_counted_apart(lab):
    places = [place for document in lab.corpora["held_out"][:2] for place in places_to_infer(document)]
    assert per_document(places, [1.0, math.inf]) == [1.0, None]
    assert nats_per_token(lab, [4.0, None] + [2.0] * 18) == pytest.approx((4 + 36) / (2 * 19))


def test_final_answers():
    assert final_answer(" gold.") == "gold" and final_answer("So 3 + 4 = 7.\n#### 1,800") == "1,800"


def test_thoughts_drawn_from_the_exact_posterior_are_near_it(lab):
    """Weights equal to the posterior give distance zero; a single valid draw counts as valid."""
    places, latents, rows = [], [], []
    for document in lab.corpora["held_out"]:
        ingredients = lab.world.read_prefix(document.record["chunks"][0]["suffix"])
        if len(ingredients) == 3:
            outcome = lab.world.read_suffix(document.record["chunks"][1]["suffix"])
            paths = [[state, outcome] for state in range(10)]
            places.append((document, 1))
            latents.append([lab.tokenizer.encode(lab.world.write_thought(ingredients, path)) for path in paths])
            rows.append([lab.world.log_joint(ingredients, path) for path in paths])
    log_joint = torch.tensor(rows)
    quality = thought_quality(lab, places, Evidence(latents, log_joint, torch.zeros_like(log_joint), {}))
    assert quality["distance_after"] == pytest.approx(0.0, abs=1e-5) and quality["distance_before"] > 0.3
    assert quality["valid_after"] > quality["valid_before"]


@pytest.mark.slow
def test_the_second_process_gives_the_same_figures(corpus, finished, tmp_path):
    out = tmp_path / "two"
    main(["--data", str(corpus), "--out", str(out), "--arms", "study", *TINY, "--processes", "2"])
    for path in finished.glob("**/step_*.json"):
        assert path.read_text() == (out / path.relative_to(finished)).read_text()


