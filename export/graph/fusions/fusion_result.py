"""What a fusion rule did."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionResult:
    """How many places of a graph a rule matched, or why it matched none."""

    count: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.count > 0) == bool(self.reason) or self.count < 0:
            raise ValueError(f"a rule that matched {self.count} places cannot give {self.reason!r} as its reason")


def fusion_result(count: int, reason: str) -> FusionResult:
    """Return the result of a rule; ``reason`` is used only where ``count`` is 0."""
    return FusionResult(count=count) if count else FusionResult(reason=reason)
