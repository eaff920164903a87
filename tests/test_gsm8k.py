"""Laws of the GSM8K door, on three problems written in its format."""
import codecs
import json
from pathlib import Path

import pytest

from bolt import BoltConfig
from data.gsm8k.prepare import main, write_document
from data.run import parse_config

ROOT = Path(__file__).resolve().parent.parent

PROBLEMS = [
    {"question": "Ann has 48 clips. She sells half, then 5 more. How many did she sell?",
     "answer": "Half of them are 48/2 = <<48/2=24>>24 clips.\nSo she sold 24 + 5 = <<24+5=29>>29 clips.\n#### 29"},
    {"question": "Bob earns $12 an hour. What does he earn in 2 hours?",
     "answer": "He earns 12 x 2 = $<<12*2=24>>24.\n#### 24"},
    {"question": "Cy reads 12 pages. Then twice as many. Then 3 more. How many in all?",
     "answer": "He read 12 x 2 = <<12*2=24>>24 pages then. With the first that is 24 + 12 = 36.\n"
               "In all he read 36 + 3 = 39.\n#### 39"},
]


def test_the_last_sentence_and_the_answer_are_the_suffix_and_the_rest_is_the_thought():
    document = write_document(PROBLEMS[0], thought=True)
    question, solution = document["chunks"]
    assert question == {"suffix": PROBLEMS[0]["question"] + "\n", "given": True}
    assert solution == {"latent": "Half of them are 48/2 = 24 clips.",
                        "suffix": "So she sold 24 + 5 = 29 clips.\n#### 29"}
    assert document["answer"] == "29" and document["text"] == question["suffix"] + solution["suffix"]


def test_a_raw_document_holds_nothing_else_of_the_solution():
    document = write_document(PROBLEMS[2], thought=False)
    assert document["chunks"][1]["latent"] is None
    assert "24" not in document["text"] and "<<" not in document["text"]


def test_a_solution_of_one_sentence_has_an_empty_thought():
    solution = write_document(PROBLEMS[1], thought=True)["chunks"][1]
    assert solution == {"latent": "", "suffix": "He earns 12 x 2 = $24.\n#### 24"}


def test_prepare_writes_disjoint_parts_that_do_not_depend_on_the_order_of_the_file(tmp_path):
    for name, problems in (("one", PROBLEMS), ("two", PROBLEMS[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
        main(["--source", str(tmp_path / f"{name}.jsonl"), "--out", str(tmp_path / name),
              "--gold", "1", "--raw", "1", "--held_out", "1"])
    parts = {part: (tmp_path / "one" / f"{part}.jsonl").read_text() for part in ("gold", "raw", "held_out", "oracle")}
    assert parts == {part: (tmp_path / "two" / f"{part}.jsonl").read_text() for part in parts}
    texts = [json.loads(parts[part])["text"] for part in ("gold", "raw", "held_out")]
    assert len(set(texts)) == 3 and json.loads(parts["oracle"])["text"] == texts[1]


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["--source", "nowhere.jsonl", "--out", str(tmp_path)])
    good = json.dumps(PROBLEMS[0]).encode() + b"\n"
    for line, complaint in (
            (b"{}", "is not GSM8K"), (b"[]", "is not GSM8K"),
            (b'{"question": "a", "answer": "#### 4"}', "is not GSM8K"),
            (b'{"question": "a", "answer": "<<4>>\\n#### 4"}', "is not GSM8K"),
            (b'{"question": "a", "answer": "b #### 4 #### 5"}', "is not GSM8K"), (b'{"question": ', "Expecting value"),
            (b'{"question": "a", "answer": "\\ud835\\n#### 4"}', "half a character"), (b'"\xe9"', "not UTF-8"),
            (b"[" * 100_000, "nested too deeply")):
        (tmp_path / "bad.jsonl").write_bytes(codecs.BOM_UTF8 + good + b"\r\n" + line + b"\n")
        with pytest.raises(ValueError, match=f"bad.jsonl:3: .*{complaint}"):
            main(["--source", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (tmp_path / "few.jsonl").write_text(json.dumps(PROBLEMS[0]) + "\n")
    with pytest.raises(ValueError, match="--raw"):
        main(["--source", str(tmp_path / "few.jsonl"), "--out", str(tmp_path)])


def test_the_settings_beside_the_corpus_are_settings_of_bolt():
    fresh, of_base = (parse_config(BoltConfig(), ["--config", str(ROOT / "data" / "gsm8k" / name)], "")
                      for name in ("bolt.json", "smollm2.json"))
    assert fresh.data == "data/gsm8k" and fresh.train.model.width == 128 and fresh.sample.num_latents == 4
    assert of_base.train.epochs == 2 and of_base.warm_epochs == 4 and of_base.keep_models == "last"
    assert fresh.arm_names[0] == of_base.arm_names[0] == "warm" and "raw_best" in of_base.arm_names
