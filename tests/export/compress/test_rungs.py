"""The names of the rungs, the ladder of a geometry, and requests that are refused."""

from dataclasses import replace

import pytest

from medseg_trt.errors import UsageError
from medseg_trt.export.compress.rungs import AFFINE, EXACT, Rung, candidate_rungs, parse_block
from medseg_trt.network_spec import ModelSpec
from medseg_trt.spec import BlockSpec, InsertSpec
from medseg_trt.train.models.model import model_spec


def transunet(architecture: str, size: tuple[int, int], num_classes: int) -> ModelSpec:
    spec = model_spec(architecture, size, num_classes)
    assert isinstance(spec, ModelSpec)
    return spec


FULL = transunet("llm-transunet", (256, 256), 1)
DEMO = transunet("llm-transunet-small", (128, 128), 9)


def with_insert(**fields: object) -> ModelSpec:
    return replace(DEMO, insert=InsertSpec(**fields))  # pyright: ignore[reportArgumentType]


def test_parse_block_and_str_of_a_rung_round_trip() -> None:
    for name in ("exact", "affine", "narrow:r=512,k=1024,heads=4"):
        assert str(parse_block(name)) == name
    assert parse_block("narrow: r=8, k=16, heads=2") == Rung(kind="narrow", width=8, neurons=16, heads=2)
    assert parse_block("auto") is None


@pytest.mark.parametrize(
    "text", ["", "Exact", "narrow", "narrow:r=512", "narrow:r=-1,k=2,heads=3", "narrow:r=1,k=2,heads=3,x=1", "half"]
)
def test_parse_block_refuses_an_unknown_name_and_lists_the_choices(text: str) -> None:
    with pytest.raises(UsageError, match=r"choose exact, auto, affine or narrow:r=512,k=1024,heads=4"):
        parse_block(text)


@pytest.mark.parametrize("text", ["narrow:r=0,k=2,heads=3", "narrow:r=1,k=0,heads=3", "narrow:r=1,k=2,heads=0"])
def test_parse_block_refuses_sizes_of_zero(text: str) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        parse_block(text)


def test_the_ladder_of_the_published_geometry() -> None:
    assert [str(rung) for rung in candidate_rungs(None, FULL)] == [
        "affine",
        "narrow:r=512,k=1024,heads=4",
        "narrow:r=768,k=2048,heads=16",
        "exact",
    ]


def test_another_geometry_has_the_same_shares_and_whole_head_groups() -> None:
    names = [str(rung) for rung in candidate_rungs(None, DEMO)]
    assert names == ["affine", "narrow:r=72,k=143,heads=3", "narrow:r=108,k=286,heads=6", "exact"]
    one_head = replace(DEMO, block=BlockSpec(hidden_size=4, intermediate_size=5, num_heads=1, num_kv_heads=1))
    assert [str(rung) for rung in candidate_rungs(None, one_head)][1] == "narrow:r=1,k=1,heads=1"


def test_half_a_layer_has_no_narrow_rungs() -> None:
    assert candidate_rungs(None, with_insert(parts="mlp")) == (AFFINE, EXACT)
    with pytest.raises(UsageError, match="parts=mlp"):
        candidate_rungs(parse_block("narrow:r=8,k=8,heads=3"), with_insert(parts="mlp"))


def test_the_exact_block_needs_no_block_that_can_be_replaced() -> None:
    assert candidate_rungs(EXACT, transunet("transunet", (32, 32), 1)) == (EXACT,)


@pytest.mark.parametrize("name", ["auto", "affine", "narrow:r=8,k=8,heads=3"])
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (transunet("transunet-small", (128, 128), 9), "no language block"),
        (with_insert(weights="none"), "weights=none"),
        (with_insert(residual="in"), "residual=in"),
        (with_insert(residual="out"), "residual=out"),
        (with_insert(residual="both"), "residual=both"),
        (with_insert(num_layers=2), "num_layers=2"),
        (with_insert(placement="after_norm"), "placement=after_norm"),
        (with_insert(placement=2), "placement=2"),
    ],
)
def test_unreplaceable_block_is_refused_with_a_one_line_reason(name: str, model: ModelSpec, reason: str) -> None:
    with pytest.raises(UsageError, match=rf"{reason}.*--block exact$") as refused:
        candidate_rungs(parse_block(name), model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("narrow:r=577,k=8,heads=3", "r is 577, but the block has 576"),
        ("narrow:r=8,k=1537,heads=3", "k is 1537, but the block has 1536"),
        ("narrow:r=8,k=8,heads=12", "heads is 12, but the block has 9"),
        ("narrow:r=8,k=8,heads=4", "heads must be a multiple of 3"),
    ],
)
def test_narrow_rung_that_does_not_fit_the_block_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        candidate_rungs(parse_block(name), DEMO)


def test_rotary_and_causal_blocks_are_judged_not_refused() -> None:
    assert DEMO.block is not None
    ordered = replace(DEMO, block=replace(DEMO.block, rotary=True, causal=True))
    assert candidate_rungs(None, ordered)[0] == AFFINE
