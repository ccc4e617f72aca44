"""The systemd unit: systemd's own checker finds nothing to say, and the command in it parses."""

import shutil
import subprocess
from pathlib import Path

import pytest
from parsing import parse

UNIT = Path(__file__).parents[3] / "toolkit" / "docker" / "medseg-serve.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian package systemd)")
def test_systemd_verifies_the_unit(tmp_path):
    path = shutil.copy(UNIT, tmp_path)
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "medseg" in line]) == (0, [])


def test_systemd_unit_command_parses():
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    assert parse(line.removeprefix("ExecStart=/usr/bin/env ")).command.name == "serve"
