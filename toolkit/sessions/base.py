"""The interface of a session: a network that is ready to run, whatever runs it."""

from abc import ABC, abstractmethod
from types import TracebackType

from jaxtyping import Float32, Num, UInt8
from numpy import ndarray

from medseg_trt.errors import UsageError
from medseg_trt.imaging.preprocess import Size
from medseg_trt.imaging.segment import PixelRun
from medseg_trt.sessions.device_times import DeviceTimes


class Session(ABC):
    """A network that is ready to run; a context manager that frees it at the end."""

    backend: str  # a key of BACKENDS, or "pytorch"
    device: str
    description: str  # back-end, version, precision and threads, for a table
    streams = 1  # runs that may overlap, each from a thread of its own
    gives_masks = False  # whether ``masks`` may be called: the graph was built with ``--outputs mask``

    @abstractmethod
    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images."""

    def masks(
        self, batch: Float32[ndarray, "batch 3 _ _"], size: Size, resampled: Size
    ) -> UInt8[ndarray, "batch height width"]:
        """Return the labels of a batch of prepared images at the size of their sources.

        Args:
            batch: images of one size and spacing.
            size: height and width of the sources in pixels.
            resampled: what ``preprocess.resampled_size`` says of them.

        Raises:
            UsageError: the graph gives logits alone.
        """
        raise UsageError(f"{self.description} gives logits alone; build with --outputs mask")

    def device_pipeline(
        self, pixels: Num[ndarray, "slices height width channels"], spacing_mm: tuple[float, float] | None
    ) -> PixelRun | None:
        """Return what makes masks of slices like these, (batch, height, width, channels), all on the device.

        None, where they are to be prepared and labelled on the CPU: for this session, or for pixels like these.
        """
        return None

    def time_on_device(
        self, batch: Float32[ndarray, "batch 3 height width"], duration_s: float, min_runs: int
    ) -> DeviceTimes | None:
        """Run prepared images that are on the device already, for ``duration_s`` and at least ``min_runs`` times.

        Returns:
            The times by the device's own clock, or None where the back-end does not tell them.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Free the network."""

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
