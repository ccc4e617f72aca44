"""Manifests of schemas 2 and 3 are read under today's names, and with the same content."""

import json
import zipfile
from pathlib import Path

import pytest

from medseg_trt.bundles.bundle import MANIFEST, load_bundle
from medseg_trt.bundles.manifest import SCHEMA, BuiltEngine, Manifest
from medseg_trt.bundles.older_manifests import RENAMED, current_fields
from medseg_trt.errors import ArtefactError
from medseg_trt.spec import EngineSpec, from_dict, to_dict

FIXTURES = Path(__file__).parents[2] / "fixtures"
GATE = {
    "metric": "Dice",
    "images": 5,
    "unit": "slices",
    "reference": 0.9,
    "candidate": 0.9,
    "drop": 0.0,
    "low": 0.0,
    "high": 0.001,
    "limit": 0.005,
}


@pytest.mark.parametrize("schema", [2, 3])
def test_a_bundle_of_an_earlier_schema_has_todays_names(schema, tmp_path):
    with zipfile.ZipFile(FIXTURES / f"bundle-schema-{schema}.zip") as file:
        file.extractall(tmp_path)
    stored = json.loads((tmp_path / MANIFEST).read_text())
    assert stored["schema"] == schema
    content = load_bundle(tmp_path).content
    assert content.schema == SCHEMA
    for name, variant in content.variants.items():
        assert variant.dialect == stored["variants"][name]["flavour"]
    for execution, older in zip(content.executions, stored["executions"], strict=True):
        assert execution.compute_dtype == older["compute"]
        assert execution.verification.by == older["verification"]["by"]
        assert execution.verification.batch_sizes == tuple(older["verification"]["batch_sizes"])
    assert content.rejected_executions == ()


def older(manifest: Manifest) -> dict:
    """Return a manifest as version 0.1.0 wrote it."""
    data = json.loads(json.dumps(to_dict(manifest)))
    back = {part: {new: old for old, new in names.items()} for part, names in RENAMED.items()}

    def renamed(fields: dict, part: str) -> dict:
        return {back[part].get(name, name): value for name, value in fields.items()}

    data["variants"] = {name: renamed(variant, "variants") for name, variant in data["variants"].items()}
    for part in ("executions", "engines"):
        data[part] = [renamed(entry, part) for entry in data[part]]
    return {**renamed(data, "manifest"), "schema": 3}


def test_every_renamed_field_keeps_its_value(tiny_bundle):
    content = load_bundle(tiny_bundle).content
    spec = EngineSpec(library="tensorrt-rtx", targets=("sm89",), opt_batch=1, max_batch=1)
    engine = BuiltEngine(
        plan="engines/a.plan",
        variant="fp32",
        spec=spec,
        wall_s=1.0,
        processor_s=1.0,
        peak_resident_mb=1.0,
        failed_expectations=("attention is not fused",),
    )
    data = older(content)
    data["engines"] = older_engine = [json.loads(json.dumps(to_dict(engine)))]
    older_engine[0]["unmet"] = older_engine[0].pop("failed_expectations")
    data["dropped"] = ["int8 with openvino in bf16: it died"]
    data["executions"][0]["verification"]["gate"] = {**GATE, "holds": True}
    manifest = from_dict(Manifest, current_fields(data), "manifest.json")
    assert manifest.rejected_executions == ("int8 with openvino in bf16: it died",)
    assert manifest.engines[0].failed_expectations == ("attention is not fused",)
    gate = manifest.executions[0].verification.gate
    assert gate is not None
    assert gate.holds
    assert {name: variant.dialect for name, variant in manifest.variants.items()} == {
        name: variant.dialect for name, variant in content.variants.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(variants=[]),
        lambda data: data.update(executions={}),
        lambda data: data["executions"].insert(0, "fp32"),
        lambda data: data["executions"][0].update(verification=[1]),
        lambda data: data["executions"][0]["verification"].update(gate=[1]),
        lambda data: data.update(engines=[None]),
    ],
)
def test_a_damaged_manifest_of_an_earlier_schema_is_one_line(tiny_bundle, change):
    data = older(load_bundle(tiny_bundle).content)
    change(data)
    with pytest.raises(ArtefactError, match=r"manifest\.json: Manifest"):
        from_dict(Manifest, current_fields(data), "manifest.json")


def test_older_manifest_with_old_and_new_name_of_a_field_is_refused(tiny_bundle):
    """A field under both names would let the older one win in silence."""
    data = older(load_bundle(tiny_bundle).content)
    data["variants"]["fp32"]["dialect"] = "plain"
    with pytest.raises(ArtefactError, match="twice"):
        current_fields(data)
