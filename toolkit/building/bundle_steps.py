"""The steps of ``pipeline.build``, in the order in which it takes them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_trt.building.block_ladder import BlockLadder
from medseg_trt.building.contract import Contract
from medseg_trt.building.deployment import Deployment
from medseg_trt.building.engine_trials import say_unverified, try_engines
from medseg_trt.building.executions import GRAPH_OF, ExecutionTrials, default_graph
from medseg_trt.building.guard import guard_of
from medseg_trt.building.postprocessing import judged_postprocessing, learn
from medseg_trt.building.provenance import Provenance
from medseg_trt.building.reference import Reference
from medseg_trt.building.reference_images import JudgedImages, reference_images, second_judged_images
from medseg_trt.building.stream_trials import with_streams
from medseg_trt.building.variants import make_variants
from medseg_trt.bundles.bundle import DEFAULT_GRAPH, MANIFEST, load_bundle, seal
from medseg_trt.bundles.manifest import Manifest, Variant
from medseg_trt.bundles.signature import sign
from medseg_trt.devices import AUTO, ComputeDevice
from medseg_trt.engines.build import Engines, build_engines, check_engines
from medseg_trt.engines.choice import device_of_trials
from medseg_trt.engines.kernels import add_kernels
from medseg_trt.errors import UsageError
from medseg_trt.export.compress.rungs import EXACT, candidate_rungs, parse_block
from medseg_trt.export.fold.fold import fold, plain_report
from medseg_trt.export.fold.fold_rule import FoldResult
from medseg_trt.export.graph.fusions.fuse import fuse
from medseg_trt.export.graph.imported import simplify_traced
from medseg_trt.export.graph.masks import require_linear
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.export.graph.trace import trace
from medseg_trt.export.precision.quantize import parse_precision
from medseg_trt.external_spec import ExternalSpec
from medseg_trt.guard.guard import Guard
from medseg_trt.machine import package_versions
from medseg_trt.progress import LOG
from medseg_trt.sessions.pytorch import PyTorchSession
from medseg_trt.spec import BuildSpec, to_dict
from medseg_trt.train.models.model import runner
from medseg_trt.train.torch_device import torch_device

if TYPE_CHECKING:
    from medseg_trt.train.checkpoint import Checkpoint
    from medseg_trt.train.models.segmentation_model import SegmentationModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedGraph:
    """The float32 graph, from which every variant is made."""

    graph: OnnxGraph
    passes: Mapping[str, Any]  # what each rule of folding and fusing changed


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldedNetwork:
    """The folded network, verified, and what each rule changed."""

    network: "SegmentationModel"
    report: Mapping[str, FoldResult]


def check_request(spec: BuildSpec, folder: Path, device: ComputeDevice = AUTO) -> None:
    """Refuse within seconds what would fail after minutes.

    Raises:
        UsageError: ``folder`` exists and is no bundle, or a precision, a target or a block does not exist.
        MissingExtraError: the library that builds engines is not installed.
        DeviceError: that library needs a GPU, and there is none.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} exists and is no bundle, so it is not replaced; choose another name with -o")
    if spec.engines is not None:
        check_engines(spec.engines, spec.outputs, spec.precisions, device.number)
    for name in spec.precisions:
        parse_precision(name)
    parse_block(spec.block)


def make_reference(
    checkpoint: "Checkpoint",
    network: "SegmentationModel",
    spec: BuildSpec,
    data: Path | None,
    device: ComputeDevice = AUTO,
) -> Reference:
    """Run PyTorch on the images that every graph is compared on; ``auto`` takes the GPU where PyTorch has one.

    Graphs and engines are tried on the GPU where the driver has one, also if PyTorch is built for CPUs alone.

    Raises:
        DeviceError: PyTorch or the driver has no such device.
        InputError: ``data`` cannot be used.
        UsageError: an image is in two splits.
    """
    chosen, tried_on = torch_device(device), device_of_trials(device)
    images, contract = reference_images(checkpoint, data), Contract.of(checkpoint)
    # A copy: the network itself is folded and traced on the CPU.
    run = runner(network) if chosen.type == "cpu" else PyTorchSession(copy.deepcopy(network), chosen).run
    return Reference(network=run, contract=contract, images=images, spec=spec, device=tried_on)


def second_images(checkpoint: "Checkpoint", spec: BuildSpec, data: Path | None) -> JudgedImages | None:
    """Return the images of a second labelled split, which judge replacements of the block; None: none are judged."""
    return None if spec.block == str(EXACT) else second_judged_images(checkpoint, data)


def block_ladder(
    checkpoint: "Checkpoint",
    network: "SegmentationModel",
    folded: FoldedNetwork,
    reference: Reference,
    second: JudgedImages | None,
    data: Path | None,
) -> BlockLadder:
    """Return the rungs of the block that the build tries.

    Raises:
        UsageError: the block cannot be replaced as ``spec.block`` asks.
    """
    judged = (reference.images.judged, *(() if second is None else (second,)))
    return BlockLadder(checkpoint, network, folded.network, reference.spec, data, judged)


def check_block(checkpoint: "Checkpoint", spec: BuildSpec) -> None:
    """Refuse a replacement that the checkpoint's block cannot have.

    Raises:
        UsageError: there is no block, or none that a replacement can stand for, or ``spec.block`` exceeds its geometry.
    """
    candidate_rungs(parse_block(spec.block), checkpoint.spec)


def check_outputs(checkpoint: "Checkpoint", spec: BuildSpec) -> None:
    """Refuse graphs that compute masks where the checkpoint's resampling cannot be part of a graph.

    Raises:
        UsageError: it cannot, or masks are blended of several windows, which no graph sees together.
    """
    if spec.outputs == "mask":
        require_linear(checkpoint.preprocessing)
        if checkpoint.preprocessing.windows is not None:
            raise UsageError("the network was trained on windows, whose logits are blended; leave --outputs mask out")


def fold_network(network: "SegmentationModel", reference: Reference) -> FoldedNetwork:
    """Fold the network and compare it with PyTorch.

    Raises:
        AccuracyGateError: the folded network gives other logits than PyTorch.
    """
    folded, report = fold(network)
    rules = ", ".join(f"{folding.count} {rule}" for rule, folding in report.items())
    LOG.info("verify the folded network (%s)", rules)
    reference.check_logits(runner(folded))
    return FoldedNetwork(network=folded, report=report)


def export_graph(network: "SegmentationModel", folding: Mapping[str, FoldResult]) -> ExportedGraph:
    """Trace a folded network to ONNX and fuse nodes.

    Args:
        network: folded; its block may be replaced.
        folding: the result of each folding rule.
    """
    LOG.info("trace the network to ONNX")
    traced = trace(network)
    if isinstance(network.spec, ExternalSpec):
        LOG.info("of folding and fusion, only BatchNorms apply to a network from elsewhere")
        traced = simplify_traced(traced, network.spec)
    return fused_graph(traced, plain_report(folding))


def fused_graph(graph: OnnxGraph, folded: Mapping[str, Any]) -> ExportedGraph:
    """Fuse nodes of a graph; ``folded`` is what was done to its network before."""
    fused_copy, results = fuse(graph)
    for rule, result in results.items():
        if result.reason:
            LOG.debug("fusion %s: %s", rule, result.reason)
    counts = {rule: result.count for rule, result in results.items()}
    return ExportedGraph(graph=fused_copy, passes={"folded": folded, "fused": counts})


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


def complete(
    folder: Path,
    checkpoint: "Checkpoint",
    path: Path,
    spec: BuildSpec,
    deployed: Deployment,
    reference: Reference,
    key: Any,
) -> None:
    """Add engines, golden data, what is learnt from the images, manifest and signature to a folder with the graphs.

    Where the build tries graphs on a GPU, engines that fit it are verified and timed there.

    Args:
        folder: of the bundle that is being made.
        checkpoint: what the bundle is made from.
        path: its file.
        spec: what was asked for.
        deployed: the graphs, and the ways to run them.
        reference: post-processing and guard are learnt from its network's masks and its images.
        key: the private key of ``signature.read_private_key``; None leaves the bundle unsigned.
    """
    variants = deployed.variants
    engines = add_engines(folder, variants, deployed.tried, spec, reference.device.number)
    draft = make_manifest(checkpoint, path, spec, deployed, engines, guard_of(reference))
    tried, engines = _with_engines(folder, draft, deployed, engines)
    tried = with_streams(folder, variants, tried, deployed.golden[0])
    manifest = replace(
        draft,
        executions=tried.executions,
        engines=engines.built,
        postprocessing=judged_postprocessing(learn(reference), reference, folder, variants, tried),
        rejected_executions=(*tried.rejected, *engines.rejected),
    )
    default = default_graph(tried.executions, variants)
    if default is None:
        LOG.warning("no graph was verified with ONNX Runtime, so there is no %s for other tools", DEFAULT_GRAPH)
    seal(folder, manifest, deployed.golden[1], default)
    if key is not None:
        sign(folder / MANIFEST, key)


def add_engines(
    folder: Path, variants: Mapping[str, Variant], tried: ExecutionTrials, spec: BuildSpec, gpu_number: int = 0
) -> Engines:
    """Build the engines that ``spec`` asks for, and the kernels that run beside them."""
    if spec.engines is None:
        return Engines(built=(), rejected=())
    engines = build_engines(folder, variants, tried.verified, spec.engines, spec.precisions, gpu_number)
    missing_kernels = add_kernels(folder, spec.engines)
    return replace(engines, rejected=(*engines.rejected, *missing_kernels))


def _with_engines(
    folder: Path, draft: Manifest, deployed: Deployment, engines: Engines
) -> tuple[ExecutionTrials, Engines]:
    """Return the executions and the engines once these were verified, where the build tries graphs on a GPU."""
    if not engines.built or deployed.reference.device.kind != "cuda":
        say_unverified(engines)
        return deployed.tried, engines
    seal(folder, draft, deployed.golden[1], None)
    tried, engines = try_engines(load_bundle(folder), deployed, engines)
    # Sealed once more: what is opened from the folder later must not look for engines that were removed.
    seal(folder, replace(draft, executions=tried.executions, engines=engines.built), deployed.golden[1], None)
    return tried, engines


def make_manifest(
    checkpoint: "Checkpoint",
    path: Path,
    spec: BuildSpec,
    deployed: Deployment,
    engines: Engines,
    guard: Guard | None,
) -> Manifest:
    """Describe the bundle before its engines are run; ``path`` is the file of the checkpoint."""
    tried = deployed.tried
    return Manifest(
        model=checkpoint.spec,
        preprocessing=checkpoint.preprocessing,
        classes=checkpoint.classes,
        build=spec,
        source=to_dict(Provenance.of(checkpoint, path)),
        versions=package_versions(),
        variants=deployed.variants,
        executions=tried.executions,
        engines=engines.built,
        block=deployed.block,
        guard=guard,
        rejected_executions=(*tried.rejected, *engines.rejected),
    )
