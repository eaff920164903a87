"""Laws of run.py: one dataclass is flags, help and config.json; errors are one line; files are whole."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

import bolt
import sample_latents
import train
from data import run
from data.report import read_reports
from data.run import (Log, Ranks, as_began, choose_dtype, folder_beside, hold, open_run, option, parse_config,
                      random_stream, script, write_whole)
from tests.conftest import full_disk


@dataclass(frozen=True)
class Inner:
    width: int = option(8, "an inner number", above=0)


@dataclass(frozen=True)
class Config:
    """An example."""
    steps: int = option(10, "a number", above=0)
    rate: float = option(0.5, "a share, 100% at most")
    kind: Literal["a", "b"] = option("a", "a choice")
    on: bool = option(False, "a switch")
    inner: Inner = option(Inner(), "nested")


ALONE = Ranks(0, 1, torch.device("cpu"))


def test_flags_override_the_file_which_overrides_defaults(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"config": {"steps": 3, "inner": {"width": 5}}}))
    config = parse_config(Config(), ["--config", str(file), "--steps", "4", "--on", "true"], "")
    assert config == Config(steps=4, on=True, inner=Inner(width=5))
    assert parse_config(Config(), ["--inner.width=9", "--rate", "1"], "") == Config(rate=1.0, inner=Inner(9))
    assert parse_config(Config(), ["--on", "--steps", "4"], "") == Config(steps=4, on=True)      # a switch alone


@pytest.mark.parametrize("flag, value", [
    ("--steps", "x"), ("--steps", "1.5"), ("--steps", "0"), ("--kind", "c"), ("--on", "7"), ("--rate", "nan"),
    ("--rate", "inf"), ("--inner.width", "-1")])
def test_a_bad_value_is_named_wherever_it_comes_from(tmp_path, flag, value):
    """From the command line and from a file: flag and value in one line."""
    with pytest.raises(ValueError, match=f"{flag}: .*{value}"):
        parse_config(Config(), [flag, value], "")
    nested = {"inner": {"width": value}} if "." in flag else {flag[2:]: value}
    (tmp_path / "config.json").write_text(json.dumps({"config": nested}))
    with pytest.raises(ValueError, match=f"{flag}: .*{value}"):
        parse_config(Config(), ["--config", str(tmp_path / "config.json")], "")


def test_an_unknown_flag_or_key_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--step 3"):
        parse_config(Config(), ["--step", "3"], "")
    file = tmp_path / "config.json"
    file.write_text('{"config": {"stepz": 3}}')
    with pytest.raises(ValueError, match="config.json sets stepz, no setting"):
        parse_config(Config(), ["--config", str(file)], "")
    file.write_text("[]")
    with pytest.raises(ValueError, match="config"):
        parse_config(Config(), ["--config", str(file)], "")
    with pytest.raises(FileNotFoundError):
        parse_config(Config(), ["--config", "nowhere.json"], "")


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config(), ["--help"], "What it does.")
    text = capsys.readouterr().out
    assert "What it does." in text and "a share, 100% at most [0.5]" in text
    assert "--inner.width" in text and "a|b" in text


def test_a_users_error_is_one_line_without_traceback(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x"])

    def fail(argv):
        raise ValueError("--steps 0 is not allowed")
    with pytest.raises(SystemExit) as error:
        script(fail)
    assert error.value.code == 2 and capsys.readouterr().err == "error: --steps 0 is not allowed\n"


def test_a_run_folder_belongs_to_one_configuration(tmp_path):
    folder = tmp_path / "run"
    open_run(folder, Config(), ALONE)
    open_run(folder, Config(), ALONE)
    with pytest.raises(ValueError, match="steps 10 -> 11.*--out"):
        open_run(folder, Config(steps=11), ALONE)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["inner"] == {"width": 8} and "command" in saved and "commit" in saved


def test_a_run_folder_is_of_one_process_until_that_ends(tmp_path):
    """However it ends: what it leaves blocks nobody."""
    root, folder = os.path.dirname(os.path.dirname(run.__file__)), str(tmp_path / "run")
    holding = f"import time; from data.run import hold; hold({folder!r}); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holding], cwd=root, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="run is in use by another process.*--out"):
        open_run(folder, Config(), ALONE)
    process.kill()
    process.wait()
    open_run(folder, Config(), ALONE)
    hold(folder)        # a process that has it goes on


def test_jobs_that_share_a_run_keep_out_who_wants_it_whole(tmp_path):
    root, folder = os.path.dirname(os.path.dirname(run.__file__)), str(tmp_path / "run")
    holding = f"from data.run import hold; hold({folder!r}, shared=True); print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", holding], cwd=root, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="in use by another process"):
        open_run(folder, Config(), ALONE)
    open_run(folder, Config(), ALONE, part="part_2_of_2")
    process.communicate(b"\n")


def test_files_of_a_run_that_are_no_json_are_named(tmp_path):
    open_run(tmp_path / "run", Config(), ALONE)
    for name, read in (("config.json", lambda: open_run(tmp_path / "run", Config(), ALONE)),
                       ("metrics.jsonl", lambda: Log(tmp_path / "run", 9, ALONE, print)),
                       ("report.json", lambda: read_reports([str(tmp_path / "run")]))):
        for content in ("{", "[" * 100_000):
            (tmp_path / "run" / name).write_text(content + "\n")
            with pytest.raises(ValueError, match=f"run/{name} is no JSON"):
                read()
    (tmp_path / "report.json").write_text("5")
    with pytest.raises(ValueError, match="older version, or none"):
        read_reports([str(tmp_path)])


def test_what_has_no_room_in_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x"])
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")):
        def fail(argv):
            raise error
        with pytest.raises(SystemExit) as end:
            script(fail)
        assert end.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory (")
    with pytest.raises(RuntimeError, match="other"):
        script(lambda argv: (_ for _ in ()).throw(RuntimeError("other")))


def test_a_run_goes_on_where_it_was_moved_to_and_without_what_a_kill_left(tmp_path):
    @dataclass(frozen=True)
    class Moved(Config):
        out: str = option("", "a folder", how=True)
    open_run(tmp_path / "here", Moved(out="here"), ALONE, data_sha256="1")
    (tmp_path / "here" / "deep").mkdir()
    (tmp_path / "here" / "deep" / "ckpt.pt.123.tmp").write_text("half")
    (tmp_path / "here" / "mine.tmp").write_text("a user's")
    run.HELD.clear()        # the process ends
    shutil.move(tmp_path / "here", tmp_path / "there")
    open_run(tmp_path / "there", Moved(out="there"), ALONE, data_sha256="1")
    assert [path.name for path in (tmp_path / "there").rglob("*.tmp")] == ["mine.tmp"]
    with pytest.raises(ValueError, match="data_sha256"):
        open_run(tmp_path / "there", Moved(out="there"), ALONE, data_sha256="2")


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path):
    """The old file stays; the error says which file there was no room for."""
    write_whole(tmp_path / "file", "old")
    with full_disk(100):
        with pytest.raises(OSError, match=r"could not write .*file \(File too large\); make room"):
            write_whole(tmp_path / "file", "x" * 1000)
        with pytest.raises(OSError, match=r"could not write .*metrics.jsonl"):
            Log(tmp_path, 0, ALONE, lambda row: None).add("train", 1, 1, {"long": "x" * 1000})
    assert (tmp_path / "file").read_text() == "old" and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("main", [train.main, sample_latents.main, bolt.main])
def test_an_out_without_a_name_is_refused(main, tmp_path):
    """As of an empty variable of a shell; of a single file, also a folder."""
    with pytest.raises(ValueError, match="--out is empty"):
        main(["--out", ""])
    for out in ("", f"{tmp_path}/new/"):
        with pytest.raises(ValueError, match="names no file"):
            folder_beside(out)


ROOT = os.path.dirname(os.path.dirname(run.__file__))


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.1, 0.2, 0.4, 0.8])
def test_an_early_interrupt_ends_a_run(tmp_path, wait):
    """Also while packages are imported: numpy's import would lose it."""
    process = subprocess.Popen([sys.executable, "train.py", "--out", str(tmp_path / "run")], cwd=ROOT,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0


@pytest.mark.parametrize("doing", ["time.sleep(60)", pytest.param(
    "late = type('Late', (), {'__del__': lambda self, sleep=time.sleep: sleep(60)})()",
    marks=pytest.mark.skipif(sys.platform != "linux", reason="only there the kernel ends a process with its parent"))])
def test_a_process_ends_with_the_one_that_started_it(doing):
    """At work, and while Python, at its own end, runs no threads any more."""
    child = f"import time; from data.run import end_with_parent; end_with_parent(); print('up', flush=True); {doing}"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    time.sleep(0.5)         # until the child is at it
    process.kill()
    begin = time.time()
    assert process.stdout.read() == "" and time.time() - begin < 20     # which ends when the child has closed it


def test_a_reader_that_has_had_enough_is_no_error():
    """`| head`: the end comes quietly."""
    talk = "import sys; sys.path.insert(0, '.'); from data.run import script; " \
           "script(lambda argv: [print(n) for n in range(10 ** 5)])"
    process = subprocess.Popen([sys.executable, "-c", talk], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_a_setting_that_is_auto_is_as_the_run_began(tmp_path):
    """Also on another machine; what is given counts."""
    assert as_began(str(tmp_path), "sample.dtype", "auto") == as_began("", "sample.dtype", "auto") == "auto"
    (tmp_path / "config.json").write_text(json.dumps({"config": {"sample": {"dtype": "bfloat16"}}}))
    assert as_began(str(tmp_path), "sample.dtype", "auto") == "bfloat16"
    assert as_began(str(tmp_path), "sample.dtype", "float32") == "float32"


def test_bfloat16_is_chosen_where_the_hardware_has_it_and_it_pays(monkeypatch):
    """One rule of hardware and width; a setting overrides it."""
    for amx, avx, width, wanted, expected in (
            (True, True, 256, "auto", "bfloat16"), (False, True, 256, "auto", "bfloat16"),
            (True, True, 64, "auto", "float32"), (False, False, 256, "auto", "float32"),
            (True, True, 256, "float32", "float32"), (False, False, 64, "bfloat16", "bfloat16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
        assert choose_dtype(wanted, width, torch.device("cpu")) == expected
    monkeypatch.undo()
    assert {torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()} <= {True, False}


def test_random_streams_depend_on_every_label_and_nothing_else():
    draws = {labels: random_stream(0, "x", *labels).random() for labels in [(), (1,), (0, 1), (0, 0, 1), (0, 0, 0, 1)]}
    assert len(set(draws.values())) == 5
    one = random_stream(0, "x", 1).random()
    assert one == draws[(1,)] != random_stream(1, "x", 1).random() != random_stream(1, "y", 1).random()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
