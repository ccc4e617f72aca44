import os

import pytest

from medseg_trt import machine
from medseg_trt.machine import cores, cpu_quota


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "5000 100000"}, 1),
        ({"cpu.max": "max 100000", "system.slice/cpu.max": "300000 100000"}, 3),
        ({"system.slice/cpu.max": "300000 100000", "system.slice/a.service/cpu.max": "max 100000"}, 3),
        ({"system.slice/cpu.max": "300000 100000", "system.slice/a.service/cpu.max": "200000 100000"}, 2),
        ({"system.slice/b.service/cpu.max": "200000 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "0"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000"}, None),
        ({"cpu.max": "6400000 100000"}, None),  # of all 64 processors: the back-ends choose the threads
        ({"cpu.max": "12800000 100000"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_or_service_is_read_from_either_version_of_control_groups(
    files, quota, tmp_path, monkeypatch
):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    own = tmp_path / "own"
    own.write_text("3:cpuset:/\n0::/system.slice/a.service\n")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUP", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert cpu_quota() == quota
    assert cores() == (quota or 64)
