"""On a GPU: engines against PyTorch on real images, graphs, memory, time and a soak.

Bounds that no GPU has confirmed yet say so. The network has random weights; the images are real CT slices.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import make_checkpoint

from medseg_trt.bench.timings import CUDA_EVENTS
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.bundles.manifest import ENGINES_FOLDER
from medseg_trt.cli import cli
from medseg_trt.engines import kernels as engine_kernels
from medseg_trt.engines.choice import fitting_engine
from medseg_trt.errors import DeviceError
from medseg_trt.export.tensorrt.build import known_targets
from medseg_trt.imaging.images import read_image
from medseg_trt.imaging.preprocess import prepare, restore
from medseg_trt.kernels.device import DeviceMemoryError, open_device
from medseg_trt.kernels.library import open_library
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.open import choose, open_session
from medseg_trt.sessions.pytorch import open_reference
from medseg_trt.sessions.tensorrt import TensorRtSession
from medseg_trt.sessions.tensorrt_engine import Engine
from medseg_trt.spec import LIBRARY_NAMES, Classes
from medseg_trt.train.checkpoint import load_checkpoint

pytestmark = pytest.mark.gpu
PRECISIONS = ("fp32", "fp16", "int8")
SIZE = (128, 128)
SLACK = 0.01  # share of pixels that the GPU may label otherwise than the CPU that verified the graph; not confirmed yet
SOAK_RUNS, SOAK_THREADS = 2000, 4
LEAK_BYTES = 8 << 20  # the driver's own pools may grow once; not confirmed yet


@dataclass(frozen=True)
class OnGpu:
    bundle: Path
    checkpoint: Path
    library: str
    slices: np.ndarray  # prepared, of a real scan


@pytest.fixture(scope="module", params=LIBRARY_NAMES)
def library(request) -> str:
    trt = pytest.importorskip(BACKENDS[request.param].package)
    sm = f"sm{open_device().capability}"
    if sm not in (known := known_targets(request.param, trt, sm)):
        pytest.skip(f"{LIBRARY_NAMES[request.param]} {trt.__version__} builds for {', '.join(known)}, not for {sm}")
    return request.param


@pytest.fixture(scope="module", params=["off", "on"], ids=["plain", "plugins"])
def on_gpu(request, library, organs, tmp_path_factory) -> OnGpu:
    """A bundle with engines for the GPU that is here; its graphs were verified on the CPU, on real slices."""
    root = tmp_path_factory.mktemp("gpu")
    names = json.loads((organs / "dataset.json").read_text())["classes"]
    checkpoint = make_checkpoint(root, classes=Classes(names=tuple(names)), size=SIZE)
    command = [
        "build",
        "--ckpt",
        checkpoint,
        "--data",
        organs,
        "-o",
        root / "model.medseg",
        "--backend",
        library,
        "--target",
        f"sm{open_device().capability}",
        "--plugins",
        request.param,
        "--max-dice-drop",
        "0.05",
        "--precision",
        ",".join(PRECISIONS),
        "--device",
        "cpu",
    ]
    built = CliRunner().invoke(cli, [str(word) for word in command], catch_exceptions=False)
    assert built.exit_code == 0, built.output
    loaded = load_checkpoint(checkpoint)
    image = read_image(organs / "images" / "ct_B.nii.gz")
    pixels = image.pixels[:: max(image.num_slices // 12, 1)]
    slices = np.stack([prepare(slice_pixels, loaded.preprocessing, image.spacing_in_plane) for slice_pixels in pixels])
    return OnGpu(bundle=root / "model.medseg", checkpoint=checkpoint, library=library, slices=slices)


def test_a_build_verifies_and_times_its_engines_here(library, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} has no GPU, so a build compares graphs on the CPU")
    target = f"sm{open_device().capability}"
    command = ["build", "--ckpt", make_checkpoint(tmp_path, size=SIZE), "-o", tmp_path / "model.medseg"]
    command += ["--backend", library, "--target", target, "--precision", "fp32,fp16", "--device", "cuda"]
    built = CliRunner().invoke(cli, [*map(str, command)], catch_exceptions=False)
    assert built.exit_code == 0, built.output
    bundle = load_bundle(tmp_path / "model.medseg")
    assert [engine.executed for engine in bundle.content.engines] == [True, True], built.output
    timed = {
        bundle.variant(execution).precision: execution.median_ms
        for execution in bundle.content.executions
        if execution.backend == library
    }
    assert set(timed) == {"fp32", "fp16"}
    assert all(median_ms is not None and median_ms > 0 for median_ms in timed.values())


def engine_session(on_gpu: OnGpu, precision: str, *, graphs: bool) -> TensorRtSession:
    """Open an engine without the checks of ``open_session``, with CUDA graphs or without."""
    bundle, device = load_bundle(on_gpu.bundle), open_device()
    trt = pytest.importorskip(BACKENDS[on_gpu.library].package)
    fingerprint = fitting_engine(bundle, on_gpu.library, trt.__version__, precision, device)
    plan = (bundle.folder / ENGINES_FOLDER / fingerprint.plan).read_bytes()
    if fingerprint.plugins:
        from medseg_trt.kernels.plugin import register

        register(trt, open_library(bundle.folder / engine_kernels.KERNELS_FOLDER))
    engine = Engine(trt, on_gpu.library, plan, host_code=bool(fingerprint.plugins))
    return TensorRtSession(engine, device, on_gpu.library, f"{precision} engine", graphs=graphs)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_masks_of_real_images_are_pytorchs(on_gpu, precision):
    bundle = load_bundle(on_gpu.bundle)
    wanted = choose(bundle, on_gpu.library, precision).verification.agreement
    with open_reference(load_checkpoint(on_gpu.checkpoint)) as reference:
        expected = np.concatenate([reference.run(slice_input[np.newaxis]) for slice_input in on_gpu.slices])
    with open_session(bundle, on_gpu.library, precision=precision) as session:
        logits = session.run(on_gpu.slices)
    assert (logits.argmax(1) == expected.argmax(1)).mean() >= wanted - SLACK
    if precision == "fp32":
        assert np.abs(logits - expected).max() <= 1e-3 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cuda_graph_gives_the_same_bits_as_single_calls(on_gpu, precision):
    with (
        engine_session(on_gpu, precision, graphs=True) as one,
        engine_session(on_gpu, precision, graphs=False) as other,
    ):
        for _ in range(4):
            np.testing.assert_array_equal(one.run(on_gpu.slices), other.run(on_gpu.slices))


def test_pixels_become_the_same_masks_on_the_device(on_gpu):
    bundle = load_bundle(on_gpu.bundle)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 173, 219, 3), np.uint8)  # generated
    with open_session(bundle, on_gpu.library, precision="fp32") as session:
        masks = session.device_pipeline(pixels, None)
        assert masks is not None, session.description
        prepared = np.stack([prepare(slice_pixels, bundle.preprocessing, None) for slice_pixels in pixels])
        expected = [
            restore(slice_logits, (173, 219), bundle.preprocessing, None) for slice_logits in session.run(prepared)
        ]
        for _ in range(3):
            assert (masks(pixels) == np.stack(expected)).mean() >= 0.999


@pytest.mark.parametrize("graphs", [True, False], ids=["graph", "calls"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_latency_with_transfers_and_without(on_gpu, precision, graphs, record_property):
    """Time both; the device's share cannot be longer than the whole."""
    image = on_gpu.slices[:1]
    session = engine_session(on_gpu, precision, graphs=graphs)
    with session:
        for _ in range(50):
            session.run(image)
        whole = [_milliseconds(lambda: session.run(image)) for _ in range(200)]
        times = session.time_on_device(image, 0.0, 200)
    alone, (images_per_s,) = times.compute_ms, times.images_per_s
    record_property("whole_ms", float(np.median(whole)))
    record_property("device_ms", float(np.median(alone)))
    record_property("images_per_s", images_per_s)
    print(f"{precision}: {np.median(whole):.3f} ms with transfers, {np.median(alone):.3f} ms on the device")
    print(f"{precision}: {images_per_s:.1f} images per second with copies that overlap")
    assert np.median(alone) <= np.median(whole)
    assert images_per_s >= 0.9 * 1000 / np.median(whole)  # two streams are no slower than one; not confirmed yet


def test_bench_times_engines_on_the_device_and_looks_into_their_layers(on_gpu, organs, tmp_path):
    command = [
        "bench",
        "--bundle",
        on_gpu.bundle,
        "--ckpt",
        on_gpu.checkpoint,
        "--data",
        organs,
        "--tier",
        "quick",
        "--max-dice-drop",
        "0.05",
        "-o",
        tmp_path / "report",
    ]
    ran = CliRunner().invoke(cli, [str(word) for word in command], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "report/report.json").read_text())["rows"]}
    for precision in PRECISIONS:
        row = rows[f"{on_gpu.library} {precision}"]
        assert (row["executed"], row["failure"]) == (True, None)
        assert row["verdict"]["holds"]
        assert row["latency"]["model"]["timer"] == CUDA_EVENTS
        assert row["latency"]["model"]["median_ms"] <= row["latency"]["model+transfers"]["median_ms"]
        assert row["latency"]["end-to-end"]["median_ms"] > 0
        assert row["profile"]["total_ms"] > 0
        known = sum(layer["ms"] for layer in row["profile"]["layers"] if layer["kind"] != "unknown")
        assert known > 0.5 * row["profile"]["total_ms"]  # the profiler's names are the builder's; not confirmed yet


def test_soak_of_threads_gives_equal_logits_and_leaks_no_gpu_memory(on_gpu):
    with engine_session(on_gpu, "fp16", graphs=True) as session:
        expected = {count: session.run(on_gpu.slices[:count]) for count in range(1, 9)}

        def work(run: int) -> None:
            count = 1 + run % 8
            np.testing.assert_array_equal(session.run(on_gpu.slices[:count]), expected[count])

        with ThreadPoolExecutor(SOAK_THREADS) as pool:
            list(pool.map(work, range(100)))
            before = open_device().free_bytes()
            list(pool.map(work, range(SOAK_RUNS)))
        assert before - open_device().free_bytes() <= LEAK_BYTES


@pytest.fixture
def full_memory() -> Iterator[None]:
    """Take all of the device's memory, down to blocks of 64 KiB."""
    device, taken = open_device(), list[int]()
    for nbytes in (1 << 30, 32 << 20, 1 << 20, 64 << 10):
        with suppress(DeviceMemoryError):
            while True:
                taken.append(device.allocate(nbytes))
    yield
    for address in taken:
        device.free(address)


def test_a_full_gpu_is_one_line(on_gpu, full_memory):
    bundle = load_bundle(on_gpu.bundle)
    with pytest.raises(DeviceError, match="the GPU has not enough memory"):
        open_session(bundle, on_gpu.library, precision="fp32")


def _milliseconds(run) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)
