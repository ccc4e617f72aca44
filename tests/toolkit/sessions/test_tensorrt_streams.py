"""The TensorRT session on a GPU that records and delays: what goes up and down, in which order, and what may fail."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fakes.gpu import FakeGpu, illegal_address, symbol_as_ptx
from fakes.tensorrt_session import (
    FORMS,
    INPUT,
    OUTPUT,
    PASS,
    Opened,
    images_of,
    masks_of_the_cpu,
    network,
    slices_of,
)
from fakes.trt import FakeTrt

from medseg_trt.errors import ArtefactError, DeviceError
from medseg_trt.kernels.device import DeviceMemoryError
from medseg_trt.sessions import tensorrt_stream
from medseg_trt.sessions.tensorrt import PixelKernels
from medseg_trt.sessions.tensorrt_engine import Engine, EngineError
from medseg_trt.sessions.tensorrt_stream import Buffer, InferenceStream
from medseg_trt.spec import LIBRARY_NAMES


@pytest.mark.parametrize("batches", [(1, 2, 4), (3, 3, 4), (4, 4, 4)])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 9])
def test_a_batch_of_any_number_is_cut_up_and_filled_up(batches, count):
    with Opened(batches=batches) as opened:
        opened.calls_of(count, count, count)
        uploads = [call[1] for call in opened.gpu.calls if call[0] == "upload"]
        assert max(uploads, default=0) <= min(count, 4) * 4 * np.prod(INPUT)  # what it is filled up with stays here


def test_inference_makes_one_call_sequence_with_one_synchronisation():
    with Opened(graphs=False) as opened:
        first = opened.calls_of(2)
        assert first == [
            "activate",
            "new_stream",
            "allocate",
            "allocate",
            "allocate",
            "clear",
            "allocate_host",
            "allocate_host",
            "set_runtime_cache",
            "create_execution_context",
            "set_input_shape",
            *PASS,
            "synchronize",
        ]
        assert opened.calls_of(2) == ["activate", *PASS, "synchronize"]


def test_a_network_that_comes_again_is_recorded_and_then_launched_between_its_copies():
    with Opened() as opened:
        opened.calls_of(2)
        recording = ["begin_capture", "execute_async_v3", "end_capture"]
        assert opened.calls_of(2) == ["activate", *PASS, "synchronize", *recording]
        assert opened.calls_of(2, 2) == 2 * ["activate", "upload", "launch_graph", "download", "synchronize"]


def test_every_size_of_batch_has_a_graph_and_a_context_of_its_own_up_to_the_next_power_of_two():
    with Opened(batches=(1, 2, 16)) as opened:
        opened.calls_of(*range(1, 17), *range(1, 17))
        assert opened.gpu.names().count("end_capture") == len(opened.trt.contexts) == 5  # of 1, 2, 4, 8 and 16
        assert sorted(context.batch for context in opened.trt.contexts) == [1, 2, 4, 8, 16]
        again = opened.calls_of(3, 1, 7, 16)
        assert again == 4 * ["activate", "upload", "launch_graph", "download", "synchronize"]
        assert len({context.memory for context in opened.trt.contexts}) == 1  # they share what they work in


@pytest.mark.parametrize(("batches", "sizes"), [((1, 1, 20), [1, 2, 4, 8, 16, 20]), ((3, 3, 6), [3, 4, 6])])
def test_batches_are_filled_up_to_what_the_engine_takes(batches, sizes):
    engine = engine_of(batches=batches)[1]
    assert sorted({engine.filled_up(images) for images in range(1, batches[2] + 1)}) == sizes
    assert all(engine.filled_up(images) >= images for images in range(1, batches[2] + 1))


def test_larger_batch_does_not_free_existing_cuda_graphs():
    with Opened() as opened:
        opened.calls_of(1, 1, 1)
        assert "free_graph" not in opened.calls_of(4)
        assert "launch_graph" in opened.calls_of(1)


@pytest.mark.parametrize("refused", ["begin_capture", "end_capture", "launch", "capturable"])
def test_capture_failure_falls_back_to_single_calls_with_one_warning(refused, caplog):
    with Opened() as opened:
        opened.calls_of(2)
        if refused == "capturable":
            opened.trt.capturable = False
        elif refused == "launch":  # inside of the recording
            real = opened.gpu.begin_capture

            def begin(stream):
                real(stream)
                opened.trt.refused = {"execute_async_v3"}

            opened.gpu.begin_capture = begin
        else:
            opened.gpu.fail[refused] = illegal_address()
        opened.calls_of(2)
        assert caplog.text.count("CUDA graphs are not used") == 1
        assert not opened.gpu.capturing
        opened.trt.refused = set()
        assert opened.calls_of(2) == ["activate", *PASS, "synchronize"]


def test_tensorrt_of_the_other_kind_makes_contexts_without_a_configuration():
    with Opened(library="tensorrt") as opened:
        calls = opened.calls_of(1, 1, 1)
    assert "create_execution_context" in calls
    assert "set_runtime_cache" not in calls  # which a configuration has


def test_an_engine_of_half_precision_is_fed_and_read_so():
    with Opened(dtype="float16") as opened:
        batch = images_of(3)
        for _ in range(3):
            logits = opened.session.run(batch)
            assert logits.dtype == np.float32
            np.testing.assert_array_equal(logits, network(batch.astype(np.float16)).astype(np.float32))


def test_the_wrong_size_is_refused():
    with Opened() as opened, pytest.raises(ValueError, match="the network takes"):
        opened.session.run(np.zeros((1, 3, 32, 16), np.float32))


# --- what may fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(5))
def test_out_of_memory_is_one_line_wherever_it_strikes_and_nothing_is_lost(which):
    with Opened(graphs=False) as opened:
        real, count = {"allocate": opened.gpu.allocate, "allocate_host": opened.gpu.allocate_host}, iter(range(99))

        def scarce(name):
            def allocate(nbytes):
                if next(count) == which:
                    raise DeviceMemoryError("cuMemAlloc returned 2 CUDA_ERROR_OUT_OF_MEMORY")
                return real[name](nbytes)

            return allocate

        for name in real:
            setattr(opened.gpu, name, scarce(name))
        with pytest.raises(DeviceError, match=r"^fake: the GPU has not enough memory \(\d+ MB are free; cuMem.*--max-"):
            opened.session.run(images_of(2))
        opened.calls_of(2)


def test_an_image_that_is_too_large_leaves_the_stream_unchanged():
    p, _ = FORMS["stretched"]
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        opened.calls_of(1)
        opened.gpu.limit = sum(map(len, opened.gpu.memory.values())) + 10_000
        large = slices_of(1, (200, 200))
        with pytest.raises(DeviceError, match="the GPU has not enough memory"):
            opened.masks_of(large)(large)
        small = slices_of(1, (20, 20))
        np.testing.assert_array_equal(opened.masks_of(small)(small), masks_of_the_cpu(small, p, None))
        assert opened.gpu.names().count("new_stream") == 1


@pytest.mark.parametrize("method", ["set_input_shape", "execute_async_v3", "create_execution_context"])
@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("Requested amount of GPU memory (1024 bytes) could not be allocated: OutOfMemory", "not enough memory"),
        ("myelin graph failed", "fake: .*: myelin graph failed"),
        ("", "says no reason"),
    ],
)
def test_tensorrt_error_is_reported_in_one_line_and_the_session_recovers(method, said, wanted):
    with Opened() as opened:
        opened.trt.refused, opened.trt.refuses = {method}, said
        with pytest.raises(DeviceError, match=wanted) as caught:
            opened.session.run(images_of(1))
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 6
        opened.trt.refused = set()
        opened.calls_of(1)


@pytest.mark.parametrize("call", ["new_stream", "clear", "upload", "download", "synchronize", "launch_graph"])
def test_an_error_of_the_device_is_one_line_and_the_next_run_has_a_new_stream(call):
    with Opened() as opened:
        if call == "launch_graph":
            opened.calls_of(1, 1)
        opened.gpu.fail[call] = illegal_address()
        with pytest.raises(DeviceError, match=r"^fake: cuStreamSynchronize returned 700"):
            opened.session.run(images_of(1))
        opened.calls_of(1, 1, 1)


def test_a_kernel_that_cannot_be_loaded_has_its_name():
    p, _ = FORMS["stretched"]
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        opened.gpu.fail["load"] = illegal_address()
        with pytest.raises(DeviceError, match="image_to_tensor_float32: cuStream"):
            opened.masks_of(slices_of(1))(slices_of(1))
        opened.calls_of(1)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_threads_share_two_streams_and_get_their_own_outputs():
    with Opened() as opened:
        barrier = threading.Barrier(6)

        def work(seed: int) -> None:
            barrier.wait()
            for number in range(10):
                batch = images_of(1 + (seed + number) % 5, seed=100 * seed + number)
                np.testing.assert_allclose(opened.session.run(batch), network(batch), atol=1e-6)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        assert opened.gpu.names().count("new_stream") <= 2


def test_two_threads_run_at_the_same_time_and_a_third_waits():
    with Opened(graphs=False) as opened:
        inside, leave = threading.Semaphore(0), threading.Event()
        real = opened.gpu.synchronize

        def slow(stream):
            inside.release()
            assert leave.wait(20)
            real(stream)

        opened.gpu.synchronize = slow
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(opened.session.run, images_of(1, seed)) for seed in range(3)]
            assert inside.acquire(timeout=20)
            assert inside.acquire(timeout=20)
            assert not inside.acquire(timeout=0.05)
            leave.set()
            for seed, future in enumerate(futures):
                np.testing.assert_allclose(future.result(20), network(images_of(1, seed)), atol=1e-6)


def test_threads_share_one_stream_where_memory_suffices_for_one():
    with Opened() as opened:
        opened.calls_of(4)
        opened.gpu.limit = sum(map(len, opened.gpu.memory.values())) + 100
        with ThreadPoolExecutor(4) as pool:
            for seed, logits in enumerate(pool.map(lambda seed: opened.session.run(images_of(2, seed)), range(8))):
                np.testing.assert_allclose(logits, network(images_of(2, seed)), atol=1e-6)
        assert len(opened.gpu.streams) == 1


def test_a_closed_session_says_so():
    with Opened() as opened:
        opened.calls_of(1)
    with pytest.raises(ValueError, match="the session is closed"):
        opened.session.run(images_of(1))


# --- engines ---------------------------------------------------------------------------------------------------------


def engine_of(
    library: str = "tensorrt-rtx", host_code: bool = False, refuses: str = "", **trt
) -> tuple[FakeTrt, Engine]:
    gpu = FakeGpu()
    gpu.activate()
    fake = FakeTrt(gpu, network, INPUT, OUTPUT, **trt)
    if refuses:
        fake.refuses, fake.refused = refuses, {"deserialize_cuda_engine"}
    return fake, Engine(fake, library, b"plan", host_code=host_code)


def test_plan_refused_by_the_library_is_an_engine_error():
    with pytest.raises(EngineError, match=r"^TensorRT-RTX 1\.7\.1\.116 cannot load the plan: Version tag mismatch$"):
        engine_of(refuses="Version tag\n mismatch")


@pytest.mark.parametrize("library", LIBRARY_NAMES)
def test_host_code_is_allowed_only_on_request(library):
    assert [engine_of(library, host_code=asked)[0].host_code for asked in (False, True)] == [[False], [True]]


def test_engine_with_other_tensors_or_dtypes_is_refused():
    with pytest.raises(ArtefactError, match="pixel_values, logits, source_size; only"):
        engine_of(names=("pixel_values", "logits", "source_size"))
    with pytest.raises(ArtefactError, match="pixel_values is int8; it must be float32 or float16"):
        engine_of(dtype="int8")


def test_compiled_kernels_are_kept_where_the_library_compiles():
    fake, engine = engine_of()
    assert engine.load_kernels(b"kernels") is True
    assert fake.cache == b"kernels"
    assert engine.load_kernels(b"of another GPU") is False
    engine.context(0)
    assert fake.gpu.names()[-3:] == ["deserialize", "set_runtime_cache", "create_execution_context"]
    engine.context(0)
    assert fake.gpu.names().count("set_runtime_cache") == 1
    assert engine.load_kernels(b"kernels") is False  # too late
    assert engine.compiled_kernels() == b"kernels of a GPU"
    _, classic = engine_of("tensorrt")
    assert classic.load_kernels(b"kernels") is False
    assert classic.compiled_kernels() is None


# --- faults on purpose: the fake must notice -----------------------------------------------------------------------


def shares_a_context(monkeypatch):
    monkeypatch.setattr(Engine, "context", _same_context(Engine.context))


def _same_context(real):
    made = {}

    def context(engine, activations):
        return made.setdefault((id(engine), activations), real(engine, activations))

    return context


def reads_before_the_end(monkeypatch):
    monkeypatch.setattr(FakeGpu, "synchronize", lambda gpu, stream: None)


def records_without_settling(monkeypatch):
    monkeypatch.setattr(tensorrt_stream, "UNTIMED", 0)
    real = InferenceStream._prepared

    def prepared(stream, size):
        batch = real(stream, size)
        stream._record_if_seen(batch)
        return batch

    monkeypatch.setattr(InferenceStream, "_prepared", prepared)


def moves_without_freeing(monkeypatch):
    monkeypatch.setattr(Buffer, "close", lambda buffer: None)


def counts_images_too_few(monkeypatch):
    monkeypatch.setattr(Engine, "filled_up", lambda engine, images: 1)


def unloads_too_early(monkeypatch):
    real = InferenceStream.run

    def run(stream, request, source):
        output = real(stream, request, source)
        stream._device.unload()
        return output

    monkeypatch.setattr(InferenceStream, "run", run)


@pytest.mark.parametrize(
    "fault",
    [
        shares_a_context,
        reads_before_the_end,
        records_without_settling,
        moves_without_freeing,
        counts_images_too_few,
        unloads_too_early,
    ],
    ids=lambda fault: fault.__name__,
)
def test_stream_session_fault_is_detected(fault, monkeypatch):
    fault(monkeypatch)
    p, _ = FORMS["stretched"]
    kernels = PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)
    with pytest.raises(AssertionError), Opened(kernels) as opened:  # noqa: PT012  # wherever it shows
        for seed in range(2):
            opened.masks_of(slices_of(2))(slices_of(2, seed=seed))
        opened.calls_of(1, 2, 1, 2, 1, 2)
        opened.calls_of(4, 4, 4, 1, 1, 1)
