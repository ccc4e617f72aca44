"""The TensorRT session on a GPU that records and delays: what goes up and down, in which order, and what may fail."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fakes.gpu import FakeGpu, illegal_address, symbol_as_ptx
from fakes.trt import FakeTrt

from medseg_trt.errors import ArtefactError, DeviceError
from medseg_trt.imaging.preprocess import prepare, restore
from medseg_trt.imaging.segment import PixelRun
from medseg_trt.kernels.device import DeviceMemoryError
from medseg_trt.sessions import tensorrt_stream
from medseg_trt.sessions.tensorrt import PixelKernels, TensorRtSession
from medseg_trt.sessions.tensorrt_engine import Engine, EngineError
from medseg_trt.sessions.tensorrt_stream import MOST_GRAPHS, Buffer, InferenceStream
from medseg_trt.spec import LIBRARY_NAMES, Preprocessing

SIZE = (16, 32)
INPUT, OUTPUT = (3, *SIZE), (4, *SIZE)
PASS = ["upload", "execute_async_v3", "download"]
PIXEL_PASS = ["upload", "launch", "execute_async_v3", "launch", "download"]


def network(images: np.ndarray) -> np.ndarray:
    """Return four logits of every pixel, each image by itself; a faint pattern keeps them from being equal."""
    weights = np.random.default_rng(0).normal(size=(4, 3))
    pattern = np.random.default_rng(1).normal(size=OUTPUT)
    return (np.einsum("oc,bchw->bohw", weights, images) + pattern).astype(images.dtype)


class Opened:
    """A session on a fake GPU."""

    def __init__(self, kernels: PixelKernels | None = None, library: str = "tensorrt-rtx", graphs: bool = True, **trt):
        self.gpu = FakeGpu()
        self.gpu.activate()
        self.trt = FakeTrt(self.gpu, network, INPUT, OUTPUT, **trt)
        engine = Engine(self.trt, library, b"plan")
        self.session = TensorRtSession(engine, self.gpu, library, "fake", kernels, graphs=graphs)
        self.gpu.calls.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session.close()
        assert self.gpu.is_clean()

    def masks_of(self, slices: np.ndarray, spacing_mm: tuple[float, float] | None = None) -> PixelRun:
        found = self.session.device_pipeline(slices, spacing_mm)
        assert found is not None
        return found

    def calls_of(self, *batches: int) -> list[str]:
        """Run batches, check their logits, and return the names of the calls that they made."""
        before = len(self.gpu.calls)
        for number, images in enumerate(batches):
            batch = images_of(images, seed=number)
            np.testing.assert_allclose(self.session.run(batch), network(batch), atol=1e-6)
        return self.gpu.names()[before:]


def images_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *INPUT)).astype(np.float32)


def without(names: list[str], *dropped: str) -> list[str]:
    return [name for name in names if name not in dropped]


@pytest.mark.parametrize("batches", [(1, 2, 4), (3, 3, 4), (4, 4, 4)])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 9])
def test_a_batch_of_any_number_is_cut_up_and_filled_up(batches, count):
    with Opened(batches=batches) as opened:
        opened.calls_of(count, count, count)
        uploads = [call[1] for call in opened.gpu.calls if call[0] == "upload"]
        assert max(uploads, default=0) <= min(count, 4) * 4 * np.prod(INPUT)  # what it is filled up with stays here


def test_a_pass_is_one_sequence_with_one_wait():
    with Opened(graphs=False) as opened:
        first = opened.calls_of(2)
        assert first == [
            "activate", "new_stream", "allocate", "allocate", "allocate", "clear", "create_execution_context",
            "allocate_host", "allocate_host", "set_input_shape", *PASS, "synchronize",
        ]  # fmt: skip
        assert opened.calls_of(2) == ["activate", "set_input_shape", *PASS, "synchronize"]


def test_a_sequence_that_comes_again_is_recorded_and_then_launched_as_one():
    with Opened() as opened:
        opened.calls_of(2)
        again = opened.calls_of(2)
        recording = ["create_execution_context", "set_input_shape", *PASS, "synchronize", "begin_capture", *PASS,
                     "end_capture"]  # fmt: skip
        assert again == ["activate", "set_input_shape", *PASS, "synchronize", *recording]
        assert opened.calls_of(2, 2) == 2 * ["activate", "launch_graph", "synchronize"]


def test_every_shape_has_a_graph_and_a_context_of_its_own():
    with Opened() as opened:
        opened.calls_of(1, 2, 3, 1, 2, 3)
        assert opened.calls_of(3, 1, 2, 1) == 4 * ["activate", "launch_graph", "synchronize"]
        assert len(opened.trt.contexts) == 1 + 3
        assert len({context.memory for context in opened.trt.contexts}) == 1  # they share what they work in


def test_graphs_are_kept_in_a_limited_number_the_latest_used_first():
    with Opened(batches=(1, 1, 20)) as opened:
        sizes = range(1, MOST_GRAPHS + 2)
        opened.calls_of(20, *(size for size in sizes for _ in range(2)))
        assert [graph.alive for graph in opened.gpu.graphs] == [False] + MOST_GRAPHS * [True]
        assert "launch_graph" in opened.calls_of(2)
        assert "launch_graph" not in opened.calls_of(1)


def test_a_buffer_that_moves_takes_the_graphs_with_it():
    with Opened() as opened:
        opened.calls_of(1, 1, 1)
        assert "free_graph" in opened.calls_of(4)
        opened.calls_of(1, 1, 1)


@pytest.mark.parametrize("refused", ["begin_capture", "end_capture", "launch", "capturable", "create"])
def test_what_cannot_be_recorded_is_done_call_by_call_and_said(refused, caplog):
    with Opened() as opened:
        opened.calls_of(2)
        if refused == "capturable":
            opened.trt.capturable = False
        elif refused == "create":
            opened.trt.refused, opened.trt.refuses = {"create_execution_context"}, "no more handles"
        elif refused == "launch":  # inside of the recording
            real = opened.gpu.begin_capture

            def begin(stream):
                real(stream)
                opened.gpu.fail["download"] = illegal_address()

            opened.gpu.begin_capture = begin
        else:
            opened.gpu.fail[refused] = illegal_address()
        opened.calls_of(2)
        assert caplog.text.count("CUDA graphs are not used") == 1
        assert not opened.gpu.capturing
        assert opened.calls_of(2) == ["activate", "set_input_shape", *PASS, "synchronize"]


def test_tensorrt_of_the_other_kind_makes_contexts_without_a_configuration():
    with Opened(library="tensorrt") as opened:
        opened.calls_of(1, 1, 1)


def test_an_engine_of_half_precision_is_fed_and_read_so():
    with Opened(dtype="float16") as opened:
        batch = images_of(3)
        for _ in range(3):
            found = opened.session.run(batch)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, network(batch.astype(np.float16)).astype(np.float32))


def test_the_wrong_size_is_refused():
    with Opened() as opened, pytest.raises(ValueError, match="the network takes"):
        opened.session.run(np.zeros((1, 3, 32, 16), np.float32))


# --- pixels up, masks down ------------------------------------------------------------------------------------------

FORMS = {
    "stretched": (Preprocessing(image_size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)), None),
    "linear": (Preprocessing(image_size=SIZE, window=(20.0, 200.0), resize="linear"), None),
    "spacing": (Preprocessing(image_size=SIZE, spacing_mm=1.5), (1.0, 2.0)),
    "spacing unknown": (Preprocessing(image_size=SIZE, spacing_mm=1.5), None),
}


def slices_of(count: int, size: tuple[int, int] = (23, 41), channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, channels), np.uint8)


def masks_of_the_cpu(slices: np.ndarray, p: Preprocessing, spacing_mm) -> np.ndarray:
    logits = network(np.stack([prepare(pixels, p, spacing_mm) for pixels in slices]))
    return np.stack([restore(each, slices.shape[1:3], p, spacing_mm) for each in logits])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_from_pixels_are_those_of_the_cpu_and_nothing_else_crosses_the_bus(form, channels):
    p, spacing_mm = FORMS[form]
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        slices = slices_of(5, channels=channels)
        masks = opened.masks_of(slices, spacing_mm)
        for _ in range(3):  # call by call, recorded, launched as one
            opened.gpu.calls.clear()
            np.testing.assert_array_equal(masks(slices), masks_of_the_cpu(slices, p, spacing_mm))
        moved = {name: sum(call[1] for call in opened.gpu.calls if call[0] == name) for name in ("upload", "download")}
        assert moved in ({"upload": 0, "download": 0}, {"upload": slices[4:].nbytes, "download": 23 * 41})


def test_the_kernels_stand_before_and_after_the_network():
    p, _ = FORMS["stretched"]
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p), graphs=False) as opened:
        masks = opened.masks_of(slices_of(2))
        masks(slices_of(2))
        before = len(opened.gpu.calls)
        masks(slices_of(2, seed=1))
        calls = opened.gpu.calls[before:]
        assert [name for name, *_ in calls] == ["activate", "set_input_shape", *PIXEL_PASS, "synchronize"]
        assert [call[1] for call in calls if call[0] == "launch"] == ["image_to_tensor", "logits_to_mask"]
        assert [call[1] for call in calls if call[0] in ("upload", "download")] == [2 * 23 * 41 * 3, 2 * 23 * 41]


def test_pictures_of_many_sizes_share_the_buffers():
    p, _ = FORMS["stretched"]
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        for number, size in enumerate([(10, 10), (40, 50), (10, 10), (12, 9), (10, 10), (40, 50), (40, 50)]):
            slices = slices_of(2, size, seed=number)
            masks = opened.masks_of(slices)
            np.testing.assert_array_equal(masks(slices), masks_of_the_cpu(slices, p, None))


def test_what_the_kernels_do_not_know_is_left_to_the_cpu():
    p, _ = FORMS["stretched"]
    nearest = Preprocessing(image_size=SIZE, resize="nearest")
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        path = opened.session.device_pipeline
        assert path(slices_of(1), None) is not None
        assert path(slices_of(1).astype(np.int16), None) is None
        assert path(slices_of(1).astype(np.float32), None) is None
        assert path(slices_of(1, (1, 20000)), None) is None
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=nearest)) as opened:
        assert opened.session.device_pipeline(slices_of(1), None) is None
    with Opened() as opened:
        assert opened.session.device_pipeline(slices_of(1), None) is None
    p, _ = FORMS["spacing"]
    with Opened(PixelKernels(find_ptx=symbol_as_ptx, preprocessing=p)) as opened:
        assert opened.session.device_pipeline(slices_of(1), (0.0, 1.0)) is None


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
def test_a_refusal_of_tensorrt_is_one_line_in_its_words(method, said, wanted):
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
            for seed, found in enumerate(pool.map(lambda seed: opened.session.run(images_of(2, seed)), range(8))):
                np.testing.assert_allclose(found, network(images_of(2, seed)), atol=1e-6)
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


def test_a_plan_that_the_library_refuses():
    with pytest.raises(EngineError, match=r"^TensorRT-RTX 1\.7\.1\.116 cannot load the plan: Version tag mismatch$"):
        engine_of(refuses="Version tag\n mismatch")


@pytest.mark.parametrize("library", LIBRARY_NAMES)
def test_code_for_the_processor_is_let_in_only_where_it_is_asked_for(library):
    assert [engine_of(library, host_code=asked)[0].host_code for asked in (False, True)] == [[False], [True]]


def test_an_engine_of_something_else():
    with pytest.raises(ArtefactError, match="pixel_values, logits, source_size; only"):
        engine_of(names=("pixel_values", "logits", "source_size"))
    with pytest.raises(ArtefactError, match="pixel_values is int8; it must be float32 or float16"):
        engine_of(dtype="int8")


def test_compiled_kernels_are_kept_where_the_library_compiles():
    fake, engine = engine_of()
    assert engine.load_kernels(b"kernels") is True
    assert fake.cache == b"kernels"
    assert engine.load_kernels(b"of another GPU") is False
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


def keeps_graphs_of_moved_buffers(monkeypatch):
    monkeypatch.setattr(InferenceStream, "_forget_graphs", lambda stream: None)


def reads_before_the_end(monkeypatch):
    monkeypatch.setattr(FakeGpu, "synchronize", lambda gpu, stream: None)


def records_without_settling(monkeypatch):
    real = InferenceStream._capture

    def capture(stream, request):
        monkeypatch.setattr(stream, "_device", NoWait(stream._device))
        return real(stream, request)

    monkeypatch.setattr(InferenceStream, "_capture", capture)


class NoWait:
    def __init__(self, device):
        self._device_behind = device

    def __getattr__(self, name):
        return (lambda stream: None) if name == "synchronize" else getattr(self._device_behind, name)


def moves_without_freeing(monkeypatch):
    monkeypatch.setattr(Buffer, "close", lambda buffer: None)


def counts_images_too_few(monkeypatch):
    real = InferenceStream._prepare
    monkeypatch.setattr(
        InferenceStream,
        "_prepare",
        lambda stream, request, context: real(stream, tensorrt_stream.InferenceRequest(images=1), context),
    )


@pytest.mark.parametrize(
    "fault",
    [
        shares_a_context, keeps_graphs_of_moved_buffers, reads_before_the_end, records_without_settling,
        moves_without_freeing, counts_images_too_few,
    ],
    ids=lambda fault: fault.__name__,
)  # fmt: skip
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError), Opened() as opened:  # noqa: PT012  # wherever it shows
        opened.calls_of(1, 2, 1, 2, 1, 2)
        opened.calls_of(4, 4, 4, 1, 1, 1)


# --- the network's own time -------------------------------------------------------------------------------------------


def test_the_networks_own_time_is_taken_between_two_events_without_copies():
    with Opened(graphs=False) as opened:
        taken = opened.session.time_on_device(images_of(2), 0.0, 3)
        between = ["set_input_shape", "record_event", "execute_async_v3", "record_event", "synchronize", "elapsed_ms"]
        names = opened.gpu.names()
        first = names.index("new_event")
        assert names[first:] == ["new_event", "new_event", *12 * between, "free_event", "free_event"]
        assert taken == [1.0] * 10  # one piece of work each time, on a clock that counts them


def test_a_recorded_network_is_timed_as_it_is_run():
    with Opened() as opened:
        assert opened.session.time_on_device(images_of(2), 0.0, 3) == [1.0] * 10
        names = opened.gpu.names()
        timed = names[names.index("launch_graph") - 1 :]
        assert timed[:5] == ["record_event", "launch_graph", "record_event", "synchronize", "elapsed_ms"]
        assert names.count("launch_graph") == 10  # the two that settle and record it are not counted
        recorded = names[names.index("begin_capture") : names.index("end_capture") + 1]
        assert recorded == ["begin_capture", "execute_async_v3", "end_capture"]
        opened.calls_of(2, 2)  # and images still go through


def test_a_batch_that_the_engine_does_not_take_at_once_takes_the_sum_of_its_pieces():
    with Opened(batches=(1, 2, 4)) as opened:
        assert opened.session.time_on_device(images_of(9), 0.0, 3) == [3.0] * 10


def test_it_goes_on_until_the_time_is_over():
    with Opened() as opened:
        assert len(opened.session.time_on_device(images_of(1), 0.0305, 1)) == 40  # 1 ms each, ten between two looks


def test_an_error_while_it_is_timed_gives_the_events_back():
    opened = Opened()
    opened.gpu.fail["elapsed_ms"] = illegal_address()
    with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
        opened.session.time_on_device(images_of(1), 0.0, 3)
    opened.session.close()
    assert opened.gpu.is_clean()


def test_layers_are_watched_in_a_context_of_their_own():
    with Opened() as opened:
        opened.trt.layer_ms = {"first": 0.5, "second": 0.25}
        assert opened.session.layer_times(images_of(2), 3) == {"first": [0.5] * 3, "second": [0.25] * 3}
        assert [context.profiler is None for context in opened.trt.contexts] == [True, False]
        opened.calls_of(2, 2)  # what runs images is as it was
