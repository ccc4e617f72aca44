"""What does an image cost the host in Python, beside the GPU's own work?

    python benchmarks/bench_host_cost.py [--runs 2000] [--json]

A session's stream runs a recorded network on a stand-in for the driver whose calls do nothing, so that what is left is
Python: the time of the processor per image, for prepared images and for pixels with the two kernels around the network.
The images are small, so that copying them counts for nothing. Needs no GPU.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from results_file import options, publish, table

from medseg_trt.kernels import image_to_tensor, logits_to_mask
from medseg_trt.kernels.device import Device
from medseg_trt.kernels.launch import Launch, Launcher
from medseg_trt.sessions.tensorrt_engine import Engine
from medseg_trt.sessions.tensorrt_stream import InferenceRequest, InferenceStream
from medseg_trt.spec import Preprocessing

SIZE, CLASSES = (16, 16), 9
ROUNDS = 5  # the median of them


def _nothing(*_: object) -> int:
    return 0


class StandIn(Device):
    """A driver whose calls do nothing; pinned memory is the host's."""

    capability, cuda, name = 89, (13, 0), "stand-in"

    def __init__(self) -> None:
        self._pinned: list[np.ndarray] = []
        self._next = 1 << 20

    def allocate_host(self, nbytes: int) -> int:
        """Return memory of the host."""
        self._pinned.append(np.zeros(nbytes, np.uint8))
        return self._pinned[-1].ctypes.data

    def load(self, ptx: str, symbol: str) -> str:
        """Return the symbol."""
        return symbol

    def launch(self, launch: Launch) -> None:
        """Do nothing."""

    activate = free_bytes = free = free_host = new_stream = free_stream = clear = upload = download = _nothing  # pyright: ignore
    begin_capture = launch_graph = free_graph = new_event = free_event = record_event = wait_event = _nothing  # pyright: ignore
    synchronize = unload = _nothing  # pyright: ignore

    def allocate(self, nbytes: int) -> int:
        """Return another address, which is aligned."""
        self._next += 1 << 20
        return self._next

    def end_capture(self, stream: int) -> str:
        """Return something that stands for a graph."""
        return "graph"

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Return a time."""
        return 1.0


def engine() -> Engine:
    """Return an engine of one image whose network does nothing."""
    source = SimpleNamespace(nbytes=3 * 4 * SIZE[0] * SIZE[1], dtype=np.dtype(np.float32), shape=(3, *SIZE))
    target = SimpleNamespace(nbytes=CLASSES * 4 * SIZE[0] * SIZE[1], dtype=np.dtype(np.float32), shape=(CLASSES, *SIZE))
    context = SimpleNamespace(prepare=_nothing, enqueue=_nothing, is_capturable=lambda _: True)
    made = SimpleNamespace(
        input=source,
        output=target,
        least=1,
        most=1,
        activation_bytes=1,
        filled_up=lambda images: images,
        context=lambda _: context,
    )
    return cast("Engine", made)


def microseconds(run: Callable[[], object], runs: int) -> float:
    """Return the processor's time of one run: the median of some rounds."""
    taken: list[float] = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(runs):
            run()
        taken.append(1e6 * (time.process_time() - began) / runs)
    return float(np.median(taken))


def measure(runs: int) -> dict[str, float]:
    """Return microseconds per image."""
    pixels, p = np.zeros((1, *SIZE, 3), np.uint8), Preprocessing(image_size=SIZE)
    requests = {
        "prepared images": (InferenceRequest(images=1), np.zeros((1, 3, *SIZE), np.float32)),
        "pixels, with two kernels": (
            InferenceRequest(
                images=1,
                to_tensor=tuple(image_to_tensor.scalars(p, pixels.shape).items()),
                to_mask=tuple(logits_to_mask.scalars(p, 1, CLASSES, SIZE).items()),
            ),
            pixels,
        ),
    }
    device = StandIn()
    stream = InferenceStream(engine(), device, Launcher(device, lambda *_: ""))
    costs: dict[str, float] = {}
    for name, (request, source) in requests.items():
        run = partial(stream.run, request, source)
        for _ in range(3):  # the second is recorded
            run()
        costs[name] = microseconds(run, runs)
    stream.close()
    return costs


def page(result: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows = [(name, f"{cost:.1f}") for name, cost in result["microseconds"].items()]
    return "\n".join(["# Host time per image", "", *table(("input", "µs of the processor"), rows), ""])


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="images per round")
    chosen = parser.parse_args()
    publish("host_cost", {"microseconds": measure(chosen.runs)}, page, chosen)
