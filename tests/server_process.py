"""A server in a process of its own, as a user starts it."""

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

START_S = 180.0  # of a machine that is busy with other tests


@dataclass(kw_only=True)
class ServerProcess:
    """A running server."""

    process: "subprocess.Popen[str]"
    address: str
    dicom_port: int  # -1 without a DICOM node
    models: Mapping[str, str]
    spool: Path
    lines: list[str] = field(default_factory=list)  # of its log

    @property
    def netloc(self) -> str:
        return self.address.partition("://")[2]

    def get(self, path: str, **headers: str) -> tuple[int, Message, bytes]:
        return self.request("GET", path, None, **headers)

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, Message, bytes]:
        return self.request("POST", path, body, **headers)

    def request(self, method: str, path: str, body: bytes | None, **headers: str) -> tuple[int, Message, bytes]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"{self.address}{path}", body, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def wait_for_job(self, address: str, timeout_s: float = 120.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status, _, body = self.get(address)
            assert status == 200, body
            if (job := json.loads(body))["state"] in ("done", "failed"):
                return job
            time.sleep(0.05)
        raise AssertionError(f"the job is not done after {timeout_s} s")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout_s: float = 60.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def resident_mb(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")


@contextmanager
def running_server(bundles: Sequence[Path], spool: Path, *options: str) -> Iterator[ServerProcess]:
    """Start a server on a free port and stop it at the end."""
    server = start_server(bundles, spool, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.terminate()


def start_server(bundles: Sequence[Path], spool: Path, *options: str) -> ServerProcess:
    """Start a server on a free port and wait until it listens."""
    named = [word for bundle in bundles for word in ("--bundle", str(bundle))]
    command = [sys.executable, "-m", "medseg_trt", "serve", *named, "--port", "0", "--spool", str(spool), "--json"]
    if "--backend" not in options:
        command += ["--backend", "onnxruntime", "--threads", "1"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    assert process.stderr is not None
    assert process.stdout is not None

    def collect(stream: Any) -> None:
        with stream:
            lines.extend(line.rstrip("\n") for line in stream)

    threading.Thread(target=collect, args=(process.stderr,), daemon=True).start()
    timer = threading.Timer(START_S, process.kill)
    timer.start()
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            break
    timer.cancel()
    process.stdout.close()
    if not text.endswith("}\n"):
        process.wait()
        raise AssertionError(f"the server did not start: {lines}")
    started = json.loads(text)
    return ServerProcess(
        process=process,
        address=started["address"],
        dicom_port=-1 if started["dicom_port"] is None else started["dicom_port"],
        models=started["models"],
        spool=spool,
        lines=lines,
    )
