"""The codes and colours of classes in DICOM segmentations.

A class takes its code from the bundle (``codes`` in ``dataset.json``), else from the defaults by its name, else a code
of this program's own scheme, which only repeats its name.
Source: SNOMED CT, as in DICOM PS3.16 CID 7150 (categories), 7166 and 7192 (types) and 244 (sides).
"""

import hashlib
from collections.abc import Mapping

from medseg_trt.progress import LOG
from medseg_trt.spec import ClassCode, Classes, Code

OWN_SCHEME = "99MEDSEG"  # schemes that begin with 99 are private (DICOM PS3.3 section 8.2)
MAX_MEANING = 64


def _sct(value: str, meaning: str) -> Code:
    return Code(value=value, scheme="SCT", meaning=meaning)


ANATOMY = _sct("123037004", "Anatomical Structure")
ABNORMAL = _sct("49755003", "Morphologically Altered Structure")
RIGHT, LEFT = _sct("24028007", "Right"), _sct("7771000", "Left")
KIDNEY = _sct("64033007", "Kidney")


def _organ(name: str, kind: Code, modifier: Code | None = None) -> ClassCode:
    return ClassCode(name=name, category=ANATOMY, type=kind, modifier=modifier)


def _finding(name: str, kind: Code) -> ClassCode:
    return ClassCode(name=name, category=ABNORMAL, type=kind)


DEFAULTS: Mapping[str, ClassCode] = {
    code.name: code
    for code in (
        _organ("spleen", _sct("78961009", "Spleen")),
        _organ("kidney_right", KIDNEY, RIGHT),
        _organ("kidney_left", KIDNEY, LEFT),
        _organ("gallbladder", _sct("28231008", "Gallbladder")),
        _organ("liver", _sct("10200004", "Liver")),
        _organ("stomach", _sct("69695003", "Stomach")),
        _organ("pancreas", _sct("15776009", "Pancreas")),
        _organ("aorta", _sct("15825003", "Aorta")),
        _organ("right ventricle", _sct("53085002", "Right ventricle")),
        _organ("left ventricle", _sct("87878005", "Left ventricle")),
        _organ("myocardium", _sct("74281007", "Myocardium")),
        _organ("cell", _sct("4421005", "Cell")),
        _finding("lesion", _sct("52988006", "Lesion")),
        _finding("tumour", _sct("108369006", "Neoplasm")),
    )
}


def class_codes(classes: Classes) -> tuple[ClassCode, ...]:
    """Return the code of every class except the background, with a warning for classes that have none."""
    own = {code.name: code for code in classes.codes}
    codes: list[ClassCode] = []
    unknown: list[str] = []
    for name in classes.names[1:]:
        code = own.get(name) or DEFAULTS.get(name)
        if code is None:
            unknown.append(name)
            code = _own_code(name)
        codes.append(code)
    if unknown:
        LOG.warning(
            "no SNOMED CT code is known for %s; the DICOM segmentation names them in the private scheme %s: state "
            "their codes in dataset.json before training",
            ", ".join(unknown),
            OWN_SCHEME,
        )
    return tuple(codes)


def _own_code(name: str) -> ClassCode:
    """Return a code of our own scheme: digits of a digest, since a code value may not hold every character."""
    meaning = "".join(character for character in name if character.isprintable() and character != "\\")[:MAX_MEANING]
    kind = Code(value=hashlib.sha256(name.encode()).hexdigest()[:16], scheme=OWN_SCHEME, meaning=meaning or "class")
    return ClassCode(name=name, category=ANATOMY, type=kind)
