"""Identify how a network was rounded, so that evidence from one network can be matched with another network.

Graphs with the same digest were rounded with the same settings, by the same version of the rounding code.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

# Increase it with every change that makes the same settings round differently: in this package, or in the GEMMs,
# parts, layers and dialects of ``export.graph``.
POLICY_VERSION = 2


def policy_digest(parts: Mapping[str, str], quant_format: str, dialect: str, kept_float: Sequence[str]) -> str:
    """Return the SHA-256 of the settings that decide which values are rounded and how, and of ``POLICY_VERSION``.

    Args:
        parts: the scheme of every part, as ``quantize.parse_precision`` returns it.
        quant_format: a key of ``quantize.QUANT_FORMATS``.
        dialect: a key of ``dialects.DIALECTS``.
        kept_float: groups of layers that the accuracy gate returned to float, in any order.
    """
    settings = {
        "version": POLICY_VERSION,
        "parts": dict(parts),
        "quant_format": quant_format,
        "dialect": dialect,
        "kept_float": sorted(kept_float),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
