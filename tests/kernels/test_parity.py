"""The PTX that ships, executed: every kernel and entry within its tolerance, without a finding, without a wasted byte.

The default run covers every entry with every width, with all numbers of rows and magnitudes in turn. Further tests take
one entry of each kernel in ``make test`` and all of them in ``make test-kernels``; ``slow`` is the whole grid on every
architecture.
"""

import itertools
import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import pytest
from gpu_free.cases import CASES, SCALES
from gpu_free.execute import Execution, excesses, execute, ptx_of
from gpu_free.selection import covering, form, selected_cases

from medseg_trt.kernels import KERNELS, load
from medseg_trt.kernels.kernel import DTYPES, Array, Entry, Expected, Kernel, distance, float_bits

WIDTHS = (1, 33, 64, 576, 768, 4093, 4096, 8192)
WIDER = (12296, 12297)  # than what a block of any kernel on rows holds in its registers; odd: without vectors
ROWS = (1, 3, 17, 256)
TARGETS = ((80, "13.0"), (87, "12.6"), (90, "13.0"), (120, "13.0"))  # 12.6: JetPack 6
ENTRIES = [(name, entry.name) for name in KERNELS for entry in load(name).entries]
ROW_KERNELS = tuple(name for name in KERNELS if name not in ("image_to_tensor", "logits_to_mask"))
ANY_WIDTH = tuple(name for name in ROW_KERNELS if name != "rotary")  # any width
ANY_WIDTH_ENTRIES = [case for case in ENTRIES if case[0] in ANY_WIDTH]


def kernel_of(name: str, entry_name: str) -> str:
    """Return what the covering selection has one case of."""
    return name


def make_case(entry_name: str, kernel: Kernel, rows: int, width: int, first_scale: int):
    """Return scalars and inputs, the same on every run."""
    rng = np.random.default_rng(zlib.crc32(f"{entry_name} {rows} {width} {first_scale}".encode()))
    with np.errstate(over="ignore"):  # the largest numbers are infinite in float16
        return CASES[kernel.name](kernel.entry(entry_name), rows, width, first_scale, rng)


def check(
    kernel: Kernel,
    entry: Entry,
    ptx: str,
    rows: int,
    width: int,
    first_scale: int,
    starts: Mapping[str, int] | None = None,
) -> Execution:
    """Run one case and assert that nothing is wrong with it."""
    scalars, inputs = make_case(entry.name, kernel, rows, width, first_scale)
    execution = execute(kernel, entry, scalars, inputs, ptx, starts=starts)
    with np.errstate(invalid="ignore"):
        worst = excesses(kernel, entry, scalars, inputs, execution.outputs)
    where = (
        f"{entry.name}, {rows} rows of {width}, from scale {SCALES[first_scale % len(SCALES)]}, {starts or 'aligned'}"
    )
    assert not execution.report.findings, f"{where}: {'; '.join(map(str, execution.report.findings))}"
    assert all(excess <= 1 for excess in worst.values()), f"{where}: {worst} times the tolerance"
    return execution


def test_every_kernel_has_cases() -> None:
    assert CASES.keys() == KERNELS.keys()


def selection(name: str, entry_name: str) -> list[tuple[tuple[int, str], int, int, int]]:
    """Return the targets, rows, widths and first magnitudes of the default run.

    The functions of one kernel and type share out the targets among them, so that all are met; every other width goes
    to the oldest, which most cards get.
    """
    kernel, number = load(name), ENTRIES.index((name, entry_name))
    alike = [other.name for other in kernel.entries if other.dtype == kernel.entry(entry_name).dtype]
    share = [
        target for index, target in enumerate(TARGETS) if index % len(alike) == alike.index(entry_name) % len(TARGETS)
    ]
    return [
        (share[index // 2 % len(share)] if index % 2 else TARGETS[0], ROWS[(index + number) % 3], width, index + number)
        for index, width in enumerate(WIDTHS)
    ]


def test_the_default_run_meets_every_target_with_every_kernel_and_type() -> None:
    met = {
        (name, load(name).entry(entry_name).dtype, target)
        for name, entry_name in ENTRIES
        for target, *_ in selection(name, entry_name)
    }
    expected = {
        (name, load(name).entry(entry_name).dtype, target) for name, entry_name in ENTRIES for target in TARGETS
    }
    assert met == expected
    assert {rows for case in ENTRIES for _, rows, *_ in selection(*case)} == {1, 3, 17}  # 256: below


@pytest.mark.parametrize(("name", "entry_name"), ENTRIES)
def test_shipped_ptx_keeps_its_contract(name: str, entry_name: str) -> None:
    kernel = load(name)
    entry = kernel.entry(entry_name)
    for (arch, toolchain), rows, width, first_scale in selection(name, entry_name):
        check(kernel, entry, ptx_of(kernel, entry, arch, toolchain), rows, width, first_scale)


@pytest.mark.parametrize(("name", "entry_name"), covering(ANY_WIDTH_ENTRIES, kernel_of))
@pytest.mark.parametrize("width", WIDER)
def test_rows_that_no_block_holds_at_once(name: str, entry_name: str, width: int) -> None:
    kernel = load(name)
    entry = kernel.entry(entry_name)
    check(kernel, entry, ptx_of(kernel, entry), 3, width, width)


@pytest.mark.parametrize(("name", "entry_name"), covering(ENTRIES, kernel_of))
def test_256_rows_of_4096_move_no_more_than_they_must(name: str, entry_name: str) -> None:
    kernel = load(name)
    entry = kernel.entry(entry_name)
    execution = check(kernel, entry, ptx_of(kernel, entry), 256, 4096, 0)
    scalars, _ = make_case(entry_name, kernel, 256, 4096, 0)
    least = kernel.bytes_moved(scalars, entry)
    assert least <= execution.report.moved_bytes <= 1.01 * least
    if name in ROW_KERNELS:
        for array, traffic in {**execution.report.loads, **execution.report.stores}.items():
            if array not in ("scales", "cos", "sin", "frequencies"):  # one number a block; tables stay in the cache
                assert traffic.sectors == traffic.ideal_sectors, array
                assert max(traffic.widths) == _widest(entry, array), array


def _widest(entry: Entry, array: str) -> int:
    """Return the bytes of an access that go with 16 bytes of the entry's type."""
    dtype = next(parameter.dtype for parameter in entry.parameters if parameter.name == array)
    return 16 // DTYPES[entry.dtype].itemsize * DTYPES[dtype].itemsize


@pytest.mark.parametrize(("name", "entry_name"), covering(ENTRIES, kernel_of))
def test_kernels_accept_unaligned_array_starts(name: str, entry_name: str) -> None:
    kernel = load(name)
    entry, ptx = kernel.entry(entry_name), ptx_of(kernel, kernel.entry(entry_name))
    for moved in (parameter for parameter in entry.parameters if parameter.kind == "pointer"):
        check(kernel, entry, ptx, 3, 64, 0, starts={moved.name: DTYPES[moved.dtype].itemsize})


@pytest.mark.parametrize(("name", "entry_name"), covering(ENTRIES, kernel_of))
def test_no_opcode_is_approximate(name: str, entry_name: str) -> None:
    """What the interpreter computes of an approximate opcode is not what a card computes."""
    kernel = load(name)
    ptx = ptx_of(kernel, kernel.entry(entry_name))
    assert ".approx" not in ptx
    assert ".full" not in ptx


FAULTS: Mapping[str, tuple[str, str, str, str]] = {  # fault -> entry, text in the PTX, what replaces it, what it trips
    "fp16 cut off": ("rmsnorm_float16", "cvt.rn.f16.f32", "cvt.rz.f16.f32", "tolerance"),
    "bf16 cut off": ("swiglu_bfloat16", "cvt.rn.bf16.f32", "cvt.rz.bf16.f32", "tolerance"),
    "fp16 rotary cut off": ("rotary_float16_half_table", "cvt.rn.f16.f32", "cvt.rz.f16.f32", "tolerance"),
    "int8 cut off": ("layernorm_quant_float16_int8", "cvt.rni.s32.f32", "cvt.rzi.s32.f32", "tolerance"),
    "sums from the wrong lanes": ("rmsnorm_float32", "shfl.sync.bfly.b32", "shfl.sync.up.b32", "tolerance"),
    "the sine's sign": ("rotary_float32_interleaved_table", "neg.f32", "mov.f32", "tolerance"),
    "no barrier": ("add_rmsnorm_float16", "bar.sync \t0;", "", "race"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_ptx_fails_the_parity_check(fault: str) -> None:
    entry_name, text, replacement, trips = FAULTS[fault]
    name = next(name for name, other in ENTRIES if other == entry_name)
    kernel = load(name)
    entry = kernel.entry(entry_name)
    ptx = ptx_of(kernel, entry)
    assert text in ptx
    scalars, inputs = make_case(entry_name, kernel, 17, 768, 0)
    execution = execute(kernel, entry, scalars, inputs, ptx.replace(text, replacement))
    with np.errstate(invalid="ignore"):
        worst = max(excesses(kernel, entry, scalars, inputs, execution.outputs).values())
    assert trips in (execution.report.kinds if trips != "tolerance" else {"tolerance"} if worst > 1 else set())


def test_a_wrong_epsilon_is_caught_in_small_rows() -> None:
    kernel = load("rmsnorm")
    entry = kernel.entry("rmsnorm_float32")
    inputs: dict[str, Array] = {
        "x": np.random.default_rng(0).normal(0, 1e-3, (3, 768)).astype(np.float32),
        "weight": np.ones(768, np.float32),
    }
    scalars = {"rows": 3, "width": 768, "epsilon_bits": float_bits(1e-6)}
    wrong = execute(kernel, entry, {**scalars, "epsilon_bits": float_bits(1e-5)}, inputs, ptx_of(kernel, entry))
    assert excesses(kernel, entry, scalars, inputs, wrong.outputs)["y"] > 1


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in KERNELS for dtype in load(name).tolerance])
def test_a_tolerance_refuses_a_result_just_beyond_it(name: str, dtype: str) -> None:
    tolerance = load(name).tolerance[dtype]
    value = np.array([1.25, 3.0, 100.0])
    expected = Expected(value=value, largest_term=value, slack=np.zeros(3))
    _, unit = distance(value.astype(DTYPES[dtype]), expected, dtype)
    steps = np.ceil(tolerance.ulps + 0.01)
    assert (tolerance.excess((value + 2 * steps * unit).astype(DTYPES[dtype]), expected, dtype) > 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "toolchain"), TARGETS)
@pytest.mark.parametrize(("name", "entry_name"), ENTRIES)
def test_ptx_parity_for_all_targets_widths_rows_and_scales(
    name: str, entry_name: str, arch: int, toolchain: str
) -> None:
    kernel = load(name)
    entry = kernel.entry(entry_name)
    ptx = ptx_of(kernel, entry, arch, toolchain)
    for width in WIDTHS:
        for rows in ROWS:
            for first_scale in range(0, len(SCALES), rows):  # so that every magnitude occurs
                check(kernel, entry, ptx, rows, width, first_scale)


def covered(cases: Iterable[Sequence[str]]) -> set[tuple[str, str, Hashable]]:
    """Return kernels, input types and forms of output or angles of (kernel, entry)."""
    entries = [(name, load(name).entry(entry_name)) for name, entry_name in cases]
    return {(name, entry.dtype, form(entry)) for name, entry in entries}


def test_make_test_covers_every_kernel_with_every_type_and_every_form() -> None:
    expected = {
        (name, entry.dtype, form(other))
        for name in KERNELS
        for entry, other in itertools.product(load(name).entries, repeat=2)
    }
    assert len(expected) == len(ENTRIES)
    assert covered(selected_cases(test_shipped_ptx_keeps_its_contract)) == expected
    assert covered(ENTRIES[1:]) < expected  # one that is left out is noticed


PER_KERNEL = (
    test_256_rows_of_4096_move_no_more_than_they_must,
    test_kernels_accept_unaligned_array_starts,
    test_no_opcode_is_approximate,
)


def test_make_test_runs_every_other_test_on_every_kernel_and_every_type() -> None:
    for test in PER_KERNEL:
        assert [name for name, _ in selected_cases(test)] == list(KERNELS)
        assert {dtype for _, dtype, _ in covered(selected_cases(test))} == {"float16", "bfloat16", "float32"}
    assert [name for name, _ in selected_cases(test_rows_that_no_block_holds_at_once, 1)] == list(ANY_WIDTH)
