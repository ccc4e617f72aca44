"""What the hardware will execute, counted: spills, registers, the width of loads and stores, contractions, arguments.

The default run takes every second kernel for every architecture, each time another function; the rest is marked slow.
Every gate is shown to catch a violation that was planted.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

from medseg_trt.kernels import KERNELS, load
from medseg_trt.kernels.assemble import Usage, count, opcodes, usage
from medseg_trt.kernels.compile import compile_ptx
from medseg_trt.kernels.kernel import DTYPES, Entry, Kernel, Parameter, pointer, scalar
from medseg_trt.kernels.library import TARGETS, Target
from medseg_trt.kernels.manifest import ptx_parameters

REGISTER_FILE = 65536  # registers of a multiprocessor, from sm_80 to sm_120
MIN_THREADS = 512  # that must fit on a multiprocessor at once: a third of sm_86's, enough to hide the memory's latency
REGISTERS: Mapping[str, int] = {"layernorm_quant": 168}  # holds a whole row of 1024 in the registers of 128 threads
LOCAL = ("LDL", "STL")
WHOLE_STRIPS = ("image_to_tensor", "logits_to_mask")  # take 16 pixels at a time, whatever their type


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """One function on one target."""

    kernel: Kernel
    entry: Entry
    ptx: str
    used: Usage
    opcode_counts: Mapping[str, int]  # opcodes


def build(kernel: Kernel, entry: Entry, target: Target) -> Built:
    ptx = compile_ptx(kernel, entry, target.virtual, target.toolchain)
    return assembled(kernel, entry, ptx, target)


def assembled(kernel: Kernel, entry: Entry, ptx: str, target: Target) -> Built:
    opcode_counts = opcodes(ptx, target.real, target.toolchain)
    used = usage(ptx, target.real, target.toolchain)
    return Built(kernel=kernel, entry=entry, ptx=ptx, used=used, opcode_counts=opcode_counts)


def no_spill(built: Built) -> bool:
    return built.used.spill_bytes == 0


def no_local_memory(built: Built) -> bool:
    return built.used.stack_bytes == 0 and not any(count(built.opcode_counts, name) for name in LOCAL)


def registers_within_budget(built: Built) -> bool:
    budget = REGISTERS.get(built.kernel.name, REGISTER_FILE // MIN_THREADS)
    return built.used.registers <= budget


def loads_of_16_bytes(built: Built) -> bool:
    return count(built.opcode_counts, "LDG", "128") > 0


def store_bits(kernel: Kernel, entry: Entry) -> int:
    """Return how wide the widest store should be: what 16 loaded bytes become, at most 16 bytes."""
    itemsizes = [DTYPES[parameter.dtype].itemsize for parameter in entry.parameters if parameter.direction == "out"]
    lanes = 16 if kernel.name in WHOLE_STRIPS else 16 // DTYPES[entry.dtype].itemsize
    return min(128, 8 * lanes * itemsizes[0])


def widest_stores(built: Built) -> bool:
    bits = store_bits(built.kernel, built.entry)
    return count(built.opcode_counts, "STG", *([] if bits == 32 else [str(bits)])) > 0


def nothing_to_contract(built: Built) -> bool:
    """Say whether every product and sum names its rounding: ptxas may then make no fused one of the two."""
    return re.search(r"\b(mul|add|sub)(\.ftz)?(\.sat)?\.(f32|f64|f16|f16x2|bf16|bf16x2)\b", built.ptx) is None


def arguments_as_declared(built: Built) -> bool:
    return ptx_parameters(built.ptx, built.entry.symbol) == [parameter.kind for parameter in built.entry.parameters]


GATES: Mapping[str, Callable[[Built], bool]] = {
    gate.__name__: gate
    for gate in (
        no_spill,
        no_local_memory,
        registers_within_budget,
        loads_of_16_bytes,
        widest_stores,
        nothing_to_contract,
        arguments_as_declared,
    )
}


def red(built: Built) -> list[str]:
    """Return the gates that a function does not pass."""
    return [name for name, gate in GATES.items() if not gate(built)]


GRID = [
    (target, name, entry.name)
    for target in TARGETS
    for name in KERNELS
    for entry in load(name).entries
    if entry.min_arch <= TARGETS[target].capability
]


def covering() -> list[tuple[str, str, str]]:
    """Return one function of every second kernel for every target, other ones for the next target."""
    chosen: list[tuple[str, str, str]] = []
    for number, target in enumerate(TARGETS):
        for name in list(KERNELS)[number % 2 :: 2]:
            choices = [case for case in GRID if case[:2] == (target, name)]
            if choices:  # sm_75 has the kernels on images alone
                chosen.append(choices[number // 2 * 5 % len(choices)])
    return chosen


COVERING = covering()


def gates_of(case: tuple[str, str, str]) -> list[str]:
    target, name, entry = case
    kernel = load(name)
    return red(build(kernel, kernel.entry(entry), TARGETS[target]))


@pytest.mark.parametrize("case", COVERING, ids="-".join)
def test_every_kernel_passes_the_gates_on_every_architecture(case):
    assert gates_of(case) == []


def fused(ptx: str, target: Target) -> tuple[int, int]:
    """Return the number of FFMA as they are, and where ptxas must not contract."""
    as_it_is, forbidden = (
        count(opcodes(ptx, target.real, target.toolchain, fuse_multiply_add=fuse), "FFMA") for fuse in (True, False)
    )
    return as_it_is, forbidden


@pytest.mark.parametrize("case", [case for case in COVERING if case[0] == "sm_80"], ids="-".join)
def test_no_ffma_is_there_that_the_source_did_not_ask_for(case):
    target, name, entry = case
    kernel, goal = load(name), TARGETS[target]
    ptx = compile_ptx(kernel, kernel.entry(entry), goal.virtual, goal.toolchain)
    as_it_is, forbidden = fused(ptx, goal)
    assert as_it_is == forbidden > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in GRID if case not in COVERING], ids="-".join)
def test_every_function_passes_the_gates_on_every_architecture(case):
    assert gates_of(case) == []


def test_the_selection_covers_every_kernel_every_target_and_several_types():
    assert {target for target, _, _ in COVERING} == set(TARGETS)
    assert {name for _, name, _ in COVERING} == set(KERNELS)
    assert len({entry for _, _, entry in COVERING}) > 2 * len(KERNELS)


# --- the same arguments as a TensorRT plugin passes: input pointers, int32 scalars, output pointers -----------------


def plugin_order(parameters: tuple[Parameter, ...]) -> bool:
    """Say whether arguments stand as TensorRT's ahead-of-time plugins pass them."""
    groups = [
        {("pointer", "in"): 0, ("int32", "in"): 1, ("pointer", "out"): 2}.get((parameter.kind, parameter.direction), 3)
        for parameter in parameters
    ]
    return groups == sorted(groups) and {0, 2} <= set(groups) <= {0, 1, 2}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_parameters_have_the_plugin_order(name):
    assert all(plugin_order(entry.parameters) for entry in load(name).entries)


@pytest.mark.parametrize(
    "parameters",
    [
        (scalar("n"), pointer("x", "float16"), pointer("y", "float16", "out")),
        (pointer("y", "float16", "out"), pointer("x", "float16"), scalar("n")),
        (pointer("x", "float16"), pointer("y", "float16", "out"), scalar("n")),
        (pointer("x", "float16"), scalar("n")),
        (pointer("x", "float16"), dataclasses.replace(scalar("n"), direction="out"), pointer("y", "float16", "out")),
    ],
)
def test_plugin_order_rejects_other_parameter_orders(parameters):
    assert not plugin_order(parameters)


# --- violations, planted in a kernel that passes --------------------------------------------------------------------

TARGET = TARGETS["sm_86"]


def planted(change: Callable[[str], str], tmp_path) -> Built:
    """Build logits_to_mask_float16 from a changed source."""
    kernel = load("logits_to_mask")
    text = kernel.source.read_text()
    changed = change(text)
    assert changed != text
    source = tmp_path / kernel.source.name
    source.write_text(changed)
    kernel = dataclasses.replace(kernel, source=source)
    return build(kernel, kernel.entry("logits_to_mask_float16"), TARGET)


def limit_registers(text: str) -> str:
    return text.replace("__launch_bounds__(128)", "__maxnreg__(32)")  # it uses more


def index_by_variable(text: str) -> str:
    """Make the compiler index an array of registers by a variable: the array then lies in local memory."""
    return re.sub(r"#pragma unroll\n(\s+)for \(int k", r"#pragma unroll 1\n\1for (int k", text)


def load_one_by_one(text: str) -> str:
    """Lose the alignment: read the logits one at a time."""
    return text.replace(
        "const uint4 word = *reinterpret_cast<const uint4*>(logits + start);\n            SCALAR values[GROUP];\n"
        "            memcpy(values, &word, 16);",
        "SCALAR values[GROUP];\n#pragma unroll\n"
        "            for (int k = 0; k < GROUP; ++k) values[k] = logits[start + k];",
    )


def store_one_by_one(text: str) -> str:
    return text.replace(
        "*reinterpret_cast<uint4*>(to + pixel) = labels_of(picture + pixel, classes, plane);",
        "{ uint4 labels = labels_of(picture + pixel, classes, plane); for (int k = 0; k < 16; ++k) "
        "to[pixel + k] = reinterpret_cast<unsigned char*>(&labels)[k]; }",
    )


def another_argument(text: str) -> str:
    return text.replace("int batch, int classes", "long batch, int classes")


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (index_by_variable, "no_local_memory"),
        (limit_registers, "no_spill"),
        (load_one_by_one, "loads_of_16_bytes"),
        (store_one_by_one, "widest_stores"),
        (another_argument, "arguments_as_declared"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_violation_in_the_source_is_caught(change, gate, tmp_path):
    assert gate in red(planted(change, tmp_path))


def test_products_and_sums_that_ptxas_may_contract_are_caught():
    kernel = load("logits_to_mask")
    entry = kernel.entry("logits_to_mask_float16")
    ptx = compile_ptx(kernel, entry, TARGET.virtual)
    loose = ptx.replace("mul.rn.f32", "mul.f32").replace("add.rn.f32", "add.f32")
    assert loose != ptx
    assert red(assembled(kernel, entry, loose, TARGET)) == ["nothing_to_contract"]
    as_it_is, forbidden = fused(loose, TARGET)
    assert as_it_is > forbidden


def test_register_gate_rejects_129_registers():
    kernel = load("logits_to_mask")
    good = build(kernel, kernel.entry("logits_to_mask_float16"), TARGET)
    assert red(good) == []
    greedy = dataclasses.replace(good, used=dataclasses.replace(good.used, registers=129))
    assert red(greedy) == ["registers_within_budget"]
