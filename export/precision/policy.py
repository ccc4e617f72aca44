"""Name the way in which a network was rounded, so that a figure of one network can be set beside a proof on another.

Two graphs with the same policy went through the same code with the same choices: a gate that held for one of them says
that this code, not merely code of this name, draws the right masks on a real network.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

MODULES = (
    "precision/calibrate",
    "precision/sensitive_layers",
    "graph/dialects",
    "graph/gemms",
    "graph/modules",
    "precision/half",
    "graph/parts",
    "precision/quantize",
    "precision/smooth",
    "precision/weight_only",
)  # decide it


def policy_digest(parts: Mapping[str, str], form: str, flavour: str, kept_float: Sequence[str]) -> str:
    """Return the SHA-256 of everything that decides which number is rounded, and how.

    Args:
        parts: the scheme of every part, as ``quantize.parse_precision`` returns it.
        form: a key of ``quantize.QUANT_FORMATS``.
        flavour: a key of ``dialects.DIALECTS``.
        kept_float: groups of layers that the gate gave back to float.
    """
    choices = {"parts": dict(parts), "form": form, "flavour": flavour, "kept_float": sorted(kept_float)}
    content = hashlib.sha256(json.dumps(choices, sort_keys=True).encode())
    for module in MODULES:
        content.update((Path(__file__).parents[1] / f"{module}.py").read_bytes())
    return content.hexdigest()
