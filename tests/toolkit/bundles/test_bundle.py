import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from medseg_trt.bundles import bundle as bundle_module
from medseg_trt.bundles.bundle import MANIFEST, find_bundle, golden_input, load_bundle
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.files import sha256

FILES = ["fp32.onnx", "weights-fp32.bin", "model.onnx", "golden.npz", "config.json", "preprocessor_config.json"]


@pytest.fixture
def copy(tiny_bundle, tmp_path) -> Path:
    """Return a bundle that a test may damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "copy.medseg")


def edit_manifest(folder: Path, change) -> None:
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_the_manifest_names_every_file_with_its_digest(tiny_bundle):
    bundle = load_bundle(tiny_bundle)
    files = {path.name for path in tiny_bundle.iterdir()} - {MANIFEST}
    assert bundle.content.files.keys() == files
    assert files == {
        "fp32.onnx",
        "fp32-plain.onnx",
        "weights-fp32.bin",
        "model.onnx",
        "golden.npz",
        "config.json",
        "preprocessor_config.json",
    }
    assert all(sha256(tiny_bundle / name) == entry.sha256 for name, entry in bundle.content.files.items())
    assert (tiny_bundle / "model.onnx").read_bytes() == (
        tiny_bundle / bundle.variant(bundle.default).graph
    ).read_bytes()


def test_the_manifest_says_what_was_built_and_how_well_it_was_verified(tiny_bundle):
    manifest = load_bundle(tiny_bundle).manifest()
    assert manifest["source"]["sha256"] == sha256(tiny_bundle.parent / "model" / "model.pt")
    assert {
        (stored_execution["backend"], stored_execution["variant"]) for stored_execution in manifest["executions"]
    } == {
        ("onnxruntime", "fp32"),
        ("openvino", "fp32-plain"),
    }
    for execution in manifest["executions"]:
        assert execution["executed"]
        assert execution["median_ms"] > 0
        assert execution["verification"]["images"] == "generated noise"
        assert 0 < execution["verification"]["max_abs_error"] <= 1e-4
        assert execution["verification"]["agreement"] >= 0.9999
    passes = manifest["variants"]["fp32"]["passes"]
    assert passes["folded"]["mapper1"] == {"count": 1, "reason": ""}
    assert passes["fused"]["swiglus"] == 1
    assert manifest["classes"]["names"] == ("background", "disc", "bar")
    assert json.loads(json.dumps(manifest))["model"]["image_size"] == [32, 32]


def test_hugging_face_configs_say_the_same(tiny_bundle):
    config = json.loads((tiny_bundle / "config.json").read_text())
    assert config["model_type"] == "medseg-trt"
    assert config["id2label"] == {"0": "background", "1": "disc", "2": "bar"}
    processor = json.loads((tiny_bundle / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 32}
    assert processor["window"] == [0.0, 255.0]


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_in_any_file_is_refused(copy, name):
    path = copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=f"{name} is not what manifest.json says"):
        load_bundle(copy)


def test_a_missing_and_a_shortened_file_are_refused(copy):
    path = copy / "weights-fp32.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="is not what"):
        load_bundle(copy)
    path.unlink()
    with pytest.raises(ArtefactError, match=r"weights-fp32\.bin is missing"):
        load_bundle(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_digest_is_refused(copy, name):
    edit_manifest(copy, lambda data: data["files"].pop(name))
    with pytest.raises(ArtefactError, match=f"no digest of {name}"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["../stolen.onnx", "/etc/passwd"])
def test_a_path_out_of_the_bundle_is_refused(copy, name):
    def redirect(data):
        data["variants"]["fp32"]["graph"] = name
        data["files"][name] = data["files"]["fp32.onnx"]

    edit_manifest(copy, redirect)
    shutil.copy(copy / "fp32.onnx", copy.parent / "stolen.onnx")
    with pytest.raises(ArtefactError, match=r"leads out of|no plain file name"):
        load_bundle(copy)


def test_a_link_out_of_the_bundle_is_refused(copy):
    outside = copy.parent / "outside.bin"
    (copy / "weights-fp32.bin").rename(outside)
    (copy / "weights-fp32.bin").symlink_to(outside)
    with pytest.raises(ArtefactError, match="leads out of"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema=99), "has schema 99"),
        (lambda data: data.update(surprise=1), "surprise"),
        (lambda data: data.pop("classes"), "classes"),
        (lambda data: data.update(default="int8"), "default"),
        (lambda data: data["model"].update(image_size=[33, 32]), "multiple of 16"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(copy, change, message):
    edit_manifest(copy, change)
    with pytest.raises(ArtefactError, match=message):
        load_bundle(copy)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(copy, text):
    (copy / MANIFEST).write_text(text)
    with pytest.raises(ArtefactError):
        load_bundle(copy)


def test_a_huge_manifest_is_not_even_read(copy, monkeypatch):
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", 100)
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(ArtefactError, match="larger than"):
        load_bundle(copy)


def test_other_preprocessing_than_at_the_build_is_refused(copy, monkeypatch):
    """A resize that is off by half a pixel, as a careless rewrite of it would be."""
    monkeypatch.setattr(bundle_module, "golden_input", lambda p: np.roll(golden_input(p), 1, axis=-1))
    with pytest.raises(ArtefactError, match="prepares images in another way"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["classes"].update(names=["background", "bar", "disc"]), "config.json differ in id2label"),
        (lambda data: data["preprocessing"].update(own_window=True), "preprocessor_config.json differ in own_window"),
        (lambda data: data["preprocessing"].update(channel_order="bgr"), "differ in channel_order"),
    ],
)
def test_an_edited_manifest_is_refused(copy, change, message, monkeypatch):
    stored = load_bundle(copy).golden()[0]
    edit_manifest(copy, change)
    monkeypatch.setattr(bundle_module, "golden_input", lambda _: stored)  # as if preparing showed no difference
    with pytest.raises(ArtefactError, match=message):
        load_bundle(copy)


@pytest.mark.parametrize("index", [(0, 0, 0, 0), (0, 2, 31, 31), (0, 1, 16, 7)])
def test_load_bundle_detects_one_changed_pixel_of_the_golden_input(copy, monkeypatch, index):
    """The mean over all pixels, 3e-7, would be below the tolerance."""

    def nearly(preprocessing):
        changed_input = golden_input(preprocessing).copy()
        changed_input[index] += np.float32(1e-3)
        return changed_input

    monkeypatch.setattr(bundle_module, "golden_input", nearly)
    with pytest.raises(ArtefactError, match="prepares images in another way"):
        load_bundle(copy)


def test_find_bundle_error_suggests_the_command_for_none_or_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="medseg-trt build"):
        find_bundle(None)
    (tmp_path / "a.medseg").mkdir()
    assert find_bundle(None) == Path("a.medseg")
    (tmp_path / "b.medseg").mkdir()
    with pytest.raises(UsageError, match=r"--bundle a\.medseg, --bundle b\.medseg"):
        find_bundle(None)
    assert find_bundle(Path("b.medseg")) == Path("b.medseg")


def test_load_bundle_refuses_a_folder_without_manifest(tmp_path):
    with pytest.raises(ArtefactError, match="is no bundle"):
        load_bundle(tmp_path)
