"""The steps of ``pipeline.build``, in the order in which it takes them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy import ndarray

from medseg_trt.building.contract import Contract
from medseg_trt.building.executions import GRAPH_OF, ExecutionTrials
from medseg_trt.building.provenance import Provenance
from medseg_trt.building.reference import Reference
from medseg_trt.building.reference_images import reference_images
from medseg_trt.building.variants import make_variants
from medseg_trt.bundles.bundle import MANIFEST, golden_input
from medseg_trt.bundles.manifest import Manifest, Variant
from medseg_trt.engines.build import Engines, build_engines, check_engines
from medseg_trt.engines.kernels import add_kernels
from medseg_trt.errors import UsageError
from medseg_trt.export.fold.fold import fold, plain_report
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.masks import require_linear
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.export.graph.trace import trace
from medseg_trt.export.precision.quantize import parse_precision
from medseg_trt.machine import package_versions
from medseg_trt.progress import LOG
from medseg_trt.spec import BuildSpec, to_dict
from medseg_trt.train.models.model import runner

if TYPE_CHECKING:
    from medseg_trt.train.checkpoint import Checkpoint
    from medseg_trt.train.models.transunet import TransUNet


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedGraph:
    """The float32 graph, from which every variant is made."""

    graph: OnnxGraph
    passes: Mapping[str, Any]  # what each rule of folding and fusing changed


def check_request(spec: BuildSpec, folder: Path) -> None:
    """Refuse within seconds what would fail after minutes.

    Raises:
        UsageError: ``folder`` exists and is no bundle, or a precision or a target does not exist.
        MissingExtraError: the library that builds engines is not installed.
        DeviceError: that library needs a GPU, and there is none.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} exists and is no bundle, so it is not replaced; choose another name with -o")
    if spec.engines is not None:
        check_engines(spec.engines, spec.outputs, spec.precisions)
    for name in spec.precisions:
        parse_precision(name)


def make_reference(checkpoint: "Checkpoint", network: "TransUNet", spec: BuildSpec, data: Path | None) -> Reference:
    """Run PyTorch on the images that every graph is compared on.

    Raises:
        InputError: ``data`` cannot be used.
        UsageError: an image is in two splits.
    """
    images = reference_images(checkpoint, data)
    return Reference(network=runner(network), contract=Contract.of(checkpoint), images=images, spec=spec)


def check_outputs(checkpoint: "Checkpoint", spec: BuildSpec) -> None:
    """Refuse graphs that compute masks where the checkpoint's resampling cannot be part of a graph.

    Raises:
        UsageError: it cannot.
    """
    if spec.outputs == "mask":
        require_linear(checkpoint.preprocessing)


def export_graph(network: "TransUNet", reference: Reference) -> ExportedGraph:
    """Fold the network, compare it with PyTorch, trace it to ONNX and fuse nodes.

    Raises:
        AccuracyGateError: the folded network gives other logits than PyTorch.
    """
    folded, report = fold(network)
    rules = ", ".join(f"{folding.count} {rule}" for rule, folding in report.items())
    LOG.info("verify the folded network (%s)", rules)
    reference.check_logits(runner(folded))
    LOG.info("trace the network to ONNX")
    graph, fused = fuse(trace(folded))
    for rule, result in fused.items():
        if result.reason:
            LOG.debug("fusion %s: %s", rule, result.reason)
    return ExportedGraph(
        graph=graph,
        passes={"folded": plain_report(report), "fused": {rule: result.count for rule, result in fused.items()}},
    )


def golden_pair(checkpoint: "Checkpoint", network: "TransUNet") -> tuple[ndarray, ndarray]:
    """Return the golden input and PyTorch's logits of it."""
    pixel_values = golden_input(checkpoint.preprocessing)
    return pixel_values, runner(network)(pixel_values)


def write_variants(folder: Path, exported: ExportedGraph, spec: BuildSpec, reference: Reference) -> dict[str, Variant]:
    """Write the graphs of every precision into ``folder`` and return them by name.

    Raises:
        UsageError: a precision needs calibration images, and there are none.
        AccuracyGateError: a precision does not keep the masks.
    """
    variants: dict[str, Variant] = {}
    for name in dict.fromkeys(GRAPH_OF.get(precision, precision) for precision in spec.precisions):
        variants |= make_variants(
            exported.graph,
            folder,
            name,
            exported.passes,
            contract=reference.contract,
            outputs=spec.outputs,
            reference=reference,
        )
    return variants


def add_engines(folder: Path, variants: Mapping[str, Variant], tried: ExecutionTrials, spec: BuildSpec) -> Engines:
    """Build the engines that ``spec`` asks for, and the kernels that run beside them."""
    if spec.engines is None:
        return Engines(built=(), dropped=())
    engines = build_engines(folder, variants, tried.verified, spec.engines, spec.precisions)
    missing_kernels = add_kernels(folder, spec.engines)
    return replace(engines, dropped=(*engines.dropped, *missing_kernels))


def make_manifest(
    checkpoint: "Checkpoint",
    path: Path,
    spec: BuildSpec,
    variants: Mapping[str, Variant],
    tried: ExecutionTrials,
    engines: Engines,
) -> Manifest:
    """Describe the bundle; ``path`` is the file of the checkpoint."""
    return Manifest(
        model=checkpoint.spec,
        preprocessing=checkpoint.preprocessing,
        classes=checkpoint.classes,
        build=spec,
        source=to_dict(Provenance.of(checkpoint, path)),
        versions=package_versions(),
        variants=variants,
        executions=tried.executions,
        engines=engines.built,
        dropped=(*tried.dropped, *engines.dropped),
    )
