"""What a bundle says of the language block: which rung stands in its graphs, what it costs, and how it was judged."""

from dataclasses import dataclass

EXACT = "exact"


@dataclass(frozen=True, kw_only=True, slots=True)
class RungVerdict:
    """The accuracy gate's verdict on one rung in one precision, on one split."""

    split: str
    precision: str
    metric: str
    images: int
    reference: float  # mean score of the checkpoint's network
    candidate: float
    drop: float
    low: float  # the interval of the drop
    high: float
    limit: float
    holds: bool

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RungReport:
    """One rung of the ladder: its cost, its errors, and whether it was accepted."""

    rung: str  # exact, affine or narrow:r=…,k=…,heads=…
    macs: int  # of one image, between the transformer and encoder_norm
    bytes: int  # of its weights in float32
    relative_error: float | None = None  # on held-out tokens; None: not fitted, or exact
    unexplained: float | None = None  # share of the output's variance, on the same tokens
    verdicts: tuple[RungVerdict, ...] = ()
    accepted: bool
    reason: str = ""  # why it was not accepted

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCalibration:
    """The tokens that rungs were fitted to and judged on."""

    tokens: int
    held_out_tokens: int
    slices: int  # of the training split, half of them held out
    augmented: int  # further copies among the fitted and the held-out ones
    files: tuple[str, ...]  # the cases that the slices are of
    digests: tuple[str, ...]  # SHA-256 of every prepared slice

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockReport:
    """The ladder of a build."""

    requested: str  # as --block named it
    rung: str  # what stands in the graphs
    max_error: float  # limit for the relative error on held-out tokens
    max_unexplained: float  # limit for the share of the variance
    calibration: BlockCalibration | None = None  # None: only the exact block was asked for
    rungs: tuple[RungReport, ...]  # those that were tried, the cheapest first

    __pydantic_config__ = {"extra": "forbid"}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the rungs, as a header and rows of text."""
        header = ["block", "MACs", "MB fp32", "relative error", "unexplained", "Dice drop <", "accepted"]
        return header, [_row(rung) for rung in self.rungs]


def _row(rung: RungReport) -> list[str]:
    drops = [f"{verdict.split} {verdict.precision} {verdict.high:+.4f}" for verdict in rung.verdicts]
    return [
        rung.rung,
        f"{rung.macs:,}",
        f"{rung.bytes / 1e6:.2f}",
        "–" if rung.relative_error is None else f"{rung.relative_error:.4f}",
        "–" if rung.unexplained is None else f"{rung.unexplained:.4f}",
        "; ".join(drops) or "–",
        "yes" if rung.accepted else f"no: {rung.reason}",
    ]
