"""The peaks of a GPU, measured by a stand-in's clock: PyTorch multiplies on the CPU here."""

from collections.abc import Callable

import pytest
import torch

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


def test_a_number_format_that_the_device_lacks_has_no_peak(monkeypatch):
    def refused(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not implemented for 'Char'")

    monkeypatch.setattr(torch, "_int_mm", refused)
    assert [peak.arithmetic for peak in gpu_peaks(CPU, Clock(), SIDE, 1 << 20)] == ["fp32", "fp16", "bf16"]
