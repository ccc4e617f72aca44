"""Limits, tokens, TLS, draining, clients that go away, logs, and what must not happen."""

import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner
from server_process import running_server, start_server

from medseg_trt.cli import cli
from medseg_trt.errors import UsageError
from medseg_trt.serve.settings import DicomSettings, ServeSettings, parse_destination

TOKEN = "0123456789abcdef-token"


def settings(**changes) -> ServeSettings:
    return ServeSettings(**({"bundles": (Path("a.medseg"),), "spool": Path("spool")} | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bundles": ()}, "at least one bundle"),
        ({"host": "0.0.0.0"}, "give --token-file, or type --insecure"),
        ({"host": "example.org"}, "give --token-file"),
        ({"tls_key": Path("key")}, "TLS needs both"),
        ({"dicom": DicomSettings(port=1, host="0.0.0.0")}, "--allow-ae"),
    ],
)
def test_settings_that_are_unsafe_are_refused(changes, reason):
    with pytest.raises(UsageError, match=reason):
        settings(**changes)


def test_safe_serve_settings_are_accepted():
    assert settings(host="0.0.0.0", token=TOKEN).host == "0.0.0.0"
    assert settings(host="0.0.0.0", insecure=True).insecure
    assert settings(host="::1").host == "::1"


@pytest.mark.parametrize(
    "text", ["", "A@b", "A@b:0", "A@b:70000", "A\\B@c:1", f"{'A' * 17}@b:1", "http://u@h/", "http://"]
)
def test_parse_destination_refuses_invalid_destinations(text):
    with pytest.raises(UsageError):
        parse_destination(text)


def test_a_port_in_use_and_no_bundle_are_one_line(bundle, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = ["serve", "--bundle", str(bundle), "--port", port, "--spool", str(tmp_path / "spool")]
        done = subprocess.run(
            [sys.executable, "-m", "medseg_trt", *command], capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "choose another with --port" in done.stderr
    ran = CliRunner().invoke(cli, ["serve", "--spool", str(tmp_path / "s")], catch_exceptions=True)
    assert isinstance(ran.exception, UsageError)


@pytest.mark.parametrize(
    "option",
    [("--send-to", "ARCHIVE@10.0.0.5:104"), ("--secondary-capture",), ("--ae-title", "WARD"), ("--quiet-s", "3")],
)
def test_options_of_the_dicom_node_need_its_port(option, bundle, tmp_path):
    ran = CliRunner().invoke(cli, ["serve", "--bundle", str(bundle), "--spool", str(tmp_path / "s"), *option])
    assert isinstance(ran.exception, UsageError)
    assert option[0] in str(ran.exception)
    assert "add --dicom-port" in str(ran.exception)


def test_one_spool_serves_one_server(server, bundle):
    with pytest.raises(AssertionError, match="in use by another server"):
        start_server([bundle], server.spool)


def test_a_name_of_another_host_is_refused(server):
    status, _, body = server.get("/v1/models", Host="evil.example:8000")
    assert (status, "Host" in json.loads(body)["error"]) == (421, True)


def test_metrics_and_logs_name_requests_and_no_content(server, inputs):
    server.post("/v1/segment", (inputs / "image0.png").read_bytes(), X_Request_ID="my-request")
    _, headers, body = server.get("/metrics")
    text = body.decode()
    assert headers["content-type"].startswith("text/plain")
    for name in ("medseg_queue_slices", "medseg_batch_slices_bucket", "medseg_http_seconds_bucket", "medseg_jobs"):
        assert name in text
    lines = [json.loads(line) for line in server.lines if "my-request" in line]
    assert [(line["route"], line["status"]) for line in lines] == [("/v1/segment", 200)]


def test_a_thread_that_ends_with_an_error_is_a_line_of_json():
    code = "import logging, threading; from medseg_trt.serve.json_log import log_as_json; "
    code += "log_as_json(logging.getLogger('a')); threading.Thread(target=lambda: 1 / 0).start()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert (json.loads(line)["level"], json.loads(line)["error"]) == ("error", "ZeroDivisionError")


def test_a_client_that_goes_away_is_dropped(server, inputs):
    before = _metric(server, 'status="499"')
    body = (inputs / "image0.png").read_bytes()
    for _ in range(5):
        with socket.create_connection(server.netloc.split(":")) as client:
            head = f"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body) + 1}\r\n\r\n"
            client.sendall(head.encode() + body)  # a byte is missing
    deadline = time.monotonic() + 30
    while _metric(server, 'status="499"') < before + 5:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.post("/v1/segment", body)[0] == 200
    assert list((server.spool / "uploads").iterdir()) == []


def _metric(server, label: str) -> float:
    lines = server.get("/metrics")[2].decode().splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("medseg_http_requests_total{") and label in line
    )


def test_server_requires_its_token_over_tls(bundle, inputs, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    names = [
        "-keyout",
        "key.pem",
        "-out",
        "cert.pem",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    (tmp_path / "token").write_text(TOKEN + "\n")
    options = ["--token-file", "token", "--tls-certificate", "cert.pem", "--tls-key", "key.pem"]
    options = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in options]
    with running_server([bundle], tmp_path / "spool", *options) as secured:
        context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))

        def ask(path: str, token: str | None = None, body: bytes | None = None, scheme: str = "Bearer") -> int:
            connection = http.client.HTTPSConnection(secured.netloc, context=context, timeout=60)
            headers = {} if token is None else {"Authorization": f"{scheme} {token}"}
            connection.request("GET" if body is None else "POST", path, body, headers)
            status = connection.getresponse().status
            connection.close()
            return status

        assert secured.address.startswith("https://")
        assert [ask(path) for path in ("/", "/v2/health/live", "/v1/models", "/metrics")] == [200, 200, 401, 401]
        assert ask("/v1/models", "wrong") == 401
        assert ask("/v1/models", TOKEN) == 200
        assert ask("/v1/models", TOKEN, scheme="bearer") == 200  # RFC 9110, section 11.1
        assert ask("/v1/models", TOKEN, scheme="Basic") == 401
        assert ask("/v1/segment", TOKEN, (inputs / "image0.png").read_bytes()) == 200


@pytest.mark.parametrize("case", ["swapped", "encrypted", "of another"])
def test_a_certificate_or_key_that_does_not_work_is_one_line(case, bundle, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    for name in ("a", "b"):
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "1", "-subj", "/CN=localhost"]
        password = ["-passout", "pass:secret"] if case == "encrypted" else ["-nodes"]
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run([*request, *files, *password], cwd=tmp_path, check=True, capture_output=True)
    certificate, key = {
        "swapped": ("a.key", "a.pem"),
        "encrypted": ("a.pem", "a.key"),
        "of another": ("a.pem", "b.key"),
    }[case]
    command = ["serve", "--bundle", str(bundle), "--port", "0", "--spool", "spool"]
    done = subprocess.run(
        [sys.executable, "-m", "medseg_trt", *command, "--tls-certificate", certificate, "--tls-key", key],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        start_new_session=True,  # without a terminal, no question can wait for an answer
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "unencrypted key in PEM" in done.stderr


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_draining_finishes_what_is_in_flight(rounds, bundle, inputs, masks, tmp_path):
    body = (inputs / "image0.png").read_bytes()
    for round_number in range(rounds):
        server = start_server([bundle], tmp_path / f"spool{round_number}")
        host, port = server.netloc.split(":")
        connections = [http.client.HTTPConnection(host, int(port), timeout=60) for _ in range(6)]
        for connection in connections:
            connection.putrequest("POST", "/v1/segment")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body[:-1])  # the last byte comes after the signal
        time.sleep(0.5)
        ended = threading.Thread(target=server.terminate)
        started = time.monotonic()
        ended.start()
        time.sleep(0.5)
        for connection in connections:
            connection.send(body[-1:])
        for connection in connections:
            assert connection.getresponse().read() == (masks / "image0.png").read_bytes()
            connection.close()
        ended.join()
        assert time.monotonic() - started < 30
        assert server.process.returncode == 0
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, int(port)))


def test_a_second_interrupt_ends_the_server_without_a_traceback(bundle, tmp_path):
    server = start_server([bundle], tmp_path / "spool")
    host, port = server.netloc.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.putrequest("POST", "/v1/segment")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"too few")  # in flight until the server ends
    time.sleep(0.5)
    for _ in range(2):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert server.process.wait(60) == 0
    connection.close()
    messages = [json.loads(line) for line in server.lines]
    assert [line for line in messages if line["level"] == "error"] == []
    assert [line["status"] for line in messages if "status" in line] == [499]


AUDIT = """
import sys
def hook(event, arguments):
    if event == "socket.connect" and not str(arguments[1][0]).startswith(("127.", "::1", "/")):
        print("CONNECTED", arguments[1], file=sys.stderr, flush=True)
sys.addaudithook(hook)
from medseg_trt.cli import main
sys.argv[0] = "medseg-trt"
main()
"""


def test_server_opens_no_outgoing_connections(bundle, inputs, tmp_path, monkeypatch):
    starter = tmp_path / "python"
    (tmp_path / "audit.py").write_text(AUDIT)
    starter.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {tmp_path / "audit.py"} "$@"\n')
    starter.chmod(0o755)
    monkeypatch.setattr("server_process.sys.executable", str(starter))
    with running_server([bundle], tmp_path / "spool", "--dicom-port", "0") as server:
        assert server.post("/v1/segment", (inputs / "image0.png").read_bytes())[0] == 200
        with urllib.request.urlopen(f"{server.address}/", timeout=30) as response:
            assert b"http" not in response.read().replace(b"http-equiv", b"")
    assert [line for line in server.lines if "CONNECTED" in line] == []
