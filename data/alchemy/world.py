"""The laboratory: a hidden table of reactions, the notebook it writes, and what an ideal reader of the notebook knows.

    text     Mix fire, salt and moss; get gold.
    thought  fire salt = lead moss gives gold           (fire + salt -> lead, lead + moss -> gold)

The first substance meets the second; what comes out meets the third; and so on. Each reaction follows the table, or
fails with probability `failure` and gives any substance at all, with which the chain goes on. The notebook shows
ingredients and outcome only. Because the thought's space is small, everything is exact: dynamic programming over the
substances gives p(x | C), the posterior of a thought, and the best thought.

Letters: M substances, n reactions; a state is the substance in the crucible, a path the n states after the reactions.
"""
import json
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SUBSTANCES = ("fire", "salt", "moss", "lead", "gold", "iron", "tin", "ash", "dew", "bone")
WORDS = re.compile(r"\w+|[=]")


@dataclass(frozen=True)
class World:
    """table[a][b] is what a in the crucible gives with b added; each column is a permutation, so outcomes tell apart.

    hidden: the facts (a, b) that no gold thought states.
    """
    table: tuple[tuple[int, ...], ...]
    hidden: frozenset[tuple[int, int]]
    failure: float

    # ---- what happens in the laboratory

    def states(self, ingredients: list[int]) -> list[int]:
        """The path without any failure, (n,)."""
        path = [ingredients[0]]
        for added in ingredients[1:]:
            path.append(self.table[path[-1]][added])
        return path[1:]

    def mix(self, ingredients: list[int], random: np.random.Generator) -> list[int]:
        """A path as the laboratory gives it, failures and all, (n,)."""
        path = [ingredients[0]]
        for added in ingredients[1:]:
            failed = random.random() < self.failure
            path.append(int(random.integers(len(self.table))) if failed else self.table[path[-1]][added])
        return path[1:]

    def facts(self, ingredients: list[int], path: list[int]) -> list[tuple[int, int]]:
        """The entries of the table that a path looks up."""
        return list(zip([ingredients[0], *path[:-1]], ingredients[1:]))

    # ---- what an ideal reader knows

    @cached_property
    def log_transition(self) -> np.ndarray:
        """[b, a, c] = log p(c | a in the crucible, b added), (M, M, M)."""
        M = len(self.table)
        p = np.full((M, M, M), self.failure / M)
        for a in range(M):
            for b in range(M):
                p[b, a, self.table[a][b]] += 1 - self.failure
        with np.errstate(divide="ignore"):
            return np.log(p)

    def log_joint(self, ingredients: list[int], path: list[int]) -> float:
        """log p(z, x | C) of a path, whose last state is the outcome; nats."""
        return float(sum(self.log_transition[b, a, c] for (a, b), c in zip(self.facts(ingredients, path), path)))

    def log_evidence(self, ingredients: list[int], outcome: int) -> float:
        """log p(x | C): the forward sum over all paths to the outcome; nats."""
        log_p = self.log_transition[ingredients[1], ingredients[0]]
        for added in ingredients[2:]:
            log_p = np.logaddexp.reduce(log_p[:, None] + self.log_transition[added], axis=0)
        return float(log_p[outcome])

    def log_best(self, ingredients: list[int], outcome: int) -> float:
        """log p(z, x | C) of the best path to the outcome (Viterbi); nats."""
        log_p = self.log_transition[ingredients[1], ingredients[0]]
        for added in ingredients[2:]:
            log_p = (log_p[:, None] + self.log_transition[added]).max(axis=0)
        return float(log_p[outcome])

    def log_posterior(self, ingredients: list[int], path: list[int]) -> float:
        """log p(z | x, C) of a path, nats."""
        return self.log_joint(ingredients, path) - self.log_evidence(ingredients, path[-1])

    def valid(self, ingredients: list[int], path: list[int] | None, outcome: int) -> bool:
        """Whether a thought is right: no path to this outcome is likelier. A thought that does not parse is None."""
        return (path is not None and path[-1] == outcome
                and self.log_joint(ingredients, path) > self.log_best(ingredients, outcome) - 1e-9)

    # ---- how the notebook is written

    @staticmethod
    def write_prefix(ingredients: list[int]) -> str:
        names = [SUBSTANCES[i] for i in ingredients]
        return f"Mix {', '.join(names[:-1])} and {names[-1]}; get"

    @staticmethod
    def write_suffix(outcome: int) -> str:
        return f" {SUBSTANCES[outcome]}."

    @staticmethod
    def write_thought(ingredients: list[int], path: list[int]) -> str:
        thought = f" {SUBSTANCES[ingredients[0]]}"
        for i, (added, state) in enumerate(zip(ingredients[1:], path), start=1):
            thought += f" {SUBSTANCES[added]} {'gives' if i == len(path) else '='} {SUBSTANCES[state]}"
        return thought

    @staticmethod
    def read_prefix(text: str) -> list[int]:
        return [SUBSTANCES.index(word) for word in WORDS.findall(text) if word in SUBSTANCES]

    @classmethod
    def read_thought(cls, text: str, ingredients: list[int]) -> list[int] | None:
        """The path of a thought about these ingredients; None where it is not written as thoughts are."""
        path = [SUBSTANCES.index(word) for word in WORDS.findall(text)[3::3] if word in SUBSTANCES]
        well_formed = len(path) == len(ingredients) - 1 and cls.write_thought(ingredients, path) == text
        return path if well_formed else None

    @staticmethod
    def read_suffix(text: str) -> int:
        return SUBSTANCES.index(WORDS.findall(text)[0])

    # ---- marks for a model's thoughts, given as text

    def log_evidence_of(self, prefix: str, suffix: str) -> float:
        """log p(x | C) of a document as written, nats: what an ideal reader needs."""
        return self.log_evidence(self.read_prefix(prefix), self.read_suffix(suffix))

    def grade(self, prefix: str, suffix: str, thoughts: list[str], weights: list[float]) -> tuple[float, float]:
        """Of weighed thoughts about a document: the weight that lies on valid ones, and the total variation distance to
        the exact posterior. The weights add up to 1."""
        ingredients, outcome = self.read_prefix(prefix), self.read_suffix(suffix)
        share: dict[tuple[int, ...], float] = {}
        for thought, weight in zip(thoughts, weights, strict=True):
            path = self.read_thought(thought, ingredients)
            if path is not None and path[-1] == outcome:
                share[tuple(path)] = share.get(tuple(path), 0.0) + weight
        valid = sum(weight for path, weight in share.items() if self.valid(ingredients, list(path), outcome))
        posterior = {path: np.exp(self.log_posterior(ingredients, list(path))) for path in share}
        overlap = sum(min(weight, posterior[path]) for path, weight in share.items())
        return valid, float(1 - overlap)

    # ---- the world as a file

    def to_json(self) -> str:
        return json.dumps({"table": self.table, "hidden": sorted(self.hidden), "failure": self.failure})

    @classmethod
    def from_json(cls, text: str) -> "World":
        parts = json.loads(text)
        return cls(tuple(map(tuple, parts["table"])), frozenset(map(tuple, parts["hidden"])), parts["failure"])


def make_world(random: np.random.Generator, hidden_share: float = 0.2, failure: float = 0.1) -> World:
    """A random table whose columns are permutations, with a share of its facts hidden from the gold thoughts."""
    M = len(SUBSTANCES)
    columns = [random.permutation(M) for _ in range(M)]
    table = tuple(tuple(int(columns[b][a]) for b in range(M)) for a in range(M))
    hidden = random.choice(M * M, size=round(hidden_share * M * M), replace=False)
    return World(table, frozenset((int(i) // M, int(i) % M) for i in hidden), failure)
