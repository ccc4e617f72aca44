"""Say what a checkpoint, a bundle, an ONNX file, an engine or an architecture is, as plain data."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medseg_trt.errors import InputError
from medseg_trt.files import sha256
from medseg_trt.spec import to_dict


def describe(what: str, image_size: int, classes: int) -> dict[str, Any]:
    """Describe a file, a folder or an architecture.

    Args:
        what: ``model.pt``, a ``*.medseg`` folder, a ``*.onnx`` file, an engine ``*.plan``, or ``arch:NAME``.
        image_size: height and width of ``arch:NAME``, in pixels.
        classes: number of logits of ``arch:NAME``.

    Raises:
        InputError: it is none of these.
        UsageError: there is no such architecture, or not for this image size.
        ArtefactError: it is damaged or not to be trusted.
    """
    if what.startswith("arch:"):
        return _architecture(what.removeprefix("arch:"), (image_size, image_size), classes)
    path = Path(what)
    if not path.exists():
        raise InputError(
            f"{path} does not exist; give a checkpoint (.pt), a bundle (.medseg), an ONNX file, an engine (.plan) "
            "or arch:NAME"
        )
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise InputError(f"{path} is nothing that can be inspected; known are {', '.join(KINDS)} and arch:NAME")
    return KINDS[suffix](path)


def _architecture(name: str, image_size: tuple[int, int], classes: int) -> dict[str, Any]:
    from medseg_trt.train.models.cost import cost
    from medseg_trt.train.models.model import model_spec

    spec = model_spec(name, image_size, classes)
    return {**asdict(cost(spec)), "spec": to_dict(spec)}


def _checkpoint(path: Path) -> dict[str, Any]:
    from medseg_trt.train.checkpoint import load_checkpoint
    from medseg_trt.train.models.cost import cost

    checkpoint = load_checkpoint(path)
    checkpoint.model()  # the weights fit, and the block is the one it was trained with
    return {
        "sha256": sha256(path),
        **asdict(cost(checkpoint.spec)),
        "block": {"sha256": checkpoint.block_sha256, "file": str(checkpoint.block_file or "")},
        "spec": to_dict(checkpoint.spec),
        "preprocessing": to_dict(checkpoint.preprocessing),
        "classes": to_dict(checkpoint.classes),
        "provenance": _brief(checkpoint.provenance),
    }


def _brief(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Count the cases of every split, which ``data.json`` in the run folder lists."""
    data = provenance.get("data") or {}
    if "manifest" not in data:
        return dict(provenance)
    splits = {split: len(names) for split, names in data["manifest"]["splits"].items()}
    return {**provenance, "data": {**data, "manifest": {"splits": splits}}}


def _bundle(path: Path) -> dict[str, Any]:
    from medseg_trt.bundles.bundle import load_bundle

    return load_bundle(path).manifest()


def _onnx(path: Path) -> dict[str, Any]:
    from medseg_trt.inspection.onnx_file import describe_onnx

    return describe_onnx(path)


def _plan(path: Path) -> dict[str, Any]:
    from medseg_trt.inspection.engine import inspect_engine

    return inspect_engine(path).to_dict()


KINDS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    ".pt": _checkpoint,
    ".medseg": _bundle,
    ".onnx": _onnx,
    ".plan": _plan,
}
