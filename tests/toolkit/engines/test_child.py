"""The process that builds an engine changes its scheduling and its addresses only when this is requested."""

import ctypes
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from medseg_trt.engines import child
from medseg_trt.spec import EngineSpec, from_dict, to_dict

SPEC = EngineSpec(library="tensorrt-rtx", targets=("sm86",))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="scheduling and addresses are Linux's")


@pytest.fixture
def system_calls(monkeypatch) -> list[str]:
    """The calls that change how a process runs; none of them is made."""
    calls: list[str] = []

    def recorded(name: str, value: int | None = None):
        return lambda *_: calls.append(name) or value

    monkeypatch.setattr(os, "sched_setaffinity", recorded("sched_setaffinity"), raising=False)
    monkeypatch.setattr(os, "sched_setscheduler", recorded("sched_setscheduler"), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "execv", recorded("execv"))

    class Personality:
        def __call__(self, *_: int) -> int:
            calls.append("personality")
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda *_: SimpleNamespace(personality=Personality()))
    return calls


def test_default_build_keeps_scheduling_addresses_and_environment(system_calls):
    child.prepare_process(SPEC)
    assert system_calls == []
    assert child.child_environment(SPEC) == dict(os.environ)


@pytest.mark.parametrize(
    ("visible", "number", "seen"),
    [(None, 0, None), (None, 2, "2"), ("3,1", 0, "3,1"), ("3,1", 1, "1"), ("GPU-a,GPU-b", 1, "GPU-b")],
)
def test_a_build_on_another_gpu_than_the_first_sees_that_gpu_alone(visible, number, seen, monkeypatch):
    monkeypatch.delenv(child.VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(child.VISIBLE, visible)
    for spec in (SPEC, replace(SPEC, reproducible=True)):
        assert child.child_environment(spec, number).get(child.VISIBLE) == seen


@LINUX
def test_a_reproducible_build_runs_on_one_core_in_a_fixed_order_at_fixed_addresses(system_calls):
    spec = replace(SPEC, reproducible=True)
    child.prepare_process(spec)
    assert system_calls == ["sched_setaffinity", "sched_setscheduler", "personality", "personality", "execv"]
    assert child.child_environment(spec)["GLIBC_TUNABLES"] == child.ALLOCATOR


@LINUX
def test_a_policy_that_the_system_refuses_is_replaced_by_the_next(system_calls, monkeypatch):
    policies: list[int] = []

    def refuse(_process: int, policy: int, _parameter: object) -> None:
        policies.append(policy)
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    child.prepare_process(replace(SPEC, reproducible=True))
    assert policies == [os.SCHED_FIFO, os.SCHED_BATCH]
    assert system_calls[-1] == "execv"


def test_the_request_of_the_child_says_whether_the_build_is_reproducible():
    for spec in (SPEC, replace(SPEC, reproducible=True)):
        assert from_dict(EngineSpec, to_dict(spec), "request") == spec
    older = {name: value for name, value in to_dict(SPEC).items() if name != "reproducible"}
    assert from_dict(EngineSpec, older, "manifest") == SPEC  # bundles of earlier versions have no such field
