"""ONNX files from elsewhere: what is read computes the same in our form, and what cannot be used is named."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from foreign import write_onnx
from onnx import TensorProto, helper

from medseg_trt.errors import ArtefactError
from medseg_trt.export.graph import imported_file, imported_wire
from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.imported import MAX_GROUPS, import_graph
from medseg_trt.export.graph.imported_file import read_imported
from medseg_trt.export.graph.modules import groups_of
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.external_spec import ExternalSpec

ROUNDING = 2e-5  # a BatchNorm that is merged rounds its products anew: 1e-6 of logits up to 20 in this network


FEW_NODES = 10  # instead of MAX_NODES, which take seconds to write


def spec(classes: int = 3) -> ExternalSpec:
    return ExternalSpec(architecture="onnx:net", image_size=(32, 32), num_classes=classes)


def images(channels: int = 1) -> np.ndarray:
    values = np.random.default_rng(1).normal(size=(3, 3, 32, 32)).astype(np.float32)
    return values[:, :1].repeat(3, axis=1) if channels == 1 else values


def run(path, name: str, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: batch})[0])


def imported_logits(path, tmp_path, logits: int = 3, classes: int = 3, channels: int = 1) -> np.ndarray:
    graph = import_graph(read_imported(path), spec(classes), logits)
    save_graphs({"ours.onnx": graph}, tmp_path, "weights.bin")
    return run(tmp_path / "ours.onnx", "pixel_values", images(channels))


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21])
def test_imported_onnx_network_has_the_logits_of_the_file(tmp_path, opset):
    path = write_onnx(tmp_path / "net.onnx", opset=opset)
    expected = run(path, "image", images()[:, :1])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(imported_logits(path, tmp_path), expected, atol=ROUNDING)


def test_three_channels_reach_the_network_in_their_order(tmp_path):
    path = write_onnx(tmp_path / "net.onnx", input_shape=("batch", 3, 32, 32))
    expected = run(path, "image", images(3))
    np.testing.assert_allclose(imported_logits(path, tmp_path, channels=3), expected, atol=ROUNDING)
    assert np.abs(run(path, "image", images(3)[:, ::-1].copy()) - expected).max() > 1  # another order would show


def test_dynamic_image_size_is_fixed_to_the_described_size(tmp_path):
    path = write_onnx(
        tmp_path / "net.onnx", input_shape=("n", 1, "height", "width"), output_shape=("n", 3, "height", "width")
    )
    file = read_imported(path)
    assert file.size == (None, None)
    np.testing.assert_allclose(imported_logits(path, tmp_path), run(path, "image", images()[:, :1]), atol=ROUNDING)


def test_two_logits_of_a_binary_network_become_their_difference(tmp_path):
    part = helper.make_node("Gather", ["logits_of_conv", "two"], ["both"], axis=1)
    path = write_onnx(
        tmp_path / "net.onnx",
        extra_nodes=[part],
        output="both",
        output_shape=("batch", 2, 32, 32),
        constants={"two": np.array([0, 2])},
    )
    both = run(path, "image", images()[:, :1])
    ours = imported_logits(path, tmp_path, logits=2, classes=1)
    np.testing.assert_allclose(ours, both[:, 1:] - both[:, :1], atol=ROUNDING)
    assert (ours[:, 0] > 0).mean() == pytest.approx((both.argmax(axis=1) == 1).mean(), abs=1e-3)


def test_batch_norms_are_merged_and_every_product_has_a_layer(tmp_path):
    graph = import_graph(read_imported(write_onnx(tmp_path / "net.onnx")), spec(), 3)
    assert graph.num_nodes["BatchNormalization"] == 0
    assert {gemm.part for gemm in gemms(graph)} == {"decoder"}
    assert list(groups_of(graph)) == ["image_layer", "logits_layer"]


def test_many_products_share_a_bounded_number_of_groups(tmp_path):
    nodes = [
        helper.make_node("Conv", [before, "eye"], [f"x{number}"])
        for number, before in enumerate(["logits_of_conv", *(f"x{number}" for number in range(2 * MAX_GROUPS))])
    ]
    path = write_onnx(
        tmp_path / "net.onnx",
        extra_nodes=nodes,
        output=f"x{2 * MAX_GROUPS}",
        constants={"eye": np.eye(3)[:, :, None, None] + 0.0},
    )
    groups = groups_of(import_graph(read_imported(path), spec(), 3))
    assert len(groups) <= MAX_GROUPS + 2
    assert sum(map(len, groups.values())) == 2 * MAX_GROUPS + 3


def after(operator: str, domain: str = "", **attributes: Any) -> dict[str, object]:
    node = helper.make_node(operator, ["logits_of_conv"], ["last"], domain=domain, **attributes)
    return {"extra_nodes": [node], "output": "last"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (after("Dance", domain="com.example"), r"uses com.example.Dance, an operator that is not of ONNX itself"),
        (after("NonZero"), r"uses the operator NonZero, which bundles may not use"),
        (after("Sigmoid"), r"ends with Sigmoid, so it gives probabilities; export the logits"),
        (after("Softmax", axis=1), r"ends with Softmax"),
        ({"input_shape": (1, 1, 32, 32)}, r"takes image \(1, 1, 32, 32\): the batch is fixed at 1; .*free batch axis"),
        (
            {"input_shape": ("n", 32, 32, 1)},
            r"takes image \(free, 32, 32, 1\), channels last; export it channels first",
        ),
        ({"input_shape": ("n", 4, 32, 32)}, r"images have 1 or 3 channels"),
        ({"input_shape": ("n", "c", 32, 32)}, r"images have 1 or 3 channels, on a fixed second axis"),
        ({"input_shape": ("n", 1, 32, 32, 32)}, r"export a network of 2-D images"),
        ({"more_outputs": ("c",)}, r"gives 2 outputs \(logits_of_conv .*, c .*; .*deep supervision"),
        ({"output_type": TensorProto.INT64}, r"in int64; export the float32 logits"),
        ({"output_shape": ("n", 3)}, r"gives logits_of_conv \(free, 3\); export logits"),
        ({"opset": 8}, r"is written in operator set 8; export it again with 9 or later"),
    ],
)
def test_unusable_onnx_file_is_refused_in_one_line(tmp_path, changes, message):
    path = write_onnx(tmp_path / "net.onnx", **changes)
    with pytest.raises(ArtefactError, match=message) as caught:
        read_imported(path)
    assert str(caught.value).startswith(f"{path} ")
    assert "\n" not in str(caught.value)


def test_a_name_of_a_million_characters_or_with_line_breaks_is_not_repeated(tmp_path):
    name = "y\n" * 500_000
    node = helper.make_node("Softmax", ["logits_of_conv"], [name])
    path = write_onnx(tmp_path / "net.onnx", extra_nodes=[node], output=name, output_shape=("n", 3))
    with pytest.raises(ArtefactError) as caught:
        read_imported(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 700


def test_onnx_file_with_a_subgraph_is_refused(tmp_path):
    body = helper.make_graph([], "body", [], [helper.make_tensor_value_info("logits_of_conv", TensorProto.FLOAT, None)])
    node = helper.make_node("If", ["c"], ["last"], then_branch=body, else_branch=body)
    path = write_onnx(tmp_path / "net.onnx", extra_nodes=[node], output="last")
    with pytest.raises(ArtefactError, match="has a graph inside If; export the network again without branches"):
        read_imported(path)


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add()


def sparse_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(
        name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR
    ).sparse_tensor.SetInParent()


def training(model: onnx.ModelProto) -> None:
    model.training_info.add()


def too_many_nodes(model: onnx.ModelProto) -> None:
    model.graph.node.extend(helper.make_node("Relu", ["image"], [f"z{number}"]) for number in range(FEW_NODES))


def two_locations(model: onnx.ModelProto) -> None:
    _in_other_files(model.graph.initializer[0], "net.onnx", "net.onnx")


def hidden_location(model: onnx.ModelProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="values", type=onnx.AttributeProto.TENSORS)
    _in_other_files(attribute.tensors.add(), "/etc/hostname")


def _in_other_files(tensor: TensorProto, *locations: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for location in locations:
        tensor.external_data.add(key="location", value=location)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sparse, "has sparse weights; export the network with dense ones"),
        (sparse_attribute, "has a graph inside Conv"),
        (training, "has a training graph"),
        (too_many_nodes, f"has more than {FEW_NODES} nodes"),
        (two_locations, "says twice where its weights are; it is not to be trusted"),
        (hidden_location, "takes weights from '/etc/hostname', which is no file beside it"),
    ],
)
def test_unsafe_onnx_fields_are_refused_before_onnx_parses_the_file(tmp_path, monkeypatch, change, message):
    path = write_onnx(tmp_path / "net.onnx")
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    monkeypatch.setattr(imported_wire, "MAX_NODES", FEW_NODES)
    monkeypatch.delattr(onnx, "load_model_from_string")  # nothing gets so far
    with pytest.raises(ArtefactError, match=message) as caught:
        read_imported(path)
    assert "\n" not in str(caught.value)


def test_files_of_weights_have_a_limit(tmp_path, monkeypatch):
    path = write_onnx(tmp_path / "net.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert read_imported(path).weight_bytes == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    monkeypatch.setattr(imported_wire, "MAX_WEIGHT_BYTES", 100)
    with pytest.raises(ArtefactError, match="has more than 100 bytes of weights in other files"):
        read_imported(path)
    monkeypatch.setattr(imported_file, "MAX_FILE_BYTES", 100)
    with pytest.raises(ArtefactError, match="is larger than 100 bytes"):
        read_imported(path)


@pytest.mark.parametrize(
    ("location", "length", "message"),
    [
        ("../secret.bin", 4, "is no file beside it; it is not to be trusted"),
        ("/etc/hostname", 4, "is no file beside it; it is not to be trusted"),
        ("missing.bin", 4, "is no regular file beside it; copy that file to"),
        ("link.bin", 4, "is no regular file beside it"),
        ("short.bin", 4, "beyond the end of 'short.bin'"),
    ],
)
def test_external_weights_outside_the_folder_missing_or_truncated_are_refused(tmp_path, location, length, message):
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 12))
    (folder / "short.bin").write_bytes(bytes(length))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(write_onnx(folder / "net.onnx"))
    _in_other_files(model.graph.initializer[0], location)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtefactError, match=message):
        read_imported(folder / "net.onnx")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not a network"])
def test_read_imported_refuses_files_that_are_not_onnx(tmp_path, content):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"net\.onnx "):
        read_imported(path)


def test_half_precision_and_quantised_networks_are_refused(tmp_path):
    model = onnx.load(write_onnx(tmp_path / "net.onnx"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float16), "half"))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ArtefactError, match="holds weights in float16; give the float32 network"):
        read_imported(tmp_path / "net.onnx")
    scale = {"step": np.array(0.1)}
    node = helper.make_node("QuantizeLinear", ["logits_of_conv", "step"], ["last"])
    path = write_onnx(tmp_path / "int8.onnx", extra_nodes=[node], output="last", constants=scale)
    with pytest.raises(ArtefactError, match="is quantised already"):
        read_imported(path)


ARGMAX = helper.make_node("ArgMax", ["logits_of_conv"], ["label"], axis=1, keepdims=0)
LABELS = {
    "argmax": [ARGMAX, helper.make_node("Cast", ["label"], ["last"], to=TensorProto.UINT8)],
    "argmax with its axis": [helper.make_node("ArgMax", ["logits_of_conv"], ["last"], axis=1, keepdims=1)],
    "squeezed argmax": [
        helper.make_node("ArgMax", ["logits_of_conv"], ["label"], axis=1, keepdims=1),
        helper.make_node("Squeeze", ["label", "one"], ["last"]),
    ],
    "above 0": [
        helper.make_node("Greater", ["logits_of_conv", "zero"], ["above"]),
        helper.make_node("Cast", ["above"], ["last"], to=TensorProto.UINT8),
    ],
}


@pytest.mark.parametrize("nodes", LABELS.values(), ids=LABELS)
def test_of_a_network_that_gives_labels_the_logits_are_taken(tmp_path, nodes):
    expected = run(write_onnx(tmp_path / "logits.onnx"), "image", images()[:, :1])
    constants = {"one": np.array([1]), "zero": np.array(0.0)}
    path = write_onnx(
        tmp_path / "net.onnx", extra_nodes=nodes, output="last", output_type=TensorProto.UINT8, constants=constants
    )
    file = read_imported(path)
    assert file.chose_labels
    (tmp_path / "own.onnx").write_bytes(file.content)
    np.testing.assert_array_equal(run(tmp_path / "own.onnx", "image", images()[:, :1]), expected)
    np.testing.assert_allclose(imported_logits(path, tmp_path), expected, atol=ROUNDING)


def test_of_a_squeezed_network_of_one_class_the_logits_are_taken(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["nothing"], value=onnx.numpy_helper.from_array(np.array(0, np.float32))),
        helper.make_node("Gather", ["logits_of_conv", "second"], ["logit"], axis=1),
        helper.make_node("Squeeze", ["logit", "second"], ["flat"]),
        helper.make_node("Greater", ["flat", "nothing"], ["above"]),
        helper.make_node("Cast", ["above"], ["last"], to=TensorProto.UINT8),
    ]
    constants = {"second": np.array([1])}
    path = write_onnx(
        tmp_path / "net.onnx", extra_nodes=nodes, output="last", output_type=TensorProto.UINT8, constants=constants
    )
    logits = run(write_onnx(tmp_path / "logits.onnx"), "image", images()[:, :1])[:, 1:2]
    labels = run(path, "image", images()[:, :1])
    np.testing.assert_array_equal(labels, logits[:, 0] > 0)
    ours = imported_logits(path, tmp_path, logits=1, classes=1)
    np.testing.assert_allclose(ours, logits, atol=ROUNDING)


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("ArgMax", ["logits_of_conv"], ["last"], axis=3)],
        [helper.make_node("ArgMax", ["logits_of_conv"], ["last"], axis=1, select_last_index=1)],
        [helper.make_node("Greater", ["logits_of_conv", "half"], ["last"])],
        [helper.make_node("Cast", ["logits_of_conv"], ["last"], to=TensorProto.UINT8)],
    ],
)
def test_import_refuses_labels_that_are_not_an_argmax_or_threshold_of_logits(tmp_path, nodes):
    path = write_onnx(
        tmp_path / "net.onnx",
        extra_nodes=nodes,
        output="last",
        output_type=TensorProto.UINT8,
        constants={"half": np.array(0.5)},
    )
    with pytest.raises(ArtefactError, match="in uint8; export the float32 logits"):
        read_imported(path)


def test_boxes_and_prototypes_are_refused_as_instance_segmentation(tmp_path):
    nodes = [helper.make_node("Squeeze", ["c", "two"], ["boxes"])]
    path = write_onnx(
        tmp_path / "net.onnx", input_shape=(1, 1, 32, 32), extra_nodes=nodes, constants={"two": np.array([2])}
    )
    model = onnx.load(path)
    model.graph.output.insert(0, helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 116, 84]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtefactError, match=r"gives boxes and prototypes \(boxes \(1, 116, 84\), .*not supported"):
        read_imported(path)
