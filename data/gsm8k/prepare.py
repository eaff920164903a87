"""Write GSM8K as a corpus with human reasoning as the thoughts of a fraction of its documents.

    python data/gsm8k/prepare.py                        downloads the official training file (4 MB, MIT licence)
    python data/gsm8k/prepare.py --source train.jsonl   takes a copy of it that you have

A document is a question (given), then the last sentence of the solution with its answer; the sentences before are the
thought. Calculator marks <<48/2=24>> are removed.

    gold.jsonl       --gold documents with their thought
    raw.jsonl        --raw documents: the question and the last sentence, nothing else of the solution
    oracle.jsonl     the raw documents with their thoughts, for the ceiling
    held_out.jsonl   --held_out documents for evaluation

Which documents are held out, gold or raw is fixed by a hash of the question. Prints what it wrote.
Source: Cobbe et al. 2021, github.com/openai/grade-school-math.
"""
import codecs
import hashlib
import json
import os
import re
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import naming_the_line, read_line, split_into_sentences  # noqa: E402
from data.run import option, parse_config, script, write_whole  # noqa: E402

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl"
CALCULATOR_MARK = re.compile(r"<<.*?>>")


def read_source(source: str) -> bytes:
    """The official file. Raises ValueError, FileNotFoundError."""
    try:
        return Path(source).read_bytes() if source else urllib.request.urlopen(URL, timeout=60).read()
    except FileNotFoundError:
        raise FileNotFoundError(f"--source {source} does not exist; give a copy of GSM8K's train.jsonl") from None
    except OSError as error:
        what = f"read --source {source} ({error})" if source else (
            f"download {URL} ({error}); fetch it by hand and pass --source FILE")
        raise ValueError(f"could not {what}") from None


def check_problem(problem) -> dict:
    """A line as it is, or a ValueError."""
    texts = [problem.get(key) for key in ("question", "answer")] if isinstance(problem, dict) else [None]
    if all(isinstance(text, str) and text.strip() for text in texts):
        solution, _, answer = CALCULATOR_MARK.sub("", texts[1]).partition("#### ")
        if solution.strip() and answer.strip() and "####" not in solution + answer:
            return problem
    raise ValueError("is not GSM8K: each line needs a question, and an answer with a solution and one ####")


def read_problems(source: str) -> list[dict]:
    """The lines of the official file, in the order of their hashes. Raises ValueError, FileNotFoundError."""
    problems = []
    for number, line in enumerate(read_source(source).split(b"\n")):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            with naming_the_line(source or URL, number):
                problems.append(read_line(line, check_problem))
    return sorted(problems, key=lambda problem: hashlib.sha256(problem["question"].encode()).digest())


def write_document(problem: dict, thought: bool) -> dict:
    """A line of the corpus: question, thought or null, last sentence with the answer."""
    solution, answer = CALCULATOR_MARK.sub("", problem["answer"]).split("#### ")
    *before, last = split_into_sentences(solution.strip())
    prefix, suffix = problem["question"].strip() + "\n", f"{last.strip()}\n#### {answer.strip()}"
    latent = "".join(before).strip() if thought else None
    return {"text": prefix + suffix, "answer": answer.strip(),
            "chunks": [{"suffix": prefix, "given": True}, {"suffix": suffix, "latent": latent}]}


def prepare(source: str, out: str, gold: int, raw: int, held_out: int) -> dict[str, int]:
    """Write the parts into `out`; returns the documents in each. Raises ValueError where there are too few."""
    problems = read_problems(source)
    raw = raw or len(problems) - held_out - gold
    if raw <= 0 or held_out + gold + raw > len(problems):
        raise ValueError(f"--held_out {held_out} --gold {gold} --raw {raw} are more than the {len(problems)} documents")
    first, second, third = held_out, held_out + gold, held_out + gold + raw
    parts = {"held_out": (problems[:first], False), "gold": (problems[first:second], True),
             "raw": (problems[second:third], False), "oracle": (problems[second:third], True)}
    for name, (part, thought) in parts.items():
        lines = (json.dumps(write_document(problem, thought)) + "\n" for problem in part)
        write_whole(Path(out, f"{name}.jsonl"), "".join(lines))
    return {name: len(part) for name, (part, _) in parts.items()}


@dataclass(frozen=True)
class Gsm8kConfig:
    source: str = option("", "GSM8K's train.jsonl on this machine; empty: download it")
    out: str = option(os.path.dirname(os.path.abspath(__file__)), "folder of the corpus")
    gold: int = option(1000, "documents with thoughts", above=0)
    raw: int = option(0, "documents without; 0: all the rest", at_least=0)
    held_out: int = option(400, "documents for evaluation", above=0)


def main(argv=None) -> None:
    counts = prepare(**vars(parse_config(Gsm8kConfig(), argv, __doc__)))
    print("gsm8k:", ", ".join(f"{count} {part}" for part, count in counts.items()), "documents")


if __name__ == "__main__":
    script(main)
