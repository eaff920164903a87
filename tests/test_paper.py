"""The paper's experiment in small: pages as FineMath has them, a teacher, a base, EM and its report, by the commands of
data/paper.md."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("datasets", "openai", "safetensors", "tokenizers"):
    pytest.importorskip(package, reason="pip install datasets openai safetensors tokenizers")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as parquet  # noqa: E402

from data.corpus import read_corpus  # noqa: E402
from tests.test_bases import make_base  # noqa: E402
from tests.test_teacher import Server  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--warm_steps 60 --train.steps 8 --train.row_tokens 256 --train.batch_tokens 512 --train.model.context 256 "
         "--train.learning_rate 0.01 --sample.num_latents 2 --sample.max_latent_tokens 24 --sample.temperature 1 "
         "--bound_draws 8 --checks 1")


def page(i: int) -> dict:
    """A row as FineMath-4+ has it: a page on mathematics, and what was found out about it."""
    text = (f"# Question {i}\n\nA train goes {i + 40} km an hour. How far is it after {i % 7 + 2} hours? I tried to "
            f"add them, e.g. {i + 40} + {i % 7 + 2}.\n\n## Answer\n\nMultiply: $d = v t$.\n\n"
            f"So $d = {i + 40} \\cdot {i % 7 + 2} = {(i + 40) * (i % 7 + 2)}$ km.\r\n\n"
            + "Note that units agree. " * (i % 5))
    return {"url": f"https://example.org/{i}", "fetch_time": 1_500_000_000 + i, "content_mime_type": "text/html",
            "warc_filename": "a.warc.gz", "warc_record_offset": i, "warc_record_length": len(text), "text": text,
            "token_count": len(text) // 4, "char_count": len(text), "metadata": '{"found_math": true}', "score": 4.1,
            "int_score": 4, "crawl": "CC-MAIN-2020-01", "snapshot_type": "latest", "language": "en",
            "language_score": 0.9}


def command(*words) -> str:
    """Run a script of ours; what it printed."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_from_pages_to_a_report(tmp_path):
    """prepare.py, teacher.py, bolt.py --base: each command as in data/paper.md, on 60 pages."""
    parquet.write_table(pa.Table.from_pylist([page(i) for i in range(60)]), tmp_path / "pages.parquet")
    base, corpus = make_base(tmp_path / "base"), tmp_path / "corpus"
    server = Server(thought=lambda passage: f"it has {len(passage)}")
    for out, skip, limit in (("held_out", 0, 6), ("warm", 6, 14), ("raw", 20, 40)):
        command("data/finemath/prepare.py", "--source", tmp_path / "pages.parquet", "--out", corpus / f"{out}.jsonl",
                "--skip", skip, "--limit", limit)
    said = command("data/teacher.py", "--data", corpus / "warm.jsonl", "--out", corpus / "gold.jsonl", "--model", "m",
                   "--base_url", server.url, "--chunk_words", 48)
    assert "0 answers rejected" in said
    gold = read_corpus(str(corpus / "gold.jsonl"))
    assert len(gold) == 14 and all(chunk["latent"].startswith("it has") for d in gold for chunk in d["chunks"])
    command("bolt.py", "--data", corpus, "--base", base, "--restart", "warm", "--rounds", 2, "--out", tmp_path / "run",
            "--arms", "em,gold_plus_raw,raw_observed,raw_total", "--device", "cpu", *SMALL.split())
    models = json.loads((tmp_path / "run/report.json").read_text())["models"]
    assert len(models) == 6 and models["warm start on gold"]["nats per token"] > 0
    assert models["EM, K = 2, round 2"]["nats per token"] > 0
    thoughts = [chunk for document in read_corpus(str(tmp_path / "run/em/round_2/latents.jsonl"))
                for chunk in document["chunks"]]
    assert len(thoughts) >= 40 and all(len(chunk["log_joint"]) == 2 for chunk in thoughts)
