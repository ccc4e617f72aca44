"""What a build has chosen to write, before the bundle is completed."""

from collections.abc import Mapping
from dataclasses import dataclass

from numpy import ndarray

from medseg_trt.building.executions import ExecutionTrials
from medseg_trt.building.reference import Reference
from medseg_trt.bundles.block_report import BlockReport
from medseg_trt.bundles.manifest import Variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """The graphs of a bundle and the ways to run them."""

    variants: Mapping[str, Variant]
    tried: ExecutionTrials
    golden: tuple[ndarray, ndarray]  # an input, and the logits of the network that the graphs compute
    block: BlockReport | None  # None: the network has no block
    reference: Reference  # what the executions were compared with, and what engines are compared with
    second: Reference | None = None  # of a second split, which judges rounded executions; None: none does
