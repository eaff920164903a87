"""One document of a megabyte of each kind of character: read, split into chunks and tokenised, in seconds.

    python -m tests.bench_text [--encoding gpt2] [--megabytes 1]

Not collected by pytest. Time should grow with the length and not with its square: twice the megabytes, twice the time.
"""
import argparse
import json
import time

from data.corpus import read_document, texts_of
from tests.test_corpus import KINDS
from tests.conftest import tokenizer_for


def seconds(text: str, encoding: str) -> tuple[float, int, int]:
    """For all that a line goes through, with the chunks and tokens that came out."""
    line, begun = json.dumps({"text": text}).encode(), time.time()
    tokenizer = tokenizer_for(texts_of([json.loads(line)], encoding), encoding)
    document = read_document("corpus", 0, line, tokenizer)
    return time.time() - begun, len(document.chunks), sum(len(chunk.suffix) for chunk in document.chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoding", default="words", help="words, or an encoding of tiktoken [words]")
    parser.add_argument("--megabytes", type=float, default=1.0, help="of each document [1]")
    args = parser.parse_args()
    for kind, piece in KINDS.items():
        text = piece * int(args.megabytes * 2 ** 20 / len(piece.encode()))
        print("{:12s} {:6.2f} s {:7,d} chunks {:9,d} tokens".format(kind, *seconds(text, args.encoding)), flush=True)


if __name__ == "__main__":
    main()
