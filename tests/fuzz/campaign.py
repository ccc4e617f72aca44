"""Run many cases of a target and record what came of each: read, refused, or one of three kinds of failure."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fuzz.targets import Target

from medseg_trt.errors import MedsegError
from medseg_trt.processes import process_memory

LONGEST_S = 2.0  # of one case, in processor time
MAX_GROWTH_MB = 512.0  # of the peak of resident memory, above the idle process


@dataclass
class Campaign:
    """What came of the cases so far."""

    target: Target
    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: dict[int, str] = field(default_factory=dict)  # by case: an exception that is no MedsegError
    slow: dict[int, float] = field(default_factory=dict)  # by case: seconds
    unclear: dict[int, str] = field(default_factory=dict)  # by case: a message that is not one line
    slowest_s: float = 0.0
    idle_mb: float = field(default_factory=lambda: process_memory()["resident_mb"])

    def run(self, cases: Iterable[int], until: float = float("inf")) -> None:
        """Run cases until ``time.monotonic()`` says ``until``."""
        for case in cases:
            if time.monotonic() > until:
                return
            self._run(case)

    @property
    def growth_mb(self) -> float:
        """How much the peak of resident memory exceeds that of the idle process."""
        return process_memory()["peak_resident_mb"] - self.idle_mb

    def _run(self, case: int) -> None:
        began = time.process_time()
        try:
            self.target.run(case)
            outcome = "read"
        except MedsegError as error:
            outcome = "refused"
            if "\n" in str(error) or not str(error).strip():
                self.unclear[case] = str(error)
        except Exception as error:
            outcome = "crash"
            self.crashes[case] = f"{type(error).__name__}: {error}"
        self.outcomes[outcome] += 1
        taken = time.process_time() - began
        self.slowest_s = max(self.slowest_s, taken)
        if taken > LONGEST_S:
            self.slow[case] = taken
