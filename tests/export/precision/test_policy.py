"""The digest of a rounding policy changes with each of its settings and with its version, and with nothing else."""

import hashlib

import pytest

from medseg_trt.export.precision import policy
from medseg_trt.export.precision.policy import policy_digest

INT8 = {"resnet": "int8", "vit": "int8", "block": "int8", "decoder": "int8"}
SETTINGS = (INT8, "uint8", "plain", ("root",))
# Bundles and results hold digests: the text below is what a digest of version 1 is made of.
VERSION_1 = (
    '{"dialect": "plain", "kept_float": ["root"], '
    '"parts": {"block": "int8", "decoder": "int8", "resnet": "int8", "vit": "int8"}, '
    '"quant_format": "uint8", "version": 1}'
)


def test_the_digest_does_not_depend_on_the_order():
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
def test_every_setting_changes_the_digest(other):
    assert policy_digest(INT8, "uint8", "plain", ()) != policy_digest(*other)


def test_the_version_changes_the_digest(monkeypatch):
    before = policy_digest(*SETTINGS)
    monkeypatch.setattr(policy, "POLICY_VERSION", policy.POLICY_VERSION + 1)
    assert policy_digest(*SETTINGS) != before


def test_the_digest_of_a_version_stays_the_same(monkeypatch):
    monkeypatch.setattr(policy, "POLICY_VERSION", 1)
    assert policy_digest(*SETTINGS) == hashlib.sha256(VERSION_1.encode()).hexdigest()
