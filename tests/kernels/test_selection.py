"""Every test belongs to one of the Makefile's targets, and a case that ``make test`` leaves out is in another."""

import re
from itertools import product
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression
from gpu_free.selection import covering

TESTS = Path(__file__).parents[1]
MAKEFILE = (TESTS.parent / "Makefile").read_text(encoding="utf-8")
MARKS = ("kernels", "slow")


def recipe(target: str) -> str:
    """Return what a target of the Makefile runs."""
    match = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert match, f"the Makefile has no target {target}"
    return match[1]


def selects(target: str, marks: set[str]) -> bool:
    """Say whether a target runs a test with such marks."""
    (expression,) = re.findall(r"-m '([^']*)'", recipe(target))
    return not expression or Expression.compile(expression).evaluate(lambda name, **_: name in marks)


@pytest.mark.parametrize("present", list(product((False, True), repeat=len(MARKS))))
def test_a_test_that_is_not_slow_is_in_one_of_two_targets_and_a_slow_one_in_none(present):
    marks = {name for name, has in zip(MARKS, present, strict=True) if has}
    assert selects("test", marks) + selects("test-kernels", marks) == ("slow" not in marks)
    assert selects("kernels-check", marks)


def test_every_file_whose_cases_are_left_out_is_in_a_folder_of_test_kernels():
    folders = re.findall(r"tests/\w+", recipe("test-kernels"))
    assert folders == re.findall(r"tests/\w+", recipe("kernels-check"))
    using = [path for path in TESTS.rglob("test_*.py") if "covering" in path.read_text("utf-8")]
    assert {f"tests/{path.relative_to(TESTS).parts[0]}" for path in using} <= {*folders}
    assert not re.findall(r"tests/\w+", recipe("test"))  # all of testpaths


def test_one_case_of_each_key_is_kept_and_none_is_lost():
    slow = pytest.param("z1", marks=pytest.mark.slow)
    cases = covering(["a1", "a2", "b1", "b2", slow], lambda name: name[0])
    assert [case.values for case in cases] == [("a1",), ("a2",), ("b1",), ("b2",), ("z1",)]
    assert [[mark.name for mark in case.marks] for case in cases] == [[], ["kernels"], ["kernels"], [], ["slow"]]
