"""Bad input, as people give it, through the commands: exit code 2, one line that names it, no traceback, and nothing is
written."""
import json
import sys

import pytest

import bolt
import sample_latents
import train
from data import bases, report
from data.alchemy.prepare import main as alchemy
from data.gsm8k.prepare import main as gsm8k
from data.run import script
from model import save_checkpoint
from tests.conftest import random_model, tokenizer_for
from tests.test_corpus import BAD

GOOD = {"text": "a b c", "chunks": [{"suffix": "a b", "given": True}, {"suffix": " c", "latent": " b"}]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a corpus in one file, in a folder, a checkpoint, and files that are something else."""
    tokenizer, line = tokenizer_for([" a b c", "a"], "words"), json.dumps(GOOD) + "\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for name in ("good.jsonl", *(f"corpus/{part}.jsonl" for part in ("gold", "raw", "held_out"))):
        (tmp_path / name).write_text(line)
    (tmp_path / "raw.jsonl").write_text('{"text": "a b c"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes(line.encode() + '{"text": "é"}\n'.encode("latin-1"))
    (tmp_path / "utf16.jsonl").write_bytes(line.encode("utf-16"))
    (tmp_path / "half.jsonl").write_text(line + line[:20])
    (tmp_path / "table.csv").write_text("text\na b c\n")
    (tmp_path / "list.json").write_text(json.dumps([GOOD]))
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "no_run").mkdir()
    (tmp_path / "config.json").write_text('{"config": {"step": 3}}')
    save_checkpoint(str(tmp_path / "ckpt.pt"), random_model(tokenizer.vocab_size), tokenizer=tokenizer.state())
    return tmp_path


MAINS = {"train": train.main, "sample": sample_latents.main, "bolt": bolt.main, "report": report.main,
         "bases": bases.main, "alchemy": alchemy, "gsm8k": gsm8k}
SAMPLE, TRAIN = "sample --checkpoint ckpt.pt --data good.jsonl", "train --data good.jsonl --held_out="
COMMANDS = [        # a command, and what its line says
    # what is not there, or is something else
    ("train --data nowhere.jsonl", "no corpus at nowhere.jsonl"), ("train --data corpus", "no corpus at corpus"),
    ("train --data empty.jsonl", "empty.jsonl is empty"),
    ("train --data latin.jsonl", "latin.jsonl:2: the file is not UTF-8"),
    ("train --data utf16.jsonl", "utf16.jsonl:1: the file is not UTF-8"), ("train --data half.jsonl", "half.jsonl:2: "),
    ("train --data table.csv", "table.csv:1: "), ("train --data list.json", "list.json:1: a document is an object"),
    ("train --data good.jsonl --held_out latin.jsonl", "latin.jsonl:2: "),
    ("train --data good.jsonl --held_out nowhere.jsonl", "no corpus at nowhere.jsonl"),
    (f"{TRAIN} --init_from nowhere", "no run, checkpoint or base at nowhere"),
    (f"{TRAIN} --init_from org/name", "hf download org/name"),
    (f"{TRAIN} --init_from half.pt", "half.pt' is not a whole checkpoint"),
    (f"{TRAIN} --init_from no_run", "no_run has no config.json"),
    (f"{TRAIN} --init_from table.csv", "table.csv' is not a whole checkpoint"),
    ("sample --checkpoint nowhere.pt", "no checkpoint at 'nowhere.pt'"),
    ("sample --checkpoint no_run", "no checkpoint at 'no_run/ckpt.pt'"),
    ("sample --checkpoint half.pt", "not a whole checkpoint"),
    ("sample --checkpoint ckpt.pt --data nowhere.jsonl", "no corpus at nowhere.jsonl"),
    ("sample --checkpoint ckpt.pt --data half.jsonl", "half.jsonl:2: "),
    (f"{SAMPLE} --prompt zebra", "--prompt:1: 'zebra' in 'zebra' is not among"),
    ("sample --checkpoint ckpt.pt --out good.jsonl", "good.jsonl is there without its good.jsonl.run"),
    ("bolt --data nowhere", "no corpus at nowhere/gold.jsonl"),
    ("bolt --data no_run", "no corpus at no_run/gold.jsonl"),
    ("bolt --data raw.jsonl", "raw.jsonl has no document with a thought"),
    ("bolt --data good.jsonl", "good.jsonl has no document"), ("bolt --data half.jsonl", "half.jsonl:2: "),
    ("bolt --data corpus --base nowhere", "no run, checkpoint or base at nowhere"),
    ("bolt --evaluate ckpt.pt", "--evaluate needs a file"), ("bolt --evaluate ckpt.pt --data corpus", "needs a file"),
    ("bolt --evaluate nowhere --data good.jsonl", "no run, checkpoint or base at nowhere"),
    ("report nowhere", "no report.json in nowhere"), ("report no_run", "no report.json in no_run"),
    ("bases nowhere out", "no checkpoint at 'nowhere'"), ("bases ckpt.pt out", "vocabulary of nanoBoLT's own"),
    ("bases ckpt.pt corpus", "corpus is there already"),
    ("gsm8k --source nowhere.jsonl --out out", "--source nowhere.jsonl does not exist"),
    ("gsm8k --source good.jsonl --out out", "good.jsonl:1: is not GSM8K"),
    ("gsm8k --source good.jsonl --held_out -2", "--held_out: -2"), ("gsm8k --source g --gold -3", "--gold: -3"),
    ("alchemy --failure nan --out o", "--failure: nan"), ("alchemy --failure 2 --out o", "--failure: 2"),
    ("alchemy --gold -3 --out o", "--gold: -3"), (f"{TRAIN} --seed 99999999999999999999999999", "--seed: 999"),
    (f"{SAMPLE} --num_latents 99999999999999", "--num_latents: 999"),
    (f"{SAMPLE} --round 9999999999999", "--round: 999"),
    ("train --config nowhere.json", "no config file 'nowhere.json'"),
    ("train --config table.csv", "table.csv is no JSON"),
    ("train --config config.json", "sets step, no setting"),
    # numbers that are none, or do not fit
    *[(f"{TRAIN} {flag} {value}", f"{flag}: {value} is not allowed") for flag, value in [
        ("--learning_rate", "nan"), ("--muon_learning_rate", "inf"), ("--weight_decay", "inf"), ("--clip", "nan"),
        ("--learning_rate", "1e99"), ("--steps", "0"), ("--steps", "-3"), ("--clip", "0"), ("--batch_tokens", "0"),
        ("--seed", "-1"), ("--micro_batch_rows", "-1"), ("--chunk_tokens", "-1"), ("--schedule", "linear"),
        ("--layout", "both"), ("--recompute", "perhaps"), ("--keep", "everything")]],
    *[(f"{SAMPLE} {flag} {value}", f"{flag}: {value} is not allowed") for flag, value in [
        ("--temperature", "0"), ("--temperature", "-1"), ("--temperature", "nan"), ("--temperature", "1e-40"),
        ("--num_latents", "0"), ("--max_latent_tokens", "0"), ("--rows", "0"), ("--thoughts", "-1"), ("--show", "-1")]],
    (f"{SAMPLE} --part 3/2", "--part 3/2"), (f"{SAMPLE} --part all", "--part all"),
    (f"{TRAIN} --steps many", "invalid int value: 'many'"), (f"{TRAIN} --steps 1.5", "invalid int value"),
    (f"{TRAIN} --step 3", "--step 3"), (f"{TRAIN} --steps", "expected one argument"),
    (f"{TRAIN} --learning_rate -1", "--learning_rate: -1 is not allowed"),
    (f"{TRAIN} --learning_rate 0", "give a number above 0"), (f"{TRAIN} --learning_rate fast", "'fast'"),
    (f"{TRAIN} --epochs -1", "argument --epochs: -1 is not allowed"),
    (f"{TRAIN} --raw_mix 2", "--raw_mix: 2 is not allowed"),
    (f"{TRAIN} --row_tokens 999 --batch_tokens 999", "--row_tokens 999 exceeds"),
    (f"{TRAIN} --batch_tokens 300", "is no multiple"), (f"{TRAIN} --model.heads 3", "width 64 over 3 heads"),
    (f"{TRAIN} --model.width 0", "--model.width 0"), (f"{TRAIN} --model.kv_heads 3 --model.heads 4", "does not divide"),
    (f"{TRAIN} --device tpu", "--device tpu"), (f"{TRAIN} --encoding gtp2", "--encoding gtp2 is unknown"),
    (f"{TRAIN} --init_from ckpt.pt --model.width 32", "leave --model.* out"),
    (f"{TRAIN} --init_from ckpt.pt --model.context 999", "exceeds that of the weights"),
    (f"{SAMPLE} --max_latent_tokens 60", "leave no room for text in a context of 64"),
    ("bolt --data corpus --rounds 0", "--rounds: 0"), ("bolt --data corpus --arms emm", "--arms emm"),
    ("bolt --data corpus --arms raw_total", "so name em too"),
    ("bolt --data corpus --held_out 1", "--held_out: 1 is not"),
    ("bolt --data corpus --held_out nan", "--held_out: nan"), ("bolt --data corpus --train.seed 1", "set those"),
    ("bolt --data corpus --warm_epochs -1", "argument --warm_epochs: -1 is not allowed"),
    ("bolt --data corpus --sample.max_latent_tokens 255", "leave no room"),
    ("bolt --data corpus --base ckpt.pt --encoding gpt2", "leave --encoding out"),
    ("alchemy --gold x --out out", "invalid int value: 'x'"), ("report", "required: folders")]


def fails(command: list[str], words: str, monkeypatch, capsys, place) -> None:
    def files():        # but what is cached of a good corpus
        return {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and ".tokens" not in str(path)}
    before = files()
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        script(MAINS[command[0]])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out, (out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert before == files()
    assert not any((place / name).exists() for name in ("runs", "out", "data"))


@pytest.mark.parametrize("command, words", COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_bad_command_ends_in_one_line(command, words, place, monkeypatch, capsys):
    fails(command.split(), words, monkeypatch, capsys, place)


@pytest.mark.parametrize("number", range(len(BAD)))
@pytest.mark.parametrize("command", ["train --held_out= --data", "sample --checkpoint ckpt.pt --data"])
def test_a_bad_line_of_a_corpus_ends_in_one_line(number, command, place, monkeypatch, capsys):
    """With the file and the number of the line."""
    line, complaint = BAD[number]
    line = (json.dumps(line) if isinstance(line, dict) else line)
    content = b'{"text": "a b"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    (place / "bad.jsonl").write_bytes(content)
    fails([*command.split(), "bad.jsonl"], "bad.jsonl:3: ", monkeypatch, capsys, place)
