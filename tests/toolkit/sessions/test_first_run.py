"""The limits of a first run: of processor time and memory, without effect on what comes after."""

import resource
import subprocess
import sys

import numpy as np
import pytest

from medseg_trt.errors import ArtefactError, DeviceError
from medseg_trt.sessions import first_run
from medseg_trt.sessions.first_run import limited_run

WAITING_AND_BUSY = """
import time
from medseg_trt.errors import ArtefactError
from medseg_trt.sessions import first_run

first_run.BASE_S = 1.0

def busy():
    while True:
        pass

first_run.limited_run(lambda: time.sleep(1.5), "a network", 0)
print("waited")
try:
    first_run.limited_run(busy, "a network", 0)
except ArtefactError as error:
    print(error)
"""


def test_the_result_and_errors_pass_unchanged():
    assert limited_run(lambda: 5, "a network", 0) == 5

    def fails() -> None:
        raise DeviceError("no device")

    with pytest.raises(DeviceError, match="no device"):
        limited_run(fails, "a network", 0)


def test_processor_time_is_limited_and_waiting_is_not():
    """In a process of its own: idle threads of the libraries that other tests opened take processor time too."""
    ran = subprocess.run([sys.executable, "-P", "-c", WAITING_AND_BUSY], capture_output=True, text=True, check=False)
    assert ran.stdout.splitlines() == [
        "waited",
        "a network takes more than 1 s of processor time for one image; it is not used",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits mappings on Linux only")
def test_memory_is_limited_only_meanwhile(monkeypatch):
    monkeypatch.setattr(first_run, "BASE_BYTES", 64 << 20)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(ArtefactError, match="more memory for one image than is allowed or free"):
        limited_run(lambda: np.empty(256 << 20, np.uint8), "a network", 0)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert limited_run(lambda: np.empty(256 << 20, np.uint8).nbytes, "a network", 32 << 20) == 256 << 20
