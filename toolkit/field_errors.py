"""Say in plain words what is wrong with a field that pydantic refused."""

from collections.abc import Mapping
from typing import Any

EXPECTED: Mapping[str, str] = {  # by the beginning of pydantic's type of error
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "an object with fields",
    "mapping": "an object with fields",
    "dataclass": "an object with fields",
}
MAX_SHOWN = 60  # characters of a value


def field_error(error: Mapping[str, Any]) -> str:
    """Return the field and what it must be, from one of pydantic's errors."""
    where = ".".join(str(part) for part in error["loc"] if "[" not in str(part))  # "[": a type of a union
    kind, value = str(error["type"]), repr(error["input"])[:MAX_SHOWN]
    if kind == "literal_error":
        return f"{where} must be {error['ctx']['expected']}, not {value}"
    if kind == "missing":
        return f"{where} is missing" if isinstance(error["loc"][-1], str) else _too_short(where)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where} is not a known field"
    expected = EXPECTED.get(kind.partition("_")[0])
    if expected is not None and kind.endswith(("_type", "_parsing", "_from_float")):
        return f"{where} must be {expected}, not {value}"
    reason = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {reason}".removeprefix(": ")


def _too_short(where: str) -> str:
    """Say that a list of a fixed length ends too early; ``where`` ends with the number of the first missing value."""
    name, _, count = where.rpartition(".")
    return f"{name} is too short: value {int(count) + 1} is missing"
