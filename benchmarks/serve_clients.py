"""Clients of a server under load, and the server's process: what ``bench_serve.py`` measures with."""

import hashlib
import http.client
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)
JOB_POLL_S = 0.05


@dataclass(kw_only=True)
class Tally:
    """What clients have seen."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: int = 0
    refused: int = 0
    volumes: int = 0

    def row(self) -> dict[str, float]:
        """Return count and percentiles in milliseconds."""
        cuts = np.percentile(1000 * np.array(self.seconds), PERCENTILES) if self.seconds else [0] * len(PERCENTILES)
        named = {f"p{percent}_ms": float(cut) for percent, cut in zip(PERCENTILES, cuts, strict=True)}
        return {"requests": len(self.seconds), **named}


@contextmanager
def serving(command: Sequence[str], port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server until the block ends."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None, "the server has ended"
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, bytes, Any]:
    """Send a request over a connection that is kept."""
    connection.request("POST", path, body, {"Host": "localhost"})
    response = connection.getresponse()
    return response.status, response.read(), response.headers


def small_client(
    port: int, path: str, bodies: Sequence[bytes], digests: Sequence[str], until: float, tally: Tally, pause_s: float
) -> None:
    """Send small images until ``until``; with a pause, at fixed times, so that a slow answer does not slow the load."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    due = time.perf_counter()
    index = 0
    while time.perf_counter() < until:
        if pause_s:
            due += pause_s
            time.sleep(max(due - time.perf_counter(), 0))
        began = due if pause_s else time.perf_counter()
        try:
            status, content, _ = ask(connection, path, bodies[index % len(bodies)])
        except (OSError, http.client.HTTPException):
            tally.lost += 1
            connection.close()
            continue
        if status == 429:
            tally.refused += 1
            time.sleep(0.05)
            continue
        tally.seconds.append(time.perf_counter() - began)
        tally.wrong += status != 200 or hashlib.sha256(content).hexdigest() != digests[index % len(bodies)]
        index += 1
    connection.close()


def volume_client(port: int, volume: bytes, digest: str, until: float, tally: Tally) -> None:
    """Send a volume again and again."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    while time.perf_counter() < until:
        status, _, headers = ask(connection, "/v1/segment", volume)
        if status != 202:
            tally.lost += 1
            continue
        address = headers["Location"]
        while True:
            connection.request("GET", f"{address}/result", headers={"Host": "localhost"})
            response = connection.getresponse()
            content = response.read()
            if response.status != 409:
                break
            time.sleep(JOB_POLL_S)
        tally.wrong += response.status != 200 or hashlib.sha256(content).hexdigest() != digest
        tally.volumes += 1
        connection.request("DELETE", address, headers={"Host": "localhost"})
        connection.getresponse().read()
    connection.close()


def run_clients(targets: Sequence[Callable[[], None]]) -> float:
    """Run clients in threads and return the seconds that they took."""
    threads = [threading.Thread(target=target) for target in targets]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began
