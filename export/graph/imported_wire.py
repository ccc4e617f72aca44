"""Check the bytes of an ONNX file from elsewhere before any library parses them.

What libraries read in different ways, or what they would read without having been asked, is refused here: sparse and
external values wherever a file may hide them, and graphs of more nodes than any network has.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from medseg_trt.errors import ArtefactError
from medseg_trt.export.graph.interface import MODEL_GRAPH
from medseg_trt.export.graph.onnx_fields import (
    ATTRIBUTE_BODIES,
    ATTRIBUTE_TENSOR,
    ATTRIBUTE_TENSORS,
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    GRAPH_SPARSE,
    MODEL_TRAINING,
    NODE_ATTRIBUTE,
    NODE_OPERATOR,
    external_entries,
)
from medseg_trt.export.graph.onnx_wire import fields, grouped, messages, only, text
from medseg_trt.export.graph.operators import MAX_NODES
from medseg_trt.files import open_regular, size_text

MAX_WEIGHT_BYTES = 1 << 33  # of all files of weights beside a network; LLaMA-7B's block in float32 is a tenth of it
MAX_PROBLEM = 600  # characters of a message that quotes the file's names
FILE_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]+")


def check_wire(path: Path, content: bytes) -> int:
    """Refuse a file that holds what no network of floats has, and return the bytes of its weights in other files.

    Args:
        path: of the file, for messages; weights in other files must lie beside it.
        content: of the file.

    Raises:
        ArtefactError: it is no ONNX file, has sparse weights, a training graph or too many nodes, or takes weights from
            what is no regular file beside it.
    """
    model = memoryview(content)
    files: dict[str, int] = {}
    try:
        problem = next(_problems(model, only(model, MODEL_GRAPH), path.parent, files), None)
    except ValueError as error:
        raise ArtefactError(f"{path} is no ONNX file: {error}") from error
    if problem is not None:
        raise ArtefactError(f"{path} {brief(problem)}")
    if sum(files.values()) > MAX_WEIGHT_BYTES:
        raise ArtefactError(f"{path} has more than {size_text(MAX_WEIGHT_BYTES)} of weights in other files")
    return sum(files.values())


def brief(problem: str) -> str:
    """Return a message without line breaks, and without the middle of a name of a file that is very long."""
    line = " ".join(problem.split())
    return line if len(line) <= MAX_PROBLEM else f"{line[: MAX_PROBLEM // 2]} … {line[-MAX_PROBLEM // 2 :]}"


def _problems(model: memoryview, graph: memoryview, folder: Path, files: dict[str, int]) -> Iterator[str]:
    """Yield what is wrong, as the rest of a sentence that begins with the file's name; list the files of weights."""
    if next(messages(model, MODEL_TRAINING), None) is not None:
        yield "has a training graph; export the network for inference"
    if next(messages(graph, GRAPH_SPARSE), None) is not None:
        yield "has sparse weights; export the network with dense ones"
    for number, node in enumerate(map(grouped, messages(graph, GRAPH_NODE))):
        if number == MAX_NODES:
            yield f"has more than {MAX_NODES} nodes"
        operator = text(node, NODE_OPERATOR)
        for attribute in node.get(NODE_ATTRIBUTE, ()):
            for field, value in fields(attribute):
                if field in ATTRIBUTE_BODIES:
                    yield f"has a graph inside {operator}; export the network again without branches and loops"
                if field in (ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS) and isinstance(value, memoryview):
                    yield from _external_problems(value, folder, files)
    for tensor in messages(graph, GRAPH_INITIALIZER):
        yield from _external_problems(tensor, folder, files)


def _external_problems(tensor: memoryview, folder: Path, files: dict[str, int]) -> Iterator[str]:
    entries, repeated = external_entries(tensor)
    if not entries:
        return
    if repeated:
        yield "says twice where its weights are; it is not to be trusted"
    location = entries.get("location", "")
    if location in files:
        return
    if not FILE_NAME.fullmatch(location) or location in (".", ".."):
        yield f"takes weights from {location!r}, which is no file beside it; it is not to be trusted"
        return
    with suppress(OSError), open_regular(folder / location) as file:
        files[location] = file.seek(0, 2)
    if location not in files:
        yield f"takes weights from {location!r}, which is no regular file beside it; copy that file to {folder}"
