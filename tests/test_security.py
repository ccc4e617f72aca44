"""SECURITY.md: its limits are those of the code, and its files exist."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from medseg_trt.telemetry import MODULES, VARIABLES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20}
ROW = re.compile(r"^\| [^|]* \| (?P<number>[\d,.]+)(?: (?P<unit>[^|]*))? \| `(?P<constant>[\w.]+)` \|$", re.MULTILINE)
ROWS = [(row["constant"], row["number"], row["unit"]) for row in ROW.finditer(TEXT)]
FEWEST_ROWS = 18


def test_security_md_limits_table_is_parsed():
    assert len(ROWS) >= FEWEST_ROWS


@pytest.mark.parametrize(("constant", "number", "unit"), ROWS)
def test_security_md_limit_equals_the_constant_in_the_code(constant: str, number: str, unit: str | None):
    module, _, name = constant.rpartition(".")
    assert getattr(import_module(module), name) == float(number.replace(",", "")) * UNITS.get(unit or "", 1)


def test_every_file_that_it_names_exists():
    for name in re.findall(r"`((?:toolkit|train|export|tests)/[\w/.]*)`", TEXT):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / name).exists(), name


def test_every_variable_of_telemetry_is_named():
    assert all(f"`{name}={value}`" in TEXT for name, value in VARIABLES.items())
    assert all(f"`{name}`" in TEXT for name in MODULES)
