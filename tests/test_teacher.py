"""data/teacher.py against a local server that does what servers do: answers, refuses, stalls, breaks off, babbles."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

pytest.importorskip("openai", reason="pip install openai")

from data import teacher
from data.corpus import read_corpus
from data.teacher import main, thought_of, why_rejected
from tests.conftest import full_disk

THOUGHT = "because of what was known"


class Server(ThreadingHTTPServer):
    """Answers a passage with a thought about it; first with the faults that `script` lists for it."""
    daemon_threads = True

    def __init__(self, script=None, delay=0.0, thought=lambda passage: f"{THOUGHT} {passage}"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.delay, self.thought = script or {}, delay, thought
        self.asked, self.headers = Counter(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        passage = body["messages"][1]["content"].split("<passage>\n")[1].split("\n</passage>")[0].strip()
        self.server.headers.append(self.headers)
        faults, number = self.server.script.get(passage, []), self.server.asked[passage]
        self.server.asked[passage] += 1
        time.sleep(self.server.delay)
        fault = faults[min(number, len(faults) - 1)] if faults else ""
        has_fault = number < len(faults) or str(fault).startswith("always")
        self.do(fault if has_fault else {"content": self.server.thought(passage)})

    def do(self, what) -> None:
        if what == "429":
            self.reply(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.2"})
        elif what in ("500", "always 500"):
            self.reply(500, b"oh no")
        elif what in ("400", "413", "always 400"):
            self.reply(int(what[-3:]), b'{"error": {"message": "maximum context length"}}')
        elif what == "401":
            message = "no such key: " + "." * 230 + self.headers["Authorization"]
            self.reply(401, json.dumps({"error": {"message": message}}).encode())
        elif what == "stall":
            time.sleep(3)
        elif what == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"id": ')
            self.close_connection = True
        elif what == "no JSON":
            self.reply(200, b"<html>hello</html>")
        elif what == "deep JSON":
            self.reply(200, b"[" * 200_000)
        elif what == "other JSON":
            self.reply(200, b'{"choices": []}')
        else:
            message = {"role": "assistant", **{k: v for k, v in what.items() if k != "finish"}}
            message.pop("usage", None)
            usage = what.get("usage", {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110})
            self.reply(200, json.dumps({
                "id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage,
                "choices": [{"index": 0, "message": message, "finish_reason": what.get("finish", "stop")}]}).encode())

    def reply(self, status: int, body: bytes, headers=()) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)


def corpus(tmp_path, texts) -> str:
    """Documents of two chunks each: a given one, and one of the texts."""
    path = tmp_path / "raw.jsonl"
    chunks = [[{"suffix": f"Q{i} ", "given": True}, {"suffix": text, "latent": None}] for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps({"text": f"Q{i} {text}", "answer": "a", "chunks": chunks[i]}) + "\n"
                            for i, text in enumerate(texts)))
    return str(path)


def run(tmp_path, server, *flags) -> list[dict]:
    main(["--data", str(tmp_path / "raw.jsonl"), "--out", str(tmp_path / "gold.jsonl"), "--model", "m", "--base_url",
          server.url, "--timeout", "1", "--retries", "3", *flags])
    return read_corpus(str(tmp_path / "gold.jsonl"))


def latents(documents) -> list:
    return [document["chunks"][1].get("latent") for document in documents]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_every_chunk_gets_its_thought_whatever_the_server_does_first(tmp_path):
    """429 with Retry-After, 500, a stalled answer, a cut connection, no JSON: tried again; the order is that of the
    corpus, and what is not a thought stays as it was."""
    faults = {"t1": ["429"], "t2": ["500", "500"], "t3": ["stall"], "t4": ["cut"], "t5": ["no JSON"],
              "t6": ["other JSON"]}
    texts, server = [f"t{i}" for i in range(40)], Server(faults)
    corpus(tmp_path, texts)
    documents = run(tmp_path, server)
    assert latents(documents) == [f"{THOUGHT} {text}" for text in texts]
    assert [document["answer"] for document in documents] == ["a"] * 40
    assert documents[7]["chunks"][0] == {"suffix": "Q7 ", "given": True}
    assert server.asked == {text: 1 + len(faults.get(text, [])) for text in texts}


def test_what_is_no_thought_is_rejected_with_a_reason_and_stays_plain(tmp_path, capsys):
    long, quoted = " ".join(["word"] * 600), "A text of some words, more than ten, stands in an answer as it is."
    faults = {"t1": [{"content": "  "}], "t2": [{"content": "some thought", "finish": "length"}],
              "t3": [{"content": long}], "a copy is what this is": [{"content": "A copy is what this is"}],
              "t5": ["400"], "t6": [{"content": None}], quoted: [{"content": f"The passage is this: {quoted} And so "
              "on, which is what the writer of it wrote there, after long thinking about all that is said in it."}]}
    corpus(tmp_path, ["t0", "t1", "t2", "t3", "a copy is what this is", "t5", "t6", quoted])
    documents = run(tmp_path, Server(faults), "--concurrency", "1", "--price_in", "1000", "--price_out", "10000")
    assert latents(documents) == [f"{THOUGHT} t0"] + [None] * 7
    line = capsys.readouterr().out.splitlines()[-1]
    for figure in ("1 thoughts", "7 answers rejected", "2 empty", "1 cut off", "1 too long", "2 a copy of the text",
                   "1 refused by the server", "700 tokens in, 70 out", "1.40 dollars"):
        assert figure in line, line


def test_requests_that_fail_for_good_are_asked_again_and_nothing_is_paid_twice(tmp_path):
    corpus(tmp_path, [f"t{i}" for i in range(20)])
    server = Server({"t3": ["always 500"]})
    with pytest.raises(ValueError, match="1 of 20 requests failed .* 19 thoughts.* the same command asks them again"):
        run(tmp_path, server, "--retries", "1")
    assert not (tmp_path / "gold.jsonl").exists()
    server.script = {}
    asked = Counter(server.asked)
    assert None not in latents(run(tmp_path, server, "--retries", "1"))
    assert server.asked - asked == {"t3": 1}


def test_answers_come_in_many_forms(tmp_path, capsys):
    """Parts instead of a text, no counts of tokens, half a character, cut by a filter: none stops the others."""
    faults = {"t0": [{"content": [{"type": "text", "text": "It "}, {"type": "text", "text": "follows."}]}],
              "t1": [{"content": "It follows.", "usage": {}}], "t2": [{"content": "It follows.", "usage": None}],
              "t3": [{"content": "half \ud83d a character"}],
              "t4": [{"content": "It foll", "finish": "content_filter"}],
              "t5": [{"content": "It follows.", "finish": None}], "t6": ["413"],
              "t8": [{"content": "It foll", "finish": "abort"}], "t9": [{"content": "It foll", "finish": "error"}]}
    corpus(tmp_path, [f"t{i}" for i in range(10)])
    found = latents(run(tmp_path, Server(faults), "--concurrency", "4"))
    assert found == ["It follows."] * 3 + [None] * 2 + ["It follows.", None, f"{THOUGHT} t7", None, None]
    assert "5 answers rejected" in capsys.readouterr().out


def test_chunks_whose_requests_always_fail_can_be_left_plain(tmp_path, capsys):
    corpus(tmp_path, [f"t{i}" for i in range(8)])
    server = Server({"t3": ["always 500"]})
    with pytest.raises(ValueError, match="with --leave_failed their chunks stay plain"):
        run(tmp_path, server, "--retries", "0")
    assert latents(run(tmp_path, server, "--retries", "0", "--leave_failed")).count(None) == 1
    assert "7 thoughts, 1 answers rejected, 1 failed" in capsys.readouterr().out


def test_a_server_that_refuses_everything_from_some_point_ends_the_run(tmp_path):
    """As one whose credit is spent: what it refused is asked again by the same command."""
    texts = [f"t{i}" for i in range(40)]
    corpus(tmp_path, texts)
    server = Server({text: ["always 400"] for text in texts[5:]})
    with pytest.raises(ValueError, match="the endpoint fails"):
        run(tmp_path, server, "--concurrency", "2")
    server.script = {}
    assert None not in latents(run(tmp_path, server))


def test_a_full_disk_ends_in_one_line_and_what_was_answered_stays(tmp_path):
    corpus(tmp_path, [f"t{i}" for i in range(60)])
    server = Server()
    with full_disk(3000), pytest.raises(OSError, match="could not write .*answers.jsonl"):
        run(tmp_path, server)
    assert None not in latents(run(tmp_path, server)) and sum(server.asked.values()) < 60 + 2 * 16


@pytest.mark.parametrize("fault", ["401", "always 500", "deep JSON"])
def test_an_endpoint_that_only_fails_ends_the_run_in_one_line(tmp_path, fault):
    texts = [f"t{i}" for i in range(50)]
    corpus(tmp_path, texts)
    server = Server({text: [fault] * 9 for text in texts})
    with pytest.raises(ValueError, match="the endpoint fails.*check --model") as error:
        run(tmp_path, server, "--concurrency", "2", "--retries", "0")
    assert "\n" not in str(error.value) and sum(server.asked.values()) <= 8


def test_a_killed_run_pays_at_most_the_requests_in_flight_twice(tmp_path):
    """kill -9 in the middle, and a last line of the answers that is cut: the same command goes on, in order."""
    texts, server = [f"t{i}" for i in range(60)], Server(delay=0.05)
    data = corpus(tmp_path, texts)
    command = [sys.executable, teacher.__file__, "--data", data, "--out", str(tmp_path / "gold.jsonl"), "--model", "m",
               "--base_url", server.url, "--concurrency", "4"]
    answers = tmp_path / "gold.jsonl.run/answers.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (answers.exists() and answers.read_bytes().count(b"\n") > 20):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with open(answers, "ab") as file:
        file.write(b'{}\n\n\0\0\n{"latent": "half a li')
    subprocess.run(command, check=True, capture_output=True)
    assert latents(read_corpus(str(tmp_path / "gold.jsonl"))) == [f"{THOUGHT} {text}" for text in texts]
    assert sum(server.asked.values()) <= 60 + 4


def test_what_a_model_thinks_aloud_is_left_out_unless_asked_for(tmp_path):
    corpus(tmp_path, ["t0", "t1"])
    faults = {"t0": [{"content": "<think>hm, well</think>It follows."}],
              "t1": [{"content": "It follows.", "reasoning_content": "hm, well"}]}
    assert latents(run(tmp_path, Server(faults))) == ["It follows."] * 2
    (tmp_path / "again").mkdir()
    corpus(tmp_path / "again", ["t0", "t1"])
    assert latents(run(tmp_path / "again", Server(faults), "--reasoning")) == ["hm, well\nIt follows."] * 2


@pytest.mark.parametrize("content, thought, with_reasoning", [
    ("<think>and so on and on", "", "and so on and on"), ("hm</think> So.", "So.", "hm\nSo."),
    ("<think>a <think>b</think> c</think>So.", "So.", "a b\nc\nSo."), ("<thinking>hm</thinking>So.", "So.", "hm\nSo.")])
def test_the_answer_is_what_follows_the_thinking(content, thought, with_reasoning):
    """Also where a template opened <think> already; where it does not end there is none."""
    message = SimpleNamespace(content=content)
    assert (thought_of(message, False), thought_of(message, True)) == (thought, with_reasoning)
    assert bool(thought) != (why_rejected(thought, "text", "stop", 100) == "empty")


def test_text_before_is_that_of_the_chunks_before_and_text_alone_is_split(tmp_path, capsys):
    sentences = "".join(f"Sentence number {i} says so. " for i in range(60))
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": sentences}) + "\n")
    questions = list(teacher.questions_of(teacher.TeacherConfig(str(tmp_path / "raw.jsonl"), model="m")))
    assert len(questions) > 3 and "".join(text for _, _, text in questions) == sentences
    assert questions[2][1] == questions[0][2] + questions[1][2]
    main(["--data", str(tmp_path / "raw.jsonl"), "--dry_run"])
    out = capsys.readouterr().out
    assert "Sentence number 0" in out and f"{len(questions)} such prompts" in out and not (tmp_path / "runs").exists()


def test_the_key_is_of_the_environment_and_is_neither_written_nor_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    corpus(tmp_path, ["t0"])
    server = Server()
    run(tmp_path, server)
    assert server.headers[0]["Authorization"] == "Bearer sk-secret-1234"
    with pytest.raises(ValueError, match="no such key") as error:
        main(["--data", str(tmp_path / "raw.jsonl"), "--out", str(tmp_path / "other.jsonl"), "--model", "m",
              "--base_url", Server({"t0": ["401"]}).url])
    print(error.value)
    everything = capsys.readouterr().out + "".join(
        path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "secret" not in everything and "sk-" not in everything


@pytest.mark.parametrize("flags, message", [
    (["--model", ""], "--model is missing"), (["--base_url", ""], "no OPENAI_API_KEY"),
    (["--data", "nowhere.jsonl"], "no corpus at nowhere.jsonl"),
    (["--base_url", "localhost:8000/v1"], "give one as http"),
    (["--base_url", "http://me:secret@localhost/v1"], "a user or a password in it.*OPENAI_API_KEY"),
    (["--temperature", "-0.5"], "at least 0")])
def test_what_is_missing_is_said_before_anything_is_asked_or_written(tmp_path, flags, message):
    corpus(tmp_path, ["t0"])
    server = Server()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, server, *flags)
    assert not server.asked and not (tmp_path / "gold.jsonl.run").exists()


def test_another_model_does_not_mix_into_the_answers_of_a_run(tmp_path):
    corpus(tmp_path, ["t0"])
    server = Server()
    run(tmp_path, server)
    with pytest.raises(ValueError, match="model m -> other"):
        run(tmp_path, server, "--model", "other")
