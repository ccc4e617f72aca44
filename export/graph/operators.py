"""The operators that the graphs of a bundle may use, by domain: those that the exporter writes, and those of imports.

A graph of anything else is refused before a back-end opens it. None of these has a body of its own (Loop, If, Scan),
and none reads a file. The functions of domain ``medseg`` may call standard operators only, so that no graph grows
when they are expanded. ``tests/export/graph/test_operators.py`` compares the table with the test networks' graphs.
"""

from collections.abc import Mapping

STANDARD = frozenset(
    (
        # arithmetic
        *("Add", "Div", "Erf", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Reciprocal", "ReduceL2"),
        *("ReduceMean", "Sqrt", "Sub"),
        # layers
        *("Attention", "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "Gelu", "Gemm"),
        *("GlobalAveragePool", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LeakyRelu"),
        *("MatMul", "MaxPool", "RMSNormalization", "Relu", "Resize", "Sigmoid", "Softmax"),
        # layout
        *("Concat", "Gather", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
        # types
        *("Cast", "CastLike", "Clip", "Constant", "ConstantOfShape", "DequantizeLinear", "QuantizeLinear"),
        # masks
        *("And", "ArgMax", "Greater", "GreaterOrEqual", "Less", "Range", "Shape", "Where"),
        # of networks that are imported from ONNX files or other packages
        *("Abs", "Ceil", "DepthToSpace", "Elu", "Equal", "Exp", "Expand", "Flatten", "Floor", "GlobalMaxPool"),
        *("HardSigmoid", "HardSwish", "Identity", "LRN", "Log", "LogSoftmax", "LpNormalization", "Mean", "Mish", "Not"),
        *("Or", "PRelu", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Round", "Selu"),
        *("Sign", "Softplus", "Softsign", "SpaceToDepth", "Sum", "Tanh", "ThresholdedRelu", "Tile", "Xor"),
    )
)
FUNCTIONS = frozenset(  # of domain medseg; export.graph.functions has their bodies
    (
        *("AddRMSNorm", "QuantizedAddRMSNorm", "QuantizedLayerNorm", "QuantizedRMSNorm", "QuantizedSwiGLU"),
        *("RMSNorm", "Rotary", "SwiGLU"),
    )
)
ALLOWED: Mapping[str, frozenset[str]] = {"": STANDARD, "ai.onnx": STANDARD, "medseg": FUNCTIONS}
MAX_NODES = 1 << 14  # of a graph with the bodies of its functions; the largest test network has 2^9, ViT-B 2^11
