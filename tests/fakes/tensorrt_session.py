"""A TensorRT session on a GPU that records and delays, with a network that NumPy computes."""

import numpy as np
from fakes.gpu import FakeGpu
from fakes.trt import FakeTrt

from medseg_trt.imaging.preprocess import prepare, restore
from medseg_trt.imaging.segment import PixelRun
from medseg_trt.sessions.tensorrt import PixelKernels, TensorRtSession
from medseg_trt.sessions.tensorrt_engine import Engine
from medseg_trt.spec import Preprocessing

SIZE = (16, 32)
INPUT, OUTPUT = (3, *SIZE), (4, *SIZE)
PASS = ["upload", "execute_async_v3", "download"]
PIXEL_PASS = ["upload", "launch", "execute_async_v3", "launch", "download"]
FORMS = {
    "stretched": (Preprocessing(image_size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)), None),
    "linear": (Preprocessing(image_size=SIZE, window=(20.0, 200.0), resize="linear"), None),
    "spacing": (Preprocessing(image_size=SIZE, spacing_mm=1.5), (1.0, 2.0)),
    "spacing unknown": (Preprocessing(image_size=SIZE, spacing_mm=1.5), None),
}


def network(images: np.ndarray) -> np.ndarray:
    """Return four logits of every pixel, each image by itself; a faint pattern keeps them from being equal."""
    weights = np.random.default_rng(0).normal(size=(4, 3))
    pattern = np.random.default_rng(1).normal(size=OUTPUT)
    return (np.einsum("oc,bchw->bohw", weights, images) + pattern).astype(images.dtype)


class Opened:
    """A session on a fake GPU."""

    def __init__(self, kernels: PixelKernels | None = None, library: str = "tensorrt-rtx", graphs: bool = True, **trt):
        self.gpu = FakeGpu()
        self.gpu.activate()
        self.trt = FakeTrt(self.gpu, network, INPUT, OUTPUT, **trt)
        engine = Engine(self.trt, library, b"plan")
        self.session = TensorRtSession(engine, self.gpu, library, "fake", kernels, graphs=graphs)
        self.gpu.calls.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session.close()
        assert self.gpu.is_clean()

    def masks_of(self, slices: np.ndarray, spacing_mm: tuple[float, float] | None = None) -> PixelRun:
        masks = self.session.device_pipeline(slices, spacing_mm)
        assert masks is not None
        return masks

    def calls_of(self, *batches: int) -> list[str]:
        """Run batches, check their logits, and return the names of the calls that they made."""
        before = len(self.gpu.calls)
        for number, images in enumerate(batches):
            batch = images_of(images, seed=number)
            np.testing.assert_allclose(self.session.run(batch), network(batch), atol=1e-6)
        return self.gpu.names()[before:]


def images_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *INPUT)).astype(np.float32)


def without(names: list[str], *left_out: str) -> list[str]:
    return [name for name in names if name not in left_out]


def slices_of(count: int, size: tuple[int, int] = (23, 41), channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, channels), np.uint8)


def masks_of_the_cpu(slices: np.ndarray, p: Preprocessing, spacing_mm) -> np.ndarray:
    logits = network(np.stack([prepare(pixels, p, spacing_mm) for pixels in slices]))
    return np.stack([restore(slice_logits, slices.shape[1:3], p, spacing_mm) for slice_logits in logits])
