"""The picture of the layers: the folders of the package and which of them import which.

A box is a folder of ``toolkit/``, one of the packages ``export``, ``train`` and ``kernels``, or a module at the top of
``toolkit/``. The top modules that import no folder form one box, the base. Boxes that import each other share a box, so
that the picture has no circle; arrows that follow from others are left out (transitive reduction).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
from pictures.modules import TOP, Module, imported_modules, read_modules
from pictures.svg import Svg, text_width

BASE = "base"
Edge = tuple[str, str]
COLORS: Mapping[str, str] = {"toolkit": "#e8f1fb", "export": "#fdf0dc", "train": "#e6f5ea", "kernels": "#f4e8f7"}
BOX_HEIGHT, ROW_HEIGHT, GAP, LINE_HEIGHT, MARGIN = 34, 84, 22, 17, 24
LINE_WIDTH = 300  # pixels of a box's text, then it wraps
MIN_WIDTH = 640  # pixels of the picture, for the lines at its top
SWEEPS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """The boxes, and the arrows from a box to a box that it imports."""

    members: Mapping[str, tuple[str, ...]]  # label of a box -> the folders and modules in it
    edges: frozenset[Edge]


def read_layers(modules: Mapping[str, Module]) -> Layers:
    """Group the modules into boxes and reduce their imports to the arrows of the picture."""
    rooms = nx.DiGraph()
    for module in modules.values():
        if module.name == f"{TOP}.__main__":
            continue
        room = _room(module)
        rooms.add_node(room)
        rooms.add_edges_from((room, _room(modules[name])) for name in imported_modules(module, modules))
    rooms.remove_edges_from(list(nx.selfloop_edges(rooms)))
    base = _base(rooms)
    merged = nx.relabel_nodes(rooms, dict.fromkeys(base, BASE))
    merged.remove_edges_from(list(nx.selfloop_edges(merged)))
    condensed = nx.condensation(merged)
    inside = {node: sorted(condensed.nodes[node]["members"]) for node in condensed}
    labels = {node: " + ".join(names) for node, names in inside.items()}
    reduced = nx.relabel_nodes(nx.transitive_reduction(condensed), labels)
    members = {
        labels[node]: tuple(sorted(name.removesuffix(".py") for name in base)) if names == [BASE] else tuple(names)
        for node, names in inside.items()
    }
    return Layers(members=members, edges=frozenset(reduced.edges))


def _room(module: Module) -> str:
    """Name the folder of ``toolkit/``, the package or the top module that a module belongs to."""
    first, *below = module.path.parts
    return first if first != "toolkit" else below[0]


def _base(rooms: nx.DiGraph) -> set[str]:
    """Find the top modules of ``toolkit/`` from which no import leads to a folder."""
    tops = {room for room in rooms if room.endswith(".py")}
    return {room for room in tops if nx.descendants(rooms, room) <= tops}


def drawn_layers(layers: Layers) -> str:
    """Draw the layers as SVG: who imports stands above what is imported."""
    graph = nx.DiGraph()
    graph.add_nodes_from(sorted(layers.members))
    graph.add_edges_from(sorted(layers.edges))
    rank = _ranks(graph)
    chains = _with_bends(graph, rank)
    rows = _ordered_rows(graph, rank)
    centres, width = _centres(rows, layers)
    rows_lines = [max((len(_lines(layers, node)) for node in row if node in layers.members), default=1) for row in rows]
    tops = [MARGIN + 44.0]
    for lines in reversed(rows_lines[1:]):
        tops.append(tops[-1] + ROW_HEIGHT + (lines - 1) * LINE_HEIGHT)
    tops.reverse()  # of row 0, the lowest, first
    height = tops[0] + BOX_HEIGHT + rows_lines[0] * LINE_HEIGHT + MARGIN
    svg = Svg(width=max(round(width + 2 * MARGIN), MIN_WIDTH), height=round(height), title="The layers of medseg-trt")
    svg.text(MARGIN, 24, "An arrow leads from a folder to a folder that it imports.", anchor="start", size=13)
    note = "Arrows that follow from others are left out. Names in one box import each other."
    svg.text(MARGIN, 42, note, anchor="start", size=13, color="#5b6770")
    for (start, end), bends in sorted(chains.items()):
        nodes = [start, *bends, end]
        points: list[tuple[float, float]] = []
        for node in nodes:
            top = tops[rank[node]]
            bottom = top + BOX_HEIGHT + (len(_lines(layers, node)) - 1) * LINE_HEIGHT
            x = MARGIN + centres[node]
            points += [(x, bottom)] if node == start else [(x, top)] if node == end else [(x, top), (x, bottom)]
        svg.arrow(points, {"data-from": start, "data-to": end})
    for node in sorted(layers.members):
        lines = _lines(layers, node)
        box_width, box_height = _width(layers, node), BOX_HEIGHT + (len(lines) - 1) * LINE_HEIGHT
        left, top = MARGIN + centres[node] - box_width / 2, tops[rank[node]]
        color = COLORS[next((name for name in layers.members[node] if name in COLORS), "toolkit")]
        svg.box(left, top, box_width, box_height, color, {"data-box": node})
        for index, line in enumerate(lines):
            bold = node != BASE or index == 0
            svg.text(left + box_width / 2, top + 22 + index * LINE_HEIGHT, line, size=13, bold=bold)
    return svg.source()


def _ranks(graph: nx.DiGraph) -> dict[str, int]:
    """Count how many imports, one after the other, lead down from each box."""
    rank: dict[str, int] = {}
    for node in reversed(list(nx.lexicographical_topological_sort(graph))):
        rank[node] = max((rank[below] + 1 for below in graph.successors(node)), default=0)
    return rank


def _with_bends(graph: nx.DiGraph, rank: dict[str, int]) -> dict[Edge, list[str]]:
    """Give every arrow a point in each row that it crosses; the points become nodes of the graph."""
    chains: dict[Edge, list[str]] = {}
    for start, end in sorted(graph.edges):
        bends = [f"{start}>{end}:{level}" for level in range(rank[start] - 1, rank[end], -1)]
        rank |= {bend: rank[start] - 1 - index for index, bend in enumerate(bends)}
        chains[start, end] = bends
        if bends:
            graph.remove_edge(start, end)
            nx.add_path(graph, [start, *bends, end])
    return chains


def _ordered_rows(graph: nx.DiGraph, rank: Mapping[str, int]) -> list[list[str]]:
    """Order every row by the mean position of its neighbours, in sweeps up and down (Sugiyama et al. 1981)."""
    rows = [sorted(node for node in graph if rank[node] == level) for level in range(max(rank.values()) + 1)]
    best = [list(row) for row in rows]
    for sweep in range(SWEEPS):
        upward = sweep % 2 == 0
        for level in range(len(rows)) if upward else reversed(range(len(rows))):
            position = {node: index / max(len(row) - 1, 1) for row in rows for index, node in enumerate(row)}
            neighbours = graph.successors if upward else graph.predecessors
            own = {node: [position[other] for other in neighbours(node)] for node in rows[level]}
            middle = {
                node: sum(positions) / len(positions) if positions else position[node]
                for node, positions in own.items()
            }
            rows[level].sort(key=lambda node: middle[node])
        if _crossings(graph, rows) < _crossings(graph, best):
            best = [list(row) for row in rows]
    return best


def _crossings(graph: nx.DiGraph, rows: list[list[str]]) -> int:
    position = {node: index for row in rows for index, node in enumerate(row)}
    count = 0
    for row in rows:
        lines = [(position[start], position[end]) for start in row for end in graph.successors(start)]
        count += sum((a - c) * (b - d) < 0 for i, (a, b) in enumerate(lines) for c, d in lines[i + 1 :])
    return count


def _centres(rows: list[list[str]], layers: Layers) -> tuple[dict[str, float], float]:
    """Spread every row over the width of the widest one."""
    widths = {node: _width(layers, node) if node in layers.members else 8.0 for row in rows for node in row}
    total = max(sum(widths[node] + GAP for node in row) for row in rows)
    centres: dict[str, float] = {}
    for row in rows:
        spare = (total - sum(widths[node] for node in row)) / len(row)
        left = spare / 2
        for node in row:
            centres[node] = left + widths[node] / 2
            left += widths[node] + spare
    return centres, total


def _lines(layers: Layers, node: str) -> list[str]:
    """Wrap the text of a box."""
    if node not in layers.members:
        return [""]
    names = layers.members[node]
    words = list(names) if node == BASE else [name if name.endswith(".py") else f"{name}/" for name in names]
    lines = ["toolkit/*.py that import no folder", ""] if node == BASE else [""]
    for word in words:
        if lines[-1] and text_width(f"{lines[-1]}, {word}") > LINE_WIDTH:
            lines.append("")
        lines[-1] += f", {word}" if lines[-1] else word
    return lines


def _width(layers: Layers, node: str) -> float:
    return max(map(text_width, _lines(layers, node))) + 24


def make(root: Path) -> str:
    """Draw the layers of the source below ``root``."""
    return drawn_layers(read_layers(read_modules(root)))
