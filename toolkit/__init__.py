"""medseg-trt: medical image segmentation with a frozen LLaMA block, from training to a verified, portable bundle.

Every name below is loaded on first use, so that ``import medseg_trt`` is quick and needs no torch. The import switches
the telemetry of other libraries off, see ``medseg_trt.telemetry``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medseg_trt.telemetry import switch_off

__version__ = "0.1.0"
__all__ = [
    "BuildSpec",
    "Bundle",
    "Checkpoint",
    "Classes",
    "EngineSpec",
    "Mask",
    "ModelSpec",
    "Preprocessing",
    "build",
    "infer",
    "load_bundle",
    "load_checkpoint",
    "open_session",
]

if TYPE_CHECKING:
    from medseg_trt.bundles.bundle import Bundle, load_bundle
    from medseg_trt.imaging.images import Mask
    from medseg_trt.network_spec import ModelSpec
    from medseg_trt.pipeline import build, infer
    from medseg_trt.sessions.open import open_session
    from medseg_trt.spec import BuildSpec, Classes, EngineSpec, Preprocessing
    from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint

switch_off()
_HOMES = {
    "BuildSpec": "spec",
    "Bundle": "bundles.bundle",
    "Checkpoint": "train.checkpoint",
    "Classes": "spec",
    "EngineSpec": "spec",
    "Mask": "imaging.images",
    "ModelSpec": "network_spec",
    "Preprocessing": "spec",
    "build": "pipeline",
    "infer": "pipeline",
    "load_bundle": "bundles.bundle",
    "load_checkpoint": "train.checkpoint",
    "open_session": "sessions.open",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
