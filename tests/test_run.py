"""Laws of run.py: one dataclass is flags, help and config.json; errors are one line; files are whole."""
import json
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from data.run import (Ranks, choose_dtype, choose_once, open_run, option, parse_config, random_stream, script,
                      write_whole)


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


def test_how_a_run_computes_is_chosen_once(tmp_path):
    """On another machine it goes on as it began."""
    assert choose_once(tmp_path, {"dtype": "bfloat16"}, ALONE) == {"dtype": "bfloat16"}
    assert choose_once(tmp_path, {"dtype": "float32"}, ALONE) == {"dtype": "bfloat16"}


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
