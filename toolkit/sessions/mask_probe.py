"""Compare the masks that a graph makes itself with those that its contract makes of its own logits."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float32, UInt8
from numpy import ndarray

from medseg_trt.errors import ArtefactError
from medseg_trt.imaging.preprocess import Size, Spacing, resampled_size, restore
from medseg_trt.spec import Preprocessing

MAX_DISAGREEMENT = 0.02
# Share of pixels. Both sides resize the same logits, so only pixels may differ where two classes tie within the
# rounding of the type that a back-end computes in, bfloat16 at worst. Graphs of another contract differed in 7 %.
PROBE_SIZE = (173, 219)  # height, width in pixels: no multiple of anything
PROBE_SPACINGS = ((1.3, 0.8), (0.4, 1.1))  # of rows and columns, in the network's: cropped and padded axes


@runtime_checkable
class MaskingNetwork(Protocol):
    """What of ``Session`` is asked."""

    description: str
    gives_masks: bool

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images."""
        ...

    def masks(
        self, batch: Float32[ndarray, "batch 3 _ _"], size: Size, resampled: Size
    ) -> UInt8[ndarray, "batch height width"]:
        """Return the labels of a batch of prepared images at the size of their sources."""
        ...


def check_masks(session: MaskingNetwork, preprocessing: Preprocessing, image: Float32[ndarray, "1 3 _ _"]) -> None:
    """Refuse a session whose masks are not those of its logits under a contract; one without masks passes.

    Args:
        session: an open network.
        preprocessing: the contract of the checkpoint.
        image: a prepared image, such as the golden input.

    Raises:
        ArtefactError: the masks are others.
    """
    if not session.gives_masks:
        return
    logits = session.run(image)[0]
    for size, spacing_mm in _probes(preprocessing):
        expected = restore(logits, size, preprocessing, spacing_mm)
        masks = session.masks(image, size, resampled_size(size, preprocessing, spacing_mm))[0]
        share = float((masks != expected).mean()) if masks.shape == expected.shape else 1.0
        if not share <= MAX_DISAGREEMENT:
            raise ArtefactError(
                f"{session.description} makes other masks than its preprocessing asks for ({100 * share:.1f} % of the "
                "pixels of a generated image); do not use them. Build the bundle again: "
                "medseg-trt build --ckpt run/best.pt"
            )


def _probes(preprocessing: Preprocessing) -> list[tuple[Size, Spacing | None]]:
    spacing_mm = preprocessing.spacing_mm
    if spacing_mm is None:
        return [(PROBE_SIZE, None)]
    height, width = preprocessing.image_size
    spaced = [((height, width), (rows * spacing_mm, columns * spacing_mm)) for rows, columns in PROBE_SPACINGS]
    return [(PROBE_SIZE, None), *spaced]
