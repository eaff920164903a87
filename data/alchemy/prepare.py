"""Write the embedded corpus: a laboratory notebook in which only outcomes are written down. No download.

    python data/alchemy/prepare.py                     into data/alchemy
    python data/alchemy/prepare.py --seed 3 --out DIR  another table and other documents, into DIR

    gold.jsonl       documents with the thought that led to the outcome; a fifth of the table never occurs in them
    raw.jsonl        documents without thoughts; they use the whole table
    oracle.jsonl     the raw documents with their thoughts, for the ceiling
    held_out.jsonl   for evaluation; half of them need a hidden fact
    probes.jsonl     two-reaction documents that need exactly one hidden fact, to ask whether it is known
    world.json       the table itself, for the exact posterior; no model ever sees it

Every list of ingredients belongs to one of the parts gold, raw and held-out (by a hash), so no part shares a prefix
with another. Prints what it wrote; with the defaults: 800 gold, 2000 raw, 400 held-out documents, about 100 probes.
"""
import hashlib
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.alchemy.world import SUBSTANCES, World, make_world  # noqa: E402
from data.run import option, parse_config, script, write_whole  # noqa: E402

SHARES = {"gold": 0.2, "raw": 0.5, "held_out": 0.3}


def part_of(ingredients: list[int], seed: int) -> str:
    """The part that a list of ingredients belongs to, fixed by a hash."""
    digest = hashlib.sha256(f"{seed} {ingredients}".encode()).digest()
    place = int.from_bytes(digest[:8], "little") / 2 ** 64
    for part, share in SHARES.items():
        place -= share
        if place < 0:
            return part
    return part


def write_document(world: World, ingredients: list[int], path: list[int], thought: bool) -> dict:
    """A line of the corpus. `answer` is the outcome without failure, `hidden` how many hidden facts it takes."""
    true_path = world.states(ingredients)
    prefix, suffix = world.write_prefix(ingredients), world.write_suffix(path[-1])
    latent = world.write_thought(ingredients, path) if thought else None
    return {"text": prefix + suffix,
            "chunks": [{"suffix": prefix, "given": True}, {"suffix": suffix, "latent": latent}],
            "answer": SUBSTANCES[true_path[-1]],
            "hidden": sum(fact in world.hidden for fact in world.facts(ingredients, true_path))}


def draw_part(world: World, part: str, count: int, seed: int) -> list[dict]:
    """`count` documents of a part, with chains of two to four reactions."""
    random, documents, seen = np.random.default_rng([seed, list(SHARES).index(part), 1]), [], set()
    while len(documents) < count:
        ingredients = random.integers(len(SUBSTANCES), size=random.integers(3, 6)).tolist()
        path = world.mix(ingredients, random)
        uses_hidden = any(fact in world.hidden for fact in world.facts(ingredients, path))
        document = write_document(world, ingredients, path, thought=part != "held_out")
        if part_of(ingredients, seed) != part or part == "gold" and uses_hidden:
            continue
        if part == "held_out":
            needs_hidden = document["hidden"] > 0
            if tuple(ingredients) in seen or sum((d["hidden"] > 0) == needs_hidden for d in documents) >= count / 2:
                continue
        seen.add(tuple(ingredients))
        documents.append(document)
    return documents


def without_thoughts(document: dict) -> dict:
    chunks = [{**chunk, "latent": None} if "latent" in chunk else chunk for chunk in document["chunks"]]
    return document | {"chunks": chunks}


def all_probes(world: World, seed: int) -> list[dict]:
    """Every two-reaction document of the held-out part that needs one hidden fact and one visible, without failure."""
    probes = []
    for ingredients in map(list, itertools.product(range(len(SUBSTANCES)), repeat=3)):
        path = world.states(ingredients)
        needed = [fact for fact in world.facts(ingredients, path) if fact in world.hidden]
        if len(needed) == 1 and part_of(ingredients, seed) == "held_out":
            probes.append(write_document(world, ingredients, path, thought=False) | {"fact": list(needed[0])})
    return probes


def prepare(out: str, seed: int = 0, gold: int = 800, raw: int = 2000, held_out: int = 400,
            failure: float = 0.1) -> dict[str, int]:
    """Write all files of the corpus into `out`; returns the documents in each."""
    world = make_world(np.random.default_rng([seed, 0]), failure=failure)
    parts = {"gold": draw_part(world, "gold", gold, seed), "oracle": draw_part(world, "raw", raw, seed),
             "held_out": draw_part(world, "held_out", held_out, seed), "probes": all_probes(world, seed)}
    parts["raw"] = [without_thoughts(document) for document in parts["oracle"]]
    texts = {f"{part}.jsonl": "".join(json.dumps(d) + "\n" for d in documents) for part, documents in parts.items()}
    for name, text in (texts | {"world.json": world.to_json()}).items():
        write_whole(Path(out, name), text)
    return {part: len(documents) for part, documents in parts.items()}


@dataclass(frozen=True)
class AlchemyConfig:
    out: str = option(os.path.dirname(os.path.abspath(__file__)), "folder of the corpus")
    seed: int = option(0, "of the table and the documents", at_least=0)
    gold: int = option(800, "documents with thoughts", above=0)
    raw: int = option(2000, "documents without", above=0)
    held_out: int = option(400, "documents for evaluation", above=0)
    failure: float = option(0.1, "probability that a reaction fails", at_least=0, at_most=1)


def main(argv=None) -> None:
    counts = prepare(**vars(parse_config(AlchemyConfig(), argv, __doc__)))
    print("alchemy:", ", ".join(f"{count} {part}" for part, count in counts.items()), "documents")


if __name__ == "__main__":
    script(main)
