import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openvino
import pytest

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import DeviceError, MissingExtraError
from medseg_trt.sessions.openvino import open_graph
from medseg_trt.sessions.pytorch import open_reference
from medseg_trt.train.checkpoint import load_checkpoint

IMAGES = np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32)
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def graph(tiny_bundle):
    bundle = load_bundle(tiny_bundle)
    return bundle.folder / next(
        variant.graph for variant in bundle.content.variants.values() if variant.dialect == "plain"
    )


@pytest.fixture(scope="module")
def expected(tiny_bundle) -> np.ndarray:
    with open_reference(load_checkpoint(tiny_bundle.parent / "model" / "model.pt")) as reference:
        return reference.run(IMAGES)


def option(session, name: str):
    """Return what OpenVINO says of the compiled model."""
    request = session._requests.get()
    session._requests.put(request)
    return request.get_compiled_model().get_property(name)


def test_openvino_fp32_session_computes_in_fp32(graph, expected):
    with open_graph(graph, "fp32", 1, "fp32") as session:
        assert option(session, "INFERENCE_PRECISION_HINT") == openvino.Type.f32
        # bfloat16 keeps 8 bits: below it is off by a hundred times as much.
        assert np.abs(session.run(IMAGES) - expected).max() <= 1e-4
        assert session.description.endswith(" fp32, 1 thread")


@pytest.mark.skipif(not HAS_BF16, reason="this processor has no bfloat16 arithmetic")
def test_bf16_really_rounds_and_says_so(graph, expected):
    with open_graph(graph, "fp32", 1, "bf16") as session:
        assert option(session, "INFERENCE_PRECISION_HINT") == openvino.Type.bf16
        error = np.abs(session.run(IMAGES) - expected).max()
        # A product is rounded by 2**-9 of itself; a wrong network is off by 1 and more.
        assert 1e-3 < error < 0.1 * np.abs(expected).max()
        assert "float parts in bf16" in session.description


def test_bf16_is_refused_where_the_processor_lacks_it(graph, monkeypatch):
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(DeviceError, match="no bfloat16 arithmetic; choose another precision"):
        open_graph(graph, "fp32", None, "bf16")
    open_graph(graph, "fp32", None, "fp32").close()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_reach_openvino(graph, threads):
    with open_graph(graph, "fp32", threads, "fp32") as session:
        assert option(session, "INFERENCE_NUM_THREADS") == threads
        assert session.description.endswith(f", {threads} thread{'s' if threads > 1 else ''}")


def test_without_a_wish_threads_are_openvinos_choice(graph):
    with open_graph(graph, "fp32", None, "fp32") as session:
        assert "thread" not in session.description


def test_openvino_disables_dynamic_activation_quantisation(graph):
    with open_graph(graph, "fp32", 1, "fp32") as session:
        assert option(session, "DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_openvino_batch_equals_single_images_bit_for_bit(graph):
    with open_graph(graph, "fp32", 1, "fp32") as session:
        together = session.run(IMAGES)
        for image, logits in zip(IMAGES, together, strict=True):
            np.testing.assert_array_equal(session.run(image[np.newaxis])[0], logits)
        first = session.run(IMAGES[:1])
        session.run(IMAGES[1:])
        np.testing.assert_array_equal(first, together[:1])  # an answer is not overwritten by the next


@pytest.mark.parametrize("shape", [(1, 3, 48, 32), (1, 3, 32, 16)])
def test_images_of_another_size_are_refused(graph, shape):
    with (
        open_graph(graph, "fp32", 1, "fp32") as session,
        pytest.raises(ValueError, match=r"network takes \[1, 3, 32, 32\]"),
    ):
        session.run(np.zeros(shape, np.float32))


def test_without_openvino_it_names_the_extra(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medseg-trt\[openvino\]'"):
        open_graph(graph, "fp32", None, "fp32")


def test_images_beside_each_other_have_the_bits_of_images_on_the_same_share_of_threads(graph):
    batch = np.random.default_rng(1).random((5, 3, 32, 32), dtype=np.float32)
    with open_graph(graph, "fp32", 1, "fp32") as alone, open_graph(graph, "fp32", 2, "fp32", streams=2) as beside:
        assert option(beside, "NUM_STREAMS") == beside.streams == 2
        assert option(beside, "INFERENCE_NUM_THREADS") == 2
        assert alone.streams == 1
        expected = alone.run(batch)
        np.testing.assert_array_equal(beside.run(batch), expected)
        with ThreadPoolExecutor(4) as pool:  # more callers than streams
            outputs = list(pool.map(lambda image: beside.run(image[np.newaxis])[0], batch))
    np.testing.assert_array_equal(outputs, expected)


def test_a_signal_is_handled_after_two_sessions_are_closed_in_the_order_of_opening(graph):
    """It ended the process with OpenVINO 2026.4.1 on processors with AVX-512; elsewhere this cannot fail."""
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from medseg_trt.sessions.openvino import open_graph

        signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
        first, second = (open_graph(Path(sys.argv[1]), "fp32", None, "fp32") for _ in range(2))
        first.close()
        second.close()
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    done = subprocess.run([sys.executable, "-c", code, graph], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
