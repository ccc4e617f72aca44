"""The model repository: Triton's own message type parses the configuration, and ONNX Runtime runs the model there."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from google.protobuf import text_format

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.bundles.manifest import BuiltEngine, FileEntry
from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.files import sha256
from medseg_trt.serve.triton_export import config_text, export_triton
from medseg_trt.spec import EngineSpec


def parse(text: str):
    """Parse with ``model_config_pb2`` of tritonclient; its package would ask for gRPC."""
    module_spec = importlib.util.find_spec("tritonclient")
    if module_spec is None or module_spec.submodule_search_locations is None:
        pytest.skip("needs tritonclient")
    path = Path(module_spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text_format.Parse(text, module.ModelConfig())


def test_the_command_writes_a_repository_that_runs(bundle, tmp_path):
    command = ["export", "triton", "--bundle", str(bundle), "-o", str(tmp_path / "repository"), "--json"]
    ran = CliRunner().invoke(cli, command)
    assert ran.exit_code == 0, ran.output
    (model,) = json.loads(ran.stdout)["models"]
    folder = Path(model["folder"])
    assert folder == tmp_path / "repository" / "tiny"
    config = parse((folder / "config.pbtxt").read_text())
    assert (config.name, config.platform, config.max_batch_size) == ("tiny", "onnxruntime_onnx", 8)
    assert [list(config.input[0].dims), list(config.output[0].dims)] == [[3, 32, 32], [3, 32, 32]]
    assert (folder / config.output[0].label_filename).read_text().split() == ["background", "disc", "bar"]
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    inputs, expected = load_bundle(bundle).golden()
    np.testing.assert_allclose(np.asarray(session.run(["logits"], {"pixel_values": inputs})[0]), expected, atol=1e-3)
    assert config.input[0].name == session.get_inputs()[0].name


def test_masks_are_not_joined_and_engines_get_models_of_their_own(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "tiny.medseg")
    loaded = load_bundle(folder)
    masks = replace(loaded, content=replace(loaded.content, build=replace(loaded.content.build, outputs="mask")))
    config = parse(config_text(masks, "m", "onnxruntime_onnx", 8))
    assert (config.max_batch_size, [tensor.name for tensor in config.output]) == (0, ["logits", "mask"])
    assert list(config.input[0].dims) == [-1, 3, 32, 32]
    assert not config.HasField("dynamic_batching")
    spec = EngineSpec(library="tensorrt", targets=("sm86",), max_batch=2)
    plan = "engines/fp32.plan"
    (folder / "engines").mkdir()
    (folder / plan).write_bytes(b"a plan")
    engine = BuiltEngine(plan=plan, variant="fp32", spec=spec, wall_s=1.0, processor_s=1.0, peak_resident_mb=1.0)
    files = {**loaded.content.files, plan: FileEntry(sha256=sha256(folder / plan), bytes=6)}
    with_engine = replace(loaded, content=replace(loaded.content, engines=(engine,), files=files))
    _, model = export_triton(with_engine, tmp_path / "repository")
    config = parse((model.folder / "config.pbtxt").read_text())
    assert (config.platform, config.max_batch_size, model.name) == ("tensorrt_plan", 2, "tiny-fp32-sm86")
    assert (model.folder / "1" / "model.plan").read_bytes() == b"a plan"

    (folder / plan).write_bytes(b"b plan")  # after the bundle was checked
    with pytest.raises(ArtefactError, match=r"fp32\.plan is not what manifest\.json says"):
        export_triton(with_engine, tmp_path / "other")
    assert not (tmp_path / "other" / model.name).exists()


def test_a_folder_that_is_no_model_is_left_alone(bundle, tmp_path):
    (tmp_path / "repository" / "tiny").mkdir(parents=True)
    with pytest.raises(InputError, match="no model of Triton"):
        export_triton(load_bundle(bundle), tmp_path / "repository")
