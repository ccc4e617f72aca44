"""What ``fuse_rotary`` must leave alone: each graph differs in one thing from a rotation that is fused."""

from collections.abc import Mapping

import numpy as np
import pytest
from onnx_text import graph_of, largest_change, outputs_of

from medseg_trt.export.graph.fusions.fuse import fuse

SAME = 2e-6  # a rotation and an attention in float32: 1.2e-7 measured, ONNX Runtime on an x86 CPU
BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 2, 3, 4, 2, 6
ANGLES = np.random.default_rng(0).normal(size=(TOKENS, HEAD_DIM // 2))
COS, SIN = (np.tile(table(ANGLES), 2).astype(np.float32) for table in (np.cos, np.sin))


def rotated(name: str) -> str:
    return f"""
        {name}_first, {name}_second = Split <axis = -1, num_outputs = 2> ({name}_heads)
        {name}_negative = Neg ({name}_second)
        {name}_swapped = Concat <axis = -1> ({name}_negative, {name}_first)
        {name}_straight = Mul ({name}_heads, {name}_cos)
        {name}_crossed = Mul ({name}_swapped, {name}_sin)
        {name} = Add ({name}_straight, {name}_crossed)"""


def heads(name: str) -> str:
    return f"""
        {name}_rows = Reshape ({name}_columns, {name}_shape)
        {name}_heads = Transpose <perm = [0, 2, 1, 3]> ({name}_rows)"""


LINES = f"""
    q_columns, k_columns, v_columns = Split <axis = -1> (qkv, sizes)
    {heads("q")} {rotated("q")} {heads("k")} {rotated("k")} {heads("v")}
    y = Attention (q, k, v_heads)"""
CONSTANTS: Mapping[str, np.ndarray] = {
    "sizes": np.array([HEADS, KV_HEADS, KV_HEADS]) * HEAD_DIM,
    **{f"{name}_shape": np.array([BATCH, TOKENS, KV_HEADS, HEAD_DIM]) for name in "kv"},
    "q_shape": np.array([BATCH, TOKENS, HEADS, HEAD_DIM]),
    **{f"{name}_{table}": values for name in "qk" for table, values in (("cos", COS), ("sin", SIN))},
}
ONE_ANGLE_ELSE = COS + np.eye(TOKENS, HEAD_DIM, dtype=np.float32)
SHAPE = (BATCH, TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
BOTH_COS, BOTH_SIN = ("q_cos", "k_cos"), ("q_sin", "k_sin")
Variant = tuple[int, Mapping[str, str], Mapping[str, np.ndarray]]  # places fused, texts and constants that differ
VARIANTS: Mapping[str, Variant] = {
    "as it is": (1, {}, {}),
    "every sum and product the other way": (
        1,
        {
            "Add (q_straight, q_crossed)": "Add (q_crossed, q_straight)",
            "Mul (k_swapped, k_sin)": "Mul (k_sin, k_swapped)",
        },
        {},
    ),
    "the query is read before the attention": (
        1,
        {"(qkv, sizes)": "(qkv, sizes)", "y = Attention": "early = Neg (q) late = Mul (early, q) y = Attention"},
        {},
    ),
    "two attentions of one query": (1, {"y = Attention": "late = Attention (q, k, v_heads) y = Attention"}, {}),
    "the first half negative": (0, {"q_negative = Neg (q_second)": "q_negative = Neg (q_first)"}, {}),
    "halves not swapped": (0, {"(k_negative, k_first)": "(k_first, k_negative)"}, {}),
    "no sign": (0, {"(k_negative, k_first)": "(k_second, k_first)"}, {}),
    "turned back": (0, {"Add (k_straight, k_crossed)": "Sub (k_straight, k_crossed)"}, {}),
    "the query alone": (0, {"Attention (q, k, v_heads)": "Attention (q, k_heads, v_heads)"}, {}),
    "key before query": (
        0,
        {"q_columns, k_columns, v_columns =": "k_columns, q_columns, v_columns ="},
        {"sizes": np.array([KV_HEADS, HEADS, KV_HEADS]) * HEAD_DIM},
    ),
    "another angle for the key": (0, {}, {"k_cos": ONE_ANGLE_ELSE}),
    "halves that turn differently": (0, {}, dict.fromkeys(BOTH_COS, ONE_ANGLE_ELSE)),
    "one row of angles for all tokens": (
        0,
        {},
        {**dict.fromkeys(BOTH_COS, COS[:1]), **dict.fromkeys(BOTH_SIN, SIN[:1])},
    ),
    "one angle for all columns": (
        0,
        {},
        {**dict.fromkeys(BOTH_COS, COS[:, :1]), **dict.fromkeys(BOTH_SIN, SIN[:, :1])},
    ),
    "tables with an axis of heads": (
        0,
        {},
        {**dict.fromkeys(BOTH_COS, COS[np.newaxis]), **dict.fromkeys(BOTH_SIN, SIN[np.newaxis])},
    ),
    "wider heads of values": (
        0,
        {},
        {
            "sizes": np.array([HEADS, KV_HEADS, 2]) * HEAD_DIM + [-2 * HEAD_DIM, 0, 2 * HEAD_DIM],
            "q_shape": np.array([BATCH, TOKENS, HEADS - 2, HEAD_DIM]),
            "v_shape": np.array([BATCH, TOKENS, KV_HEADS, 2 * HEAD_DIM]),
        },
    ),
    "rows that the reshape mixes": (
        0,
        {},
        {
            "q_shape": np.array([TOKENS, BATCH, HEADS, HEAD_DIM]),
            **{f"{name}_shape": np.array([TOKENS, BATCH, KV_HEADS, HEAD_DIM]) for name in "kv"},
            **dict.fromkeys(BOTH_COS, COS[:BATCH]),
            **dict.fromkeys(BOTH_SIN, SIN[:BATCH]),
        },
    ),
    "columns left over": (
        0,
        {"q_columns, k_columns, v_columns =": "q_columns, k_columns, v_columns, rest ="},
        {
            "sizes": np.array([HEADS, KV_HEADS, 1, 1]) * HEAD_DIM,
            "k_shape": np.array([BATCH, TOKENS, 1, 2 * HEAD_DIM]),
            "v_shape": np.array([BATCH, TOKENS, 1, HEAD_DIM]),
            "q_shape": np.array([BATCH, TOKENS, HEADS // 2, 2 * HEAD_DIM]),
            **dict.fromkeys(BOTH_COS, np.tile(COS, 2)),
            **dict.fromkeys(BOTH_SIN, np.tile(SIN, 2)),
        },
    ),
    "an odd number of columns": (
        0,
        {
            f"Split <axis = -1, num_outputs = 2> ({name}_heads)": f"Split <axis = -1> ({name}_heads, unequal)"
            for name in "qk"
        },
        {
            "unequal": np.array([4, 5]),
            "sizes": np.array([18, 18, 12]),
            "q_shape": np.array([BATCH, TOKENS, 2, 9]),
            "k_shape": np.array([BATCH, TOKENS, 2, 9]),
            **dict.fromkeys(BOTH_COS, np.tile(COS, 2)[:, :9]),
            **dict.fromkeys(BOTH_SIN, np.tile(SIN, 2)[:, :9]),
        },
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rotary_embedding_is_fused_only_for_the_exact_pattern(name):
    fused, texts, values = VARIANTS[name]
    lines = LINES
    for old, new in texts.items():
        assert lines.count(old) == 1
        lines = lines.replace(old, new)
    outputs = "float[a,b,c,d] y" + (", float[a,b,c,d] late" if "late" in lines else "")
    size = ",".join(map(str, SHAPE))
    graph = graph_of(f"g (float[{size}] qkv) => ({outputs}) {{ {lines} }}", {**CONSTANTS, **values})
    feeds = {"qkv": np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)}
    copy, results = fuse(graph)
    assert largest_change(outputs_of(graph, feeds), outputs_of(copy, feeds)) < SAME
    assert results["rotary_embeddings"].count == fused
