"""Where a run of many models stands: which of them are done, and about how long the rest takes."""
import os
import time


def in_words(seconds: float) -> str:
    """90 s, 12 min, 3.5 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Plan:
    """The models of a run, and how far it is with them, also after a restart and with the help of a second process:
    that a model is done shows on the disk."""

    def __init__(self, out: str, costs: dict[str, float]):
        """costs: folder of a model -> about what it takes in forward passes of a token."""
        self.out, self.costs, self.started = out, costs, time.time()
        self.at_start, self.guess = self.left(), 0.0        # seconds for all that is left, until a model is done

    def left(self) -> dict[str, float]:
        """What is not done yet."""
        return {name: cost for name, cost in self.costs.items()
                if not os.path.exists(f"{self.out}/{name}/step_last.json")}

    def stage(self) -> str:
        """For the front of a bar: which of the models it is about, and the time left at the speed so far."""
        left, number, passed = self.left(), len(self.costs), time.time() - self.started
        spent = sum(self.at_start.values()) - sum(left.values())
        seconds = passed * sum(left.values()) / spent if spent else max(0.0, self.guess - passed)
        return f"[{min(number, number - len(left) + 1)}/{number}, {in_words(seconds)} left] "
