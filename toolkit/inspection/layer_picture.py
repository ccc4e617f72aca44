"""Draw the layers of an engine as an SVG: a band for every part of the network, a box for every kernel, in order.

The colour is the type that a kernel computes in. The height is proportional to the logarithm of its
multiply-accumulates, or of its bytes if it has none. The tooltip of a box has the details.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import log10
from xml.sax.saxutils import escape, quoteattr

from medseg_trt.engines.fingerprint import EngineFingerprint
from medseg_trt.export.engine_layers import CUSTOM, EngineLayer, LayerReport
from medseg_trt.inspection.engine import shares
from medseg_trt.spec import LIBRARY_NAMES

COLORS: Mapping[str, str] = {  # Okabe & Ito's colour-blind-safe set
    "Float": "#999999",
    "Half": "#56B4E9",
    "BFloat16": "#0072B2",
    "Int8": "#E69F00",
    "Int4": "#D55E00",
    "FP8": "#CC79A7",
}
OTHER = "#DDDDDD"
PER_ROW, BOX, GAP, HIGHEST, LEFT = 60, 15, 2, 60, 90  # boxes in a row; pixels
LEAST_WORK, MOST_WORK = 3.0, 10.0  # powers of ten of the lowest and the highest box


def draw_layers(report: LayerReport, fingerprint: EngineFingerprint) -> str:
    """Return an SVG of the layers of an engine."""
    bands = [(part, list(layers)) for part, layers in groupby(report.layers, key=lambda layer: layer.part)]
    body, top = list[str](), 70
    for part, layers in bands:
        for start in range(0, len(layers), PER_ROW):
            body += _row(layers[start : start + PER_ROW], part if start == 0 else "", top)
            top += HIGHEST + 14
    title = (
        f"{fingerprint.plan}: {LIBRARY_NAMES[fingerprint.library]} {fingerprint.version}, {len(report.layers)} kernels"
    )
    width = LEFT + PER_ROW * (BOX + GAP) + 20
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + 10}" '
            'font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="10" y="22" font-size="15">{escape(title)}</text>',
            *_legend(report.layers),
            *body,
            "</svg>",
            "",
        ]
    )


def _legend(layers: Sequence[EngineLayer]) -> list[str]:
    """Return the legend: the colour of every type, and its share of the multiply-accumulates."""
    part_of_macs, x, lines = shares(layers), 10, list[str]()
    for dtype in dict.fromkeys([*part_of_macs, *(layer.dtype for layer in layers)]):
        share = f"{dtype}: {100 * part_of_macs[dtype]:.1f} % of MACs" if dtype in part_of_macs else dtype
        lines.append(f'<rect x="{x}" y="36" width="14" height="14" fill="{COLORS.get(dtype, OTHER)}"/>')
        lines.append(f'<text x="{x + 19}" y="48">{escape(share)}</text>')
        x += 40 + 7 * len(share)
    lines.append(f'<rect x="{x}" y="36" width="14" height="14" fill="white" stroke="black" stroke-width="2"/>')
    lines.append(f'<text x="{x + 19}" y="48">black edge: multiplies matrices; dashed: a plugin</text>')
    return lines


def _row(layers: Sequence[EngineLayer], label: str, top: int) -> list[str]:
    lines = [f'<text x="10" y="{top + HIGHEST}">{escape(label)}</text>'] if label else []
    for index, layer in enumerate(layers):
        height = _height(layer)
        edge = 'stroke="black" stroke-width="1.5"' if layer.is_product else 'stroke="none"'
        edge = 'stroke="black" stroke-width="2" stroke-dasharray="3,2"' if layer.kind == CUSTOM else edge
        lines.append(
            f'<rect x="{LEFT + index * (BOX + GAP)}" y="{top + HIGHEST - height}" width="{BOX}" height="{height}" '
            f"fill={quoteattr(COLORS.get(layer.dtype, OTHER))} {edge}><title>{escape(_tooltip(layer))}</title></rect>"
        )
    return lines


def _height(layer: EngineLayer) -> int:
    power = log10(max(layer.macs or layer.bytes, 1))
    share = (power - LEAST_WORK) / (MOST_WORK - LEAST_WORK)
    return round(HIGHEST * min(max(share, 0.08), 1))


def _tooltip(layer: EngineLayer) -> str:
    work = f"{layer.macs / 1e6:.2f} MMAC, " if layer.macs else ""
    return f"{layer.name} ({layer.kind}, {layer.dtype}), {work}{layer.bytes / 1e3:.1f} kB, {', '.join(layer.nodes)}"
