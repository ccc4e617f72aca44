"""The peaks of a GPU, measured by a stand-in's clock: PyTorch multiplies on the CPU here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from medseg_trt.bench import gpu_peaks as gpu_peaks_module
from medseg_trt.bench.gpu_peaks import FORMATS, gpu_peaks

CPU, SIDE = torch.device("cpu"), 64


class Clock:
    """Runs every launch once and says that it took 2 ms."""

    def __init__(self) -> None:
        self.results: list[torch.Tensor] = []

    def __call__(self, launch: Callable[[], object]) -> float:
        result = launch()
        assert isinstance(result, torch.Tensor)
        self.results.append(result)
        return 2.0


def test_every_number_format_is_multiplied_and_a_copy_counts_what_it_reads_and_writes():
    clock = Clock()
    peaks = gpu_peaks(CPU, clock, SIDE, 1 << 20)
    assert [peak.arithmetic for peak in peaks] == list(FORMATS)
    copied, *products = clock.results
    assert copied.nbytes == 1 << 20
    for peak, product, dtype in zip(peaks, products, FORMATS.values(), strict=True):
        assert (product == SIDE).all()
        assert product.dtype == (torch.int32 if dtype == torch.int8 else dtype)
        assert peak.gmacs_per_s == pytest.approx(SIDE**3 / 2e-3 / 1e9)
        assert peak.gbytes_per_s == pytest.approx(2 * 2**20 / 2e-3 / 1e9)
        assert peak.device == "CPU"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_everything_is_timed_while_the_gpu_is_the_current_one(monkeypatch):
    """PyTorch's events are recorded in a stream of the current GPU, which is the first one unless it is said."""
    current, during = list[torch.device](), list[list[torch.device]]()

    @contextmanager
    def device(entered: torch.device) -> Iterator[None]:
        current.append(entered)
        yield
        current.pop()

    def milliseconds(_: Callable[[], object]) -> float:
        during.append(list(current))
        return 1.0

    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("_copy", "_product"):
        monkeypatch.setattr(gpu_peaks_module, name, lambda *_: lambda: None)
    monkeypatch.setattr(gpu_peaks_module, "device_name", lambda _: "GPU")
    second = torch.device("cuda", 1)
    assert len(gpu_peaks(second, milliseconds, SIDE, 1 << 20)) == len(FORMATS)
    assert during == [[second]] * (1 + len(FORMATS))
    assert current == []


def test_a_number_format_that_the_device_lacks_has_no_peak(monkeypatch):
    def refused(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not implemented for 'Char'")

    monkeypatch.setattr(torch, "_int_mm", refused)
    assert [peak.arithmetic for peak in gpu_peaks(CPU, Clock(), SIDE, 1 << 20)] == ["fp32", "fp16", "bf16"]
