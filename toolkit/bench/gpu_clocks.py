"""Read a GPU's clock and what holds it back, as nvidia-smi reports them."""

import subprocess
from dataclasses import dataclass

from medseg_trt.gpu import pci_bus_id

QUERY = "--query-gpu=clocks.current.sm,clocks_event_reasons.active"
OLDER_QUERY = "--query-gpu=clocks.current.sm,clocks_throttle_reasons.active"  # before driver 535
REASONS = {  # nvml.h, nvmlClocksEventReason…; being idle and clocks that an application set hold nothing back
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "hardware temperature",
    0x80: "power brake",
}


@dataclass(frozen=True, slots=True)
class GpuClock:
    """One look at a GPU."""

    sm_mhz: int
    held_back_by: tuple[str, ...]


def read_clock(number: int = 0) -> GpuClock | None:
    """Look at a GPU by CUDA's number; None where nvidia-smi does not say."""
    place = pci_bus_id(number) or number
    for query in (QUERY, OLDER_QUERY):
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={place}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            continue
        if (clock := parse_clock(done.stdout)) is not None:
            return clock
    return None


def parse_clock(line: str) -> GpuClock | None:
    """Read nvidia-smi's line: MHz, and a mask of reasons in hexadecimal digits."""
    mhz, _, mask = line.strip().partition(",")
    try:
        bits = int(mask.strip(), 16)
        return GpuClock(int(mhz), tuple(words for bit, words in REASONS.items() if bits & bit))
    except ValueError:
        return None
