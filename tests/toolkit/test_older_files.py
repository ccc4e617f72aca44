"""Bundles and checkpoints of earlier versions still load, and still draw the masks that they drew then."""

import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import medseg_trt

FIXTURES = Path(__file__).parents[1] / "fixtures"


def unpack(archive: str, folder: Path) -> Path:
    with zipfile.ZipFile(FIXTURES / archive) as file:
        file.extractall(folder)
    return folder


def mask_of(bundle: Path) -> np.ndarray:
    (mask,) = medseg_trt.infer([FIXTURES / "image.png"], bundle, backend="onnxruntime")
    return np.squeeze(mask.labels)


@pytest.fixture
def expected() -> np.ndarray:
    labels = np.asarray(PIL.Image.open(FIXTURES / "mask.png"))
    assert sorted(np.unique(labels)) == [0, 1, 2], "a mask of one class would show nothing"
    return labels


@pytest.mark.parametrize("schema", [2, 3])
def test_a_bundle_of_an_earlier_schema_draws_its_mask(schema, tmp_path, expected):
    bundle = unpack(f"bundle-schema-{schema}.zip", tmp_path / "old.medseg")
    assert f'"schema": {schema}' in (bundle / "manifest.json").read_text()
    np.testing.assert_array_equal(mask_of(bundle), expected)


def test_a_checkpoint_of_version_0_1_is_built_again_to_the_same_mask(tmp_path, expected):
    checkpoint = unpack("checkpoint-0.1.zip", tmp_path) / "model.pt"
    bundle = medseg_trt.build(checkpoint, output=tmp_path / "new.medseg")
    np.testing.assert_array_equal(mask_of(bundle.folder), expected)
