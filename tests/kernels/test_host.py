"""The kernels' own source, compiled by g++: sanitizers, three orders of threads, and the same bits as the PTX.

Two ways of executing a kernel that share nothing but its text: here the host's compiler and fibres, there NVRTC's PTX
and the interpreter. Both are held against the kernel's reference, and against each other.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gpu_free.execute import excesses, execute, ptx_of
from gpu_free.host.cases import cases
from gpu_free.host.checks import TIES, same, ties, unaligned
from gpu_free.host.host import (
    FINDINGS,
    ORDERS,
    Builder,
    Case,
    CompileError,
    Finding,
    missing,
    run,
    shared_builder,
)
from gpu_free.selection import covering, selected_cases

from medseg_trt.kernels import KERNELS, load
from medseg_trt.kernels.kernel import Entry, Kernel, pointer

THREADS = 64
MESSAGES: Mapping[str, tuple[str, str, str]] = {  # fault -> sanitizer, its finding, the body of a kernel of one block
    "store out of bounds": ("address", "AddressSanitizer: heap-buffer-overflow", "y[t + 1] = x[t];"),
    "load out of bounds": ("address", "AddressSanitizer: heap-buffer-overflow", "y[t] = x[t + t / 63];"),
    "shared memory out of bounds": (
        "address",
        "UndefinedBehaviorSanitizer: load of address",
        "__shared__ float kept[64]; float* last = kept + t; kept[t] = x[t]; y[t] = last[1];",
    ),
    "misaligned store": (
        "address",
        "UndefinedBehaviorSanitizer: store to misaligned address",
        "*reinterpret_cast<float4*>(y + 1 + t % 4) = make_float4(x[t], x[t], x[t], x[t]);",
    ),
    "write to an input": ("address", "host check: an input was written to", "const_cast<float*>(x)[t] = y[t];"),
    "barrier that a warp skips": (
        "address",
        "waits at a barrier; thread 32 has returned",
        "if (t < 32) __syncthreads();",
    ),
    "two barriers that meet": (
        "address",
        "waits at this barrier, thread 32 at that of line",
        "if (t < 32) __syncthreads();\nelse __syncthreads();",
    ),
    "mask without the lane that calls": (
        "address",
        "mask 0000ffff lacks lane 16, which calls",
        "y[t] = __shfl_xor_sync(0xffffu, x[t], 1);",
    ),
    "mask with a lane that does not come": (
        "address",
        "waits with mask ffffffff for a lane that never comes",
        "if (t % 32 < 16) y[t] = __shfl_xor_sync(0xffffffffu, x[t], 1);",
    ),
    "shuffle from outside the mask": (
        "address",
        "lane 0 reads lane 16, which mask 0000ffff leaves out",
        "if (t % 32 < 16) y[t] = __shfl_xor_sync(0xffffu, x[t], 16);",
    ),
    "lanes that meet at different shuffles": (
        "address",
        "lane 0 waits with mask ffffffff, lane 16 at line",
        "if (t % 32 < 16) y[t] = __shfl_xor_sync(~0u, x[t], 1);\nelse y[t] = __shfl_xor_sync(~0u, x[t], 1);",
    ),
    "race between warps": (
        "thread",
        "ThreadSanitizer: data race",
        "__shared__ float kept[64]; kept[t] = x[t]; y[t] = kept[t ^ 32];",
    ),
    "race within a warp": (
        "thread",
        "ThreadSanitizer: data race",
        "__shared__ float kept[64]; kept[t] = __shfl_xor_sync(~0u, x[t], 1); y[t] = kept[t ^ 1];",
    ),
    "shared memory used again too early": (
        "thread",
        "ThreadSanitizer: data race",
        "__shared__ float kept[64]; kept[t] = x[t]; __syncthreads(); y[t] = kept[63 - t]; kept[t] = 0;",
    ),
}
SOUND: Mapping[str, str] = {  # bodies that give x unchanged, and that no check may object to
    "barrier": "__shared__ float kept[64]; kept[63 - t] = x[t]; __syncthreads(); y[t] = kept[63 - t];",
    "used again": (
        "__shared__ float kept[64]; for (int k = 0; k < 3; ++k) { kept[63 - t] = x[t]; __syncthreads();\n"
        "y[t] = kept[63 - t]; __syncthreads(); }"
    ),
    "warp barrier": "__shared__ float kept[64]; kept[t ^ 1] = x[t ^ 1]; __syncwarp(); y[t] = kept[t];",
    "halves of a warp": "y[t] = t % 32 < 16 ? __shfl_sync(0xffffu, x[t], t % 16) : x[t];",
}


def selection(shared_only: bool = False) -> list:
    """Return every entry; slow but for one type of each form, so that every type and every form is among the rest.

    Of that rest, ``make test`` has one entry of each kernel.
    """
    chosen = []
    for number, kernel in enumerate(map(load, KERNELS)):
        if shared_only and "__shared__" not in kernel.source.read_text():
            continue
        types = list(dict.fromkeys(entry.dtype for entry in kernel.entries))
        for position, dtype in enumerate(types):
            entries = [entry for entry in kernel.entries if entry.dtype == dtype]
            for format_number, entry in enumerate(entries):
                marks = () if (format_number + number) % len(types) == position else (pytest.mark.slow,)
                chosen.append(pytest.param(kernel, entry, id=entry.name, marks=marks))
    return covering(chosen, lambda kernel, entry: kernel.name)


@pytest.fixture(scope="module")
def builder() -> Builder:
    if reason := missing():
        pytest.skip(reason)
    return shared_builder()


@pytest.mark.parametrize(("kernel", "entry"), selection())
def test_the_host_build_is_within_the_contract_and_equals_the_ptx(builder, kernel: Kernel, entry: Entry):
    launches = cases(kernel, entry)
    forward, *others = run(builder.program(kernel, entry, "address"), kernel, entry, launches)
    for other in others:  # an output that is never written differs too: every order starts from other bytes
        assert all(same(one, two) for one, two in zip(forward, other, strict=True))
    ptx = ptx_of(kernel, entry)
    for launch, outputs in zip(launches, forward, strict=True):
        assert max(excesses(kernel, entry, launch.scalars, launch.inputs, outputs).values()) <= 1, launch.scalars
        executed = execute(kernel, entry, launch.scalars, launch.inputs, ptx)
        assert not executed.report.findings, launch.scalars
        assert same(outputs, executed.outputs), launch.scalars


@pytest.mark.parametrize(("kernel", "entry"), selection(shared_only=True))
def test_threads_that_share_memory_do_not_race(builder, kernel: Kernel, entry: Entry):
    run(builder.program(kernel, entry, "thread"), kernel, entry, cases(kernel, entry))


@pytest.mark.parametrize("kernel", [pytest.param(load(name), id=name) for name in KERNELS])
def test_arrays_off_the_16_byte_boundary_are_within_the_contract(builder, kernel: Kernel):
    assert not unaligned(kernel, kernel.entries[0], kernel)


@pytest.mark.parametrize("kernel", [pytest.param(load(name), id=name) for name in TIES])
def test_ties_go_where_the_contract_says(builder, kernel: Kernel):
    for entry in kernel.entries:
        if entry.defines.get("OUTPUT", "int8") == "int8" and entry.defines.get("SCALE") != "SCALE_TOKEN":
            assert not ties(kernel, entry, kernel), entry.name


def kernel_of(body: str, folder: Path, threads: int = THREADS) -> tuple[Kernel, Entry]:
    """Return a kernel of one block that reads x and writes y, both (threads,) float32."""
    source = folder / f"{abs(hash(body))}.cu"
    text = f"const int t = threadIdx.x;\n{body}"
    source.write_text(f'extern "C" __global__ void medseg_small(const float* x, float* y) {{ {text} }}')
    entry = Entry(
        name="small", dtype="float32", defines={}, parameters=(pointer("x", "float32"), pointer("y", "float32", "out"))
    )
    kernel = Kernel(
        name="small",
        source=source,
        entries=(entry,),
        block=(threads, 1, 1),
        grid=lambda _: (1, 1, 1),
        grid_rule="(1, 1, 1)",
        shared_bytes=0,
        shapes=lambda *_: {"x": (threads,), "y": (threads,)},
        reference=lambda *_: {},
        tolerance={},
        bytes_moved=lambda *_: 8 * threads,
        onnx="",
    )
    return kernel, entry


X = np.arange(1, THREADS + 1, dtype=np.float32)


def checker(fault: str) -> str:
    """Return which check names a fault: a sanitizer, or the host build's own."""
    return next((name for name in FINDINGS.values() if MESSAGES[fault][1].startswith(name)), "host check")


@pytest.mark.parametrize("fault", covering(MESSAGES, checker))
def test_a_fault_is_named(builder, tmp_path, fault):
    sanitizer, message, body = MESSAGES[fault]
    kernel, entry = kernel_of(body, tmp_path)
    with pytest.raises(Finding) as raised:
        run(builder.program(kernel, entry, sanitizer), kernel, entry, [Case(inputs={"x": X}, scalars={})])
    assert message in str(raised.value)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("body", covering(SOUND, lambda body: "sound"))
def test_sanitizers_report_nothing_for_valid_cuda_code(builder, tmp_path, sanitizer, body):
    kernel, entry = kernel_of(SOUND[body], tmp_path)
    for (outputs,) in run(
        builder.program(kernel, entry, sanitizer), kernel, entry, [Case(inputs={"x": X}, scalars={})]
    ):
        np.testing.assert_array_equal(outputs["y"], X)


def test_racy_kernel_gives_different_outputs_per_thread_order(builder, tmp_path):
    kernel, entry = kernel_of("__shared__ float kept[64]; kept[t] = x[t]; y[t] = kept[63 - t];", tmp_path)
    program = builder.program(kernel, entry, "address")
    orders = [outputs["y"] for (outputs,) in run(program, kernel, entry, [Case(inputs={"x": X}, scalars={})])]
    read_too_early = [np.isnan(values) for values in orders]  # shared memory is NaN until it is written
    np.testing.assert_array_equal(read_too_early[0], X < 33)  # forward: the first half comes before what it reads
    np.testing.assert_array_equal(read_too_early[1], X > 32)
    assert 0 < read_too_early[2].sum() < THREADS
    assert not np.array_equal(read_too_early[2], read_too_early[0])


def test_an_output_that_is_not_written_differs_by_order(builder, tmp_path):
    kernel, entry = kernel_of("if (t > 0) y[t] = x[t];", tmp_path)
    runs = run(builder.program(kernel, entry, "address"), kernel, entry, [Case(inputs={"x": X}, scalars={})])
    assert len({outputs["y"].tobytes() for (outputs,) in runs}) == len(ORDERS)


SHUFFLES: Mapping[str, np.ndarray] = {  # lane -> lane read; segments of 8 lanes, at whose ends a lane keeps its own
    "__shfl_sync(~0u, x[t], 11, 8)": np.arange(64) // 8 * 8 + 3,
    "__shfl_up_sync(~0u, x[t], 3, 8)": np.where(np.arange(64) % 8 < 3, np.arange(64), np.arange(64) - 3),
    "__shfl_down_sync(~0u, x[t], 3, 8)": np.where(np.arange(64) % 8 > 4, np.arange(64), np.arange(64) + 3),
    "__shfl_xor_sync(~0u, x[t], 5, 8)": np.arange(64) ^ 5,
    "__shfl_xor_sync(~0u, x[t], 16)": np.arange(64) ^ 16,
}


@pytest.mark.parametrize("call", SHUFFLES)
def test_shuffles_read_the_lane_that_cuda_says(builder, tmp_path, call):
    kernel, entry = kernel_of(f"y[t] = {call};", tmp_path)
    for (outputs,) in run(
        builder.program(kernel, entry, "address"), kernel, entry, [Case(inputs={"x": X}, scalars={})]
    ):
        np.testing.assert_array_equal(outputs["y"], X[SHUFFLES[call]])


def test_cuda_intrinsic_missing_in_the_host_header_is_a_compile_error(builder, tmp_path):
    kernel, entry = kernel_of("y[t] = __fsqrt_rd(x[t]);", tmp_path)
    with pytest.raises(CompileError, match="__fsqrt_rd"):
        builder.program(kernel, entry, "address")


def test_make_test_has_every_kernel_and_every_checker():
    assert [
        kernel.name for kernel, _ in selected_cases(test_the_host_build_is_within_the_contract_and_equals_the_ptx)
    ] == [*KERNELS]
    sharing = [name for name in KERNELS if "__shared__" in load(name).source.read_text()]
    assert [kernel.name for kernel, _ in selected_cases(test_threads_that_share_memory_do_not_race)] == sharing
    assert {checker(fault) for (fault,) in selected_cases(test_a_fault_is_named)} == {*FINDINGS.values()}
