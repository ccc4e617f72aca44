"""Decide whether a ratio of speeds is claimed: only on one device, and only where the times are precise enough."""

from medseg_trt.bench.timing_schema import Latency
from medseg_trt.metrics.intervals import MIN_UNITS, Interval

# The standard deviation of single times divided by their mean. It is 1 for exponential waiting times, which have no
# typical value. Above it, the times mix an idle and a busy machine, and their ratio would measure the load.
MAX_CLAIMED_VARIATION = 1.0
# The upper end of the interval divided by its lower end: at 1.5, "2 times as fast" may be 1.6 or 2.4 times, and even
# the first digit is uncertain.
MAX_CLAIMED_SPREAD = 1.5


def other_device(reference: str, row: str) -> str | None:
    """Return the reason why no ratio is claimed between two devices, or None where they are the same.

    Args:
        reference: the device of the reference, as its session names it.
        row: that of the network.
    """
    if reference == row:
        return None
    return (
        f"no ratio is claimed: the reference ran on {reference} and this on {row}; measure both on one device: "
        "--device cpu or --device cuda"
    )


def objection(reference: Latency, row: Latency, speed: Interval) -> str | None:
    """Return the reason why no ratio is claimed, or None if one is.

    Args:
        reference: the times of the reference.
        row: the times of the network.
        speed: the ratio of the two.
    """
    for name, latency in (("the reference's", reference), ("its", row)):
        if latency.variation > MAX_CLAIMED_VARIATION:
            return (
                f"{name} times vary by {100 * latency.variation:.0f} %, and above {100 * MAX_CLAIMED_VARIATION:.0f} % "
                "they measure the load of the machine; measure on an idle machine"
            )
    if speed.confidence is None:
        return f"{speed.units} round(s) are too few for an interval, which needs {MIN_UNITS}; measure longer"
    if speed.high > MAX_CLAIMED_SPREAD * speed.low:
        return (
            f"the {100 * speed.confidence:.0f} % interval {speed.low:.2f} … {speed.high:.2f} spans more than a factor "
            f"of {MAX_CLAIMED_SPREAD:g}; measure longer, or on an idle machine"
        )
    return None
