"""Laws of bolt.py: a small run end to end, continued where it was killed; verdicts that follow from the records."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import bolt
from bolt import BoltConfig, Lab, final_answer, main, open_lab, per_document
from data.alchemy.claims import thought_quality
from data.report import per_unit, read_records
from data.run import Ranks
from sample_latents import places_to_infer

TINY = ["--rounds", "1", "--warm_steps", "6", "--train.steps", "3", "--sample.num_latents", "2", "--bound_draws", "4",
        "--checks", "2", "--train.model.width", "16", "--train.model.ffn", "16", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """Where a test does not ask for two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bolt, "two_processes", lambda ranks: False)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    from data.alchemy.prepare import main as prepare
    folder = tmp_path_factory.mktemp("corpus")
    prepare(["--out", str(folder), "--gold", "40", "--raw", "30", "--held_out", "20"])
    return folder


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tiny"
    main(["--data", str(corpus), "--out", str(out), "--arms", ",".join(bolt.ARMS), *TINY])
    return out


def test_every_arm_is_in_the_report(finished):
    """One row for each model, floors, and a verdict for every claim, computed."""
    report = (finished / "report.md").read_text()
    for arm in bolt.ARMS.values():
        assert arm.label in report
    assert "Guessing from the last ingredient" in report and "An ideal reader" in report
    for claim in ("C1", "C2", "C3", "C4 K = 2 beats K = 1", "C5"):
        assert claim in report
    assert not re.search(r"\bnan\b", report)


def test_every_model_leaves_its_records(finished):
    names = {str(path.relative_to(finished)) for path in finished.glob("**/ckpt.pt")}
    assert {"warm/ckpt.pt", "em/round_1/ckpt.pt", "k1/round_1/ckpt.pt", "raw_total/ckpt.pt",
            "warm_long/ckpt.pt"} <= names
    summary = json.loads((finished / "em" / "round_1" / "step_last.json").read_text())["e_step"]
    assert summary["chunks"] == 30 and summary["sampled_tokens"] > 0


def test_baselines_get_the_compute_they_claim(finished):
    """Raw text and the warm start at the FLOPs of the loop spend what the loop spent, up to one step."""
    records, _ = read_records(str(finished))
    loop = records["em/round_1"]["passes"]
    for arm in ("raw_total", "warm_long"):
        assert abs(records[arm]["passes"] / loop - 1) < 0.15


def test_a_run_stopped_at_an_evaluation_continues_to_the_same_report(corpus, finished, tmp_path, monkeypatch):
    """Stopped at the third evaluation, then the same command: figures as in the run that was never stopped."""
    write_whole, calls = bolt.write_whole, []

    def failing(path, text):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_whole(path, text)
    monkeypatch.setattr(bolt, "write_whole", failing)
    argv = ["--data", str(corpus), "--out", str(tmp_path / "killed"), "--arms", ",".join(bolt.ARMS), *TINY]
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    monkeypatch.setattr(bolt, "write_whole", write_whole)
    main(argv)
    for path in finished.glob("**/step_*.json"):
        assert path.read_text() == (tmp_path / "killed" / path.relative_to(finished)).read_text()


def test_a_run_folder_of_other_settings_is_refused(corpus, finished):
    with pytest.raises(ValueError, match="rounds 1 -> 2"):
        main(["--data", str(corpus), "--out", str(finished), *TINY, "--rounds", "2"])


def test_a_prepared_corpus_that_changed_is_refused(corpus, tmp_path):
    folder, out = tmp_path / "corpus", str(tmp_path / "run")
    shutil.copytree(corpus, folder)
    main(["--data", str(folder), "--out", out, "--arms", "warm", *TINY])
    with open(folder / "raw.jsonl", "a") as file:
        file.write(json.dumps({"text": "Mix"}) + "\n")
    with pytest.raises(ValueError, match="data_sha256"):
        main(["--data", str(folder), "--out", out, "--arms", "warm", *TINY])


def test_a_corpus_without_answers_is_measured_in_nats(corpus, tmp_path):
    """Also where a document has nothing to predict: it is left out."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("gold", "raw", "held_out"):
        records = [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text().splitlines()]
        kept = [{key: record[key] for key in ("text", "chunks")} for record in records]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [{"text": ""}, *kept]))
    main(["--data", str(folder), "--out", str(tmp_path / "run"), "--arms", "em,k1,raw_observed", *TINY])
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| model | nats per token | bits per byte | compute |" in report and "nats per document" in report
    assert not re.search(r"[Aa]ccuracy|\bnan\b", report)
    (folder / "raw.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    with pytest.raises(ValueError, match="raw.jsonl has no text to predict"):
        main(["--data", str(folder), "--out", str(tmp_path / "other"), "--arms", "warm", *TINY])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("context, named", [(30, "chunk 1"), (39, "held_out.jsonl:")])
def test_what_would_not_fit_is_said_before_anything_is_trained(corpus, tmp_path, monkeypatch, context, named):
    """An E-step that has no room, and an evaluation that has none: no folder of a model is made."""
    monkeypatch.setattr(bolt, "train", lambda *arguments, **named: pytest.fail("something was trained"))
    with pytest.raises(ValueError, match=f"{named}.*exceeds the context of {context}"):
        main(["--data", str(corpus), "--out", str(tmp_path / "run"), *TINY, "--train.model.context", str(context),
              "--train.row_tokens", "16", "--train.batch_tokens", "16", "--sample.max_latent_tokens", "20"])
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_finished_thought_ends_with_its_report(corpus, tmp_path):
    """Every draw hits the cap: nothing is weighed, all chunks stay plain, and the figures that there are stand."""
    main(["--data", str(corpus), "--out", str(tmp_path / "run"), "--arms", "em", *TINY, "--warm_steps", "1",
          "--sample.max_latent_tokens", "1"])
    figures = json.loads((tmp_path / "run" / "em" / "round_1" / "step_last.json").read_text())["e_step"]
    assert figures["unfinished"] > 0.5 and "| EM, K = 2, round 1 |" in (tmp_path / "run" / "report.md").read_text()


def test_the_embedded_corpus_is_that_of_the_seed_of_the_run(tmp_path):
    """Also where an earlier command made one and then refused to run."""
    argv = ["--out", str(tmp_path / "run"), "--arms", "warm", *TINY]
    with pytest.raises(ValueError, match="exceeds the context"):
        main([*argv, "--train.model.context", "30", "--train.row_tokens", "16", "--train.batch_tokens", "16"])
    first = (tmp_path / "run" / "corpus" / "world.json").read_text()
    main([*argv, "--seed", "1"])
    assert (tmp_path / "run" / "corpus" / "world.json").read_text() != first


def test_one_thought_is_drawn_at_temperature_one():
    """Nothing is weighed, so it comes from the model as it is: whichever setting says K = 1."""
    config = replace(BoltConfig(), sample=bolt.SampleConfig(num_latents=1))
    assert bolt.sample_config(BoltConfig(), 1).temperature == bolt.sample_config(config, 0).temperature == 1.0
    assert bolt.sample_config(BoltConfig(), 4).temperature == BoltConfig().sample.temperature


def test_unknown_arms_are_named(tmp_path):
    with pytest.raises(ValueError, match="--arms emm"):
        main(["--arms", "emm", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.fixture
def lab(corpus) -> Lab:
    return open_lab(replace(BoltConfig(), data=str(corpus), rounds=2), Ranks(0, 1, torch.device("cpu")))


def test_infinite_bounds_are_left_out(lab):
    places = [place for document in lab.corpora["held_out"][:2] for place in places_to_infer(document)]
    assert per_document(places, [1.0, math.inf]) == [1.0, None]
    assert per_unit([4.0, None, 2.0], [2, 5, 1]) == pytest.approx(2.0)


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
    thoughts = [[lab.tokenizer.decode(ids) for ids in one] for one in latents]
    quality = thought_quality(lab.world, places, thoughts, log_joint.softmax(-1).tolist())
    assert quality["distance_after"] == pytest.approx(0.0, abs=1e-5) and quality["distance_before"] > 0.3
    assert quality["valid_after"] > quality["valid_before"]


@pytest.mark.slow
def test_kill_minus_9_takes_the_second_process_along_and_the_same_command_continues(corpus, finished, tmp_path):
    """Killed once the warm start is there; started again, it ends with the figures of a run that was never stopped."""
    out, root = tmp_path / "killed", os.path.dirname(bolt.__file__)
    arms = ",".join(bolt.ARMS)
    command = [sys.executable, "bolt.py", "--data", str(corpus), "--out", str(out), "--arms", arms, *TINY]
    process = subprocess.Popen(command, cwd=root)
    while not (out / "warm" / "ckpt.pt").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    subprocess.run(command, cwd=root, check=True)
    for path in finished.glob("**/step_*.json"):
        assert path.read_text() == (out / path.relative_to(finished)).read_text()


@pytest.mark.slow
def test_the_second_process_gives_the_same_figures(corpus, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(bolt, "two_processes", lambda ranks: True)
    out = tmp_path / "two"
    main(["--data", str(corpus), "--out", str(out), "--arms", ",".join(bolt.ARMS), *TINY])
    for path in finished.glob("**/step_*.json"):
        assert path.read_text() == (out / path.relative_to(finished)).read_text()




@pytest.mark.slow
def test_processes_of_torchrun_give_the_models_of_one(corpus, tmp_path):
    """Two gloo processes share the loop: it ends, evaluations included, with the figures of one to floating point."""
    root, flags = os.path.dirname(bolt.__file__), ["--data", str(corpus), "--arms", "em,raw_total", *TINY]
    main([*flags, "--out", str(tmp_path / "one")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "bolt.py", *flags, "--out", str(tmp_path / "two")]
    subprocess.run(command, cwd=root, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two = (read_records(str(tmp_path / name))[0] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert one[name]["nll_direct"] == pytest.approx(two[name]["nll_direct"], rel=1e-2)
