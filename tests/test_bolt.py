"""Laws of bolt.py: a small run end to end, continued where it was killed; verdicts that follow from the records."""
import ast
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bolt
import sample_latents
import train
from bolt import BoltConfig, Lab, main, open_lab
from data.alchemy.claims import thought_quality
from data.corpus import read_corpus
from data.evaluate import answers_right, final_answer, per_document
from data.plan import Plan
from data.report import per_unit, read_records
from data.run import Ranks
from sample_latents import places_to_infer

TINY = ["--rounds", "1", "--warm_steps", "6", "--train.steps", "3", "--sample.num_latents", "2", "--bound_draws", "4",
        "--checks", "2", "--train.model.width", "16", "--train.model.ffn", "16", "--device", "cpu"]
WHOLE = [name for name, arm in bolt.ARMS.items() if not arm.is_fixed]      # arms of a raw corpus in one piece


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
    main(["--data", str(corpus), "--out", str(out), "--arms", ",".join(WHOLE), *TINY])
    return out


def test_a_stage_says_what_is_left(tmp_path, monkeypatch):
    """By the guess until a model is done, then by the speed so far."""
    plan = Plan(str(tmp_path), {"warm": 1.0, "em/round_1": 3.0})
    plan.guess, begin = 80.0, plan.started
    monkeypatch.setattr("time.time", lambda: begin + 10)
    assert plan.stage() == "[1/2, 70 s left] "
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm/step_last.json").touch()
    assert plan.stage() == "[2/2, 30 s left] "
    monkeypatch.setattr("time.time", lambda: begin + 600)
    assert plan.stage() == "[2/2, 30 min left] "


def test_every_arm_is_in_the_report(finished):
    """One row for each model, floors, and a verdict for every claim, computed."""
    report = (finished / "report.md").read_text()
    for name in WHOLE:
        assert bolt.ARMS[name].label in report
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
    argv = ["--data", str(corpus), "--out", str(tmp_path / "killed"), "--arms", ",".join(WHOLE), *TINY]
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    monkeypatch.setattr(bolt, "write_whole", write_whole)
    main(argv)
    for path in finished.glob("**/step_*.json"):
        assert path.read_text() == (tmp_path / "killed" / path.relative_to(finished)).read_text()


def test_a_run_folder_of_other_settings_is_refused(corpus, finished):
    with pytest.raises(ValueError, match="warm_steps 6 -> 7"):
        main(["--data", str(corpus), "--out", str(finished), *TINY, "--warm_steps", "7"])


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


SMALL = ["--train.row_tokens", "16", "--train.batch_tokens", "16"]


def test_a_context_without_room_is_said_before_anything_is_trained(corpus, tmp_path, monkeypatch):
    """No folder of a model is made."""
    monkeypatch.setattr(bolt, "train", lambda *arguments, **named: pytest.fail("something was trained"))
    with pytest.raises(ValueError, match="thoughts of 20 tokens leave no room.*context of 25"):
        main(["--data", str(corpus), "--out", str(tmp_path / "run"), *TINY, *SMALL, "--train.model.context", "25",
              "--sample.max_latent_tokens", "20"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("context", [27, 30, 36, 40])
def test_what_has_no_room_is_left_out_and_the_run_ends(corpus, tmp_path, context, capsys):
    """Chunks lose C, the longest stay plain, in sampling, scoring and evaluation; how many is said."""
    main(["--data", str(corpus), "--out", str(tmp_path / "run"), *TINY, *SMALL, "--arms", "em,raw_observed",
          "--train.model.context", str(context), "--sample.max_latent_tokens", "20"])
    figures = json.loads((tmp_path / "run" / "em" / "round_1" / "step_last.json").read_text())["e_step"]
    assert (figures["cut_context"] > 0) == (context < 40) and figures["chunks"] == 30
    assert ("fewer chunks before them" in capsys.readouterr().out) == (context < 40)


def test_a_long_answer_takes_nothing_from_the_others(corpus, tmp_path, monkeypatch):
    """Every document's answer is asked for after the same text, whatever documents there are beside it."""
    lab = open_lab(BoltConfig(data=str(corpus), out=str(tmp_path), device="cpu"), Ranks(0, 1, torch.device("cpu")))
    documents, asked = lab.held_out.documents[:4], []
    chunk = documents[0].chunks[-1]
    long = replace(documents[0], chunks=[*documents[0].chunks[:-1], replace(chunk, suffix=chunk.suffix * 90)])

    def complete(model, layout, prompts, *others):
        asked.extend(map(tuple, prompts))
        return [[] for _ in prompts]
    monkeypatch.setattr("data.evaluate.complete", complete)
    answers_right(lab.held_out, None, documents, "raw")
    alone, asked[:] = set(asked), []
    assert len(answers_right(lab.held_out, None, [*documents, long], "raw")) == 5
    assert len(asked) == 5 and alone <= set(asked)


def test_what_a_user_has_in_the_folder_of_a_run_stays(corpus, tmp_path):
    """Files beside the corpus that is written, and the one that it is made from."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "notes.txt").write_text("mine")
    mine = shutil.copy(corpus / "gold.jsonl", tmp_path / "corpus" / "mine.jsonl")
    with pytest.raises(ValueError, match="lies where its parts are written"):
        main(["--data", str(mine), "--out", str(tmp_path), "--arms", "warm", *TINY])
    one = shutil.copy(corpus / "gold.jsonl", tmp_path / "one.jsonl")
    with pytest.raises(ValueError):         # it has no document to be raw
        main(["--data", str(one), "--out", str(tmp_path), "--arms", "warm", *TINY])
    assert (tmp_path / "corpus" / "notes.txt").read_text() == "mine" and Path(mine).exists()


def test_more_rounds_go_on_from_the_last(corpus, tmp_path):
    """The rounds that are there stay; what is trained as long as the loop is trained on; the report has all."""
    argv = ["--data", str(corpus), "--out", str(tmp_path / "run"), "--arms", "em,k1,raw_total,gold_plus_raw", *TINY]
    main(argv)
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "em").rglob("*") if path.is_file()}
    main([*argv, "--rounds", "3"])
    assert before == {path: path.read_bytes() for path in before}
    main([*argv[:3], str(tmp_path / "at_once"), *argv[4:], "--rounds", "3"])
    for name in ("em/round_3", "k1/round_3"):
        one, two = ((tmp_path / run / name / "step_last.json").read_text() for run in ("run", "at_once"))
        assert one == two
    records, on_the_way = read_records(str(tmp_path / "run"))
    assert abs(records["raw_total"]["passes"] / records["em/round_3"]["passes"] - 1) < 0.15
    steps = [record["step"] for record in on_the_way["gold_plus_raw"]]
    assert steps[-1] == 9 and sum(2 < step < 9 for step in steps) == 1      # of 3 steps stays what is before the fall
    main([*argv, "--rounds", "4", "--arms", "em"])
    assert "raw text, FLOPs" not in (tmp_path / "run" / "report.md").read_text()        # that was of 3
    main([*argv, "--rounds", "4"])
    assert records["gold_plus_raw"]["step"] == 9 and "| EM, K = 2, round 3 |" in (
        tmp_path / "run" / "report.md").read_text()
    with pytest.raises(ValueError, match="rounds 4 -> 1"):
        main(argv)


def test_more_rounds_are_refused_before_anything_is_dropped_where_the_learning_rate_fell_all_along(corpus, tmp_path):
    """And settings that only say how a run is done, or that the loop sets itself, refuse nothing."""
    argv = ["--data", str(corpus), "--out", str(tmp_path / "run"), "--arms", "em,raw_total,gold_plus_raw", *TINY,
            "--train.schedule", "cosine"]
    main(argv)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="more --rounds would train gold_plus_raw, raw_total longer"):
        main([*argv, "--rounds", "2"])
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    main([*argv, "--keep_models", "last", "--train.log_every", "3", "--train.recompute"])


def test_the_commands_that_a_report_ends_with_run_as_they_stand(corpus, tmp_path, monkeypatch, capsys):
    """Three, whatever folders are called and however long the held-out text is."""
    data, scripts = tmp_path / "my corpus", {"bolt.py": main, "sample_latents.py": sample_latents.main}
    shutil.copytree(corpus, data, ignore=shutil.ignore_patterns("world.json", "probes.jsonl"))
    long = [{"text": f"Mix {'ash, tin and lead; ' * 30}", "chunks": None}]
    held_out = (data / "held_out.jsonl").read_text()
    (data / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in long) + held_out)
    for more, last in (["--rounds", "1"], "--rounds 3"), (["--raw_slices", "2"], "held_out.jsonl'"):
        argv = ["--data", str(data), "--out", str(tmp_path / f"run {last[:3]}"), "--arms", "em", *TINY[2:], *more]
        monkeypatch.setattr(sys, "argv", ["bolt.py", *argv])
        main(argv)
        report = (tmp_path / f"run {last[:3]}" / "report.md").read_text()
        commands = [line.strip() for line in report.split("Next:")[1].splitlines() if line.strip()]
        assert len(commands) == 3 and commands[2].endswith(last)
        for command in commands:
            python, script, *words = shlex.split(command)
            capsys.readouterr()
            scripts[script](words)
            assert python == "python" and capsys.readouterr().out, command


def test_raw_text_without_anything_to_think_about_is_refused(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    shutil.copy(corpus / "gold.jsonl", tmp_path / "data" / "raw.jsonl")
    argv = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--arms", "em", *TINY]
    with pytest.raises(ValueError, match="raw.jsonl has no chunk to think about.*--sample.redraw"):
        main(argv)
    main([*argv, "--sample.redraw"])


def test_more_rounds_go_on_where_each_starts_from_the_one_before(corpus, tmp_path):
    """There the baselines of one model's length grow too."""
    argv = ["--data", str(corpus), "--out", str(tmp_path / "run"), "--arms", "em,raw_m_step,raw_observed", *TINY,
            "--restart", "previous"]
    main(argv)
    before = read_records(str(tmp_path / "run"))[0]
    main([*argv, "--rounds", "2"])
    after = read_records(str(tmp_path / "run"))[0]
    assert all(after[name]["step"] > before[name]["step"] for name in ("raw_m_step", "raw_observed"))


SLICED = [*TINY, "--arms", "em,fixed", "--raw_slices", "3", "--train.steps", "4", "--train.log_every", "1",
          "--train.checkpoint_every", "1"]


def test_each_round_labels_a_fresh_slice_and_trains_on_all_so_far(corpus, tmp_path, monkeypatch):
    """Thoughts about a slice are those of the round that labelled it; the fixed arm labels the first again and again,
    and trains as long. As many rounds as slices."""
    trained, fit = {}, bolt.fit
    monkeypatch.setattr(bolt, "fit", lambda lab, documents, config, folder, *more: trained.update(
        {os.path.relpath(folder, lab.config.out): documents}) or fit(lab, documents, config, folder, *more))
    main(["--data", str(corpus), "--out", str(tmp_path / "run"), *SLICED])
    raw, records = read_corpus(str(corpus / "raw.jsonl")), read_records(str(tmp_path / "run"))[0]
    for t in (1, 2, 3):
        grown, same = ([d.record for d in trained[f"{name}/round_{t}"]] for name in ("em", "fixed"))
        assert [record["text"] for record in grown] == [record["text"] for record in raw[:10 * t]]
        assert [record["text"] for record in same] == [record["text"] for record in raw[:10]]
        assert grown[10 * (t - 1):] == read_corpus(str(tmp_path / f"run/em/round_{t}/latents.jsonl"))
        assert records[f"em/round_{t}"]["step"] == records[f"fixed/round_{t}"]["step"]
    assert "| EM on the first slice alone, round 3 |" in (tmp_path / "run" / "report.md").read_text()


def test_the_learning_rate_rises_once_and_falls_for_each_rounds_model_alone(corpus, tmp_path, monkeypatch):
    """A round goes on with weights and optimizers from before the fall: the step counts on, at the peak. What went
    before the fall is trained once, and counted once."""
    main(["--data", str(corpus), "--out", str(tmp_path / "run"), *SLICED])
    rate, records, stable = 3e-3, read_records(str(tmp_path / "run"))[0], 3         # of 6 steps, of which half fall
    tokens = 0
    for name in ("warm", "em/round_1", "em/round_2", "em/round_3"):
        lines = (tmp_path / "run" / name / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
        rates = [row["learning_rate"] for row in rows]
        if name == "warm":
            tokens = 3 * rows[-1]["tokens"]
        else:
            assert rows[0]["step"] == stable + 1 and len(rows) == 4
            assert rates == pytest.approx([rate, rate, rate, rate / 2])
            e_step, before = records[name]["e_step"], rows[0]["tokens"] - first_tokens(tmp_path / "run", name)
            tokens += 3 * (rows[-1]["tokens"] - before)
            tokens += sum(e_step[f"{kind}_tokens"] for kind in ("prefilled", "sampled", "scored"))
            stable += 2
        assert records[name]["passes"] == tokens


def first_tokens(run, name) -> int:
    """Tokens of the first step of an M-step that goes on."""
    rows = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
    number = int(name.split("_")[1])
    before = run / (f"em/round_{number - 1}" if number > 1 else "warm") / "metrics.jsonl"
    kept = [row for row in map(json.loads, before.read_text().splitlines()) if row["step"] < rows[0]["step"]]
    return rows[0]["tokens"] - kept[-1]["tokens"]


def test_a_run_on_slices_that_was_stopped_ends_with_the_same_bytes(corpus, tmp_path, monkeypatch):
    argv = ["--data", str(corpus), *SLICED]
    main([*argv, "--out", str(tmp_path / "whole")])
    calls, save = itertools.count(), train.save

    def fails(*arguments):
        if next(calls) in (8, 14):
            raise OSError("no more room")
        save(*arguments)
    monkeypatch.setattr(train, "save", fails)
    for _ in range(2):
        with pytest.raises(OSError):
            main([*argv, "--out", str(tmp_path / "again")])
    main([*argv, "--out", str(tmp_path / "again")])
    for path in (tmp_path / "whole").glob("**/ckpt.pt"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "whole")).read_bytes(), path
    assert ((tmp_path / "whole/report.json").read_text() == (tmp_path / "again/report.json").read_text())
    left = {str(path.parent.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").glob("**/stable.pt")}
    assert left == {"warm"}         # for arms to come; no round follows that of the last slice


@pytest.mark.parametrize("flags, message", [
    (["--raw_slices", "31"], "--raw_slices 31 is more than the 30 documents"),
    (["--arms", "em,fixed"], "--arms fixed labels the first of several slices"),
    (["--restart", "stable", "--train.schedule", "cosine"], "cosine falls all along"),
    (["--raw_slices", "2", "--train.schedule", "cosine"], "cosine falls all along")])
def test_slices_that_cannot_be_are_refused_before_anything_is_trained(corpus, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main(["--data", str(corpus), "--out", str(tmp_path / "run"), *TINY, *flags])
    assert not list(tmp_path.glob("run/**/*.pt")) and not (tmp_path / "run/slices").exists()


def test_slices_with_epochs(corpus, tmp_path):
    """Epochs are passes over all slices so far; the fixed arm makes as many over its one, and so trains as long."""
    main(["--data", str(corpus), "--out", str(tmp_path / "run"), *SLICED, "--train.epochs", "2",
          "--restart", "previous"])
    records = read_records(str(tmp_path / "run"))[0]
    steps = [[records[f"{name}/round_{t}"]["step"] for t in (1, 2, 3)] for name in ("em", "fixed")]
    assert steps[0][0] < steps[0][1] < steps[0][2] and all(abs(a - b) <= 2 for a, b in zip(*steps))


def test_one_file_is_split_into_gold_raw_and_held_out(corpus, tmp_path, capsys):
    """By the seed: documents with thoughts are gold, those without raw; nothing is lost and nothing is in two parts."""
    lines = [(corpus / f"{name}.jsonl").read_text().splitlines() for name in ("gold", "raw")]
    mixed = [line for pair in zip(*lines) for line in pair]
    (tmp_path / "mine.jsonl").write_text("\n".join(mixed))
    argv = ["--data", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "run"), "--arms", "em", *TINY]
    main(argv)
    assert "27 gold, 27 raw, 6 held_out documents" in capsys.readouterr().out
    parts = {name: (tmp_path / "run" / "corpus" / f"{name}.jsonl").read_text().splitlines()
             for name in ("gold", "raw", "held_out")}
    assert sorted(sum(parts.values(), [])) == sorted(mixed) and set(parts["gold"]) <= set(lines[0])
    with pytest.raises(ValueError, match="mine.jsonl has no document with a thought"):
        (tmp_path / "mine.jsonl").write_text("\n".join(lines[1]))
        main([*argv[:3], str(tmp_path / "other"), *argv[4:]])
    assert not (tmp_path / "other").exists()


def test_documents_of_text_alone_run_to_the_report(tmp_path, capsys):
    """Whole documents with a thought, others without; a byte order mark, CRLF; some answers, some too long to fit."""
    lines = [{"text": f"Moss gives {x}. Iron gives {y}. " * (40 if x == y == 3 else 2)}
             for x in range(6) for y in range(6)]
    lines += [line | {"latent": f"Thought {n % 3}.", "answer": "3"} for n, line in enumerate(lines)]
    (tmp_path / "mine.jsonl").write_bytes("\ufeff".encode() + "\r\n".join(map(json.dumps, lines)).encode())
    main(["--data", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "run"), *TINY, *SMALL, "--held_out", "0.3",
          "--arms", "em,raw_total,gold_plus_raw", "--train.model.context", "40", "--sample.max_latent_tokens", "12"])
    said = capsys.readouterr().out
    assert "25 gold, 25 raw, " in said and "--prompt" in said and "accuracy" not in said
    main(["--evaluate", str(tmp_path / "run" / "warm"), "--data", str(tmp_path / "mine.jsonl"), "--device", "cpu",
          "--sample.max_latent_tokens", "12", "--bound_draws", "2"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["documents"] == 71 and "accuracy" not in figures and figures["too_long"] == 1
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if "latent" in line))
    main(["--evaluate", str(tmp_path / "run" / "warm"), "--data", str(tmp_path / "told.jsonl"), "--device", "cpu",
          "--sample.max_latent_tokens", "12", "--bound_draws", "2"])
    told = json.loads(capsys.readouterr().out)
    assert told["nll_given"] == pytest.approx(figures["nll_given"], rel=1e-5)      # whatever else the file has


def test_a_model_is_evaluated_alone(corpus, finished, tmp_path, capsys):
    """On any file, with figures that are those of the run on its held-out documents; thoughts that are there count."""
    flags = ["--bound_draws", "4", "--sample.num_latents", "2", "--device", "cpu"]
    for name in ("held_out", "gold"):
        main(["--evaluate", str(finished / "em" / "round_1"), "--data", str(corpus / f"{name}.jsonl"), *flags])
        figures = json.loads(capsys.readouterr().out)
        assert ("nll_given" in figures) == (name == "gold")
        if name == "held_out":
            record = read_records(str(finished))[0]["em/round_1"]
            assert figures["nll_bound"] == per_unit(record["nll"], record["tokens"])
            assert figures["nll_no_thought"] == per_unit(record["nll_direct"], record["tokens"])
            assert figures["documents"] == 20 and figures["nll_text"] > 0 and "accuracy" in figures
    main(["--evaluate", str(finished / "warm"), "--data", str(corpus / "held_out.jsonl"), *flags,
          "--sample.max_latent_tokens", "1"])
    assert "NaN" not in capsys.readouterr().out         # also where no draw finished
    with pytest.raises(ValueError, match="--evaluate needs a file"):
        main(["--evaluate", str(finished / "em" / "round_1"), "--data", str(corpus), *flags])


def test_a_run_without_a_finished_thought_ends_with_its_report(corpus, tmp_path):
    """Every draw hits the cap: nothing is weighed, all chunks stay plain, and the figures that there are stand."""
    main(["--data", str(corpus), "--out", str(tmp_path / "run"), "--arms", "em", *TINY, "--warm_steps", "1",
          "--sample.max_latent_tokens", "1"])
    figures = json.loads((tmp_path / "run" / "em" / "round_1" / "step_last.json").read_text())["e_step"]
    assert figures["unfinished"] > 0.5 and "| EM, K = 2, round 1 |" in (tmp_path / "run" / "report.md").read_text()
    for path in (tmp_path / "run").glob("**/*.json"):
        assert "NaN" not in path.read_text(), path      # which is no JSON


def test_the_embedded_corpus_is_that_of_the_seed_of_the_run(tmp_path):
    """Also where an earlier command made one and then refused to run."""
    argv = ["--out", str(tmp_path / "run"), "--arms", "warm", *TINY]
    with pytest.raises(ValueError, match="leave no room"):
        main([*argv, *SMALL, "--train.model.context", "30"])
    first = (tmp_path / "run" / "corpus" / "world.json").read_text()
    main([*argv, "--seed", "1"])
    assert (tmp_path / "run" / "corpus" / "world.json").read_text() != first


def test_one_thought_is_drawn_at_temperature_one():
    """Nothing is weighed, so it comes from the model as it is: whichever setting says K = 1."""
    config = replace(BoltConfig(), sample=bolt.SampleConfig(num_latents=1))
    assert bolt.sample_config(BoltConfig(), 1).temperature == bolt.sample_config(config, 0).temperature == 1.0
    assert bolt.sample_config(BoltConfig(), 4).temperature == BoltConfig().sample.temperature


def test_the_python_of_the_readme_thinks_and_weighs(finished, capsys):
    """Three lines from a run folder."""
    blocks = re.findall(r"```python\n(.*?)```", (Path(bolt.__file__).parent / "README.md").read_text(), re.DOTALL)
    assert all(len(block.splitlines()) <= 4 for block in blocks) and len(blocks) == 2
    exec(blocks[0].replace("runs/bolt/em/round_5", str(finished / "em" / "round_1")), {})
    said = capsys.readouterr().out.splitlines()
    (thought, answer), = ast.literal_eval(said[0])
    weighed, bound = ast.literal_eval(said[1].replace("-inf", "-1e999"))
    assert len(weighed) == 16 and bound < 0 and isinstance(thought + answer, str)


def test_unknown_arms_are_named(tmp_path):
    with pytest.raises(ValueError, match="--arms emm"):
        main(["--arms", "emm", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.fixture
def lab(corpus) -> Lab:
    return open_lab(replace(BoltConfig(), data=str(corpus), rounds=2), Ranks(0, 1, torch.device("cpu")))


def test_infinite_bounds_are_left_out(lab):
    places = [place for document in lab.corpora["held_out"][:2] for place in places_to_infer(lab.layout, document)]
    assert per_document(places, [1.0, math.inf]) == [1.0, None]
    assert per_unit([4.0, None, 2.0], [2, 5, 1]) == pytest.approx(2.0)


def test_final_answers():
    assert final_answer(" gold.") == "gold" and final_answer("So 3 + 4 = 7.\n#### 1,800") == "1,800"


def test_thoughts_drawn_from_the_exact_posterior_are_near_it(lab):
    """Weights equal to the posterior give distance zero; a single valid draw counts as valid."""
    places, latents, rows, world = [], [], [], lab.held_out.world
    for document in lab.corpora["held_out"]:
        ingredients = world.read_prefix(document.record["chunks"][0]["suffix"])
        if len(ingredients) == 3:
            outcome = world.read_suffix(document.record["chunks"][1]["suffix"])
            paths = [[state, outcome] for state in range(10)]
            places.append((document, 1))
            latents.append([lab.tokenizer.encode(world.write_thought(ingredients, path)) for path in paths])
            rows.append([world.log_joint(ingredients, path) for path in paths])
    log_joint = torch.tensor(rows)
    thoughts = [[lab.tokenizer.decode(ids) for ids in one] for one in latents]
    quality = thought_quality(world, places, thoughts, log_joint.softmax(-1).tolist())
    assert quality["distance_after"] == pytest.approx(0.0, abs=1e-5) and quality["distance_before"] > 0.3
    assert quality["valid_after"] > quality["valid_before"]


@pytest.mark.slow
def test_kill_minus_9_takes_the_second_process_along_and_the_same_command_continues(corpus, finished, tmp_path):
    """Killed once the warm start is there; started again, it ends with the figures of a run that was never stopped."""
    out, root = tmp_path / "killed", os.path.dirname(bolt.__file__)
    arms = ",".join(WHOLE)
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
    main(["--data", str(corpus), "--out", str(out), "--arms", ",".join(WHOLE), *TINY])
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
