"""The Open Inference Protocol: tritonclient, unmodified, and requests that it would never send."""

import gzip
import json
import zlib

import numpy as np
import pytest

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.serve.protocol_v2 import MAX_AXES, ProtocolError, decompress, parse_request
from medseg_trt.sessions.open import open_session

httpclient = pytest.importorskip("tritonclient.http", exc_type=ImportError)
SHAPE = (3, 3, 32, 32)


@pytest.fixture(scope="module")
def client(server):
    connected = httpclient.InferenceServerClient(server.netloc)
    yield connected
    connected.close()


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def logits(bundle, values) -> np.ndarray:
    with open_session(load_bundle(bundle), "onnxruntime", threads=1) as session:
        return session.run(values)


def tensor(values: np.ndarray, binary: bool = True):
    described = httpclient.InferInput("pixel_values", values.shape, "FP32")
    described.set_data_from_numpy(values, binary_data=binary)
    return described


def test_health_metadata_index_and_statistics(client, server, values):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", server.models["tiny"])
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "medseg-trt"
    metadata = client.get_model_metadata("tiny")
    assert metadata["versions"] == [server.models["tiny"]]
    assert metadata["inputs"] == [{"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    assert client.get_model_config("tiny", server.models["tiny"])["input"][0]["data_type"] == "TYPE_FP32"
    assert client.get_model_repository_index()[0]["state"] == "READY"
    before = client.get_inference_statistics("tiny")["model_stats"][0]["inference_count"]
    client.infer("tiny", [tensor(values)])
    assert client.get_inference_statistics()["model_stats"][0]["inference_count"] == before + len(values)


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_logits_are_those_of_the_session(binary_input, binary_output, compression, client, values, logits):
    result = client.infer(
        "tiny",
        [tensor(values, binary_input)],
        outputs=[httpclient.InferRequestedOutput("logits", binary_data=binary_output)],
        request_id="a request",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    assert result.get_response()["id"] == "a request"
    np.testing.assert_array_equal(result.as_numpy("logits"), logits)


def test_without_outputs_and_with_a_version(client, server, values, logits):
    result = client.infer("tiny", [tensor(values)], model_version=server.models["tiny"])
    np.testing.assert_array_equal(result.as_numpy("logits"), logits)


def test_many_requests_at_once_share_runs_and_keep_their_rows(server, values, logits):
    with httpclient.InferenceServerClient(server.netloc, concurrency=8) as client:
        waiting = [client.async_infer("tiny", [tensor(values[i % 3 : i % 3 + 1])]) for i in range(24)]
        for i, request in enumerate(waiting):
            np.testing.assert_array_equal(request.get_result().as_numpy("logits"), logits[i % 3 : i % 3 + 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.get_model_metadata("other"), "no model 'other'"),
        (lambda client: client.get_model_metadata("tiny", "9"), "no version"),
        (lambda client: client.load_model("tiny"), "cannot be loaded"),
        (lambda client: client.infer("tiny", [tensor(np.zeros((1, 3, 8, 8), np.float32))]), "it must be FP32"),
        (lambda client: client.infer("tiny", [tensor(np.zeros((0, 3, 32, 32), np.float32))]), "0 images"),
        (lambda client: client.infer("tiny", [tensor(np.full((1, 3, 32, 32), np.nan, np.float32))]), "NaN"),
        (lambda client: client.infer("tiny", [tensor(np.full((1, 3, 32, 32), 3e38, np.float32))]), "are too large"),
        (
            lambda client: client.infer(
                "tiny",
                [tensor(np.zeros((1, 3, 32, 32), np.float32))],
                outputs=[httpclient.InferRequestedOutput("other")],
            ),
            "no output",
        ),
    ],
)
def test_errors_reach_the_client_as_its_own(call, message, client):
    with pytest.raises(httpclient.InferenceServerException, match=message):
        call(client)


def request(**changes) -> bytes:
    entry = {"name": "pixel_values", "datatype": "FP32", "shape": [1], "data": [1.0]} | changes
    return json.dumps({"inputs": [entry]}).encode()


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b"", None),
        (b"[]", None),
        (b"{}", None),
        (DEEP, None),
        (b'{"inputs": 1}', None),
        (b'{"inputs": [{"name": "a", "datatype": "FP32", "shape": [1], "data": [NaN]}]}', None),
        (request(datatype="BYTES"), None),
        (request(shape=[-1]), None),
        (request(shape=[True]), None),
        (request(shape=[2**40, 2**40]), None),
        (request(shape=[1] * (MAX_AXES + 1)), None),
        (request(data=[1.0, 2.0]), None),
        (request(data=["1"]), None),
        (request(data=[10**400]), None),
        (request(datatype="UINT8", data=[256]), None),
        (request(parameters={"binary_data_size": 4}), None),
        (request(parameters={"shared_memory_region": "a"}), None),
        (request(parameters=[1]), None),
        (request(), "9999"),
        (request(), "-1"),
        (request(), "²"),
        (request() + b"tail", str(len(request()))),
        (b'{"id": 1, "inputs": []}', None),
        (b'{"inputs": [], "outputs": [{"name": "a"}, {"name": "a"}]}', None),
    ],
)
def test_malformed_requests_are_refused(body, length):
    with pytest.raises(ProtocolError):
        parse_request(body, length)


def test_a_compressed_body_is_bounded_and_must_be_whole():
    content = bytes(1000)
    for packed in (gzip.compress(content), zlib.compress(content)):
        encoding = "gzip" if packed[:2] == b"\x1f\x8b" else "deflate"
        assert decompress(packed, encoding, 1000) == content
        for broken in (packed[:-1], packed + b"x", b"x" + packed):
            with pytest.raises(ProtocolError):
                decompress(broken, encoding, 1000)
        with pytest.raises(ProtocolError, match="more than 999 bytes"):
            decompress(packed, encoding, 999)
    with pytest.raises(ProtocolError, match="not supported"):
        decompress(b"", "br", 1)
