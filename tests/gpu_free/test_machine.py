"""Loads, stores, moves, shuffles, branches and barriers: in short PTX, against NumPy."""

from collections.abc import Mapping

import numpy as np
import pytest
from gpu_free.machine import ADDRESS_CASTS, BARRIERS, BRANCHES, EXITS, MOVES, Argument, run_ptx
from gpu_free.ptx import PtxError
from gpu_free.snippets import HEAD, run
from gpu_free.spaces import ACCESSES
from gpu_free.warps import SHUFFLES

THREADS = 64
LOADS = [name for name, access in ACCESSES.items() if access.is_load and access.space != "param"]
STORES = [name for name, access in ACCESSES.items() if not access.is_load]
PREFIX = {8: "h", 16: "h", 32: "r", 64: "d"}  # of the narrowest register that holds so many bits


def clean(body: str, source: np.ndarray, target: np.ndarray, **options: int) -> np.ndarray:
    """Run without findings and return the result."""
    report = run(body, source, target, **options)
    assert not report.findings, [str(finding) for finding in report.findings]
    return target


def registers(bits: int, count: int, first: int = 9) -> str:
    names = ", ".join(f"%{PREFIX[bits]}{number}" for number in range(first, first + count))
    return f"{{{names}}}" if count > 1 else names


def declared(bits: int) -> str:
    return f".reg .b{max(bits, 16)} %{PREFIX[bits]}<19>;"


def copy_kernel(load: str, store: str, bits: int, count: int, space: str) -> str:
    """Return a kernel that copies an element or vector for each thread, by way of another space if one is named."""
    width, values = bits // 8 * count, registers(bits, count)
    first_load = f"ld.global{'.v' + str(count) if count > 1 else ''}.b{bits}"
    last_store = f"st.global{'.v' + str(count) if count > 1 else ''}.b{bits}"
    by_way = {
        "global": "",
        "shared": f".shared .align 16 .b8 place[{THREADS * width}]; ",
        "local": f".local .align 16 .b8 place[{width}];",
    }[space]
    moves = {
        "global": f"{load} {values}, [%d16]; {store} [%d17], {values};",
        "shared": f"mov.u64 %d18, place; add.s64 %d18, %d18, %d15; {first_load} {values}, [%d16]; "
        f"{store} [%d18], {values}; {load} {values}, [%d18]; {last_store} [%d17], {values};",
    }
    moves["local"] = moves["shared"].replace("add.s64 %d18, %d18, %d15;", "")
    text = f"{{ {declared(bits)} .reg .b64 %d<19>; .reg .b32 %r<2>; {by_way} mov.u32 %r0, %tid.x; "
    text += f"mul.wide.u32 %d15, %r0, {width}; ld.param.u64 %d1, [kernel_param_0]; ld.param.u64 %d2, [kernel_param_1]; "
    return text + f"add.s64 %d16, %d1, %d15; add.s64 %d17, %d2, %d15; {moves[space]} }}"


@pytest.mark.parametrize("space", ["global", "shared", "local"])
def test_loads_and_stores_of_every_type_and_width_copy_bytes(space: str) -> None:
    for name in (name for name in (*LOADS, *STORES) if ACCESSES[name].space == space):
        access = ACCESSES[name]
        vector = f".v{access.count}" if access.count > 1 else ""
        other = f"{'st' if access.is_load else 'ld'}.{space}{vector}.b{access.bits}"
        load, store = (name, other) if access.is_load else (other, name)
        body = copy_kernel(load, store, access.bits, access.count, space)
        body = body.replace("place", f"place_{space}") if space != "global" else body
        source = np.random.default_rng(0).integers(0, 256, THREADS * access.width, np.uint8)
        np.testing.assert_array_equal(clean(body, source, np.zeros_like(source)), source, name)


def test_a_narrow_load_is_extended_by_its_sign() -> None:
    source = np.arange(-32, 32, dtype=np.int8).repeat(4)
    for kind, dtype in (("s8", np.int8), ("u8", np.uint8)):
        target = np.zeros(64, np.int32)
        clean(f"ld.global.{kind} %r9, [%d4]; st.global.u32 [%d5], %r9;", source, target)
        np.testing.assert_array_equal(target, source[::4].view(dtype).astype(np.int32))


def test_parameters_of_every_type_are_read() -> None:
    head = HEAD.replace(".param .u64 kernel_param_1", ".param .u64 kernel_param_1, .param .u32 number")
    for name in (name for name, access in ACCESSES.items() if access.space == "param"):
        width, target = ACCESSES[name].width, np.zeros(64, np.uint32)
        body = f"{name} %r9, [number]; st.global.u32 [%d5], %r9;"
        if width == 8:
            body = f"{name} %d9, [kernel_param_1]; add.s64 %d9, %d9, %d3; st.global.u32 [%d9], 0x12345678;"
        arrays = [Argument("source", np.zeros(64, np.uint32)), Argument("target", target, True), 0x12345678]
        run_ptx(head + body + " ret; }", "kernel", (1, 1, 1), (64, 1, 1), arrays)
        assert (target == 0x12345678 % (1 << 8 * min(width, 4))).all(), name


def test_moves_of_every_type_copy_registers() -> None:
    source = np.random.default_rng(0).integers(0, 1 << 32, 64, np.uint64).astype(np.uint32)
    for name in MOVES:
        kind = name.partition(".")[2]
        letter = {"pred": "p", "16": "h", "32": "r", "64": "d"}[kind if kind == "pred" else kind[1:]]
        read = "setp.ne.u32 %p1, %r1, 0;" if letter == "p" else f"cvt.u{kind[1:]}.u32 %{letter}9, %r1;"
        read = "mov.b32 %r9, %r1;" if letter == "r" else read
        out = "selp.u32 %r3, 1, 0, %p2;" if letter == "p" else f"cvt.u32.u{kind[1:]} %r3, %{letter}10;"
        out = "mov.b32 %r3, %r10;" if letter == "r" else out
        names = ("%p2", "%p1") if letter == "p" else (f"%{letter}10", f"%{letter}9")
        body = f"{{ .reg .b16 %h<19>; ld.global.u32 %r1, [%d4]; {read} {name} {names[0]}, {names[1]}; {out} "
        expected = (source != 0).astype(np.uint32) if letter == "p" else source & 0xFFFF if letter == "h" else source
        np.testing.assert_array_equal(
            clean(body + "st.global.u32 [%d5], %r3; }", source, np.zeros_like(source)), expected
        )


def test_moves_pack_and_unpack_vectors() -> None:
    source = np.random.default_rng(0).integers(0, 1 << 32, 64, np.uint64).astype(np.uint32)
    body = "ld.global.u32 %r1, [%d4]; mov.b32 {%h1, %h2}, %r1; mov.b32 %r2, {%h2, %h1}; mov.b64 %d8, {%r2, %r1};"
    body += "mov.b64 {%r3, _}, %d8; st.global.u32 [%d5], %r3;"
    np.testing.assert_array_equal(clean(body, source, np.zeros_like(source)), source << 16 | source >> 16)


def test_address_casts_keep_addresses() -> None:
    for name in ADDRESS_CASTS:
        target = np.zeros(64, np.uint32)
        clean(f"{name} %d8, %d5; st.global.u32 [%d8], %r0;", np.zeros(64, np.uint32), target)
        np.testing.assert_array_equal(target, np.arange(64))


LANE = np.arange(32)
SHUFFLED: Mapping[str, tuple[str, np.ndarray]] = {  # mode -> operands b and c, the lane each lane reads
    "bfly": ("3, 31", LANE ^ 3),
    "up": ("5, 0", np.where(LANE >= 5, LANE - 5, LANE)),
    "down": ("5, 31", np.where(LANE + 5 < 32, LANE + 5, LANE)),
    "idx": ("7, 31", np.full(32, 7)),
}


@pytest.mark.parametrize("name", sorted(SHUFFLES))
def test_shuffles_read_the_lane_that_ptx_names(name: str) -> None:
    operands, lanes = SHUFFLED[name.split(".")[2]]
    source = np.arange(64, dtype=np.uint32) * 10
    body = f"ld.global.u32 %r1, [%d4]; {name} %r2, %r1, {operands}, -1; st.global.u32 [%d5], %r2;"
    expected = np.concatenate([source[lanes], source[32 + lanes]])
    np.testing.assert_array_equal(clean(body, source, np.zeros_like(source)), expected)
    body = body.replace("%r2, %r1", "%r2|%p1, %r1").replace("[%d5], %r2", "[%d5], %r3")
    body = body.replace("st.global", "selp.u32 %r3, 1, 0, %p1; st.global")
    in_range = {"up": lanes != LANE, "down": lanes != LANE}.get(name.split(".")[2], np.ones(32, bool))
    np.testing.assert_array_equal(clean(body, source, np.zeros_like(source)), np.tile(in_range, 2))


def test_a_shuffle_in_segments_stays_in_its_segment() -> None:
    body = "shfl.sync.down.b32 %r2, %r0, 1, 6151, -1; st.global.u32 [%d5], %r2;"  # 6151: segments of eight lanes
    expected = np.where(np.arange(64) % 8 < 7, np.arange(64) + 1, np.arange(64))
    np.testing.assert_array_equal(clean(body, np.zeros(64, np.uint32), np.zeros(64, np.uint32)), expected)


def test_half_a_warp_may_shuffle_by_itself() -> None:
    body = "and.b32 %r4, %r0, 16; setp.ne.s32 %p1, %r4, 0; mov.u32 %r3, %r0; "
    body += "@%p1 shfl.sync.bfly.b32 %r3, %r0, 1, 31, 0xffff0000; st.global.u32 [%d5], %r3;"
    lane = np.arange(64)
    np.testing.assert_array_equal(
        clean(body, np.zeros(64, np.uint32), np.zeros(64, np.uint32)), np.where(lane & 16, lane ^ 1, lane)
    )


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("leave", EXITS)
def test_divergent_loops_reconverge_before_a_shuffle(branch: str, leave: str) -> None:
    body = f"""
	mov.u32 %r1, 0;
	mov.u32 %r2, 0;
again:
	setp.ge.u32 %p1, %r1, %r0;
	@%p1 {branch} done;
	add.u32 %r1, %r1, 1;
	add.u32 %r2, %r2, %r1;
	{branch} again;
done:
	shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
	st.global.u32 [%d5], %r3;
	{leave};"""
    sums = np.arange(64) * (np.arange(64) + 1) // 2
    target = clean(body, np.zeros(64, np.uint32), np.zeros(64, np.uint32))
    np.testing.assert_array_equal(target, sums[np.arange(64) ^ 1])


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_barrier_orders_shared_memory(barrier: str) -> None:
    body = f"st.shared.u32 [%d7], %r0; {barrier} 0; xor.b32 %r2, %r0, 63; mul.wide.u32 %d8, %r2, 4; "
    body += "add.s64 %d8, %d8, %d6; ld.shared.u32 %r3, [%d8]; st.global.u32 [%d5], %r3;"
    target = clean(body, np.zeros(64, np.uint32), np.zeros(64, np.uint32))
    np.testing.assert_array_equal(target, np.arange(64)[::-1])


def test_lanes_of_a_shuffle_wait_for_each_other_where_the_code_is_out_of_order() -> None:
    """The lower half comes to the shuffle by a way that lies behind it in the program."""
    body = """
	setp.lt.u32 %p1, %r0, 16;
	mov.u32 %r1, %r0;
	@%p1 bra behind;
here:
	shfl.sync.bfly.b32 %r3, %r1, 16, 31, -1;
	st.global.u32 [%d5], %r3;
	ret;
behind:
	add.u32 %r1, %r1, 100;
	bra.uni here;"""
    target = clean(body, np.zeros(32, np.uint32), np.zeros(32, np.uint32), threads=32)
    lane = np.arange(32)
    np.testing.assert_array_equal(target, np.where(lane < 16, lane + 16, lane - 16 + 100))


def test_places_in_the_grid_and_batches_of_blocks() -> None:
    text = (
        HEAD
        + """
	mov.u32 %r1, %tid.y; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %r0;
	mov.u32 %r4, %ctaid.y; mov.u32 %r5, %nctaid.x; mov.u32 %r6, %ctaid.x; mad.lo.u32 %r7, %r4, %r5, %r6;
	mul.lo.u32 %r8, %r7, 24; add.u32 %r9, %r8, %r3;
	mul.wide.u32 %d8, %r9, 4; add.s64 %d9, %d2, %d8; st.global.u32 [%d9], %r9; ret; }"""
    )
    for lanes_at_once in (1, 64, 1 << 16):
        target = np.zeros(6 * 24, np.uint32)
        arrays = [Argument("source", np.zeros(1, np.uint32)), Argument("target", target, True)]
        report = run_ptx(text, "kernel", (3, 2, 1), (8, 3, 1), arrays, lanes_at_once=lanes_at_once)
        assert not report.findings
        np.testing.assert_array_equal(target, np.arange(6 * 24))


def test_scopes_have_registers_of_their_own() -> None:
    body = "{ .reg .b16 low, high; mov.b32 {low, high}, %r0; mov.b32 %r1, {low, high}; } "
    body += "{ .reg .b32 low; mov.u32 low, 5; add.u32 %r1, %r1, low; } st.global.u32 [%d5], %r1;"
    target = clean(body, np.zeros(64, np.uint32), np.zeros(64, np.uint32))
    np.testing.assert_array_equal(target, np.arange(64) + 5)


def test_traffic_is_counted_by_warp() -> None:
    load = "ld.global.u32 %r1, [%d4]; ld.global.u32 %r2, [%d1]; st.global.u32 [%d5], %r1;"
    report = run(load, np.zeros(64, np.uint32), np.zeros(64, np.uint32))
    loads, stores = report.loads["source"], report.stores["target"]
    assert loads.widths == {4: 128}
    assert loads.requested_bytes == 64 * 4 + 2 * 4  # each warp asks once for the element that all lanes want
    assert (loads.distinct_bytes, loads.sectors, loads.ideal_sectors) == (256, 8 + 2, 8 + 2)
    assert (stores.moved_bytes, stores.sectors) == (256, 8)
    strided = "mul.wide.u32 %d8, %r0, 32; add.s64 %d8, %d8, %d1; ld.global.u32 %r1, [%d8]; st.global.u32 [%d5], %r1;"
    report = run(strided, np.zeros(64 * 8, np.uint32), np.zeros(64, np.uint32))
    assert (report.loads["source"].sectors, report.loads["source"].ideal_sectors) == (64, 8)


def test_what_several_blocks_read_moves_once_and_what_a_block_reads_twice_moves_twice() -> None:
    where = "mov.u32 %r1, %ctaid.x; mul.wide.u32 %d8, %r1, 256; add.s64 %d9, %d5, %d8; st.global.u32 [%d9], %r0; "
    report = run(where + "ld.global.u32 %r2, [%d4];", np.zeros(64, np.uint32), np.zeros(128, np.uint32), blocks=2)
    assert report.loads["source"].moved_bytes == 256
    own = where + "add.s64 %d10, %d4, %d8; ld.global.u32 %r2, [%d10]; ld.global.u32 %r2, [%d10];"
    report = run(own, np.zeros(128, np.uint32), np.zeros(128, np.uint32), blocks=2)
    assert report.loads["source"].moved_bytes == 2 * 512


UNKNOWN: Mapping[str, tuple[str, str]] = {  # what -> a body, what the error names
    "opcode": ("frobnicate.b32 %r1, %r0;", "unknown opcode frobnicate.b32"),
    "modifier": ("add.rn.sparkling.f32 %f1, %f1, %f1;", "unknown opcode add.rn.sparkling.f32"),
    "type": ("add.u32 %d8, %r0, 1;", "%d8 holds no u32"),
    "operand": ("add.u32 %r1, %q7, 1;", "unknown operand: %q7"),
    "label": ("bra nowhere;", "nowhere is declared nowhere"),
    "directive": (".frobnicate 7;", "unknown directive: .frobnicate 7"),
    "address": ("ld.global.u32 %r1, [%d4*2];", r"unknown address: \[%d4\*2\]"),
    "generic address": ("ld.u32 %r1, [%d4];", "unknown opcode ld.u32"),
    "number of operands": ("add.u32 %r1, %r0;", "another number of operands is expected: add.u32"),
    "barrier": ("bar.sync 1;", "only barrier 0 of a whole block is known: bar.sync 1"),
    "barrier of some threads": ("bar.sync 0, 32;", "only barrier 0 of a whole block is known: bar.sync 0, 32"),
    "part of a warp": ("bar.warp.sync 1;", "a barrier of a part of a warp: bar.warp.sync 1"),
    "vector": ("ld.global.v2.u32 %r1, [%d4];", "2 elements are expected: ld.global.v2.u32"),
}


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_what_is_unknown_is_refused_by_name(instruction: str) -> None:
    body, message = UNKNOWN[instruction]
    with pytest.raises(PtxError, match=r"line \d+: .*" + message):
        run(body, np.zeros(64, np.uint32), np.zeros(64, np.uint32), threads=32)


def test_arguments_have_to_fit_the_parameter_list() -> None:
    with pytest.raises(PtxError, match=r"takes parameters of \[8, 8\] bytes"):
        run_ptx(HEAD + "ret; }", "kernel", (1, 1, 1), (1, 1, 1), [3])
    with pytest.raises(PtxError, match="there is no entry nobody; there are kernel"):
        run_ptx(HEAD + "ret; }", "nobody", (1, 1, 1), (1, 1, 1), [])
