"""Read the manifests of earlier schemas: their fields under today's names.

Schema 2 had no engines. Schema 3 called the dialect ``flavour``, the compute data type ``compute``, the rejected
executions ``dropped`` and failed expectations ``unmet``, and recorded whether the accuracy gate holds, which its
figures say.
"""

from collections.abc import Mapping
from typing import Any, cast

from medseg_trt.bundles.manifest import SCHEMA
from medseg_trt.errors import ArtefactError

OLDER = (2, 3)  # schemas that are read, beside the current one
RENAMED: Mapping[str, Mapping[str, str]] = {  # by the part of the manifest: old name -> new name
    "manifest": {"dropped": "rejected_executions"},
    "variants": {"flavour": "dialect"},
    "executions": {"compute": "compute_dtype"},
    "engines": {"unmet": "failed_expectations"},
}
DERIVED = "holds"  # in ``verification.gate``


def current_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest of an earlier schema under today's names; wrong values stay as they are.

    Raises:
        ArtefactError: a field occurs under both names.
    """
    renamed = {**_renamed(fields, RENAMED["manifest"]), "schema": SCHEMA}
    variants = renamed.get("variants")
    if isinstance(variants, dict):
        entries = cast("dict[str, Any]", variants)
        renamed["variants"] = {name: _renamed(entry, RENAMED["variants"]) for name, entry in entries.items()}
    for part in ("executions", "engines"):
        entries = renamed.get(part)
        if isinstance(entries, list):
            renamed[part] = [_renamed(entry, RENAMED[part]) for entry in cast("list[Any]", entries)]
    if isinstance(renamed.get("executions"), list):
        renamed["executions"] = [_without_derived(execution) for execution in renamed["executions"]]
    return renamed


def _renamed(fields: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(fields, dict):
        return fields
    entries = cast("dict[str, Any]", fields)
    if repeated := [new for old, new in names.items() if old in entries and new in entries]:
        raise ArtefactError(f"a manifest of an earlier schema has {repeated[0]} twice; it is not to be trusted")
    return {names.get(name, name): value for name, value in entries.items()}


def _without_derived(execution: Any) -> Any:
    match execution:
        case {"verification": {"gate": {**gate}}}:
            kept = {name: value for name, value in gate.items() if name != DERIVED}
            return {**execution, "verification": {**execution["verification"], "gate": kept}}
        case _:
            return execution
