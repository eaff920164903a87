"""Laws of the embedded corpus: exact inference against brute force, disjoint parts, hidden facts that stay hidden."""
import itertools
import json
import math
import re

import numpy as np
import pytest

from data.alchemy.prepare import main, part_of
from data.alchemy.world import SUBSTANCES, World, make_world


@pytest.fixture(scope="module")
def world():
    return make_world(np.random.default_rng(0))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alchemy")
    main(["--out", str(folder), "--seed", "5", "--gold", "150", "--raw", "300", "--held_out", "100"])
    read = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("gold", "raw", "oracle", "held_out", "probes")}
    return read, World.from_json((folder / "world.json").read_text())


def all_paths(ingredients, outcome):
    for middle in itertools.product(range(len(SUBSTANCES)), repeat=len(ingredients) - 2):
        yield [*middle, outcome]


@pytest.mark.parametrize("ingredients", [[0, 1], [3, 3, 7], [1, 2, 3, 4]])
def test_dynamic_programming_equals_the_sum_and_maximum_over_all_paths(world, ingredients):
    total = 0.0
    for outcome in range(len(SUBSTANCES)):
        joints = [world.log_joint(ingredients, path) for path in all_paths(ingredients, outcome)]
        assert world.log_evidence(ingredients, outcome) == pytest.approx(np.logaddexp.reduce(joints))
        assert world.log_best(ingredients, outcome) == pytest.approx(max(joints))
        posterior = [math.exp(world.log_posterior(ingredients, path)) for path in all_paths(ingredients, outcome)]
        assert sum(posterior) == pytest.approx(1.0)
        total += math.exp(world.log_evidence(ingredients, outcome))
    assert total == pytest.approx(1.0)


def test_the_laboratory_follows_its_exact_distribution(world):
    """Outcomes of many mixings have the frequencies of exp(log_evidence)."""
    random, ingredients, counts = np.random.default_rng(1), [2, 5, 8], np.zeros(len(SUBSTANCES))
    for _ in range(4000):
        counts[world.mix(ingredients, random)[-1]] += 1
    exact = np.exp([world.log_evidence(ingredients, x) for x in range(len(SUBSTANCES))])
    assert np.abs(counts / 4000 - exact).max() < 0.03


def test_columns_are_permutations_and_no_order_is_free(world):
    """Outcomes tell states apart; the table is neither commutative nor associative."""
    M = len(SUBSTANCES)
    assert all(sorted(world.table[a][b] for a in range(M)) == list(range(M)) for b in range(M))
    assert any(world.table[a][b] != world.table[b][a] for a in range(M) for b in range(M))
    assert any(world.table[world.table[a][b]][c] != world.table[a][world.table[b][c]]
               for a, b, c in itertools.product(range(M), repeat=3))
    assert len(world.hidden) == M * M // 5


def test_a_thought_is_written_and_read(world):
    """Two reactions read: fire salt = lead moss gives gold."""
    names = {name: i for i, name in enumerate(SUBSTANCES)}
    ingredients, path = [names["fire"], names["salt"], names["moss"]], [names["lead"], names["gold"]]
    thought = World.write_thought(ingredients, path)
    assert thought == " fire salt = lead moss gives gold"
    assert World.write_prefix(ingredients) == "Mix fire, salt and moss; get"
    assert World.read_prefix("Mix fire, salt and moss; get") == ingredients
    assert World.read_thought(thought, ingredients) == path
    for wrong in ("", " fire salt = lead", " fire moss = lead salt gives gold", thought + " gold",
                  thought.replace("=", "gives")):
        assert World.read_thought(wrong, ingredients) is None


def test_valid_thoughts_are_the_best_explanations(world):
    """The true path of a document without failure is valid; a path with a needless failure is not."""
    ingredients = [0, 1, 2]
    path = world.states(ingredients)
    assert world.valid(ingredients, path, path[-1])
    assert not world.valid(ingredients, [(path[0] + 1) % 10, path[-1]], path[-1])
    assert not world.valid(ingredients, path, (path[-1] + 1) % 10) and not world.valid(ingredients, None, path[-1])


def test_no_gold_document_touches_a_hidden_fact(corpus):
    parts, world = corpus
    for record in parts["gold"]:
        ingredients = World.read_prefix(record["chunks"][0]["suffix"])
        path = World.read_thought(record["chunks"][1]["latent"], ingredients)
        assert not set(world.facts(ingredients, path)) & world.hidden


def test_parts_share_no_prefix(corpus):
    parts, _ = corpus
    prefixes = {name: {record["chunks"][0]["suffix"] for record in parts[name]}
                for name in ("gold", "raw", "held_out", "probes")}
    for one, other in itertools.combinations(("gold", "raw", "held_out"), 2):
        assert not prefixes[one] & prefixes[other]
    assert not prefixes["probes"] & (prefixes["gold"] | prefixes["raw"])
    assert len(prefixes["held_out"]) == len(parts["held_out"])
    for name in ("gold", "raw", "held_out"):
        assert all(part_of(World.read_prefix(prefix), 5) == name for prefix in prefixes[name])


def test_raw_documents_show_outcomes_only(corpus):
    parts, _ = corpus
    assert all(record["chunks"][1]["latent"] is None
               for name in ("raw", "held_out", "probes") for record in parts[name])
    assert [record["text"] for record in parts["raw"]] == [record["text"] for record in parts["oracle"]]
    assert all(re.fullmatch(r"Mix (\w+, )+\w+ and \w+; get \w+\.", record["text"]) for record in parts["raw"])


def test_half_of_the_held_out_documents_need_a_hidden_fact_and_probes_need_one(corpus):
    parts, world = corpus
    assert sum(record["hidden"] > 0 for record in parts["held_out"]) == 50
    for record in parts["probes"]:
        ingredients = World.read_prefix(record["text"])
        facts = world.facts(ingredients[:3], world.states(ingredients[:3]))
        assert [list(fact) for fact in facts if fact in world.hidden] == [record["fact"]]
        assert record["text"].endswith(f"{record['answer']}.")


def test_the_answer_is_the_outcome_without_failure(corpus):
    parts, world = corpus
    failed = 0
    for record in parts["raw"]:
        ingredients = World.read_prefix(record["chunks"][0]["suffix"])
        assert record["answer"] == SUBSTANCES[world.states(ingredients)[-1]]
        failed += record["answer"] not in record["chunks"][1]["suffix"]
    assert 0.1 < failed / len(parts["raw"]) < 0.4


def test_the_seed_changes_table_and_documents(tmp_path):
    for seed in ("1", "2", "1"):
        main(["--out", str(tmp_path / seed), "--seed", seed, "--gold", "20", "--raw", "20", "--held_out", "20"])
    one, two = ((tmp_path / seed / "world.json").read_text() for seed in ("1", "2"))
    assert World.from_json(one).table != World.from_json(two).table
    assert (tmp_path / "1" / "raw.jsonl").read_text() != (tmp_path / "2" / "raw.jsonl").read_text()
