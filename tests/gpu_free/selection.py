"""Which cases of the kernels' tests ``make test`` runs; the others are marked ``kernels``: ``make test-kernels``."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest

from medseg_trt.kernels.kernel import Entry

Parameters = type(pytest.param())
STRIDE = 5  # from one key to the next: coprime to the 12 entries of a kernel, so that types and forms change with it


def covering(cases: Iterable[Any], key: Callable[..., Hashable]) -> list[Any]:
    """Return all cases; ``make test`` keeps one of each key, and takes another place in every key's list.

    Args:
        cases: what ``parametrize`` takes. A case with a mark of its own, such as ``slow``, is left as it is.
        key: of a case, given its values: what has to be covered.
    """
    parameters = [_parameters(case) for case in cases]
    groups: dict[Hashable, list[int]] = {}
    for index, case in enumerate(parameters):
        if not case.marks:
            groups.setdefault(key(*case.values), []).append(index)
    selected = {indices[number * STRIDE % len(indices)] for number, indices in enumerate(groups.values())}
    return [
        case if case.marks or index in selected else case._replace(marks=(pytest.mark.kernels,))
        for index, case in enumerate(parameters)
    ]


def selected_cases(test: Callable[..., None], number: int = 0) -> list[Sequence[Any]]:
    """Return the values of the cases of a test's decorator ``number`` that ``make test`` runs."""
    decorators = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    return [case.values for case in map(_parameters, decorators[number].args[1]) if not case.marks]


def form(entry: Entry) -> Hashable:
    """Return what tells an entry from others of its kernel and type: output, scale, layout, angles."""
    return tuple(sorted((name, value) for name, value in entry.defines.items() if name not in ("ENTRY", "SCALAR")))


def _parameters(case: Any) -> Any:
    if isinstance(case, Parameters):
        return case
    return pytest.param(*case) if isinstance(case, tuple) else pytest.param(case)
