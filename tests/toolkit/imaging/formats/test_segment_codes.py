"""Codes of classes: every class of the recipes and samples has a default, and ``dataset.json`` states others."""

import json

import pytest

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.segment_codes import DEFAULTS, class_codes
from medseg_trt.samples import cells, organs, tumours
from medseg_trt.spec import ClassCode, Classes, Code
from medseg_trt.train.datasets import acdc
from medseg_trt.train.datasets.description import read_description
from medseg_trt.train.datasets.synapse import ORGANS

NAMES = (
    *(names for names in ORGANS.values()),
    acdc.CLASSES.names,
    *(tuple(sample.DATASET["classes"]) for sample in (cells, organs, tumours)),
    ("background", "lesion"),
)
LIVER = {"value": "10200004", "scheme": "SCT", "meaning": "Liver"}


@pytest.mark.parametrize("names", NAMES)
def test_the_classes_of_recipes_and_samples_have_codes(names, caplog):
    codes = class_codes(Classes(names=names))
    assert [code.name for code in codes] == list(names[1:])
    assert {code.type.scheme for code in codes} == {"SCT"}
    assert caplog.text == ""


def test_default_segment_codes_are_unique():
    meanings = [(code.type.value, code.modifier) for code in DEFAULTS.values()]
    assert len(set(meanings)) == len(meanings)


def test_codes_of_dataset_json_reach_the_classes(tmp_path):
    own = {"name": "blob", "category": LIVER | {"meaning": "Organ"}, "type": LIVER}
    content = {"classes": ["background", "blob"], "codes": [own]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    described = read_description(tmp_path / "dataset.json").description
    (code,) = class_codes(Classes(names=("background", "blob"), codes=described.codes))
    assert code.type == Code(**LIVER)


@pytest.mark.parametrize(
    "codes",
    [
        [{"name": "other", "category": LIVER, "type": LIVER}],
        [{"name": "background", "category": LIVER, "type": LIVER}],
        [{"name": "blob", "category": LIVER, "type": LIVER}] * 2,
        [{"name": "blob", "category": LIVER, "type": LIVER | {"value": "1" * 17}}],
        [{"name": "blob", "category": LIVER, "type": LIVER | {"meaning": "a\\b"}}],
        [{"name": "blob", "type": LIVER}],
    ],
)
def test_codes_that_cannot_be_are_refused(codes, tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["background", "blob"], "codes": codes}))
    with pytest.raises(InputError, match="codes"):
        read_description(tmp_path / "dataset.json")


def test_a_name_with_odd_characters_gets_a_valid_private_code():
    (code,) = class_codes(Classes(names=("background", "a\\b\x00" + "ü" * 80)))
    assert isinstance(code, ClassCode)
    assert (code.type.scheme, len(code.type.value)) == ("99MEDSEG", 16)
