"""Make the graphs of a bundle: every precision asked for, in every quantised format and dialect that a back-end wants.

What rounds numbers is judged by its masks before it is written: while the gate does not hold, the layers that do the
most harm go back to float, one group at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.building.activation_observer import observer
from medseg_trt.building.contract import Contract
from medseg_trt.building.reference import Reference
from medseg_trt.bundles.manifest import Variant
from medseg_trt.errors import AccuracyGateError, UsageError
from medseg_trt.export.gate import FloatFallback, GateVerdict, fall_back_to_float
from medseg_trt.export.graph.dialects import derive
from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.masks import with_masks
from medseg_trt.export.graph.modules import groups_of
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import OnnxGraph
from medseg_trt.export.precision.calibrate import Calibration, calibrate
from medseg_trt.export.precision.half import TYPES
from medseg_trt.export.precision.overflow import observed_values, rounded_graph, too_large
from medseg_trt.export.precision.policy import policy_digest
from medseg_trt.export.precision.quantize import (
    int8_share,
    needs_calibration,
    parse_precision,
    quantise,
    scheme_components,
    values_to_calibrate,
)
from medseg_trt.export.precision.sensitive_layers import sensitive_layers
from medseg_trt.export.precision.smooth import smooth, smoothable
from medseg_trt.network_spec import NetworkSpec
from medseg_trt.progress import LOG
from medseg_trt.sessions.backends import is_installed
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.sessions.subprocess_session import ChildSession
from medseg_trt.spec import to_dict

MIN_INT8_SHARE = 0.8  # of all MACs, or it is not called int8
IN_FILE_NAMES = str.maketrans("=+,", "--_")
INT8, FP8, FLOAT = "int8", "fp8", "fp32"
KEEPS_CASTS = "onnxruntime"  # OpenVINO drops a cast to 16 bits and back, and with it an overflow


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTarget:
    """A way to write a precision down."""

    dialect: str  # a key of export.graph.dialects.DIALECTS
    quant_format: str  # a key of export.precision.quantize.QUANT_FORMATS
    backend: str  # that it is meant for, and is judged with where that is installed


GRAPH_TARGETS: Mapping[str, GraphTarget] = {
    "canonical": GraphTarget(dialect="canonical", quant_format="int8", backend="onnxruntime"),
    "plain": GraphTarget(dialect="plain", quant_format="uint8", backend="openvino"),
    "convolved": GraphTarget(dialect="convolved", quant_format="uint8", backend="openvino"),
    "uint8": GraphTarget(dialect="canonical", quant_format="uint8_outputs", backend="onnxruntime"),
}
ONLY_INTEGERS = ("convolved", "uint8")  # say nothing new of a precision without integer activations
STAND_IN_TARGET = "uint8"  # judged where OpenVINO is not installed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """A float graph that is ready to be quantised, and what was found out on the way."""

    graph: OnnxGraph
    model: NetworkSpec
    name: str
    precision: Mapping[str, str]  # of each part
    calibration: Calibration | None
    keep_float: frozenset[str]  # GEMMs that eight bits would hurt most
    keep_wide: frozenset[str]  # GEMMs whose numbers 16 bits cannot hold
    notes: Mapping[str, Any]


def make_variants(
    graph: OnnxGraph,
    folder: Path,
    name: str,
    passes: Mapping[str, Any],
    *,
    contract: Contract,
    outputs: str,
    reference: Reference,
) -> dict[str, Variant]:
    """Write the graphs of one precision into the folder and return them by name.

    Args:
        graph: folded, traced and fused, in float32.
        folder: of the bundle that is being made.
        name: the precision, or a mix of several.
        passes: what was done to the graph so far.
        contract: of the network; it decides how a graph makes masks, whatever images there are.
        outputs: ``BuildSpec.outputs``.
        reference: what masks are compared with; its images calibrate.

    Raises:
        UsageError: an unknown precision, or no images to calibrate on.
        AccuracyGateError: the masks do not stay right, whatever is left in float.
    """
    prepared = _prepare(graph, name, contract.model, reference)
    is_for_cpus = prepared.calibration is not None and "+" not in name  # no CPU multiplies codes into 16-bit floats
    forms = [key for key in GRAPH_TARGETS if key not in ONLY_INTEGERS or is_for_cpus]
    if any(FP8 in scheme_components(scheme) for scheme in prepared.precision.values()):
        forms = ["canonical"]  # ONNX before opset 19, which the others are written in, has no such numbers
    relaxed = _relaxed(prepared, name, forms, reference) if set(prepared.precision.values()) != {FLOAT} else None
    kept = _names(prepared.graph, relaxed.kept_float) if relaxed else frozenset[str]()
    graphs = {key: _written(prepared, key, kept) for key in forms}
    share = int8_share(graphs["canonical"])
    if scheme_components(name)[0] == INT8 and share < MIN_INT8_SHARE:
        parts = dict.fromkeys(gemm.part for gemm in gemms(graph))
        raise AccuracyGateError(
            f"only {100 * share:.0f} % of the MACs would be in int8, less than {100 * MIN_INT8_SHARE:.0f} %; "
            f"name the parts that shall be: --precision {','.join(f'{part}=int8' for part in parts)}"
        )
    stem = name.translate(IN_FILE_NAMES)
    files = {f"{stem}.onnx" if key == "canonical" else f"{stem}-{key}.onnx": key for key in forms}
    if outputs == "mask":
        graphs = {key: with_masks(written, contract.preprocessing) for key, written in graphs.items()}
    save_graphs({file: graphs[key] for file, key in files.items()}, folder, f"weights-{stem}.bin")
    done = {**passes, **prepared.notes, "int8_share": share, "gate": to_dict(relaxed) if relaxed else None}
    groups = relaxed.kept_float if relaxed else ()

    def variant(file: str, key: str) -> Variant:
        target = GRAPH_TARGETS[key]
        policy = policy_digest(prepared.precision, target.quant_format, target.dialect, groups)
        passes = {**done, "policy": policy}
        return Variant(precision=name, dialect=key, graph=file, weights=f"weights-{stem}.bin", passes=passes)

    return {file.removesuffix(".onnx"): variant(file, key) for file, key in files.items()}


def _prepare(graph: OnnxGraph, name: str, model: NetworkSpec, reference: Reference) -> _Prepared:
    """Calibrate and smooth where integers need it, and look for numbers that 16 bits cannot hold."""
    precision, images = parse_precision(name), reference.images.calibration
    notes: dict[str, Any] = {"parts": precision}
    calibration, kept = None, tuple[str, ...]()
    if needs_calibration(precision):
        if images is None:
            raise UsageError(
                f"--precision {name} needs images to calibrate on that are not in the validation split; "
                "give a folder with a train and a val split: --data DIR"
            )
        LOG.info("calibrate %s on %d images", name, len(images))
        named = [gemm.name for gemm in gemms(graph) if INT8 in scheme_components(precision[gemm.part])]
        kept = sensitive_layers(graph, named)
        rounded = [name for name in named if name not in kept]
        with observer(graph, smoothable(graph, rounded)) as observe:
            graph, smoothings = smooth(graph, rounded, observe, images)
        values = values_to_calibrate(graph, precision)
        with observer(graph, values) as observe:
            calibration = calibrate(observe, images, values)
        notes |= {
            "left_in_float": list(kept),
            "smoothed": [to_dict(smoothing) for smoothing in smoothings],
            "calibration": to_dict(calibration),
        }
    halves = {part for part, scheme in precision.items() if TYPES.keys() & scheme_components(scheme)}
    unsafe: frozenset[str] = frozenset()
    if halves:
        chosen = [gemm.name for gemm in gemms(graph) if gemm.part in halves]
        with observer(graph, observed_values(graph, chosen)) as observe:
            overflows = too_large(graph, chosen, observe, reference.images.verified)
        unsafe = frozenset(overflow.gemm for overflow in overflows)
        notes |= {"too_large_for_16_bits": [to_dict(overflow) for overflow in overflows]}
    return _Prepared(
        graph=graph,
        model=model,
        name=name,
        precision=precision,
        calibration=calibration,
        keep_float=frozenset(kept),
        keep_wide=unsafe,
        notes=notes,
    )


def _written(prepared: _Prepared, key: str, kept: frozenset[str]) -> OnnxGraph:
    written = GRAPH_TARGETS[key]
    quantised = quantise(
        prepared.graph,
        prepared.precision,
        prepared.calibration,
        quant_format=written.quant_format,
        keep_float=kept | prepared.keep_float,
        keep_wide=prepared.keep_wide,
    )
    return derive(written.dialect, quantised, prepared.model.image_size, prepared.model.num_classes)


def _relaxed(prepared: _Prepared, name: str, forms: Sequence[str], reference: Reference) -> FloatFallback:
    """Find the groups of layers that must stay in float for the gate to hold."""
    key = next(
        key
        for key in ("plain", STAND_IN_TARGET, "canonical")
        if key in forms and is_installed(GRAPH_TARGETS[key].backend)
    )
    groups = groups_of(prepared.graph)
    rounded = {group: names for group, names in groups.items() if _is_rounded(prepared, names)}

    def logits(kept: frozenset[str]) -> ndarray:
        return _logits(prepared, key, kept, reference.images.judged.inputs)

    def judge(kept: frozenset[str]) -> GateVerdict:
        verdict, _ = reference.verdict_of(logits(_names(prepared.graph, kept)))
        LOG.info("%s%s: %s", name, f" without {', '.join(sorted(kept))}" if kept else "", verdict)
        return verdict

    def error_alone(group: str) -> float:
        others = frozenset(gemm for other, names in rounded.items() if other != group for gemm in names)
        return reference.error_of(logits(others))

    def within_budget(kept: frozenset[str]) -> bool:
        if scheme_components(name)[0] != INT8:
            return len(kept) < len(rounded)
        return int8_share(_written(prepared, key, _names(prepared.graph, kept))) >= MIN_INT8_SHARE

    relaxed = fall_back_to_float(judge, error_alone, rounded, within_budget)
    if not relaxed.verdict.holds:
        kept = f", even with {', '.join(relaxed.kept_float)} in float" if relaxed.kept_float else ""
        raise AccuracyGateError(
            f"{name} draws other masks than {reference.name}{kept}: {relaxed.verdict}. Nothing was written; choose "
            "another --precision, or allow more: --max-dice-drop"
        )
    if relaxed.verdict.remark is not None:
        LOG.warning("%s: %s", name, relaxed.verdict.remark)
    return relaxed


def _logits(prepared: _Prepared, key: str, kept: frozenset[str], images: ndarray) -> ndarray:
    """Return the logits of images; 16-bit numbers are rounded for real, which a CPU would not do."""
    graph, backend = _written(prepared, key, kept), GRAPH_TARGETS[key].backend
    if any(TYPES.keys() & scheme_components(scheme) for scheme in prepared.precision.values()):
        graph, backend = rounded_graph(graph), KEEPS_CASTS
    with TemporaryDirectory() as folder:
        save_graphs({"tried.onnx": graph}, Path(folder), "weights.bin")
        path = Path(folder, "tried.onnx")
        request = SessionRequest(backend=backend, path=path, precision=prepared.name, compute_dtype=FLOAT)
        with ChildSession(request) as session:
            return np.concatenate([session.run(image[np.newaxis]) for image in images])


def _names(graph: OnnxGraph, groups: Sequence[str] | frozenset[str]) -> frozenset[str]:
    names = groups_of(graph)
    return frozenset(name for group in groups for name in names[group])


def _is_rounded(prepared: _Prepared, names: Sequence[str]) -> bool:
    first = {gemm.name: scheme_components(prepared.precision[gemm.part])[0] for gemm in gemms(prepared.graph)}
    kept = {FLOAT: frozenset(first), **dict.fromkeys(TYPES, prepared.keep_wide)}
    return any(name not in kept.get(first[name], prepared.keep_float) for name in names)
