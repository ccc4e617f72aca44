"""Malformed requests: every one gets an answer of the client's kind, and the next good request is answered."""

import http.client
import io
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicoms import AXIAL, save_series

MANY, QUICK = 3000, 150
REFUSED = range(400, 500)


@pytest.fixture(scope="module")
def good(inputs, tmp_path_factory) -> dict[str, tuple[str, bytes, dict[str, str]]]:
    """Good requests of every kind: path, body and headers."""
    folder = tmp_path_factory.mktemp("good")
    save_series(folder / "ct", np.arange(4 * 20 * 20, dtype=np.int16).reshape(4, 20, 20), AXIAL)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((folder / "ct").iterdir()):
            archive.write(path, path.name)
    values = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype("<f4")
    tensor = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 32, 32]}
    as_json = json.dumps({"inputs": [tensor | {"data": values.ravel().round(3).tolist()}]}).encode()
    header = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": values.nbytes}}]}).encode()
    infer = "/v2/models/tiny/infer"
    return {
        "png": ("/v1/segment", (inputs / "image0.png").read_bytes(), {}),
        "jpeg": ("/v1/segment", (inputs / "photo.jpg").read_bytes(), {}),
        "tiff": ("/v1/segment", (inputs / "one.tif").read_bytes(), {}),
        "nifti": ("/v1/segment", (inputs / "volume.nii.gz").read_bytes(), {}),
        "dicom": ("/v1/segment", next((folder / "ct").iterdir()).read_bytes(), {}),
        "zip": ("/v1/segment", packed.getvalue(), {}),
        "json": (infer, as_json, {}),
        "binary": (infer, header + values.tobytes(), {"Inference-Header-Content-Length": str(len(header))}),
    }


def flip(body: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 12)):
        body[rng.randrange(len(body))] = rng.randrange(256)


def cut(body: bytearray, rng: random.Random) -> None:
    del body[rng.randrange(len(body)) :]


def repeat(body: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(body))
    body[start:start] = body[start : start + rng.randint(1, 200)] * rng.randint(1, 5)


def blank(body: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(body))
    body[start : start + 40] = bytes(len(body[start : start + 40]))


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, cut, repeat, blank)


def send_mutants(server, good, count: int, seed: int) -> dict[int, int]:
    """Send mutants of good requests and return how many got each status."""
    rng, statuses = random.Random(seed), dict[int, int]()
    host, port = server.netloc.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    for _ in range(count):
        path, content, headers = good[rng.choice(sorted(good))]
        body, headers = bytearray(content), dict(headers)
        rng.choice(MUTATIONS)(body, rng)
        if rng.random() < 0.2:
            headers["Content-Encoding"] = rng.choice(["gzip", "deflate", "br", "\t"])
        if rng.random() < 0.1:
            headers["Inference-Header-Content-Length"] = rng.choice(["-1", "0", "99999999999999999999", "NaN", "5"])
        if rng.random() < 0.1:
            path += rng.choice(["?model=%00", "?model=..%2f..%2fetc", "/../..", "?model=tiny&model=x", "%2e%2e/"])
        connection.request("POST", path, bytes(body), headers)
        response = connection.getresponse()
        text = response.read()
        statuses[response.status] = statuses.get(response.status, 0) + 1
        is_expected = response.status in (200, 202, *REFUSED) or (response.status == 503 and b"jobs" in text)
        assert is_expected, (path, text, [line for line in server.lines if "error" in line])
        if response.status in REFUSED:
            assert list(json.loads(text)) == ["error"]
    connection.close()
    return statuses


def check_alive(server, inputs, masks) -> None:
    status, _, body = server.post("/v1/segment", (inputs / "image0.png").read_bytes())
    assert (status, body) == (200, (masks / "image0.png").read_bytes())


def test_mutated_http_requests_are_refused_and_the_server_stays_alive(server, good, inputs, masks):
    statuses = send_mutants(server, good, QUICK, seed=0)
    assert sum(count for status, count in statuses.items() if status in REFUSED) > QUICK / 4, statuses
    check_alive(server, inputs, masks)


@pytest.mark.slow
def test_three_thousand_mutated_http_requests_leave_the_server_alive(server, good, inputs, masks):
    send_mutants(server, good, MANY, seed=1)
    check_alive(server, inputs, masks)


def test_random_bytes_leave_the_server_alive(server, inputs, masks):
    rng = random.Random(0)
    host, port = server.netloc.split(":")
    for _ in range(60):
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(rng.randbytes(rng.randint(1, 5000)) + b"\r\n\r\n")
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):
                pass
    check_alive(server, inputs, masks)


def test_a_body_that_is_no_http_after_its_answer(server, inputs, masks):
    """The answer comes before the body, which then is no chunk; nothing but the log's own lines may be in the log."""
    host, port = server.netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"POST /v1/segment?model=x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b"404" in client.recv(4096).splitlines()[0]
        client.sendall(b"no chunk\r\n")
        while client.recv(4096):
            pass
    check_alive(server, inputs, masks)
    assert [line for line in server.lines if not line.startswith("{")] == []


def test_a_body_of_a_gigabyte_that_is_only_announced(server):
    host, port = server.netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000000\r\n\r\nx")
        assert b"413" in client.recv(4096).splitlines()[0]


@pytest.mark.slow
def test_headers_that_never_end_are_cut_off(server, inputs, masks):
    host, port = server.netloc.split(":")
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\n")
        assert client.recv(100) == b""
    assert 15 < time.monotonic() - began < 40
    check_alive(server, inputs, masks)


def run_schemathesis(server, examples: int) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs schemathesis")
    command = [program, "run", f"{server.address}/openapi.json", "--checks", "not_a_server_error", "--seed", "1"]
    command += ["--max-examples", str(examples), "--phases", "examples,coverage,fuzzing", "--no-color"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(server, inputs, masks):
    done = run_schemathesis(server, 100)
    assert done.returncode == 0, done.stdout[-3000:]
    check_alive(server, inputs, masks)
