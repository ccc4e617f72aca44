"""The name of a way to round changes with everything that decides it, and with nothing else."""

import shutil
from pathlib import Path

import pytest

from medseg_trt.export.precision import policy
from medseg_trt.export.precision.policy import MODULES, policy_digest

INT8 = {"resnet": "int8", "vit": "int8", "block": "int8", "decoder": "int8"}


def test_the_same_choices_have_the_same_name_in_any_order():
    first = policy_digest(INT8, "uint8", "plain", ("head", "root"))
    assert first == policy_digest(dict(reversed(INT8.items())), "uint8", "plain", ["root", "head"])


@pytest.mark.parametrize(
    "other",
    [
        (INT8 | {"vit": "fp32"}, "uint8", "plain", ()),
        (INT8, "int8", "plain", ()),
        (INT8, "uint8", "canonical", ()),
        (INT8, "uint8", "plain", ("head",)),
    ],
)
def test_another_choice_has_another_name(other):
    assert policy_digest(INT8, "uint8", "plain", ()) != policy_digest(*other)


@pytest.mark.parametrize("module", MODULES)
def test_other_code_has_another_name(tmp_path, monkeypatch, module):
    for name in MODULES:
        copy = tmp_path / f"{name}.py"
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(Path(policy.__file__).parents[1] / f"{name}.py", copy)
    before = policy_digest(INT8, "uint8", "plain", ())
    monkeypatch.setattr(policy, "__file__", str(tmp_path / "precision" / "policy.py"))
    assert policy_digest(INT8, "uint8", "plain", ()) == before
    with (tmp_path / f"{module}.py").open("a") as file:
        file.write("# another line")
    assert policy_digest(INT8, "uint8", "plain", ()) != before
