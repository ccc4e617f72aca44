"""A graph's masks follow the checkpoint's contract, whatever images a build has; one of another contract is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from fakes.bundles import rehash
from session_here import SessionHere
from tiny import make_checkpoint, write_volumes

from medseg_trt.bench.layer_times import profile
from medseg_trt.bench.profile_schema import Profile
from medseg_trt.building import executions, variants
from medseg_trt.building.executions import default_graph
from medseg_trt.building.reference import Reference
from medseg_trt.bundles import graph_check
from medseg_trt.bundles.bundle import MANIFEST, load_bundle
from medseg_trt.bundles.manifest import Execution, Variant
from medseg_trt.bundles.verification import Verification
from medseg_trt.errors import AccuracyGateError, ArtefactError, MedsegError
from medseg_trt.export.graph import masks
from medseg_trt.export.graph.interface import read_interface, require_interface, required_interface, size_inputs
from medseg_trt.export.graph.node_costs import node_costs
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.pipeline import build, infer
from medseg_trt.sessions.open import open_session
from medseg_trt.spec import BuildSpec
from medseg_trt.train.checkpoint import load_checkpoint, save_checkpoint

SPACING_MM = 2.5
REBUILD = "medseg-trt build --ckpt run/best.pt"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of 2.5 mm pixels that does not say what it was trained on."""
    folder = tmp_path_factory.mktemp("spaced")
    loaded = load_checkpoint(make_checkpoint(folder, architecture="transunet-tiny"))
    save_checkpoint(
        replace(loaded, preprocessing=replace(loaded.preprocessing, spacing_mm=SPACING_MM)), folder / "spaced.pt"
    )
    return folder / "spaced.pt"


@pytest.fixture(scope="module")
def bundles(checkpoint, data, tmp_path_factory) -> dict[str, Path]:
    """Bundles of the checkpoint: of logits, and of masks without and with images to verify on; do not write to them."""
    folder = tmp_path_factory.mktemp("bundles")
    with pytest.MonkeyPatch.context() as patch:
        for module in (executions, variants):
            patch.setattr(module, "ChildSession", SessionHere)
        specs = {"logits": (BuildSpec(), None), "mask": (BuildSpec(outputs="mask"), None)}
        specs["real"] = (BuildSpec(outputs="mask"), data)
        return {
            name: build(checkpoint, spec, folder / f"{name}.medseg", images).folder
            for name, (spec, images) in specs.items()
        }


MASKS = BuildSpec(outputs="mask", backend="onnxruntime")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_masks_are_the_same_whether_the_graph_makes_them_or_not(bundles, data, backend):
    agreed = {
        name: np.stack([mask.labels for mask in infer([data / "images"], folder, backend=backend)])
        for name, folder in bundles.items()
    }
    assert len(np.unique(agreed["logits"])) > 1
    # The order of the additions differs, so a pixel may flip where two classes tie: none of these 10,080 does.
    np.testing.assert_array_equal(agreed["mask"], agreed["logits"])
    np.testing.assert_array_equal(agreed["real"], agreed["logits"])
    for name in ("mask", "real"):
        bundle = load_bundle(bundles[name])
        graph = onnx.load(bundles[name] / bundle.variant(bundle.default).graph, load_external_data=False)
        assert [value.name for value in graph.graph.input] == ["pixel_values", "source_size", "resampled_size"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_that_takes_two_sizes_is_profiled(bundles, backend):
    bundle = load_bundle(bundles["mask"])
    execution = next(candidate for candidate in bundle.content.executions if candidate.backend == backend)
    graph = bundle.folder / bundle.variant(execution).graph
    costs = node_costs(OnnxGraph(model=ir.load(graph)))
    layers = profile(graph, backend, "fp32", "fp32", bundle.golden()[0], costs)
    assert isinstance(layers, Profile), layers
    assert {part.part for part in layers.parts} >= {"resnet", "vit", "decoder"}


def test_the_graph_for_other_tools_is_one_that_onnx_runtime_was_verified_with(bundles):
    """Opened as other tools open it: plain ONNX Runtime, no options."""
    bundle = load_bundle(bundles["logits"])
    session = onnxruntime.InferenceSession(str(bundle.folder / "model.onnx"))
    image, logits = bundle.golden()
    output = np.asarray(session.run(["logits"], {"pixel_values": image})[0])
    assert np.abs(output - logits).max() <= 1e-4
    executions = [candidate for candidate in bundle.content.executions if candidate.backend == "onnxruntime"]
    graphs = [(bundle.folder / bundle.variant(candidate).graph).read_bytes() for candidate in executions]
    assert (bundle.folder / "model.onnx").read_bytes() in graphs


def execution(variant: str, backend: str, executed: bool = True) -> Execution:
    return Execution(
        variant=variant,
        backend=backend,
        compute_dtype="fp32",
        executed=executed,
        golden_error=1.0,
        verification=Verification(by=backend, images="generated noise", num_images=1, max_abs_error=0.0, agreement=1.0),
    )


@pytest.mark.parametrize(
    ("executions", "expected"),
    [
        ([("int8-plain", "openvino", True), ("fp32", "onnxruntime", True)], "fp32.onnx"),  # the fastest is not ORT's
        ([("int8-fp16", "onnxruntime", True), ("fp32", "onnxruntime", True)], "fp32.onnx"),  # it needs an option
        ([("int8-plain", "openvino", True), ("fp32", "onnxruntime", False)], None),  # it never ran here
        ([("int8-plain", "openvino", True)], None),
    ],
)
def test_the_best_graph_of_onnx_runtime_is_chosen_whatever_else_is_faster(executions, expected):
    graphs = {
        name: Variant(precision=precision, dialect="canonical", graph=f"{name}.onnx", weights="w.bin", passes={})
        for name, precision in (("fp32", "fp32"), ("int8-plain", "int8"), ("int8-fp16", "int8+fp16"))
    }
    assert default_graph([execution(*fields) for fields in executions], graphs) == expected


def test_build_without_onnxruntime_execution_writes_no_model_onnx_and_warns(checkpoint, tmp_path, in_process, caplog):
    folder = build(checkpoint, BuildSpec(backend="openvino"), tmp_path / "a.medseg").folder
    assert not (folder / "model.onnx").exists()
    assert "no graph was verified with ONNX Runtime" in caplog.text


def without_spacing(graph, preprocessing, original=masks.with_masks):
    return original(graph, replace(preprocessing, spacing_mm=None))


def of_another_size(graph, preprocessing, original=masks.with_masks):
    """Return a graph with the right inputs whose placement is that of a larger network image."""
    height, width = preprocessing.image_size
    return original(graph, replace(preprocessing, image_size=(height + 16, width)))


CHECKS = {  # the checks of a build in the order in which they come
    "own masks": lambda patch: patch.setattr(Reference, "check_masks_of_graph", lambda *_: {}),
    "probe": lambda patch: patch.setattr(executions, "check_masks", lambda *_: None),
    "interface": lambda patch: patch.setattr(graph_check, "require_interface", lambda *_: None),
}


@pytest.mark.parametrize("left", CHECKS)
def test_a_graph_of_another_contract_is_refused_by_each_check_of_a_build(
    checkpoint, tmp_path, in_process, monkeypatch, left
):
    monkeypatch.setattr(variants, "with_masks", without_spacing)
    for name, disable in CHECKS.items():
        if name != left:
            disable(monkeypatch)
    messages = {
        "own masks": "the masks that the graph makes agree with PyTorch's",
        "probe": "makes other masks than its preprocessing asks for",
        "interface": "does not match its manifest",
    }
    with pytest.raises((AccuracyGateError, ArtefactError), match=messages[left]):
        build(checkpoint, MASKS, tmp_path / "a.medseg")
    assert list(tmp_path.iterdir()) == []


def wrong_bundle(checkpoint: Path, folder: Path, fault) -> Path:
    """Build without any check."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "with_masks", fault)
        for disable in CHECKS.values():
            disable(patch)
        build(checkpoint, MASKS, folder)
    return folder


def test_an_old_bundle_of_another_contract_is_refused_in_one_line_with_the_command(
    checkpoint, data, tmp_path, in_process
):
    folder = wrong_bundle(checkpoint, tmp_path / "old.medseg", without_spacing)
    for action in (lambda: load_bundle(folder), lambda: list(infer([data / "images"], folder))):
        with pytest.raises(
            ArtefactError, match=r"does not match its manifest: .* needs .*resampled_size \(2\)"
        ) as caught:
            action()
        assert REBUILD in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["preprocessing"].update(spacing_mm=None),
        lambda data: data["build"].update(outputs="logits"),
        lambda data: data["model"].update(num_classes=4),
    ],
)
def test_a_manifest_that_promises_another_contract_is_refused(bundles, tmp_path, change):
    folder = shutil.copytree(bundles["mask"], tmp_path / "a.medseg")
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    rehash(folder)
    with pytest.raises(ArtefactError, match="does not match its manifest"):
        load_bundle(folder)


def test_a_graph_with_the_right_inputs_and_other_masks_is_refused_when_it_is_opened(checkpoint, tmp_path, in_process):
    folder = wrong_bundle(checkpoint, tmp_path / "a.medseg", of_another_size)
    bundle = load_bundle(folder)
    with pytest.raises(MedsegError, match=r"makes other masks|refuses"):
        open_session(bundle, "onnxruntime")


def test_inputs_and_outputs_are_what_onnx_reads(bundles):
    for path in [path for folder in bundles.values() for path in folder.glob("*.onnx")]:
        graph = onnx.load(path, load_external_data=False).graph
        for described, values in (
            (read_interface(path).inputs, graph.input),
            (read_interface(path).outputs, graph.output),
        ):
            assert described == {
                value.name: tuple(
                    axis.dim_value if axis.HasField("dim_value") else None for axis in value.type.tensor_type.shape.dim
                )
                for value in values
            }


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 40, b"\x3a\x7f\x00", b"\x3a\x02\x5a\x00"])
def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ArtefactError, match="is no ONNX file, or is damaged"):
        read_interface(tmp_path / "a.onnx")


def test_every_cut_of_a_graph_is_refused(bundles, tmp_path):
    """A cut file ends within a field, or lacks the graph."""
    content = (bundles["mask"] / "fp32.onnx").read_bytes()
    manifest = load_bundle(bundles["mask"]).content
    required = required_interface(manifest.model, manifest.preprocessing, "mask")
    for length in np.linspace(0, len(content) - 1, 50).astype(int):
        with pytest.raises(ArtefactError):
            require_interface(tmp_path / "a.onnx", content[:length], required)


def test_size_inputs_refuses_an_unknown_graph_input():
    assert {name: value.tolist() for name, value in size_inputs(["source_size"], (3, 4), (5, 6)).items()} == {
        "source_size": [3, 4]
    }
    with pytest.raises(ArtefactError, match="takes window"):
        size_inputs(["source_size", "window"], (3, 4), (5, 6))
