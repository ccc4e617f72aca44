"""The checks that a kernel has to pass without a GPU, each by its name, so that a broken kernel can be shown to fail.

A check takes a kernel and one of its entries, and returns what is wrong with them, or "". The sound kernel, beside it,
is what traffic is compared with.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from gpu_free.execute import Execution, excesses, execute, ptx_of
from gpu_free.host.cases import cases
from gpu_free.host.host import ORDERS, Case, Finding, run, shared_builder

from medseg_trt.kernels.assemble import count, opcodes, usage
from medseg_trt.kernels.kernel import DTYPES, Array, Entry, Kernel, float_bits

ARCH = "sm_80"  # or the oldest that the entry runs on
MORE_BYTES = 1.01  # of what the sound kernel moves
Check = Callable[[Kernel, Entry, Kernel], str]


def same(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    """Say whether all bits are equal; one NaN is as good as another, whose bits C++ leaves open."""
    return all(
        np.array_equal(np.isnan(first[name]), np.isnan(second[name]))
        and np.array_equal(bits(first[name])[~np.isnan(first[name])], bits(second[name])[~np.isnan(first[name])])
        for name in first
    )


def bits(values: Array) -> Array:
    return values.view(f"u{values.dtype.itemsize}")


def host(kernel: Kernel, entry: Entry, sound: Kernel) -> str:
    """Run under AddressSanitizer and UndefinedBehaviorSanitizer in three orders: findings, differences, tolerance."""
    return _on_the_host(kernel, entry, cases(sound, entry), "address")


def unaligned(kernel: Kernel, entry: Entry, sound: Kernel) -> str:
    """Do the same with every array in turn one element off the boundary that vector accesses need."""
    moved = [
        Case(inputs=case.inputs, scalars=case.scalars, offsets={parameter.name: DTYPES[parameter.dtype].itemsize})
        for case in cases(sound, entry)[:2]
        for parameter in entry.parameters
        if parameter.kind == "pointer"
    ]
    return _on_the_host(kernel, entry, moved, "address", ORDERS[:1])


def threads(kernel: Kernel, entry: Entry, sound: Kernel) -> str:
    """Run under ThreadSanitizer in three orders."""
    return _on_the_host(kernel, entry, cases(sound, entry), "thread")


def ptx(kernel: Kernel, entry: Entry, sound: Kernel) -> str:
    """Run the PTX: the interpreter's checkers, and tolerance."""
    text = ptx_of(kernel, entry)
    for case in cases(sound, entry):
        executed = execute(kernel, entry, case.scalars, case.inputs, text)
        if executed.report.findings:
            return str(executed.report.findings[0])
        if wrong := _beyond_tolerance(kernel, entry, case, executed.outputs):
            return wrong
    return ""


def traffic(kernel: Kernel, entry: Entry, sound: Kernel) -> str:
    """Count what the PTX moves where vector accesses are possible; the sound kernel moves no more in wider accesses."""
    before, after = (_moved(variant, entry, sound) for variant in (sound, kernel))
    for table, expected in ((after.report.loads, before.report.loads), (after.report.stores, before.report.stores)):
        for array, accesses in table.items():
            if max(accesses.widths) < max(expected[array].widths):
                return f"{array} moves {max(accesses.widths)} bytes an access, not {max(expected[array].widths)}"
            if accesses.sectors > MORE_BYTES * expected[array].sectors:
                return f"{array} touches {accesses.sectors} sectors, not {expected[array].sectors}"
    moved, least = after.report.moved_bytes, before.report.moved_bytes
    return f"{moved} bytes move, not {least}" if moved > MORE_BYTES * least else ""


def static(kernel: Kernel, entry: Entry, sound: Kernel) -> str:
    """Assemble the PTX: no register is spilt, no array lies in local memory, and 16-byte accesses are there."""
    arch = f"sm_{max(entry.min_arch, int(ARCH[3:]))}"
    text = ptx_of(kernel, entry)
    used, opcode_counts = usage(text, arch), opcodes(text, arch)
    if used.stack_bytes or used.spill_bytes:
        return f"{used.stack_bytes} bytes of local memory a thread, {used.spill_bytes} of spills"
    wide = {name: count(opcode_counts, name, "128") for name in ("LDG", "STG")}
    expected = {name: count(opcodes(ptx_of(sound, entry), arch), name, "128") for name in wide}
    lost = [name for name in wide if wide[name] < expected[name]]
    return f"{wide[lost[0]]} {lost[0]}.128, not {expected[lost[0]]}" if lost else ""


def ties(kernel: Kernel, entry: Entry, sound: Kernel) -> str:
    """Give inputs whose exact results are ties; the tolerance has to let those pass, the contract does not."""
    case, expected = TIES[sound.name](entry)
    try:
        ((outputs,),) = run(shared_builder().program(kernel, entry, "address"), kernel, entry, [case], ORDERS[:1])
    except Finding as finding:
        return str(finding)
    wrong = int((outputs[expected[0]] != expected[1]).sum())
    return f"{wrong} of {expected[1].size} ties go the wrong way" if wrong else ""


CHECKS: Mapping[str, Check] = {
    "host": host,
    "unaligned": unaligned,
    "threads": threads,
    "ptx": ptx,
    "traffic": traffic,
    "static": static,
    "ties": ties,
}


def _half_steps(entry: Entry) -> tuple[Case, tuple[str, Array]]:
    """SwiGLU of a gate so large that SiLU leaves it: gate · up is k + 1/2 exactly, at a scale of 1."""
    steps = np.arange(-100, 100)
    gate_up = np.stack([np.full(len(steps), 128.0), (steps + 0.5) / 128]).reshape(1, -1).astype(DTYPES[entry.dtype])
    scalars = {"rows": 1, "width": len(steps), "scale_bits": float_bits(1.0)}
    even = np.where(steps % 2 == 0, steps, steps + 1).astype(np.int8).reshape(1, -1)
    return Case(inputs={"gate_up": gate_up}, scalars=scalars), ("y", even)


def _equal_logits(entry: Entry) -> tuple[Case, tuple[str, Array]]:
    """Logits that are all equal belong to the first class."""
    numbers = {"batch": 1, "classes": 3}
    sizes = dict.fromkeys(("image_height", "image_width", "resampled_height", "resampled_width"), 16)
    scalars = {**numbers, **sizes, "height": 16, "width": 16}
    logits = np.full((1, 3, 16, 16), 0.75, DTYPES[entry.dtype])
    return Case(inputs={"logits": logits}, scalars=scalars), ("mask", np.zeros((1, 16, 16), np.uint8))


TIES: Mapping[str, Callable[[Entry], tuple[Case, tuple[str, Array]]]] = {
    "swiglu": _half_steps,
    "logits_to_mask": _equal_logits,
}


def _on_the_host(
    kernel: Kernel, entry: Entry, launches: Sequence[Case], sanitizer: str, orders: Sequence[int] = ORDERS
) -> str:
    try:
        first, *others = run(shared_builder().program(kernel, entry, sanitizer), kernel, entry, launches, orders)
    except Finding as finding:
        return str(finding)
    for number, case in enumerate(launches):
        if not all(same(first[number], other[number]) for other in others):
            return "the result depends on the order of threads, or is not written"
        if wrong := _beyond_tolerance(kernel, entry, case, first[number]):
            return wrong
    return ""


def _beyond_tolerance(kernel: Kernel, entry: Entry, case: Case, outputs: Mapping[str, Array]) -> str:
    with np.errstate(invalid="ignore", over="ignore"):
        worst = excesses(kernel, entry, case.scalars, case.inputs, outputs)
    name = max(worst, key=worst.__getitem__)
    return f"{name} is off by {worst[name]:.3g} times its tolerance" if worst[name] > 1 else ""


VECTOR_CASE: Mapping[str, int] = {"rmsnorm": 1, "add_rmsnorm": 1, "layernorm_quant": 1, "swiglu": 1}  # else the first


def _moved(kernel: Kernel, entry: Entry, sound: Kernel) -> Execution:
    case = cases(sound, entry)[VECTOR_CASE.get(sound.name, 0)]
    return execute(kernel, entry, case.scalars, case.inputs, ptx_of(kernel, entry))
