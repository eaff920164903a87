"""Warm-start thoughts from a teacher: a model behind an OpenAI-compatible endpoint thinks about the chunks of a corpus.

    export OPENAI_API_KEY=...                                                         read from there alone
    python data/teacher.py --data raw.jsonl --out gold.jsonl --model gpt-4o-mini --limit 1000
    python data/teacher.py --data raw.jsonl --model M --base_url http://localhost:8000/v1      vLLM, llama.cpp, Ollama
    python data/teacher.py --data raw.jsonl --model M --dry_run                       prints one prompt, asks nobody

For a chunk x after a text C (as in the E-step, up to three chunks before it) the teacher is asked what a writer must
have known and worked out to get from C to x. Its answer is the chunk's latent. Answers that are empty, cut off, too
long or a copy of the text are rejected: the chunk stays plain, and the reasons are counted. Chunks that have a latent
keep it.

Every answer is kept in OUT.run/answers.jsonl as it comes, so a killed run, started again, pays at most the requests in
flight twice. What failed for good is asked again then; OUT is written once all are answered, or with --leave_failed,
which leaves those chunks plain. Needs the package `openai`.
"""
import asyncio
import contextlib
import difflib
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Iterator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.corpus import numbered_lines, read_record, with_chunks  # noqa: E402
from data.layout import CONTEXT_CHUNKS  # noqa: E402
from data.run import (Ranks, folder_beside, naming_the_file, one_line, open_run, option,  # noqa: E402
                      parse_config, script, sha256_of, whole_file)
from data.tokens import count_tokens  # noqa: E402

SYSTEM = """\
You reconstruct the thinking behind a text. A text is the short result of long thinking: its writer knew facts, \
weighed them and worked things out, and wrote down only the outcome. You are shown a passage, and the text that stands \
before it. Write the thoughts that lead from the text before to the passage: what the writer must have known, which \
steps, calculations or inferences stand between, why the passage says what it says and says it next.

Write the thoughts themselves, as they would have been thought before the passage was written: do not mention the \
passage or yourself, do not repeat its sentences, add no heading and no comment. Be concrete and brief."""
USER = "<text_before>\n{before}\n</text_before>\n\n<passage>\n{text}\n</passage>\n\nThe thoughts behind the passage:"
THINKING, ANSWERING = (re.compile(mark, re.IGNORECASE) for mark in (r"<think(?:ing)?>", r"</think(?:ing)?>"))
WHOLE = (None, "", "stop", "eos", "eos_token", "stop_sequence")     # how an answer that was not cut off ends
REFUSED = (400, 413, 422)       # of a prompt that a server will not take, as one that is too long


@dataclass(frozen=True)
class TeacherConfig:
    data: str = option("data/alchemy/raw.jsonl", "corpus to think about", how=True)
    out: str = option("runs/gold.jsonl", "the corpus with thoughts; OUT.run has the answers so far", how=True)
    model: str = option("", "name of the model at the endpoint")
    base_url: str = option("", "endpoint, as http://localhost:8000/v1 (vLLM), http://localhost:11434/v1 (Ollama); "
                               "empty: that of OpenAI, or OPENAI_BASE_URL", how=True)
    limit: int = option(0, "documents, the first ones; 0: all", at_least=0, how=True)
    chunk_words: int = option(256, "words of a chunk at most, where a document is text alone and has to be split",
                              above=0)
    concurrency: int = option(16, "requests at a time", above=0, how=True)
    retries: int = option(5, "times a request that failed is sent again, waiting longer each time", at_least=0,
                         how=True)
    timeout: float = option(120.0, "seconds until a request counts as failed", above=0, how=True)
    max_tokens: int = option(1024, "tokens of an answer at most; what is cut off there is rejected", above=0)
    max_words: int = option(500, "words of a thought at most; longer ones are rejected", above=0)
    temperature: float = option(1.0, "of the teacher", at_least=0)
    reasoning: bool = option(False, "take what a reasoning model thinks aloud along, before its answer")
    price_in: float = option(0.0, "dollars per million tokens of prompts, for the cost that is shown", at_least=0,
                            how=True)
    price_out: float = option(0.0, "dollars per million tokens of answers", at_least=0, how=True)
    leave_failed: bool = option(False, "leave chunks plain whose requests fail for good, and write OUT all the same",
                                how=True)
    dry_run: bool = option(False, "print the first prompt and how many there are; ask nobody", how=True)


# ---- what is asked ---------------------------------------------------------------------------------------------

Place = tuple[int, int]     # document and chunk


count_words = partial(count_tokens, encoding="words")


def documents_of(config: TeacherConfig) -> Iterator[tuple[int, dict]]:
    """The documents, with chunks, one at a time. Raises ValueError with file:line."""
    for count, (number, line) in enumerate(numbered_lines(config.data)):
        if config.limit and count >= config.limit:
            return
        yield number, with_chunks(read_record(config.data, number, line), count_words, config.chunk_words)


def questions_of(config: TeacherConfig) -> Iterator[tuple[Place, str, str]]:
    """(place, text before, text) of every chunk that wants a thought."""
    for number, record in documents_of(config):
        texts = [chunk["suffix"] for chunk in record["chunks"]]
        for c, chunk in enumerate(record["chunks"]):
            if not chunk.get("given") and "latent" not in chunk and chunk["suffix"].strip():
                yield (number, c), "".join(texts[max(0, c - CONTEXT_CHUNKS):c]), chunk["suffix"]


def messages_for(before: str, text: str) -> list[dict]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER.format(before=before, text=text)}]


# ---- what is answered ------------------------------------------------------------------------------------------

def thought_of(message, reasoning: bool) -> str:
    """The thought in an answer: what is thought aloud, up to </think> or beside the text, only where it is asked for.

    Templates may have opened <think> in the prompt; where it is not closed, there is no answer.
    """
    content = message.content or ""
    if isinstance(content, list):       # of parts
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    *thinking, rest = ANSWERING.split(content)
    said, *unfinished = THINKING.split(rest)
    beside = [getattr(message, name, None) for name in ("reasoning_content", "reasoning")]
    aloud = [*(part for part in beside if isinstance(part, str)), *(THINKING.sub("", part) for part in thinking)]
    parts = [*aloud, *unfinished, said] if reasoning else [said]
    return "\n".join(part.strip() for part in parts if part.strip())


def why_rejected(thought: str, text: str, finish: str | None, max_words: int) -> str:
    """Why an answer is no thought about a text; empty where it is one."""
    words, of_text = thought.lower().split(), text.lower().split()
    if finish not in WHOLE:
        return "cut off"
    if thought != thought.encode(errors="ignore").decode():
        return "half a character"
    if not words:
        return "empty"
    if len(words) > max_words:
        return "too long"
    both = difflib.SequenceMatcher(None, words, of_text, autojunk=False)
    in_one_piece = len(of_text) > 10 and both.find_longest_match().size > 0.8 * len(of_text)     # among words about it
    return "a copy of the text" if in_one_piece or both.ratio() > 0.8 else ""


class Answers:
    """OUT.run/answers.jsonl: a line per answer, written as it comes."""

    def __init__(self, path: Path):
        self.path, self.of = path, {}
        lines = path.read_bytes().splitlines(True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < len(lines):         # the last one was cut by a kill
            os.truncate(path, sum(map(len, whole)))
        for line in whole:
            with contextlib.suppress(ValueError, LookupError, TypeError):       # of a line that is damaged: asked again
                answer = json.loads(line)
                counted = {name: int(answer[name] or 0) for name in ("tokens_in", "tokens_out")}
                self.of[answer["document"], answer["chunk"]] = answer | counted | {"latent": answer["latent"]}
        self.file = open(path, "a", encoding="utf-8")

    def add(self, place: Place, answer: dict) -> None:
        self.of[place] = answer | {"document": place[0], "chunk": place[1]}
        with naming_the_file(self.path):
            self.file.write(json.dumps(self.of[place]) + "\n")
            self.file.flush()

    def counts(self, places: set[Place]) -> Counter:
        """Of thoughts, rejected answers by reason, and tokens, at some places."""
        total = Counter()
        for place in self.of.keys() & places:
            answer = self.of[place]
            total["thoughts" if answer["latent"] else answer["rejected"]] += 1
            total.update({name: answer[name] for name in ("tokens_in", "tokens_out")})
        return total


def in_figures(counts: Counter, config: TeacherConfig) -> str:
    """Tokens so far, and their cost where there are prices."""
    cost = (counts["tokens_in"] * config.price_in + counts["tokens_out"] * config.price_out) / 1e6
    return (f"{counts['tokens_in']:,} tokens in, {counts['tokens_out']:,} out"
            + (f", {cost:.2f} dollars" if config.price_in or config.price_out else ""))


# ---- asking ----------------------------------------------------------------------------------------------------

def open_client(config: TeacherConfig):
    """The package and its client, with the key of the environment. Raises ValueError, ImportError where one lacks."""
    try:
        import openai
    except ImportError:
        raise ImportError("a teacher needs the package openai: pip install openai") from None
    if config.base_url and not config.base_url.startswith(("http://", "https://")):
        raise ValueError(f"--base_url {config.base_url} is no address; give one as http://localhost:8000/v1")
    if "@" in config.base_url:
        raise ValueError("--base_url has a user or a password in it, and settings are written down; leave them out, "
                         "and set OPENAI_API_KEY")
    key = os.environ.get("OPENAI_API_KEY")
    if not key and not (config.base_url or os.environ.get("OPENAI_BASE_URL")):
        raise ValueError("there is no OPENAI_API_KEY in the environment; set it, or give the --base_url of a server "
                         "that needs none")
    if key and not key.isascii():
        raise ValueError("OPENAI_API_KEY has letters that no key has; set it anew")
    return openai, openai.AsyncOpenAI(api_key=key or "none", base_url=config.base_url or None, timeout=config.timeout,
                                      max_retries=config.retries)


def reason(error: Exception) -> str:
    """What went wrong, without the key, which some servers say back."""
    return one_line(error, os.environ.get("OPENAI_API_KEY", ""))


async def ask(openai, client, config: TeacherConfig, before: str, text: str) -> dict:
    """The teacher's thought about a text, or why it is rejected, with the tokens it took.

    Errors of the network and the server are tried again by the package, what is no JSON here. Raises openai.APIError,
    ValueError, TimeoutError.
    """
    # a newer name, which not all servers know
    limit = "max_completion_tokens" if client.base_url.host == "api.openai.com" else "max_tokens"
    for attempt in range(config.retries + 1):
        try:
            async with asyncio.timeout(2 * config.timeout * (config.retries + 1)):      # also where bytes drip
                reply = await client.chat.completions.create(
                    model=config.model, messages=messages_for(before, text), temperature=config.temperature,
                    **{limit: config.max_tokens})
            choice = reply.choices[0]
            thought, usage = thought_of(choice.message, config.reasoning), reply.usage
            break
        except (ValueError, AttributeError, TypeError, LookupError, RecursionError, openai.APIResponseValidationError):
            if attempt == config.retries:
                raise ValueError("the answer is no chat completion") from None
            await asyncio.sleep(min(8, 0.5 * 2 ** attempt))
    why = why_rejected(thought, text, choice.finish_reason, config.max_words)
    tokens = [getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")]
    tokens_in, tokens_out = (max(0, count) if type(count) is int else 0 for count in tokens)    # not all servers count
    return {"latent": None if why else thought, "rejected": why, "tokens_in": tokens_in, "tokens_out": tokens_out}


async def ask_all(openai, client, config: TeacherConfig, answers: Answers, counts: Counter, bar) -> tuple[Counter, int]:
    """Ask about every chunk that has no answer yet, some at a time; returns what failed for good, by reason, and how
    many prompts the server refused, as too long. counts: tokens so far.

    Raises ValueError where one after the other comes to nothing: a wrong key, model or address, or a server that is
    gone.
    """
    waiting = ((place, before, text) for place, before, text in questions_of(config) if place not in answers.of)
    failed, refused, in_a_row = Counter(), 0, 0

    async def work() -> None:
        nonlocal in_a_row, refused
        for place, before, text in waiting:         # shared: each question goes to the next worker that is free
            try:
                answer = await ask(openai, client, config, before, text)
            except (openai.APIError, ValueError, TimeoutError) as error:
                is_refused = getattr(error, "status_code", None) in REFUSED
                refused += is_refused
                failed.update([] if is_refused else [reason(error)])
                in_a_row += 1
                if in_a_row >= 2 * config.concurrency:
                    raise ValueError(f"the endpoint fails: {reason(error)}; check --model, --base_url and the key; "
                                     "the same command goes on") from None
                continue
            in_a_row = 0
            answers.add(place, answer)
            counts.update({"tokens_in": answer["tokens_in"], "tokens_out": answer["tokens_out"]})
            bar.update()
            bar.set_postfix_str(in_figures(counts, config), refresh=False)

    async with client:
        async with asyncio.TaskGroup() as group:
            for _ in range(config.concurrency):
                group.create_task(work())
    return failed, refused


def write_out(config: TeacherConfig, answers: Answers) -> None:
    """The documents in their order, with the thoughts."""
    with whole_file(config.out) as file:
        for number, record in documents_of(config):
            chunks = [chunk | ({"latent": answers.of[number, c]["latent"]} if (number, c) in answers.of else {})
                      for c, chunk in enumerate(record["chunks"])]
            file.write(json.dumps(record | {"chunks": chunks}, ensure_ascii=False).encode() + b"\n")


def teach(config: TeacherConfig, ranks: Ranks) -> str:
    """Ask about what is not answered yet and write the corpus; returns what there is to say.

    Raises ValueError where requests failed for good: the same command asks them again.
    """
    if not config.model:
        raise ValueError("--model is missing; name a model of the endpoint, as --model gpt-4o-mini")
    folder, (openai, client) = folder_beside(config.out), open_client(config)
    ranks.say(f"reading {config.data}")
    places = {place for place, _, _ in questions_of(config)}
    open_run(folder, config, ranks, data_sha256=sha256_of(config.data))
    answers = Answers(folder / "answers.jsonl")
    done = len(places & answers.of.keys())
    ranks.say(f"{config.model}: {len(places):,} chunks to think about, {done:,} of them answered already")
    with ranks.bar(len(places), "teacher", done=done) as bar:
        try:
            failed, refused = asyncio.run(ask_all(openai, client, config, answers, answers.counts(places), bar))
        except* (ValueError, OSError) as errors:
            raise errors.exceptions[0] from None
    counts = answers.counts(places)
    rejected = {name: n for name, n in counts.items() if name not in ("thoughts", "tokens_in", "tokens_out")}
    rejected |= {"refused by the server": refused} if refused else {}
    rejected |= {"failed": sum(failed.values())} if failed and config.leave_failed else {}
    figures = (f"{counts['thoughts']:,} thoughts, {sum(rejected.values()):,} answers rejected"
               + "".join(f", {n:,} {name}" for name, n in rejected.items()) + f"; {in_figures(counts, config)}")
    if failed and not config.leave_failed:
        most, _ = failed.most_common(1)[0]
        raise ValueError(f"{sum(failed.values()):,} of {len(places):,} requests failed ({most}), {figures}; the same "
                         "command asks them again, and with --leave_failed their chunks stay plain")
    if refused and not counts["thoughts"]:
        raise ValueError(f"the server refused all {refused:,} prompts that it was asked; see its log")
    write_out(config, answers)
    return f"{config.out}: {figures}"


def main(argv=None) -> None:
    config = parse_config(TeacherConfig(), argv, __doc__)
    if not config.dry_run:
        return print(teach(config, Ranks(0, 1, None)))
    questions = list(questions_of(config))
    words = sum(count_words(SYSTEM + USER + before + text) for _, before, text in questions)
    for _, before, text in questions[:1]:
        print("\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages_for(before, text)))
    print(f"\n{len(questions):,} such prompts, about {words:,} words in all")


if __name__ == "__main__":
    script(main)
