"""The rules for the language insert, on networks of random weights in float64, where only rounding is left.

Every norm has a weight, so that none can be forgotten, and ``encoder_norm`` an eps of 0, unless a test is about it:
with 0, the final norm cancels exactly.
"""

import copy
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medseg_trt.export.fold import language as fold_language
from medseg_trt.export.fold.fold import RULES, fold
from medseg_trt.export.fold.language import merge_language_projections
from medseg_trt.export.fold.layers import Branch, FoldedInsert, InverseRMS, RotaryTable, WeightedRMSNorm
from medseg_trt.export.graph.parts import part_of
from medseg_trt.export.graph.trace import trace
from medseg_trt.network_spec import ModelSpec, NetworkSpec
from medseg_trt.spec import InsertSpec
from medseg_trt.train.block.llama import RMSNorm
from medseg_trt.train.models.model import build_model, model_spec
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.models.transunet import TransUNet

SIZE = (32, 48)  # six tokens; as many rows as columns would hide a transposed grid
# Logits of order 1 after some forty float64 roundings of 1e-16 each; 1e-14 is the most that was seen. The faults below
# miss it by a factor of a thousand and more: LLaMA-2's eps of 1e-5 in LLaMA's place, the least of them, by 2400.
LIMIT = 1e-10
BUILD_LIMIT = 1e-4  # what a build allows, in float32
PUBLISHED = InsertSpec()
LANGUAGE_RULES = ("mapper1", "final_norm", "mapper2", "rotary_tables", "norm_weights")


def network(spec: NetworkSpec, eps: float = 0.0) -> TransUNet:
    """Return a network of seeded random weights in float64, whose logits depend on every one of them."""
    torch.manual_seed(0)
    model = build_model(spec).eval().double()
    assert isinstance(model, TransUNet)
    model.encoder_norm.eps = eps
    with torch.no_grad():
        model.position_embedding.normal_()
        for layer in model.modules():
            if isinstance(layer, RMSNorm | nn.LayerNorm):
                layer.weight.uniform_(0.5, 1.5)
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                nn.init.kaiming_normal_(layer.weight)  # the tokens' share would fade from stage to stage
    return model


def variant(insert: InsertSpec = PUBLISHED, *, rotary: bool = False, causal: bool = False) -> ModelSpec:
    spec = model_spec("llm-transunet-tiny", SIZE, 3, insert, rotary=rotary, causal=causal)
    assert isinstance(spec, ModelSpec)
    return spec


def error(folded: nn.Module, model: TransUNet) -> float:
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).to(model.position_embedding.dtype)
    with torch.inference_mode():
        expected = model(images)
        assert expected.std() > 0.1  # or nothing could be told from anything
        return float((folded(images) - expected).abs().max())


SITES = [
    InsertSpec(residual=residual, norm=norm, placement=placement)
    for residual, norm, placement in product(
        ("none", "in", "out", "both"), ("pretrained", "none"), ("before_norm", "after_norm", 1, 2)
    )
]
INSIDES = [
    InsertSpec(parts=parts, num_layers=num_layers, residual=residual)
    for parts, num_layers, residual in product(("full", "attention", "mlp"), (1, 2), ("none", "both"))
]
VARIANTS = [
    *map(variant, SITES),
    *map(variant, INSIDES),
    *(variant(InsertSpec(weights="none", residual=residual)) for residual in ("none", "out", "both")),
    variant(InsertSpec(trainable=True, num_layers=2, residual="out")),
    variant(rotary=True),
    variant(causal=True),
    variant(InsertSpec(num_layers=2, residual="in", parts="attention"), rotary=True, causal=True),
    variant(InsertSpec(weights="random", seed=3)),
    model_spec("transunet-tiny", SIZE, 3),
]


def described(spec: NetworkSpec) -> str:
    insert, block = spec.insert, spec.block
    if block is None:
        return spec.architecture
    named = {name: getattr(insert, name) for name in InsertSpec.__dataclass_fields__}
    changed = [f"{name}={value}" for name, value in named.items() if value != getattr(PUBLISHED, name)]
    switches = [name for name in ("rotary", "causal") if getattr(block, name)]
    return ",".join([*changed, *switches]) or "published"


@pytest.mark.parametrize("spec", VARIANTS, ids=described)
def test_every_variant_folds_to_an_equal_network(spec):
    model = network(spec)
    folded, report = fold(model)
    assert error(folded, model) < LIMIT
    assert report.keys() == RULES.keys()


NO_RESIDUAL_FINAL = "the final norm stands between"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (variant(), {"language_projections": 2, "mapper1": 1, "final_norm": 1, "mapper2": 1, "norm_weights": 1}),
        (variant(InsertSpec(placement=2)), {"mapper1": 1, "final_norm": 1, "mapper2": 1}),
        (variant(InsertSpec(norm="none", residual="both")), {"mapper1": 1, "final_norm": "norm=none", "mapper2": 1}),
        *(
            (
                variant(InsertSpec(residual=residual)),
                {"mapper1": 1, "final_norm": f"residual={residual}", "mapper2": NO_RESIDUAL_FINAL, "norm_weights": 2},
            )
            for residual in ("in", "out", "both")
        ),
        *(
            (
                variant(InsertSpec(placement=placement)),
                {"mapper1": 1, "final_norm": f"placement={placement}: no LayerNorm", "mapper2": NO_RESIDUAL_FINAL},
            )
            for placement in ("after_norm", 1)
        ),
        (variant(InsertSpec(num_layers=2)), {"language_projections": 4, "mapper1": 1, "mapper2": 1, "norm_weights": 3}),
        (variant(InsertSpec(parts="mlp")), {"language_projections": 1, "mapper1": 1, "mapper2": 1}),
        (variant(InsertSpec(parts="attention")), {"language_projections": 1, "mapper1": 1, "mapper2": 1}),
        (
            variant(InsertSpec(weights="none")),
            {
                "language_projections": "weights=none",
                "mapper1": "weights=none",
                "final_norm": 1,
                "mapper2": "weights=none",
                "norm_weights": "no RMSNorm",
            },
        ),
        (variant(), {"rotary_tables": "rotary=false"}),
        (variant(InsertSpec(num_layers=2), rotary=True), {"rotary_tables": 2}),
        (
            model_spec("transunet-tiny", SIZE, 3),
            dict.fromkeys(("language_projections", "mapper1", "final_norm", "mapper2"), "no language block"),
        ),
    ],
    ids=lambda value: described(value) if isinstance(value, NetworkSpec) else "",
)
def test_a_rule_counts_its_layers_or_gives_its_reason(spec, expected):
    _, report = fold(network(spec))
    for rule, wanted in expected.items():
        counts = report[rule]
        assert counts.count == (wanted if isinstance(wanted, int) else 0)
        assert (wanted if isinstance(wanted, str) else "") in counts.reason


def test_a_block_that_is_narrower_than_the_network_keeps_its_own_projections():
    spec = variant()
    assert spec.block is not None
    narrow = replace(spec.block, hidden_size=spec.hidden_size)
    model = network(replace(spec, block=narrow))
    folded, report = fold(model)
    for rule in ("mapper1", "mapper2"):
        assert "the folded matrix would not be smaller" in report[rule].reason
    assert report["language_projections"].count == 2
    assert error(folded, model) < LIMIT


def with_projections(model: TransUNet) -> TransUNet:
    """Return a copy whose insert is in the form that the other rules change."""
    changed = copy.deepcopy(model)
    assert merge_language_projections(changed).count > 0
    return changed


@pytest.mark.parametrize("rule", LANGUAGE_RULES)
def test_each_rule_alone_is_exact(rule):
    norm = "none" if rule == "mapper2" else "pretrained"  # with a norm, mapper2 needs the rule that cancels it
    model = network(variant(InsertSpec(norm=norm), rotary=True))
    changed = with_projections(model)
    assert error(changed, model) < LIMIT
    assert RULES[rule](changed).count > 0
    assert error(changed, model) < LIMIT


def first_branch(model: TransUNet) -> Branch:
    assert isinstance(model.insert, FoldedInsert)
    branch = model.insert.branches[0]
    assert isinstance(branch, Branch)
    return branch


def last_branch(model: TransUNet) -> Branch:
    assert isinstance(model.insert, FoldedInsert)
    assert model.insert.last_branch is not None
    return model.insert.last_branch


def insert_of(model: TransUNet) -> FoldedInsert:
    assert isinstance(model.insert, FoldedInsert)
    return model.insert


def mapper1_with_llama_2s_eps(model: TransUNet) -> None:
    insert_of(model).inverse_rms = InverseRMS(1e-5)


def mapper1_with_a_stale_scale(model: TransUNet) -> None:
    """Take every token's scale from the token before it."""

    class Stale(InverseRMS):
        def forward(self, tokens):
            return super().forward(tokens.roll(1, 1))

    insert_of(model).inverse_rms = Stale(1e-6)


def mapper1_without_the_norms_weight(model: TransUNet) -> None:
    insert, untouched = insert_of(model), network(model.spec)
    assert untouched.insert is not None
    attention = untouched.insert.get_submodule("block.self_attn")
    weight = torch.cat([attention.get_parameter(f"{name}_proj.weight") for name in "qkv"]) @ insert.mapper1.weight[:64]
    insert.mapper1.weight = nn.Parameter(torch.cat([insert.mapper1.weight[:64], weight]))


def mapper1_with_a_row_dropped(model: TransUNet) -> None:
    with torch.no_grad():
        insert_of(model).mapper1.weight[-1] = 0


def mapper1_with_keys_and_values_swapped(model: TransUNet) -> None:
    with torch.no_grad():
        weight = insert_of(model).mapper1.weight
        weight[-64:] = weight[-64:].roll(32, 0)


def mapper1_with_a_transposed_query(model: TransUNet) -> None:
    with torch.no_grad():
        weight = insert_of(model).mapper1.weight
        weight[64:112] = weight[64:112].T.clone()


def final_norm_with_its_weight_forgotten(model: TransUNet) -> None:
    insert, untouched = insert_of(model), network(model.spec)
    assert untouched.insert is not None
    insert.mapper2.weight = nn.Parameter(untouched.insert.get_parameter("mapper2.weight"))


def final_norm_with_a_wrong_eps(model: TransUNet) -> None:
    model.encoder_norm.eps = 1e-6


def final_norm_with_the_layer_norms_weight_forgotten(model: TransUNet) -> None:
    model.encoder_norm.weight = nn.Parameter(torch.ones_like(model.encoder_norm.weight))


def mapper2_without_its_own_share(model: TransUNet) -> None:
    insert = insert_of(model)
    insert.mapper2.weight = nn.Parameter(torch.zeros_like(insert.mapper2.weight))


def mapper2_with_a_row_dropped(model: TransUNet) -> None:
    with torch.no_grad():
        last_branch(model).project_out.weight[0] = 0


def mapper2_from_the_map_before_the_norms_weight(model: TransUNet) -> None:
    untouched = network(model.spec)
    assert untouched.insert is not None
    weight = untouched.insert.get_parameter("mapper2.weight") @ untouched.insert.get_parameter(
        "block.mlp.down_proj.weight"
    )
    last_branch(model).project_out.weight = nn.Parameter(weight)


def projections_with_gate_and_up_swapped(model: TransUNet) -> None:
    with torch.no_grad():
        weight = last_branch(model).project_in.get_parameter("weight")
        weight[:] = weight.roll(len(weight) // 2, 0)


def rotary_tables_with_the_angles_of_another_column(model: TransUNet) -> None:
    mix = first_branch(model).mix
    table = mix.get_submodule("rotary")
    assert isinstance(table, RotaryTable)
    setattr(mix, "rotary", RotaryTable(table.cos.roll(1, 1), table.sin.roll(1, 1)))  # noqa: B010  # a module's slot


def rotary_tables_with_the_sines_of_another_token(model: TransUNet) -> None:
    """Leave the cosines alone: a table whose positions are all shifted answers the same, since only distances count."""
    mix = first_branch(model).mix
    table = mix.get_submodule("rotary")
    assert isinstance(table, RotaryTable)
    table.sin[1:] = table.sin[1:].roll(1, 0)


def norm_weights_with_llama_2s_eps(model: TransUNet) -> None:
    norm = last_branch(model).norm
    assert isinstance(norm, WeightedRMSNorm)
    last_branch(model).norm = WeightedRMSNorm(norm.weight, 1e-5)


def norm_weights_forgotten(model: TransUNet) -> None:
    norm = last_branch(model).norm
    assert isinstance(norm, WeightedRMSNorm)
    last_branch(model).norm = WeightedRMSNorm(nn.Parameter(torch.ones_like(norm.weight)), norm.eps)


FAULTS = (
    mapper1_with_llama_2s_eps,
    mapper1_with_a_stale_scale,
    mapper1_without_the_norms_weight,
    mapper1_with_a_row_dropped,
    mapper1_with_keys_and_values_swapped,
    mapper1_with_a_transposed_query,
    final_norm_with_its_weight_forgotten,
    final_norm_with_a_wrong_eps,
    final_norm_with_the_layer_norms_weight_forgotten,
    mapper2_without_its_own_share,
    mapper2_with_a_row_dropped,
    mapper2_from_the_map_before_the_norms_weight,
    projections_with_gate_and_up_swapped,
    rotary_tables_with_the_angles_of_another_column,
    rotary_tables_with_the_sines_of_another_token,
    norm_weights_with_llama_2s_eps,
    norm_weights_forgotten,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faulty_language_fold_exceeds_the_error_limit(fault):
    model = network(variant(InsertSpec(norm="pretrained"), rotary=True))
    folded, _ = fold(model)
    fault(folded)
    assert error(folded, model) > 1000 * LIMIT


def test_a_residual_makes_cancelling_the_final_norm_wrong():
    """Were the rule not to look, the networks would differ by far more than a build allows."""
    model = network(variant(InsertSpec(residual="both")))
    changed = with_projections(model)
    insert_of(changed).inner_residual = insert_of(changed).outer_residual = False
    assert RULES["final_norm"](changed).count == 1
    insert_of(changed).inner_residual = insert_of(changed).outer_residual = True
    assert error(changed, model) > BUILD_LIMIT


# The eps of the LayerNorm, which the final norm's scale reaches when it is not cancelled.


def test_with_the_published_eps_the_networks_differ_by_less_than_rounding_in_float32():
    model = network(variant(), eps=1e-6)
    folded, report = fold(model)
    assert report["final_norm"].count == 1
    # Half of eps over the variance, 1e-6 / 0.3, of logits of order 1; float32 rounds to 6e-8 some forty times.
    assert LIMIT < error(folded, model) < 5e-6


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_tokens_of_any_magnitude_keep_their_output(scale):
    """The cancelled norm would have brought them to size one; ``encoder_norm``'s eps, left as it was, would not."""
    model = network(variant(InsertSpec(parts="mlp")), eps=1e-6)
    with torch.no_grad():
        assert model.insert is not None
        for name in ("mapper1.weight", "block.mlp.down_proj.weight"):
            model.insert.get_parameter(name).mul_(scale)
    folded, report = fold(model)
    assert report["final_norm"].count == 1
    assert error(folded, model) < BUILD_LIMIT / 10
    assert isinstance(folded, TransUNet)
    folded.encoder_norm.eps = 1e-6
    assert (error(folded, model) > BUILD_LIMIT) == (scale < 1)


def test_the_final_norm_stays_where_its_eps_matters(monkeypatch):
    model = network(variant(), eps=1e-6)
    with torch.no_grad():
        assert model.insert is not None
        model.insert.get_parameter("mapper2.weight").mul_(1e-2)
    folded, report = fold(model)
    assert "the eps of encoder_norm is 3e-02 of the variance" in report["final_norm"].reason
    assert NO_RESIDUAL_FINAL in report["mapper2"].reason
    assert error(folded, model) < LIMIT
    monkeypatch.setattr(fold_language, "MAX_EPS_SHARE", 1.0)
    assert error(fold(model)[0], model) > BUILD_LIMIT


# Size.


def macs(model: SegmentationModel) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.device("meta"):
        model(torch.zeros(1, 3, *model.spec.image_size))
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_published_network_has_the_expected_parameters_after_folding():
    """LLaMA-7B is 4096 wide, with 11008 in its feed-forward part, and the ViT is 768 wide; there are 256 tokens."""
    language, feed_forward, vit, tokens = 4096, 11008, 768, 256
    with torch.device("meta"):
        model = build_model(model_spec("llm-transunet", (256, 256), 9)).eval()
    folded, report = fold(model)
    assert model.insert is not None
    assert folded.insert is not None
    saved = (language - vit) * (3 * language + feed_forward)
    norms = 2 * language  # the weights of the input norm and of the final norm are in the matrices
    assert parameters(model.insert) == 208_678_912
    assert parameters(folded.insert) == 208_678_912 - saved - norms == 131_141_632
    batch_norms = 512 + 2 * (256 + 128 + 64 + 16)  # a weight and a bias a channel become a bias
    assert parameters(model) - parameters(folded) == 77_537_280 + batch_norms == saved + norms + batch_norms
    before, after = macs(model), macs(folded)
    assert before - after == tokens * saved == 19_847_446_528
    assert (round(before / 1e9, 1), round(after / 1e9, 1)) == (92.4, 72.6)
    assert report["standardised_convolutions"].count == 52
    assert report["transformer_projections"].count == 12


# The traced graph.


@pytest.fixture(scope="module")
def traced():
    return trace(fold(network(variant(rotary=True, causal=True), eps=1e-6).float())[0])


def test_folded_language_layer_is_exported_with_merged_projections(traced):
    modules = Counter()
    for node in traced.model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            namespace = node.metadata_props["namespace"]
            modules[namespace.split("/")[-2].partition(":")[0]] += 1
    transformer = [f"layers.{layer}.{name}" for layer in range(2) for name in ("attention.qkv", "attention.out")]
    transformer += [f"layers.{layer}.{name}" for layer in range(2) for name in ("fc1", "fc2")]
    language = ["mapper1", "mapper2", "branches.0.project_out", "last_branch.project_in", "last_branch.project_out"]
    assert modules == Counter([*transformer, *(f"insert.{name}" for name in language)])


def test_constants_are_not_computed_in_the_graph(traced):
    operators = traced.num_nodes
    assert not operators.keys() & {"Shape", "ConstantOfShape", "Range", "Cos", "Sin", "Pow", "Expand", "Cast"}
    assert operators["RMSNormalization"] == 1  # the input norm is in mapper1, and the final one cancelled
    assert operators["Attention"] == 3


def test_every_node_has_a_part(traced):
    counts = Counter(part_of(node.metadata_props["namespace"]) for node in traced.model.graph)
    assert counts.keys() == {"resnet", "vit", "block", "decoder"}
    products = Counter(
        part_of(node.metadata_props["namespace"])
        for node in traced.model.graph
        if node.op_type in ("MatMul", "Gemm", "Conv")
    )
    assert products == {"resnet": 13, "vit": 1 + 2 * 4, "block": 5, "decoder": 10}
