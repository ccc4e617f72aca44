"""Describe an engine from the two files beside its plan. The plan is code, and is never deserialised here."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_trt.engines.fingerprint import EngineFingerprint, read_fingerprint
from medseg_trt.errors import ArtefactError
from medseg_trt.export.engine_layers import LAYERS_SUFFIX, EngineLayer, LayerReport
from medseg_trt.files import parse_json, read_limited, sha256
from medseg_trt.spec import from_dict, to_dict

MAX_BYTES = 64 << 20  # of a report


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectedEngine:
    """The fingerprint and the layer report of a plan."""

    path: Path
    fingerprint: EngineFingerprint
    state: str  # of the plan: intact, missing or damaged
    report: LayerReport

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {
            "state": self.state,
            "fingerprint": to_dict(self.fingerprint),
            "precisions": shares(self.report.layers),
            "report": to_dict(self.report),
        }

    def layer_table(self) -> tuple[list[str], list[list[str]]]:
        """Return the layers, as a header and rows of text."""
        header = ["layer", "part", "types", "kB", "MMAC", "nodes"]
        return header, [_row(layer) for layer in self.report.layers]

    def outcome_table(self) -> tuple[list[str], list[list[str]]]:
        """Return the expectations, as a header and rows of text."""
        return ["expectation", "holds for", "of", "first failure"], [
            [
                outcome.name,
                str(outcome.asked - len(outcome.failed)),
                str(outcome.asked),
                outcome.failed[0] if outcome.failed else "",
            ]
            for outcome in self.report.outcomes
        ]


def inspect_engine(plan: Path) -> InspectedEngine:
    """Read the fingerprint and the layer report of a plan.

    Raises:
        ArtefactError: a file beside it is missing or damaged.
    """
    fingerprint = read_fingerprint(plan)
    return InspectedEngine(
        path=plan, fingerprint=fingerprint, state=_state(plan, fingerprint), report=read_layer_report(plan)
    )


def read_layer_report(plan: Path) -> LayerReport:
    """Read the report of the layers of a plan.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    path = plan.with_suffix(LAYERS_SUFFIX)
    if not path.is_file():
        raise ArtefactError(f"{path} is missing, so the layers of {plan.name} are unknown; build the engine again")
    return from_dict(LayerReport, parse_json(path, read_limited(path, MAX_BYTES)), str(path))


def shares(layers: Iterable[EngineLayer]) -> dict[str, float]:
    """Return the share, 0 … 1, of the multiply-accumulates in each type, the largest first."""
    macs = Counter[str]()
    for layer in layers:
        macs[layer.dtype] += layer.macs
    total = sum(macs.values())
    return {dtype: count / total for dtype, count in macs.most_common() if count} if total else {}


def _state(plan: Path, fingerprint: EngineFingerprint) -> str:
    if not plan.is_file():
        return "missing"
    same = plan.stat().st_size == fingerprint.bytes and sha256(plan) == fingerprint.sha256
    return "intact" if same else "damaged: it is not the plan that its fingerprint describes"


def _row(layer: EngineLayer) -> list[str]:
    more = f" +{len(layer.nodes) - 1}" if len(layer.nodes) > 1 else ""
    types = " → ".join(
        " ".join(dict.fromkeys(tensor.dtype for tensor in side)) for side in (layer.inputs, layer.outputs) if side
    )
    macs = f"{layer.macs / 1e6:.2f}" if layer.macs else ""
    name = f"{layer.name} ({layer.kind})"
    return [name, layer.part, types, f"{layer.bytes / 1e3:.1f}", macs, "".join(layer.nodes[:1]) + more]
