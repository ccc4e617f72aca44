"""Networks that come as ONNX files: a real MONAI network from export to masks, and descriptions that do not fit."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest
from click.testing import CliRunner
from foreign import export_monai, write_onnx
from onnx import helper
from tiny import write_pictures

from medseg_trt.building import onnx_source
from medseg_trt.building.onnx_source import open_onnx, reference_of_onnx
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.cli import cli
from medseg_trt.errors import AccuracyGateError, ArtefactError, InputError, UsageError
from medseg_trt.imaging.images import read_image
from medseg_trt.imaging.preprocess import prepare, restore
from medseg_trt.pipeline import build_onnx, infer
from medseg_trt.spec import BuildSpec

NAMES = ("background", "disc", "bar")


def write_description(path: Path, names=("background", "lesion"), **preprocessing: object) -> Path:
    fields = {"image_size": [32, 32], "channel_order": "grey", **preprocessing}
    path.write_text(json.dumps({"preprocessing": fields, "classes": {"names": names}}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def monai(tmp_path_factory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("monai")
    return folder / "monai.onnx", export_monai(folder / "monai.onnx")


@pytest.mark.usefixtures("in_process")
def test_a_monai_network_is_built_in_int8_and_segments_as_monai_does(monai, tmp_path):
    import torch

    path, network = monai
    data = write_pictures(tmp_path / "data", count=10, size=(40, 48))
    description = write_description(tmp_path / "net.json")
    command = ["build", "--onnx", path, "--preprocessing", description, "--data", data, "-o", tmp_path / "net.medseg"]
    options = ["--precision", "fp32,int8", "--backend", "onnxruntime", "--max-dice-drop", "0.2", "--json"]
    ran = CliRunner().invoke(cli, [*map(str, command), *options])
    assert ran.exit_code == 0, ran.output
    bundle = load_bundle(tmp_path / "net.medseg")
    assert bundle.content.model.architecture == "onnx:monai"
    assert bundle.content.source["checkpoint"] == "monai.onnx"
    shares = {variant.precision: variant.passes["int8_share"] for variant in bundle.content.variants.values()}
    assert shares["fp32"] == 0
    assert shares["int8"] > 0.8
    pictures = [data / "images" / f"case{number}.png" for number in range(3)]
    for mask in infer(pictures, bundle, precision="fp32"):
        image = read_image(mask.path)
        prepared = prepare(image.pixels[0], bundle.preprocessing, None)
        with torch.inference_mode():
            logits = network(torch.from_numpy(prepared[np.newaxis, :1])).numpy()[0]
        expected = restore(logits[1:] - logits[:1], image.size, bundle.preprocessing, None)
        assert 0 < expected.mean() < 1
        assert (mask.labels[0] == expected).mean() > 0.999  # a pixel may flip only where both logits tie


@pytest.mark.usefixtures("in_process")
def test_a_graph_that_differs_from_the_file_is_not_written(monai, tmp_path, monkeypatch):
    path, _ = monai

    def wrong(*arguments):
        graph = import_graph(*arguments)
        weight = next(value for value in graph.model.graph.initializers.values() if len(value.shape or ()) == 4)
        assert weight.const_value is not None
        weight.const_value = onnx_ir.tensor(weight.const_value.numpy() * 1.1, name=weight.name)
        return graph

    import onnx_ir

    import_graph = onnx_source.import_graph
    monkeypatch.setattr(onnx_source, "import_graph", wrong)
    with pytest.raises(AccuracyGateError, match="logits differ by"):
        build_onnx(path, write_description(tmp_path / "net.json"), BuildSpec(backend="onnxruntime"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_colour_image_is_refused_by_a_network_for_grey_ones(tmp_path):
    p = onnx_source.read_description(write_description(tmp_path / "net.json")).preprocessing
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photo.png")
    with pytest.raises(InputError, match="the image is in colour, and the network was made for grey images"):
        prepare(read_image(tmp_path / "photo.png").pixels[0], p, None)


RESIZED = {
    "extra_nodes": [helper.make_node("MaxPool", ["logits_of_conv"], ["half"], kernel_shape=[2, 2], strides=[2, 2])],
    "output": "half",
    "output_shape": ("batch", 3, "h", "w"),
}
CHANNELS_LAST = {
    "extra_nodes": [helper.make_node("Transpose", ["logits_of_conv"], ["last"], perm=[0, 2, 3, 1])],
    "output": "last",
    "output_shape": ("batch", 32, 32, 3),
}
FIXED_INSIDE = {
    "extra_nodes": [helper.make_node("Reshape", ["logits_of_conv", "shape"], ["one"])],
    "output": "one",
    "constants": {"shape": np.array([1, 3, 32, 32])},
}


@pytest.mark.parametrize(
    ("network", "description", "error", "message"),
    [
        (RESIZED, {}, ArtefactError, "gives logits of 16 x 16 pixels for images of 32 x 32; let the network resize"),
        (CHANNELS_LAST, {}, ArtefactError, r"gives logits \(2, 32, 32, 3\), channels last"),
        (FIXED_INSIDE, {}, ArtefactError, "does not run with 2 images .*if its batch is fixed inside, export it again"),
        ({}, {"names": NAMES[:2]}, ArtefactError, r"gives 3 logits a pixel, but 2 classes .* need 1 or 2"),
        ({}, {"image_size": [64, 32]}, UsageError, r"takes images of 32 x 32 pixels, .* set image_size to \[32, 32\]"),
        ({}, {"channel_order": "rgb"}, UsageError, "of 1 channel; set channel_order to grey"),
        ({"input_shape": ("n", 3, 32, 32)}, {}, UsageError, "of 3 channels; set channel_order to rgb"),
        ({}, {"image_size": "big"}, ArtefactError, r"net\.json: OnnxDescription .*image_size must be a list"),
        ({}, {"mean": [0.5]}, ArtefactError, r"preprocessing\.mean is too short: value 2 is missing"),
        ({}, {"colour": 1}, ArtefactError, "colour is not a known field"),
    ],
)
def test_a_description_that_does_not_fit_is_one_line(tmp_path, network, description, error, message):
    path = write_onnx(tmp_path / "net.onnx", **network)
    with pytest.raises(error, match=message) as caught:
        open_onnx(path, write_description(tmp_path / "net.json", **{"names": NAMES, **description}))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    path = write_onnx(tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r'other\.json does not exist; .*\{"preprocessing"'):
        open_onnx(path, tmp_path / "other.json")


def test_onnx_reference_equals_the_original_file_in_onnxruntime(tmp_path):
    path = write_onnx(tmp_path / "net.onnx")
    source = open_onnx(path, write_description(tmp_path / "net.json", NAMES))
    batch = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(source.reference(batch), session.run(None, {"image": batch[:, :1]})[0])


def test_onnx_network_with_external_weights_gives_the_same_logits(tmp_path):
    path = write_onnx(tmp_path / "net.onnx")
    expected = open_onnx(path, write_description(tmp_path / "net.json", NAMES))
    (tmp_path / "split").mkdir()
    split = tmp_path / "split" / "net.onnx"
    onnx.save(onnx.load(path), split, save_as_external_data=True, location="weights.bin", size_threshold=0)
    source = open_onnx(split, tmp_path / "net.json")
    batch = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    np.testing.assert_array_equal(source.reference(batch), expected.reference(batch))
    assert source.graph().num_nodes == expected.graph().num_nodes


def test_a_network_that_gives_nan_is_refused_in_one_line(tmp_path):
    node = helper.make_node("Mul", ["logits_of_conv", "nan"], ["last"])
    changes = {"extra_nodes": [node], "output": "last", "constants": {"nan": np.array(np.nan, np.float32)}}
    path = write_onnx(tmp_path / "net.onnx", **changes)
    source = open_onnx(path, write_description(tmp_path / "net.json", names=NAMES))
    with pytest.raises(ArtefactError, match="the ONNX file gives logits that are NaN or infinite") as caught:
        reference_of_onnx(source, BuildSpec(), None)
    assert "\n" not in str(caught.value)


def test_a_network_that_takes_all_memory_is_refused(tmp_path):
    node = helper.make_node("Tile", ["logits_of_conv", "times"], ["huge"])
    less = helper.make_node("ReduceMax", ["huge"], ["last"], axes=[1], keepdims=1)
    changes = {"extra_nodes": [node, less], "output": "last", "output_shape": ("batch", 1, 32, 32)}
    times = np.array([1, 1 << 17, 1, 1])  # 3 GiB, more than the base of the limit
    path = write_onnx(tmp_path / "net.onnx", **changes, constants={"times": times})
    with pytest.raises(ArtefactError, match=r"takes more memory|bad_alloc|allocate") as caught:
        open_onnx(path, write_description(tmp_path / "net.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [["--onnx", "a"], ["--onnx", "a", "--preprocessing", "b", "--ckpt", "c"], ["--preprocessing", "b"], []]
)
def test_build_requires_ckpt_or_onnx_with_preprocessing(arguments):
    ran = CliRunner().invoke(cli, ["build", *arguments])
    assert isinstance(ran.exception, UsageError | SystemExit)
    assert "give --ckpt FILE, or --onnx FILE with --preprocessing FILE" in str(ran.exception) + ran.output


def test_a_block_is_not_replaced_where_there_is_none(tmp_path):
    path, description = write_onnx(tmp_path / "net.onnx"), write_description(tmp_path / "net.json", NAMES)
    with pytest.raises(UsageError, match="block"):
        build_onnx(path, description, BuildSpec(block="affine"), tmp_path / "out")
