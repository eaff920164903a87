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
import argparse
import hashlib
import json
import os
import re
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import split_into_sentences  # noqa: E402

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl"
CALCULATOR_MARK = re.compile(r"<<.*?>>")


def read_problems(source: str) -> list[dict]:
    """The lines of the official file, in the order of their hashes. Raises ValueError, FileNotFoundError."""
    try:
        if source:
            content = Path(source).read_bytes()
        else:
            content = urllib.request.urlopen(URL, timeout=60).read()
        problems = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
        if not all(problem["answer"].count("#### ") == 1 for problem in problems):
            raise KeyError("answer")
        return sorted(problems, key=lambda problem: hashlib.sha256(problem["question"].encode()).digest())
    except FileNotFoundError:
        raise FileNotFoundError(f"--source {source} does not exist; give a copy of GSM8K's train.jsonl") from None
    except OSError as error:
        raise ValueError(f"could not download {URL} ({error}); fetch it by hand and pass --source FILE") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{source or URL} is not GSM8K: each line needs a question, and an answer with ####") from None


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
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (part, thought) in parts.items():
        lines = (json.dumps(write_document(problem, thought)) + "\n" for problem in part)
        temporary = folder / f"{name}.jsonl.tmp"
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, folder / f"{name}.jsonl")
    return {name: len(part) for name, (part, _) in parts.items()}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="", help="GSM8K's train.jsonl on this machine; empty: download it")
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)), help="folder of the corpus")
    parser.add_argument("--gold", type=int, default=1000, help="documents with thoughts [1000]")
    parser.add_argument("--raw", type=int, default=0, help="documents without; 0: all the rest [0]")
    parser.add_argument("--held_out", type=int, default=400, help="documents for evaluation [400]")
    counts = prepare(**vars(parser.parse_args(argv)))
    print("gsm8k:", ", ".join(f"{count} {part}" for part, count in counts.items()), "documents")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
