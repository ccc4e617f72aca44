"""How the output of an execution compares with PyTorch's, as the manifest records it."""

from dataclasses import dataclass

from medseg_trt.export.gate import GateVerdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Differences between the output of an execution and PyTorch's on the same images."""

    by: str  # description of the session that ran the graph
    images: str  # description of the images
    num_images: int
    max_abs_error: float  # of the logits
    agreement: float  # share of pixels with the same label, 0 … 1
    batch_sizes: tuple[int, ...] = ()  # that were compared; only where nothing is rounded
    max_row_error: float | None = None  # of a row's logits in other batches; only where nothing is rounded
    sqnr_db: float | None = None  # of the logits; None: they are equal, or were compared in batches
    own_masks_agreement: float | None = None  # of the masks that the graph makes itself; None: it makes none
    gate: GateVerdict | None = None  # None: nothing is rounded

    __pydantic_config__ = {"extra": "forbid"}
