"""Every checker finds the fault that it is for, in the smallest PTX that has it, and nothing in the PTX without."""

import re
from collections.abc import Mapping

import numpy as np
import pytest
from gpu_free.report import KINDS
from gpu_free.snippets import run

STORE = "st.global.u32 [%d5], %r0;"
LOAD = "ld.global.u32 %r1, [%d4];"
HALF = "setp.lt.u32 %p1, %r0, 32;"
NEIGHBOUR = "xor.b32 %r2, %r0, 32; mul.wide.u32 %d8, %r2, 4; add.s64 %d8, %d8, %d6;"  # of the other warp
LANE_BESIDE = "xor.b32 %r2, %r0, 1; mul.wide.u32 %d8, %r2, 4; add.s64 %d8, %d8, %d6;"
SHUFFLE = "shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;"

# fault -> the finding's kind, a body that has it, the same body without it; 64 threads, 64 numbers in and out
FAULTS: Mapping[str, tuple[str, str, str]] = {
    "read of another warp's shared value without a barrier": (
        "race",
        f"st.shared.u32 [%d7], %r0; {NEIGHBOUR} ld.shared.u32 %r3, [%d8]; {STORE}",
        f"st.shared.u32 [%d7], %r0; bar.sync 0; {NEIGHBOUR} ld.shared.u32 %r3, [%d8]; {STORE}",
    ),
    "shared memory used again without a barrier": (
        "race",
        f"st.shared.u32 [%d7], %r0; bar.sync 0; {NEIGHBOUR} ld.shared.u32 %r3, [%d8]; "
        f"st.shared.u32 [%d7], %r3; {STORE}",
        f"st.shared.u32 [%d7], %r0; bar.sync 0; {NEIGHBOUR} ld.shared.u32 %r3, [%d8]; bar.sync 0; "
        f"st.shared.u32 [%d7], %r3; {STORE}",
    ),
    "read of another lane's shared value in the same warp": (
        "race",
        f"st.shared.u32 [%d7], %r0; {LANE_BESIDE} ld.shared.u32 %r3, [%d8]; {STORE}",
        f"st.shared.u32 [%d7], %r0; bar.warp.sync -1; {LANE_BESIDE} ld.shared.u32 %r3, [%d8]; {STORE}",
    ),
    "a shuffle taken for a barrier of memory": (
        "race",
        f"st.shared.u32 [%d7], %r0; {SHUFFLE} {LANE_BESIDE} ld.shared.u32 %r3, [%d8]; {STORE}",
        f"st.shared.u32 [%d7], %r0; {SHUFFLE} bar.warp.sync -1; {LANE_BESIDE} ld.shared.u32 %r3, [%d8]; {STORE}",
    ),
    "a warp's barrier taken for a block's": (
        "race",
        f"st.shared.u32 [%d7], %r0; bar.warp.sync -1; {NEIGHBOUR} ld.shared.u32 %r3, [%d8]; {STORE}",
        f"st.shared.u32 [%d7], %r0; bar.sync 0; {NEIGHBOUR} ld.shared.u32 %r3, [%d8]; {STORE}",
    ),
    "all threads write one shared word": (
        "race",
        f"st.shared.u32 [scratch], %r0; {STORE}",
        f"setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [scratch], %r0; {STORE}",
    ),
    "bytes of one word, and the word": (
        "race",
        f"cvt.u16.u32 %h1, %r0; st.shared.u32 [%d7], %r0; {NEIGHBOUR} ld.shared.u8 %h2, [%d8+3]; {STORE}",
        f"cvt.u16.u32 %h1, %r0; st.shared.u32 [%d7], %r0; ld.shared.u8 %h2, [%d7+3]; {STORE}",
    ),
    "all threads write one element of the output": ("race", f"{STORE} st.global.u32 [%d2], %r0;", STORE),
    "the output read where another thread wrote it": (
        "race",
        f"{STORE} xor.b32 %r2, %r0, 32; mul.wide.u32 %d8, %r2, 4; add.s64 %d8, %d8, %d2; ld.global.u32 %r3, [%d8];",
        f"{STORE} bar.sync 0; xor.b32 %r2, %r0, 32; mul.wide.u32 %d8, %r2, 4; add.s64 %d8, %d8, %d2; "
        "ld.global.u32 %r3, [%d8];",
    ),
    "the output written after another thread read it": (
        "race",
        f"{STORE} bar.sync 0; xor.b32 %r2, %r0, 32; mul.wide.u32 %d8, %r2, 4; add.s64 %d8, %d8, %d2; "
        f"ld.global.u32 %r3, [%d8]; {STORE}",
        f"{STORE} bar.sync 0; xor.b32 %r2, %r0, 32; mul.wide.u32 %d8, %r2, 4; add.s64 %d8, %d8, %d2; "
        f"ld.global.u32 %r3, [%d8]; bar.sync 0; {STORE}",
    ),
    "one element past the end": (
        "out_of_bounds",
        f"{STORE} ld.global.u32 %r1, [%d4+4];",
        f"{STORE} setp.lt.u32 %p1, %r0, 63; @%p1 ld.global.u32 %r1, [%d4+4];",
    ),
    "one element before the beginning": ("out_of_bounds", f"{STORE} ld.global.u32 %r1, [%d4+-4];", f"{STORE} {LOAD}"),
    "a store past the end": ("out_of_bounds", f"{STORE} st.global.u32 [%d5+256], %r0;", STORE),
    "a vector across the end": (
        "out_of_bounds",
        f"{STORE} ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%d1+256];",
        f"{STORE} ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%d1+240];",
    ),
    "an address of no array": (
        "out_of_bounds",
        f"{STORE} mov.u64 %d8, 64; ld.global.u32 %r1, [%d8];",
        f"{STORE} {LOAD}",
    ),
    "past the end of shared memory": (
        "out_of_bounds",
        f"st.shared.u32 [%d7+4], %r0; {STORE}",
        f"st.shared.u32 [%d7], %r0; {STORE}",
    ),
    "a vector off its boundary": (
        "misaligned",
        f"{STORE} ld.global.v2.u32 {{%r1, %r2}}, [%d1+4];",
        f"{STORE} ld.global.v2.u32 {{%r1, %r2}}, [%d1+8];",
    ),
    "a shared word off its boundary": (
        "misaligned",
        f"setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [scratch+2], %r0; {STORE}",
        f"setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [scratch+4], %r0; {STORE}",
    ),
    "a barrier in one half of a block": (
        "divergent_barrier",
        f"{STORE} {HALF} @%p1 bra first; bar.sync 0; bra.uni end; first: bar.sync 0; end:",
        f"{STORE} {HALF} @%p1 bra first; first: bar.sync 0;",
    ),
    "a barrier that some threads leave out": (
        "divergent_barrier",
        f"{STORE} {HALF} @%p1 bra end; bar.sync 0; end:",
        f"{STORE} {HALF} @%p1 bra end; end: bar.sync 0;",
    ),
    "a mask with lanes that have gone elsewhere": (
        "shuffle",
        f"{STORE} setp.lt.u32 %p1, %r0, 8; @%p1 bra end; shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1; end:",
        f"{STORE} setp.lt.u32 %p1, %r0, 8; @%p1 bra end; end: shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;",
    ),
    "a mask without the lanes that call": (
        "shuffle",
        f"{STORE} shfl.sync.bfly.b32 %r3, %r0, 1, 31, 0x0000ffff;",
        f"{STORE} setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r3, %r0, 1, 31, 0x0000ffff;",
    ),
    "a value from a lane that has left": (
        "shuffle",
        f"{STORE} setp.eq.u32 %p1, %r0, 1; @%p1 ret; {SHUFFLE}",
        f"{STORE} {SHUFFLE}",
    ),
    "masks that differ": (
        "shuffle",
        f"{STORE} mov.u32 %r4, -1; setp.eq.u32 %p1, %r0, 0; @%p1 mov.u32 %r4, 0x7fffffff; "
        "shfl.sync.bfly.b32 %r3, %r0, 1, 31, %r4;",
        f"{STORE} mov.u32 %r4, -1; shfl.sync.bfly.b32 %r3, %r0, 1, 31, %r4;",
    ),
    "a register never written": (
        "uninitialised_read",
        "st.global.u32 [%d5], %r9;",
        "mov.u32 %r9, 7; st.global.u32 [%d5], %r9;",
    ),
    "a register written in some threads": (
        "uninitialised_read",
        f"{HALF} @%p1 mov.u32 %r9, 7; st.global.u32 [%d5], %r9;",
        f"{HALF} @%p1 mov.u32 %r9, 7; @!%p1 mov.u32 %r9, 8; st.global.u32 [%d5], %r9;",
    ),
    "shared memory never written": (
        "uninitialised_read",
        f"ld.shared.u32 %r1, [%d7]; {STORE}",
        f"st.shared.u32 [%d7], %r0; ld.shared.u32 %r1, [%d7]; {STORE}",
    ),
    "the output read before it is written": (
        "uninitialised_read",
        f"ld.global.u32 %r1, [%d5]; {STORE}",
        f"{STORE} ld.global.u32 %r1, [%d5];",
    ),
    "an element of the output left out": ("unwritten_output", f"{HALF} @%p1 {STORE}", STORE),
    "a store into an input": ("write_to_input", f"{STORE} st.global.u32 [%d4], %r0;", STORE),
    "the read-only cache in front of an output": (
        "stale_read",
        f"{STORE} ld.global.nc.u32 %r1, [%d5];",
        f"{STORE} ld.global.u32 %r1, [%d5];",
    ),
}


def findings(body: str) -> set[str]:
    lines = re.sub(r"; |: (?=\w)", lambda match: match[0].strip() + "\n", body)
    return run(lines, np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)).kinds


@pytest.mark.parametrize("fault", FAULTS)
def test_checker_reports_the_planted_fault(fault: str) -> None:
    kind, body, _ = FAULTS[fault]
    assert findings(body) == {kind}


@pytest.mark.parametrize("fault", FAULTS)
def test_checker_reports_nothing_for_correct_ptx(fault: str) -> None:
    _, _, body = FAULTS[fault]
    assert findings(body) == set()


def test_every_kind_of_finding_has_a_fault() -> None:
    assert {kind for kind, _, _ in FAULTS.values()} == set(KINDS) - {"launch"}


def test_too_many_threads_are_a_finding() -> None:
    from gpu_free.machine import Argument, run_ptx
    from gpu_free.snippets import HEAD

    text = HEAD.replace(")\n{", ")\n.maxntid 32, 1, 1\n{") + STORE + "ret;\n}\n"
    for threads, expected in ((64, {"launch"}), (32, set())):
        arrays = [Argument("source", np.zeros(64, np.uint32)), Argument("target", np.zeros(threads, np.uint32), True)]
        assert run_ptx(text, "kernel", (1, 1, 1), (threads, 1, 1), arrays).kinds == expected


def test_blocks_that_write_the_same_element_are_a_race_in_one_batch_and_in_two() -> None:
    for lanes in (64, 1 << 16):
        report = run(STORE, np.zeros(64, np.uint32), np.zeros(64, np.uint32), blocks=2, lanes_at_once=lanes)
        assert report.kinds == {"race"}


def test_finding_names_the_instruction_the_count_and_the_address() -> None:
    report = run(f"{STORE}\nld.global.u32 %r1, [%d4+4];", np.zeros(64, np.uint32), np.zeros(64, np.uint32))
    (finding,) = report.findings
    assert finding.instruction == "ld.global.u32 %r1, [%d4+4]"
    assert finding.count == 1
    assert "4 bytes at offset 256 of source, which has 256" in finding.example
