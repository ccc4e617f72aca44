"""What ONNX Runtime's TensorRT providers keep between sessions: the engines or kernels that they build from a graph.

The batches that they are built for are named beforehand. Otherwise every batch of a new size builds them again.
Source: ONNX Runtime, documentation of its TensorRT and TensorRT-RTX execution providers, "Configurations".
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.bundles.manifest import Variant
from medseg_trt.export.graph.interface import CHANNELS, INPUT
from medseg_trt.files import cache_folder
from medseg_trt.spec import MAX_BATCH, SLICES_PER_BATCH

OWN_FOLDER = 0o700  # what it holds is run by the next session
ENGINES, KERNELS = "trt", "nv"  # the beginning of the names of a provider's options


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCache:
    """The folder for one graph with its weights, and the images that the graph takes."""

    folder: Path
    image_size: tuple[int, int]  # pixels: rows, columns

    @classmethod
    def of(cls, bundle: Bundle, variant: Variant) -> "EngineCache":
        """Return that of a graph of a bundle; the providers' own names of engines do not depend on the weights."""
        digests = "".join(bundle.content.files[name].sha256 for name in (variant.graph, variant.weights))
        folder = cache_folder("onnxruntime", hashlib.sha256(digests.encode()).hexdigest())
        return cls(folder=folder, image_size=bundle.preprocessing.image_size)

    def options(self, prefix: str, gpu: str) -> dict[str, str]:
        """Return the options of a provider for a GPU, and make the folder.

        Args:
            prefix: of the provider's options, ``ENGINES`` or ``KERNELS``.
            gpu: its name; GPUs do not share engines.
        """
        folder = self.folder / prefix / hashlib.sha256(gpu.encode()).hexdigest()
        folder.mkdir(mode=OWN_FOLDER, parents=True, exist_ok=True)
        kept = {
            ENGINES: {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(folder),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(folder),
            },
            KERNELS: {"nv_runtime_cache_path": str(folder)},
        }
        sides = "x".join(map(str, (CHANNELS, *self.image_size)))
        batches = zip(("min", "opt", "max"), (1, SLICES_PER_BATCH, MAX_BATCH), strict=True)
        return kept[prefix] | {f"{prefix}_profile_{end}_shapes": f"{INPUT}:{batch}x{sides}" for end, batch in batches}
