"""The picture of the way from an image file to its mask file.

``STEPS`` says what happens; the file of every function is looked up in the source, and the function must be reachable
from ``infer`` by names. A function that was renamed or is no longer used therefore ends the script, and its line of
``STEPS`` has to follow.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pictures.modules import Module, read_modules
from pictures.svg import Svg

START = "infer"
WIDTH, LEFT, BOX_WIDTH, BOX_HEIGHT, DATA_HEIGHT, GAP = 760, 24, 470, 58, 28, 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A function on the way, and what it hands on."""

    function: str  # name, or Class.method
    text: str
    result: str
    thread: str = ""  # that it runs in


IMAGE_ARRAY = "Image: raw values (slices, height, width, channels) in LPS, spacing, geometry"
STEPS = (
    Step(
        function="list_images",
        text="lists files, folders and DICOM series",
        result="Source: the files of one image",
    ),
    Step(
        function="read_image",
        text="checks header and size, decodes, reorients",
        result=IMAGE_ARRAY,
        thread="thread 1: read and prepare",
    ),
    Step(
        function="prepare",
        text="window, pixel spacing, resize, normalise",
        result="network input (batch, 3, height, width) float32",
        thread="thread 1: read and prepare",
    ),
    Step(
        function="Session.run",
        text="runs the graph or engine of the bundle",
        result="logits (batch, classes, height, width) float32",
        thread="thread 2: run",
    ),
    Step(
        function="restore",
        text="resizes to the source size, takes the largest logit",
        result="labels (slices, height, width) uint8",
        thread="thread 3: restore",
    ),
    Step(
        function="write_mask",
        text="undoes the reorientation, writes the source's format and geometry",
        result="mask file, and rows of areas.csv",
        thread="caller: write",
    ),
)
SHORTCUT = "With --outputs mask, and for 8-bit images on a GPU, the session returns labels: restore has nothing to do."
SETUP = (
    Step(function="load_bundle", text="checks signature, SHA-256 digests and preprocessing", result=""),
    Step(function="open_session", text="chooses the back-end, compares the golden output", result=""),
)


def locate(function: str, modules: Mapping[str, Module]) -> str:
    """Find the file of a function; every step's function must be defined once in ``toolkit/``.

    Raises:
        SystemExit: no function or several functions have this name.
    """
    paths = [
        module.path.as_posix()
        for module in modules.values()
        if module.path.parts[0] == "toolkit" and function in _defined(module.tree)
    ]
    if len(paths) != 1:
        raise SystemExit(f"{function} is defined in {paths or 'no file'} of toolkit/; update tests/pictures/route.py")
    return paths[0]


def reachable(start: str, modules: Mapping[str, Module]) -> set[str]:
    """Find the names that ``start`` uses, those that the functions of these names use, and so on."""
    uses: dict[str, set[str]] = {}
    for module in modules.values():
        if module.path.parts[0] == "toolkit":
            for name, node in _functions(module.tree):
                uses.setdefault(name.rpartition(".")[2], set()).update(_names(node))
    seen, pending = set[str](), [start]
    while pending:
        for name in uses.get(pending.pop(), set()) - seen:
            seen.add(name)
            pending.append(name)
    return seen


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from (
                (f"{node.name}.{method.name}", method) for method in node.body if isinstance(method, ast.FunctionDef)
            )


def _defined(tree: ast.Module) -> set[str]:
    return {name for name, _ in _functions(tree)}


def _names(tree: ast.AST) -> set[str]:
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    return names


def make(root: Path) -> str:
    """Draw the way of one image, with the files of the source below ``root``.

    Raises:
        SystemExit: a step's function does not exist or is not reached from ``infer``.
    """
    modules = read_modules(root)
    reached = reachable(START, modules)
    for step in (*SETUP, *STEPS):
        locate(step.function, modules)
        if step.function.rpartition(".")[2] not in reached:
            raise SystemExit(f"{START} does not reach {step.function}; update tests/pictures/route.py")
    pitch = BOX_HEIGHT + DATA_HEIGHT + GAP
    top = 150
    svg = Svg(width=WIDTH, height=top + len(STEPS) * pitch + 24, title="From an image file to its mask file")
    svg.text(LEFT, 26, "From an image file to its mask file", anchor="start", size=15, bold=True)
    setup_width = (WIDTH - 2 * LEFT - 20) / 2
    for index, step in enumerate(SETUP):
        _draw_step(
            svg, step, locate(step.function, modules), LEFT + index * (setup_width + 20), 44, setup_width, "#f4e8f7"
        )
    svg.arrow([(LEFT + setup_width, 73), (LEFT + setup_width + 10, 73), (LEFT + setup_width + 20, 73)])
    middle = LEFT + BOX_WIDTH / 2
    svg.text(middle, top - 20, "image files, volumes, DICOM series", size=12, color="#5b6770")
    svg.arrow([(middle, top - 14), (middle, top)])
    for index, step in enumerate(STEPS):
        y = top + index * pitch
        _draw_step(svg, step, locate(step.function, modules), LEFT, y, BOX_WIDTH, "#e8f1fb")
        svg.text(middle, y + BOX_HEIGHT + DATA_HEIGHT - 8, step.result, size=12, color="#5b6770")
        if index + 1 < len(STEPS):
            svg.arrow([(middle, y + BOX_HEIGHT + DATA_HEIGHT - 2), (middle, y + pitch)])
    _draw_threads(svg, top, pitch)
    svg.text(LEFT, top + len(STEPS) * pitch + 8, SHORTCUT, anchor="start", size=12, color="#5b6770")
    return svg.source()


def _draw_step(svg: Svg, step: Step, file: str, left: float, top: float, width: float, color: str) -> None:
    svg.box(left, top, width, BOX_HEIGHT, color, {"data-function": step.function, "data-file": file})
    svg.text(left + 12, top + 22, step.function, anchor="start", bold=True)
    svg.text(left + width - 12, top + 22, file, anchor="end", size=11, color="#5b6770")
    svg.text(left + 12, top + 44, step.text, anchor="start", size=12)


def _draw_threads(svg: Svg, top: float, pitch: float) -> None:
    """Draw a bracket beside the steps that share a thread."""
    left = LEFT + BOX_WIDTH + 18
    for thread in dict.fromkeys(step.thread for step in STEPS if step.thread):
        rows = [index for index, step in enumerate(STEPS) if step.thread == thread]
        first, last = top + rows[0] * pitch, top + rows[-1] * pitch + BOX_HEIGHT
        svg.box(left, first, 5, last - first, "#c9d6e4")
        svg.text(left + 16, (first + last) / 2 + 4, thread, anchor="start", size=12)
