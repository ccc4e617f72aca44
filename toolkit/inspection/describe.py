"""Describe a checkpoint, a bundle, an ONNX file, an engine or an architecture for ``medseg-trt inspect``."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from medseg_trt.errors import InputError, UsageError
from medseg_trt.files import sha256
from medseg_trt.network_spec import NetworkSpec
from medseg_trt.spec import to_dict

if TYPE_CHECKING:
    from medseg_trt.bundles.bundle import Bundle
    from medseg_trt.train.checkpoint import Checkpoint
    from medseg_trt.train.models.cost import Cost


@runtime_checkable
class Description(Protocol):
    """What ``inspect`` shows of a file."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchitectureDescription:
    """The size of an architecture."""

    cost: "Cost"
    spec: NetworkSpec

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {**asdict(self.cost), "spec": to_dict(self.spec)}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointDescription:
    """The content of a checkpoint whose weights fit its architecture."""

    sha256: str
    cost: "Cost"
    checkpoint: "Checkpoint"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        checkpoint = self.checkpoint
        return {
            "sha256": self.sha256,
            **asdict(self.cost),
            "block": {"sha256": checkpoint.block_sha256, "file": str(checkpoint.block_file or "")},
            "spec": to_dict(checkpoint.spec),
            "preprocessing": to_dict(checkpoint.preprocessing),
            "classes": to_dict(checkpoint.classes),
            "provenance": _counted_splits(checkpoint.provenance.to_dict()),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleDescription:
    """The manifest of a bundle whose files are intact."""

    bundle: "Bundle"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return self.bundle.manifest()


def describe(target: str, image_size: int, classes: int) -> Description:
    """Describe a file, a folder or an architecture.

    Args:
        target: ``model.pt``, a ``*.medseg`` folder, a ``*.onnx`` file, an engine ``*.plan``, or ``arch:NAME``.
        image_size: height and width of ``arch:NAME``, in pixels.
        classes: number of logits of ``arch:NAME``.

    Raises:
        InputError: the target does not exist or has an unknown suffix.
        UsageError: an unknown architecture, or an image size that it does not support.
        ArtefactError: the target is damaged or not to be trusted.
    """
    if target.startswith("arch:"):
        return _architecture(target.removeprefix("arch:"), (image_size, image_size), classes)
    path = Path(target)
    if not path.exists():
        raise InputError(
            f"{path} does not exist; give a checkpoint (.pt), a bundle (.medseg), an ONNX file, an engine (.plan) "
            "or arch:NAME"
        )
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise InputError(f"{path} cannot be inspected; known are {', '.join(KINDS)} and arch:NAME")
    return KINDS[suffix](path)


def _architecture(name: str, image_size: tuple[int, int], classes: int) -> ArchitectureDescription:
    from medseg_trt.train.models.cost import cost
    from medseg_trt.train.models.external import allow_own_code
    from medseg_trt.train.models.model import model_spec

    try:
        allow_own_code(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    spec = model_spec(name, image_size, classes)
    return ArchitectureDescription(cost=cost(spec), spec=spec)


def _checkpoint(path: Path) -> CheckpointDescription:
    from medseg_trt.train.checkpoint import load_checkpoint
    from medseg_trt.train.models.cost import cost

    checkpoint = load_checkpoint(path)
    checkpoint.model()  # checks that the weights fit, and that the block is the one of the training
    return CheckpointDescription(sha256=sha256(path), cost=cost(checkpoint.spec), checkpoint=checkpoint)


def _counted_splits(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the names of the cases of every split, which ``data.json`` in the run folder lists, by their number."""
    data = provenance.get("data") or {}
    if "manifest" not in data:
        return dict(provenance)
    splits = {split: len(names) for split, names in data["manifest"]["splits"].items()}
    return {**provenance, "data": {**data, "manifest": {"splits": splits}}}


def _bundle(path: Path) -> BundleDescription:
    from medseg_trt.bundles.bundle import load_bundle

    return BundleDescription(bundle=load_bundle(path))


def _onnx(path: Path) -> Description:
    from medseg_trt.inspection.onnx_file import describe_onnx

    return describe_onnx(path)


def _plan(path: Path) -> Description:
    from medseg_trt.inspection.engine import inspect_engine

    return inspect_engine(path)


KINDS: Mapping[str, Callable[[Path], Description]] = {
    ".pt": _checkpoint,
    ".medseg": _bundle,
    ".onnx": _onnx,
    ".plan": _plan,
}
