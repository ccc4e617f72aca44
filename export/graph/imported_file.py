"""Read an ONNX file from elsewhere, and check all that can be known of it without running it.

Nothing in the file is believed: its bytes are read once, and operators, sizes and the files of its weights are checked
before anything runs or reads them. What cannot be used is refused with a line that says how to export it again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from medseg_trt.errors import ArtefactError
from medseg_trt.export.graph.imported_labels import reveal_logits
from medseg_trt.export.graph.imported_wire import brief, check_wire
from medseg_trt.export.graph.interface import CHANNELS
from medseg_trt.export.graph.operators import STANDARD
from medseg_trt.files import read_limited

MAX_FILE_BYTES = 1 << 31  # what a protobuf can hold
MIN_OPSET = 9  # older ones have a Resize and an Upsample of other meaning
OWN_DOMAINS = ("", "ai.onnx")
QUANTISED = ("QuantizeLinear", "DequantizeLinear")
PROBABILITIES = ("Sigmoid", "Softmax", "LogSoftmax", "HardSigmoid")
REAL_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
CHANNEL_COUNTS = (1, CHANNELS)
BOXES_AND_PROTOTYPES = [3, 4]  # axes of the outputs of YOLO's task "segment"
DYNAMIC = (
    "export it again with a free batch axis: torch.onnx.export(…, dynamic_shapes=({0: 'batch'},)), or dynamic=True "
    "with Ultralytics"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportedFile:
    """An ONNX file whose operators, weights, input and output can be used."""

    path: Path
    content: bytes  # of the file, as it was checked; without the choice of labels at its end, where it makes one
    chose_labels: bool
    weight_bytes: int  # of the file and of the files of weights beside it
    model: ir.Model  # as it is in the file; weights in other files are mapped, not copied
    input: str
    output: str
    channels: int  # of its input, 1 or 3
    size: tuple[int | None, int | None]  # of its input, height and width; None: free


def read_imported(path: Path) -> ImportedFile:
    """Read an ONNX file and check all that can be known of it without running it.

    Raises:
        ArtefactError: it is no ONNX file, or one that cannot be used; the message says why, and what to do.
    """
    content = read_limited(path, MAX_FILE_BYTES)
    beside = check_wire(path, content)
    try:
        proto = onnx.load_model_from_string(content)
        chose_labels = reveal_logits(proto)
        if chose_labels:
            content = proto.SerializeToString()
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:  # protobuf's errors have no common base but Exception
        raise ArtefactError(f"{path} is no ONNX file: {' '.join(str(error).split())[:200]}") from error
    problem = next(_problems(model), None)
    if problem is not None:
        raise ArtefactError(f"{path} {brief(problem)}")
    (taken,) = _own_inputs(model)
    (given,) = model.graph.outputs
    axes = _axes(taken)
    return ImportedFile(
        path=path,
        content=content,
        chose_labels=chose_labels,
        weight_bytes=len(content) + beside,
        model=model,
        input=str(taken.name),
        output=str(given.name),
        channels=axes[1] or 0,
        size=(axes[2], axes[3]),
    )


def _problems(model: ir.Model) -> Iterator[str]:
    """Yield what is wrong, as the rest of a sentence that begins with the file's name."""
    for domain, name, _ in model.functions:
        yield f"defines the function {domain}.{name}; export it again with its functions inlined"
    for node in model.graph:
        if node.domain not in OWN_DOMAINS:
            yield (
                f"uses {node.domain}.{node.op_type}, an operator that is not of ONNX itself; export the network again "
                "with ONNX's own operators"
            )
        elif node.op_type in QUANTISED:
            yield "is quantised already; give the float32 network, which this command quantises and checks"
        elif node.op_type not in STANDARD and node.op_type not in ("Dropout", "Upsample"):
            yield f"uses the operator {node.op_type}, which bundles may not use; export the network without it"
    version = model.opset_imports.get("", 0)
    if version < MIN_OPSET:
        yield f"is written in operator set {version}; export it again with {MIN_OPSET} or later"
    for name, tensor in _tensors(model):
        yield from _tensor_problems(name, tensor)
    yield from _output_problems(list(model.graph.outputs))
    yield from _input_problems(_own_inputs(model))


def _own(node: ir.Node) -> Iterable[ir.Attr]:
    return [attribute for attribute in node.attributes.values() if isinstance(attribute, ir.Attr)]


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value
    for node in model.graph:
        for attribute in _own(node):
            if attribute.type == ir.AttributeType.TENSOR:
                yield f"{node.op_type}.{attribute.name}", attribute.as_tensor()


def _tensor_problems(name: str, tensor: ir.TensorProtocol) -> Iterator[str]:
    if tensor.dtype in REAL_TYPES:
        yield f"holds weights in {tensor.dtype.name.lower()}; give the float32 network, which this command converts"
    if not isinstance(tensor, ir.ExternalTensor):
        return
    available = Path(tensor.path).stat().st_size
    if (tensor.offset or 0) < 0 or (tensor.offset or 0) + tensor.nbytes > available:
        yield f"takes {name} from beyond the end of {str(tensor.location)!r}; the file is damaged"


def _own_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the inputs without those that are weights, as files of IR version 3 list them."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def _axes(value: ir.Value) -> list[int | None]:
    return [axis if isinstance(axis, int) else None for axis in value.shape or ()]


def _named(values: Iterable[ir.Value]) -> str:
    return ", ".join(
        f"{value.name} ({', '.join('free' if axis is None else str(axis) for axis in _axes(value))})"
        for value in values
    )


def _input_problems(inputs: list[ir.Value]) -> Iterator[str]:
    if len(inputs) != 1:
        yield f"takes {len(inputs)} inputs ({_named(inputs)}); export a network of one batch of images"
        return
    (taken,) = inputs
    axes = _axes(taken)
    if taken.dtype != ir.DataType.FLOAT:
        kind = "of no type" if taken.dtype is None else f"in {taken.dtype.name.lower()}"
        yield f"takes {_named(inputs)} {kind}; export a network of float32 images (batch, channels, height, width)"
    if len(axes) != 4:
        yield f"takes {_named(inputs)}; export a network of 2-D images (batch, channels, height, width)"
        return
    if axes[1] not in CHANNEL_COUNTS and axes[3] in CHANNEL_COUNTS:
        yield (
            f"takes {_named(inputs)}, channels last; export it channels first: (batch, channels, height, width), for "
            "example by a transposition before the first layer"
        )
    elif axes[1] not in CHANNEL_COUNTS:
        yield f"takes {_named(inputs)}; images have 1 or 3 channels, on a fixed second axis"
    if axes[0] is not None:
        yield f"takes {_named(inputs)}: the batch is fixed at {axes[0]}; {DYNAMIC}"


def _output_problems(outputs: list[ir.Value]) -> Iterator[str]:
    if sorted(len(_axes(output)) for output in outputs) == BOXES_AND_PROTOTYPES:
        yield (
            f"gives boxes and prototypes ({_named(outputs)}): instance segmentation is not supported; export a network "
            "of semantic segmentation, such as yolo26n-sem"
        )
    if len(outputs) != 1:
        yield (
            f"gives {len(outputs)} outputs ({_named(outputs)}); export the logits alone, without auxiliary heads or "
            "deep supervision"
        )
        return
    (given,) = outputs
    producer = given.producer()
    if producer is not None and producer.op_type in PROBABILITIES:
        yield f"ends with {producer.op_type}, so it gives probabilities; export the logits before it"
    if given.dtype is not None and given.dtype != ir.DataType.FLOAT:
        yield (
            f"gives {_named(outputs)} in {given.dtype.name.lower()}; export the float32 logits (batch, classes, "
            "height, width), before labels are chosen"
        )
    if given.shape is not None and len(given.shape) != 4:
        yield f"gives {_named(outputs)}; export logits (batch, classes, height, width)"
