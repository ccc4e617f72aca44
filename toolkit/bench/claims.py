"""Decide whether times are good enough to claim that one network is so many times as fast as another."""

from medseg_trt.bench.timing_schema import Latency
from medseg_trt.metrics.intervals import MIN_UNITS, Interval

# The standard deviation of single times, as a share of their mean. Exponential waiting times, which know no typical
# value, have exactly 1. Above it a network's times mix two states of the machine, free and busy, and a factor would say
# how busy the machine was.
MAX_CLAIMED_VARIATION = 1.0
# The upper end of the interval by its lower end. A factor is read as its first digit and a half: at 1.5, "2 times" may
# be 1.6 or 2.4 and is not even right in its first digit.
MAX_CLAIMED_SPREAD = 1.5


def objection(reference: Latency, row: Latency, speed: Interval) -> str | None:
    """Say why no factor is claimed, or None where one is.

    Args:
        reference: the times that the others are compared with.
        row: the times of the network.
        speed: how many times as fast it is.
    """
    for name, found in (("the reference's", reference), ("its", row)):
        if found.variation > MAX_CLAIMED_VARIATION:
            return (
                f"{name} times vary by {100 * found.variation:.0f} %, and above {100 * MAX_CLAIMED_VARIATION:.0f} % "
                "they say how busy the machine was; measure on an idle machine"
            )
    if speed.confidence is None:
        return f"{speed.units} round(s) are too few for an interval, which needs {MIN_UNITS}; measure longer"
    if speed.high > MAX_CLAIMED_SPREAD * speed.low:
        return (
            f"the {100 * speed.confidence:.0f} % interval {speed.low:.2f} … {speed.high:.2f} spans more than a factor "
            f"of {MAX_CLAIMED_SPREAD:g}; measure longer, or on an idle machine"
        )
    return None
