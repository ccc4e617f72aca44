import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import make_checkpoint, write_volumes

from medseg_trt.building import variants as variants_module
from medseg_trt.errors import AccuracyGateError, UsageError
from medseg_trt.imaging.images import read_image
from medseg_trt.imaging.preprocess import prepare, restore
from medseg_trt.pipeline import build, infer
from medseg_trt.sessions.pytorch import open_reference
from medseg_trt.spec import BuildSpec
from medseg_trt.train.checkpoint import load_checkpoint, save_checkpoint
from medseg_trt.train.datasets.folder import manifest_sha256, open_folder


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint that says it was trained on a folder, and the folder."""
    root = tmp_path_factory.mktemp("trained")
    data = write_volumes(root / "data")
    recorded = {"name": "generated", "root": str(data), "sha256": manifest_sha256(open_folder(data).manifest())}
    return make_checkpoint(root, provenance={"data": recorded}), data


def test_masks_are_what_pytorch_says_at_the_images_own_size(tiny_bundle, images):
    checkpoint = load_checkpoint(tiny_bundle.parent / "model" / "model.pt")
    p = checkpoint.preprocessing
    with open_reference(checkpoint) as reference:
        for mask in infer([images], tiny_bundle):
            image = read_image(mask.path)
            assert mask.labels.shape == image.pixels.shape[:3]
            for labels, pixels in zip(mask.labels, image.pixels, strict=True):
                logits = reference.run(prepare(pixels, p, None)[np.newaxis])[0]
                expected = restore(logits, image.size, p, None)
                # A logit is off by 1e-6, so a pixel may flip only where two classes tie: none of these few thousand.
                assert (labels == expected).mean() > 0.999


def test_what_lies_outside_the_field_of_view_is_warned_of(trained_on, tmp_path, caplog):
    checkpoint, data = trained_on
    loaded = load_checkpoint(checkpoint)
    narrow = replace(loaded, preprocessing=replace(loaded.preprocessing, spacing_mm=1.0))
    save_checkpoint(narrow, tmp_path / "model.pt")
    folder = build(tmp_path / "model.pt").folder
    (mask,) = infer([data / "images" / "scan0.nii.gz"], folder)
    assert "outside the network's field of view" in caplog.text
    # 36 rows of 1.5 mm and 28 columns of 2 mm, of which the middle 32 mm are seen: 7 rows and 6 columns a side are not.
    assert not mask.labels[:, :7].any()
    assert not mask.labels[:, :, :6].any()
    assert mask.labels[:, 9:27, 8:20].any()


def test_a_bundle_is_verified_on_real_images_and_does_not_say_where_they_lie(trained_on, tmp_path):
    checkpoint, data = trained_on
    bundle = build(checkpoint, None, tmp_path / "a.medseg")
    assert bundle.default.verification.images == "5 real images of generated, split val"
    assert bundle.manifest()["source"]["provenance"]["data"].keys() == {"name", "sha256"}
    texts = [path.read_bytes() for path in bundle.folder.iterdir()]
    assert not any(str(data.parent).encode() in text for text in texts)  # a hospital's folders are nobody's business


def test_a_bundle_that_does_not_agree_is_not_written_and_the_old_one_stays(tiny_bundle, tmp_path, monkeypatch):
    checkpoint = tiny_bundle.parent / "model" / "model.pt"
    out = shutil.copytree(tiny_bundle, tmp_path / "model.medseg")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def wrong_weights(graphs, folder, weights_name):
        save(graphs, folder, weights_name)
        content = np.fromfile(folder / weights_name, np.float32)
        (content * np.float32(1.01)).tofile(folder / weights_name)

    save = variants_module.save_graphs
    monkeypatch.setattr(variants_module, "save_graphs", wrong_weights)
    with pytest.raises(AccuracyGateError, match="logits differ"):
        build(checkpoint, None, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_no_bundle_is_never_replaced(tiny_bundle, tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.tex").write_text("…")
    with pytest.raises(UsageError, match="is not replaced"):
        build(tiny_bundle.parent / "model" / "model.pt", None, precious)
    assert (precious / "chapter1.tex").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precisions": ("int9",)}, "no precision is called 'int9'"),
        ({"precisions": ("int8",)}, "needs images to calibrate on"),
        ({"backend": "coreml"}, "no back-end is called 'coreml'"),
    ],
)
def test_invalid_build_spec_is_refused_and_keeps_the_old_bundle(tiny_bundle, tmp_path, change, message):
    out = shutil.copytree(tiny_bundle, tmp_path / "model.medseg")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UsageError, match=message):
        build(tiny_bundle.parent / "model" / "model.pt", BuildSpec(**change), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_inference_needs_no_torch(tiny_bundle, images, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None; import medseg_trt\n"
        f"masks = list(medseg_trt.infer([{str(images)!r}], {str(tiny_bundle)!r}))\n"
        "print(len(masks), sorted(set(sys.modules) & {'transformers', 'matplotlib', 'safetensors'}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.stdout.strip() == "3 []"
