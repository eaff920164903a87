"""Laws of run.py: one dataclass is flags, help and config.json; errors are one line; files are whole."""
import json
from dataclasses import dataclass
from typing import Literal

import pytest

from data.run import Ranks, open_run, option, parse_config, random_stream, script, write_whole
from data.run import torch as torch_of_run


@dataclass(frozen=True)
class Inner:
    width: int = option(8, "an inner number")


@dataclass(frozen=True)
class Config:
    """An example."""
    steps: int = option(10, "a number")
    rate: float = option(0.5, "a share, 100% at most")
    kind: Literal["a", "b"] = option("a", "a choice")
    on: bool = option(False, "a switch")
    inner: Inner = option(Inner(), "nested")


ALONE = Ranks(0, 1, torch_of_run.device("cpu"))


def test_flags_override_the_file_which_overrides_defaults(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"config": {"steps": 3, "inner": {"width": 5}}}))
    config = parse_config(Config(), ["--config", str(file), "--steps", "4", "--on", "true"], "")
    assert config == Config(steps=4, on=True, inner=Inner(width=5))
    assert parse_config(Config(), ["--inner.width=9", "--rate", "1"], "") == Config(rate=1.0, inner=Inner(9))


@pytest.mark.parametrize("argv, named", [(["--steps", "x"], "--steps x"), (["--kind", "c"], "--kind c"), (["--on", "7"], "--on 7")])
def test_a_bad_value_is_named(argv, named):
    with pytest.raises(ValueError, match=named):
        parse_config(Config(), argv, "")


def test_an_unknown_flag_or_key_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        parse_config(Config(), ["--step", "3"], "")
    assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    file = tmp_path / "config.json"
    file.write_text('{"config": {"stepz": 3}}')
    with pytest.raises(ValueError, match="stepz"):
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
    assert "What it does." in text and "a share, 100% at most [0.5]" in text and "--inner.width" in text and "a|b" in text


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


def test_random_streams_depend_on_every_label_and_nothing_else():
    draws = {labels: random_stream(0, "x", *labels).random() for labels in [(), (1,), (0, 1), (0, 0, 1), (0, 0, 0, 1)]}
    assert len(set(draws.values())) == 5
    assert random_stream(0, "x", 1).random() == draws[(1,)] != random_stream(1, "x", 1).random() != random_stream(1, "y", 1).random()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
