"""Engines of bundles: what is checked before TensorRT sees a plan, and masks from end to end on a fake GPU."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from fakes.bundles import LIBRARY_FILE, add_engine, rehash, with_engine
from fakes.trt import FakeContext, FakeEngine, FakeTrt
from tiny import write_pictures

from medseg_trt.bundles.bundle import MANIFEST, load_bundle
from medseg_trt.bundles.manifest import ENGINES_FOLDER
from medseg_trt.cli import cli, main
from medseg_trt.engines.fingerprint import metadata_path, read_fingerprint
from medseg_trt.errors import ArtefactError, DeviceError, UsageError
from medseg_trt.files import sha256
from medseg_trt.kernels import manifest as kernel_manifest
from medseg_trt.kernels.launch import Launcher
from medseg_trt.kernels.nodes import NODES
from medseg_trt.sessions import tensorrt
from medseg_trt.sessions.open import open_session
from medseg_trt.sessions.tensorrt_cache import KernelCache, cache_file

PLAN = f"{ENGINES_FOLDER}/fp32-rtx.plan"


@pytest.fixture(scope="session")
def image_kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels") / "kernels"
    kernel_manifest.build(folder, ["sm_80"], ["image_to_tensor", "logits_to_mask"])
    return folder


@pytest.fixture
def engine_bundle(tiny_bundle, tmp_path, image_kernels):
    return with_engine(tiny_bundle, tmp_path / "model.medseg", image_kernels)


def opened(folder, **options):
    return open_session(load_bundle(folder), "tensorrt-rtx", **options)


def test_infer_gives_the_masks_of_the_cpu(machine, engine_bundle, images, tmp_path, caplog):
    with caplog.at_level("INFO", "medseg_trt"):
        for backend in ("onnxruntime", "tensorrt-rtx"):
            command = ["infer", images, "--bundle", engine_bundle, "--backend", backend, "-o", tmp_path / backend]
            ran = CliRunner().invoke(cli, [*map(str, command), "--batch", "3"], catch_exceptions=False)
            assert ran.exit_code == 0, ran.output
    assert "TensorRT-RTX 1.7.1.116 fp32, 8-bit images prepared and labelled on the GPU on GPU Fake GPU" in caplog.text
    masks = sorted(path.name for path in (tmp_path / "onnxruntime").glob("*.png"))
    assert len(masks) == 2
    for name in masks:
        one, other = (
            np.asarray(PIL.Image.open(tmp_path / backend / name)) for backend in ("onnxruntime", "tensorrt-rtx")
        )
        np.testing.assert_array_equal(one, other)
    assert (tmp_path / "onnxruntime/areas.csv").read_bytes() == (tmp_path / "tensorrt-rtx/areas.csv").read_bytes()
    assert machine.gpu.names().count("launch") > 0
    assert machine.gpu.is_clean()


def test_without_kernels_in_the_bundle_pixels_are_the_cpus_affair_and_the_description_says_so(
    machine, tiny_bundle, tmp_path
):
    with opened(with_engine(tiny_bundle, tmp_path / "model.medseg")) as session:
        assert session.description.endswith(
            "images prepared and labelled on the CPU (the bundle has no kernels for it)"
        )
        assert session.device_pipeline(np.zeros((1, 8, 8, 3), np.uint8), None) is None
    machine.gpu.capability = 75


def test_a_gpu_that_the_kernels_are_too_new_for_runs_without_them(machine, tiny_bundle, tmp_path, image_kernels):
    machine.gpu.capability = 75
    folder = with_engine(tiny_bundle, tmp_path / "model.medseg", image_kernels, targets=("sm75",))
    with opened(folder) as session:
        assert "on the CPU (there is no image_to_tensor_float32 for sm_75" in session.description


def test_a_device_that_prepares_pixels_otherwise_is_found_out_when_it_is_opened(machine, engine_bundle, monkeypatch):
    real = tensorrt.mask_scalars

    def turned(p, batch, classes, size, spacing_mm=None):
        masks = real(p, batch, classes, size, spacing_mm)
        return {**masks, "resampled_height": 2 * masks["resampled_height"]}

    monkeypatch.setattr(tensorrt, "mask_scalars", turned)
    with pytest.raises(ArtefactError, match="gives other masks than the CPU where it prepares pixels itself"):
        opened(engine_bundle)
    assert machine.gpu.is_clean()


def test_an_engine_that_answers_otherwise_is_refused(machine, engine_bundle):
    real = machine.trt.network
    machine.trt.network = lambda images: real(images) + np.float32(5e-3)
    with pytest.raises(ArtefactError, match="golden input"):
        opened(engine_bundle)
    assert machine.gpu.is_clean()


def test_compiled_kernels_are_found_again(machine, engine_bundle):
    for _ in range(2):
        opened(engine_bundle).close()
    assert machine.trt.cache == b"kernels of a GPU"
    path = cache_file(sha256(engine_bundle / PLAN), "Fake GPU")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    machine.trt.cache = b""
    opened(engine_bundle).close()
    assert machine.trt.cache == b""  # a damaged file is not given to the library


def test_kernels_that_images_asked_for_are_kept_at_the_end(machine, engine_bundle):
    path = cache_file(sha256(engine_bundle / PLAN), "Fake GPU")
    with opened(engine_bundle):
        before = path.read_bytes()
        machine.trt.compiled_later = 1
    after = path.read_bytes()
    assert (b"and more" in before, b"and more" in after) == (False, True)
    written = path.stat().st_mtime_ns
    opened(engine_bundle).close()
    assert path.stat().st_mtime_ns == written  # nothing new was compiled


def test_a_library_that_cannot_store_its_kernels_costs_the_cache_alone(machine, engine_bundle):
    machine.trt.refused = {"serialize"}
    with opened(engine_bundle) as session:
        session.run(np.zeros((1, 3, *load_bundle(engine_bundle).preprocessing.image_size), np.float32))
    assert not cache_file(sha256(engine_bundle / PLAN), "Fake GPU").exists()
    assert machine.gpu.is_clean()


def test_a_session_unloads_its_kernels(machine, engine_bundle, images, tmp_path):
    with opened(engine_bundle) as session:
        session.device_pipeline(np.zeros((1, 8, 8, 3), np.uint8), None)(np.zeros((1, 8, 8, 3), np.uint8))  # pyright: ignore[reportOptionalCall]
        assert machine.gpu.loaded
    assert machine.gpu.names()[-1] == "unload"
    assert machine.gpu.is_clean()


def test_missing_kernel_unload_fails_the_unload_test(machine, engine_bundle, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Launcher, "close", lambda launcher: None)
    with pytest.raises(AssertionError):
        test_a_session_unloads_its_kernels(machine, engine_bundle, images, tmp_path)


def test_kernel_cache_saved_only_at_the_start_fails_the_cache_test(machine, engine_bundle, monkeypatch):
    real, saved = KernelCache.save, set[KernelCache]()
    monkeypatch.setattr(KernelCache, "save", lambda cache: None if cache in saved else (saved.add(cache), real(cache)))
    with pytest.raises(AssertionError):
        test_kernels_that_images_asked_for_are_kept_at_the_end(machine, engine_bundle)


# --- what stands between a plan and its execution --------------------------------------------------------------------


def refused(machine, folder, match: str) -> None:
    """See that a bundle is refused with exit code 5 in one line, and that TensorRT has not seen anything."""
    with pytest.raises(ArtefactError, match=match) as caught:
        opened(folder)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert machine.trt.plans == []


def damaged(content: bytes, trial: int, rng: np.random.Generator) -> bytes:
    """Return 256 times a flipped bit in another byte, then 64 times a file that ends early."""
    if trial < 256:
        offset = int(rng.integers(len(content)))
        return content[:offset] + bytes([content[offset] ^ 1 << int(rng.integers(8))]) + content[offset + 1 :]
    return content[: int(rng.integers(len(content)))]


@pytest.mark.parametrize("name", [PLAN, LIBRARY_FILE])
def test_every_flipped_byte_and_every_truncation_is_refused_before_it_is_loaded(
    name, machine, tiny_bundle, tmp_path, monkeypatch
):
    folder = with_engine(tiny_bundle, tmp_path / "model.medseg")
    opened(folder).close()  # undamaged it is loaded
    assert len(machine.trt.plans) == 1
    machine.trt.plans.clear()
    monkeypatch.setattr(tensorrt, "open_device", lambda *_: pytest.fail("the GPU was opened"))
    good, rng = (folder / name).read_bytes(), np.random.default_rng(7)
    for trial in range(256 + 64):
        (folder / name).write_bytes(damaged(good, trial, rng))
        refused(machine, folder, "is not what manifest.json says it is")


def test_infer_with_a_damaged_plan_exits_with_5(machine, engine_bundle, images, tmp_path, monkeypatch, capsys):
    path = engine_bundle / PLAN
    path.write_bytes(damaged(path.read_bytes(), 0, np.random.default_rng(0)))
    command = [
        "medseg-trt",
        "infer",
        images,
        "--bundle",
        engine_bundle,
        "--backend",
        "tensorrt-rtx",
        "-o",
        tmp_path / "o",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 5
    assert capsys.readouterr().err.count("\n") == 1
    assert machine.trt.plans == []


def test_a_plan_that_changes_after_the_check_is_not_run(machine, engine_bundle):
    bundle = load_bundle(engine_bundle)
    (engine_bundle / PLAN).write_bytes(b"another plan")
    with pytest.raises(ArtefactError, match=r"is not what manifest\.json says"):
        open_session(bundle, "tensorrt-rtx")
    assert machine.trt.plans == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": "1.6.0.0"}, "was built by TensorRT-RTX 1.6.0.0; 1.7.1.116 is installed here"),
        ({"targets": ("sm86", "sm120")}, "was built for sm86, sm120; this GPU, Fake GPU, is sm89"),
        ({"cuda": "14"}, "needs CUDA 14"),
        ({"graph_sha256": "0" * 64}, "was built from another fp32.onnx"),
        ({"weights_sha256": "0" * 64}, "was built from another fp32.onnx"),
        ({"plugins": {"SwiGLU": "0" * 64}}, "other kernels behind its plugins SwiGLU"),
    ],
)
def test_an_engine_of_another_machine_is_explained_and_not_run(machine, tiny_bundle, tmp_path, changes, match):
    folder = with_engine(tiny_bundle, tmp_path / "model.medseg", **changes)
    refused(machine, folder, f"{match}.*Rebuild it.*--bundle {folder}")


def test_of_several_engines_the_fitting_one_is_taken(machine, tiny_bundle, tmp_path):
    folder = with_engine(tiny_bundle, tmp_path / "model.medseg", targets=("sm120",))
    fingerprint = read_fingerprint(folder / PLAN)
    (folder / ENGINES_FOLDER / "second.plan").write_bytes(b"the second plan")
    second = replace(
        fingerprint, plan="second.plan", sha256=sha256(folder / ENGINES_FOLDER / "second.plan"), targets=("sm89",)
    )
    add_engine(folder, second)
    opened(folder).close()
    assert machine.trt.plans == [b"the second plan"]


@pytest.mark.parametrize("fault", ["no side-car", "unlisted side-car", "of another plan", "swapped digest"])
def test_a_plan_whose_fingerprint_is_not_its_own_is_refused(machine, engine_bundle, fault):
    car = metadata_path(engine_bundle / PLAN)
    if fault == "no side-car":
        car.unlink()
    elif fault == "of another plan":
        car.write_text(car.read_text().replace("fp32-rtx.plan", "other.plan"))
    elif fault == "swapped digest":
        car.write_text(car.read_text().replace(sha256(engine_bundle / PLAN), "0" * 64))
    rehash(engine_bundle)
    if fault == "unlisted side-car":
        manifest = json.loads((engine_bundle / MANIFEST).read_text())
        del manifest["files"][car.relative_to(engine_bundle).as_posix()]
        (engine_bundle / MANIFEST).write_text(json.dumps(manifest))
    refused(machine, engine_bundle, "fingerprint|another plan|gives no digest")


@pytest.mark.parametrize(
    "name", ["../outside.plan", "engines/../../outside.plan", "/etc/hostname", "engines/link.plan"]
)
def test_names_and_links_that_lead_out_of_the_bundle_are_refused(machine, engine_bundle, tmp_path, name):
    outside = tmp_path / "outside.plan"
    outside.write_bytes(b"a plan of somebody else")
    os.symlink(outside, engine_bundle / ENGINES_FOLDER / "link.plan")
    manifest = json.loads((engine_bundle / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": sha256(outside), "bytes": outside.stat().st_size}
    (engine_bundle / MANIFEST).write_text(json.dumps(manifest))
    refused(machine, engine_bundle, "leads out of")


def test_a_plan_that_the_library_refuses_is_one_line(machine, engine_bundle):
    machine.trt.refused, machine.trt.refuses = {"deserialize_cuda_engine"}, "Version tag\ndoes not match"
    with pytest.raises(
        ArtefactError, match=r"fp32-rtx\.plan: .* cannot load the plan: Version tag does not match\. Build"
    ):
        opened(engine_bundle)


def test_engine_that_exceeds_the_gpu_memory_is_a_device_error(machine, engine_bundle):
    machine.trt.refused, machine.trt.refuses = {"deserialize_cuda_engine"}, "CUDA error 2: out of memory"
    with pytest.raises(DeviceError, match="the GPU has not enough memory"):
        opened(engine_bundle)


def test_code_in_the_plan_is_let_in_where_the_fingerprint_tells_of_some(machine, tiny_bundle, tmp_path, monkeypatch):
    registered = []
    monkeypatch.setattr(tensorrt, "_register_plugins", lambda _, bundle: registered.append(bundle))
    plugins = {"SwiGLU": NODES["SwiGLU"].digest}
    opened(with_engine(tiny_bundle, tmp_path / "without.medseg")).close()
    opened(with_engine(tiny_bundle, tmp_path / "with.medseg", plugins=plugins)).close()
    assert machine.trt.host_code == [False, True]
    assert len(registered) == 1


def test_plugins_whose_kernels_the_bundle_lacks_are_not_compiled_here(machine, tiny_bundle, tmp_path):
    folder = with_engine(tiny_bundle, tmp_path / "model.medseg", plugins={"SwiGLU": NODES["SwiGLU"].digest})
    refused(machine, folder, "has no kernels for its plugins")


def test_an_engine_without_weights_gets_those_of_its_graph(machine, tiny_bundle, tmp_path):
    folder = with_engine(tiny_bundle, tmp_path / "model.medseg", stripped=True)
    opened(folder).close()
    (graph,) = map(Path, machine.trt.refitted)
    assert (graph.name, graph.parent.exists()) == ("fp32.onnx", False)  # of a private copy, which is gone
    machine.trt.refused, machine.trt.refuses = {"refit_cuda_engine"}, "3 weights are missing"
    with pytest.raises(ArtefactError, match=r"the weights of fp32\.onnx do not fit the engine: 3 weights are missing"):
        opened(folder)


def test_a_bundle_without_an_engine_says_how_to_build_one(machine, tiny_bundle, engine_bundle):
    with pytest.raises(UsageError, match=r"holds nothing for tensorrt-rtx; .*--backend tensorrt-rtx --target sm86"):
        opened(tiny_bundle)
    with pytest.raises(UsageError, match="holds nothing for tensorrt-rtx int8"):
        opened(engine_bundle, precision="int8")


# --- this machine, and the real bindings -----------------------------------------------------------------------------


def test_without_a_gpu_it_ends_with_6_and_one_line(engine_bundle, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorrt_rtx")
    pictures = write_pictures(tmp_path / "data", count=1) / "images"
    command = ["infer", pictures, "--bundle", engine_bundle, "--backend", "tensorrt-rtx", "-o", tmp_path / "masks"]
    monkeypatch.setattr(sys, "argv", ["medseg-trt", *map(str, command)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # also where there is one
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 6
    error = capsys.readouterr().err
    assert "there is no GPU cuda:0: " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("fake", "real"),
    [(FakeEngine, "ICudaEngine"), (FakeContext, "IExecutionContext"), (FakeTrt, "")],
    ids=["engine", "context", "module"],
)
def test_the_fake_speaks_the_words_of_the_real_bindings(fake, real):
    bindings = pytest.importorskip("tensorrt_rtx")
    own = {"plans", "network", "fails"}
    names = {name for name in vars(fake) if not name.startswith("_")} - own
    assert {name for name in names if not hasattr(getattr(bindings, real) if real else bindings, name)} == set()
    for name in ("Refitter", "OnnxParserRefitter", "nptype"):
        assert hasattr(bindings, name)
    assert hasattr(bindings.Runtime, "engine_host_code_allowed")
    assert "USER_MANAGED" in bindings.ExecutionContextAllocationStrategy.__members__
    assert "EAGER" in bindings.DynamicShapesKernelSpecializationStrategy.__members__
    assert hasattr(bindings.IRuntimeConfig, "set_execution_context_allocation_strategy")
