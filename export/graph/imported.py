"""Bring the graph of an ONNX file from elsewhere into the form that every later pass requires."""

import logging

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)
from onnxscript.version_converter import convert_version

from medseg_trt.errors import ArtefactError
from medseg_trt.export.graph.imported_file import ImportedFile
from medseg_trt.export.graph.interface import CHANNELS, INPUT, OUTPUT
from medseg_trt.export.graph.onnx_graph import KEPT_METADATA, OPSET, OnnxGraph, add_constant
from medseg_trt.export.graph.operators import STANDARD
from medseg_trt.export.graph.trace import check
from medseg_trt.network_spec import NetworkSpec

BATCH = "batch"
PRODUCTS = ("MatMul", "Gemm", "Conv")
NOT_CONVERTED = f"cannot be converted to operator set {OPSET}; export it again with a newer version of its exporter"
MAX_GROUPS = 32  # of layers that the accuracy gate may return to float, one after another


def import_graph(file: ImportedFile, spec: NetworkSpec, logits: int) -> OnnxGraph:
    """Return the graph from ``pixel_values`` (batch, 3, H, W) to ``logits`` (batch, classes, H, W), with a free batch.

    BatchNorms are merged into the products before them, and constants are computed. A network of one channel reads the
    first of three equal ones. Two logits of a binary network become their difference, which is above 0 where the
    second is the larger one.

    Args:
        file: as read; it is not changed.
        spec: image size and classes.
        logits: number of channels that the file's network gives.

    Raises:
        ArtefactError: it cannot be brought into this form.
    """
    model = file.model.clone()
    try:
        _modernise(model)
        _adapt_input(model.graph, spec.image_size, file.channels)
        _simplify(model)
    except Exception as error:  # the passes raise what they like
        reason = " ".join(str(error).split())[:200]
        raise ArtefactError(f"{file.path} {NOT_CONVERTED} ({reason})") from error
    if model.opset_imports.get("") != OPSET:
        raise ArtefactError(f"{file.path} {NOT_CONVERTED}")
    _adapt_output(model.graph, spec, logits)
    for domain in [domain for domain in model.opset_imports if domain]:
        del model.opset_imports[domain]
    NameFixPass()(model)
    ShapeInferencePass()(model)
    return _settled(model, spec, str(file.path))


def simplify_traced(graph: OnnxGraph, spec: NetworkSpec) -> OnnxGraph:
    """Return a copy of a traced network of another package: its BatchNorms merged, its layers named as those of a file.

    Raises:
        ArtefactError: it uses an operator that bundles may not use.
    """
    model = graph.model.clone()
    _simplify(model)
    NameFixPass()(model)
    ShapeInferencePass()(model)
    return _settled(model, spec, spec.architecture)


def _settled(model: ir.Model, spec: NetworkSpec, source: str) -> OnnxGraph:
    _name_layers(model.graph)
    refused = sorted({node.op_type for node in model.graph if node.op_type not in STANDARD or node.domain})
    if refused:
        raise ArtefactError(f"{source} uses {', '.join(refused)} in operator set {OPSET}, which bundles may not use")
    settled = OnnxGraph(model=model)
    check(settled, spec.image_size, spec.num_classes)
    return settled


def _modernise(model: ir.Model) -> None:
    """Convert to the operator set of this package, without the exporter's metadata, which describe another machine."""
    RemoveInitializersFromInputsPass()(model)
    ClearMetadataAndDocStringPass()(model)
    logger = logging.getLogger("onnxscript.version_converter")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns where it calls ONNX's converter, for sets before 18
    try:
        convert_version(model, OPSET, fallback=True)
    finally:
        logger.setLevel(level)
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "medseg-trt", None


def _simplify(model: ir.Model) -> None:
    optimizer.optimize(model)
    rewriter.rewrite(
        model,
        [
            fuse_batchnorm_into_conv_rule,
            fuse_batchnorm_into_conv_transpose_rule,
            fuse_batchnorm_into_gemm_rule,
        ],
    )
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    IdentityEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


def _adapt_input(graph: ir.Graph, size: tuple[int, int], channels: int) -> None:
    """Rename the input and fix its size; a network of one channel gets the first of three."""
    (taken,) = graph.inputs
    for value in (value for node in graph for value in node.outputs):
        if value not in graph.outputs:
            value.shape = None  # of the file's own, free or wrong, sizes; inferred anew
    for value in (*graph.initializers.values(), *(value for node in graph for value in node.outputs)):
        if value.name == INPUT:
            value.name = f"{INPUT}_"
    taken.name, taken.shape = INPUT, ir.Shape([BATCH, CHANNELS, *size])
    if channels == CHANNELS:
        return
    uses = list(taken.uses())
    start, end = (add_constant(graph, f"channel_{value}", np.array([value], np.int64)) for value in range(2))
    first = ir.Value(
        name="first_channel", shape=ir.Shape([BATCH, channels, *size]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    node = ir.node("Slice", [taken, start, end, end], outputs=[first], name="first_channel")
    graph.insert_before(graph[0], node)
    for user, index in uses:
        user.replace_input_with(index, first)


def _adapt_output(graph: ir.Graph, spec: NetworkSpec, logits: int) -> None:
    """Rename the output; two logits of a binary network become their difference."""
    (given,) = graph.outputs
    kind = ir.TensorType(ir.DataType.FLOAT)
    if logits != spec.num_classes:
        names = {0: "background_logit", 1: "foreground_logit"}
        axis = add_constant(graph, "logits_axis", np.array([1], np.int64))
        parts = list[ir.Value]()
        for start, name in names.items():
            bounds = [
                add_constant(graph, f"{name}_{end}", np.array([value], np.int64))
                for end, value in (("start", start), ("end", start + 1))
            ]
            parts.append(ir.Value(name=name, shape=ir.Shape([BATCH, 1, *spec.image_size]), type=kind))
            graph.append(ir.node("Slice", [given, *bounds, axis], outputs=[parts[-1]], name=f"node_{name}"))
        difference = ir.Value(name=OUTPUT, type=kind)
        graph.append(ir.node("Sub", [parts[1], parts[0]], outputs=[difference], name="node_logits"))
        given.name = f"{OUTPUT}_of_file"
        graph.outputs[0] = given = difference
    for value in (value for node in graph for value in node.outputs if value is not given):
        if value.name == OUTPUT:
            value.name = f"{OUTPUT}_"
    given.name, given.type = OUTPUT, kind
    given.shape = ir.Shape([BATCH, spec.num_classes, *spec.image_size])


def _name_layers(graph: ir.Graph) -> None:
    """Name the layer of every node: that of the last product before it, the first and the last apart."""
    products = [node for node in graph if node.op_type in PRODUCTS]
    size = -(-len(products) // MAX_GROUPS) or 1
    layers = {product: f"layer.{number // size}" for number, product in enumerate(products)}
    for product, name in zip((*products[-1:], *products[:1]), ("logits_layer", "image_layer"), strict=False):
        layers[product] = name
    layer = "layer.0"
    for node in graph:
        layer = layers.get(node, layer)
        node.metadata_props[KEPT_METADATA] = f": ExternalNetwork/{layer}: onnx.Layer/{node.name}: onnx.{node.op_type}"
