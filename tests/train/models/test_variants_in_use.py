"""Variants of the language insert: what they train, start from, export, store and refuse."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from insert_variants import (
    VARIANTS,
    Weights,
    in_numpy,
    language_model,
    make_model,
    needed_blocks,
    variant,
)
from tiny import SIZE, TWO_ORGANS, tiny_recipe, write_block, write_pictures

from medseg_trt.errors import UsageError
from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.graph.trace import trace
from medseg_trt.network_spec import ModelSpec, NetworkSpec
from medseg_trt.spec import InsertSpec, Preprocessing, from_dict, to_dict
from medseg_trt.train.block.blocks import FrozenBlock, extract_last, random_block, save_block
from medseg_trt.train.block.gguf_file import open_gguf
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.datasets.folder import open_folder
from medseg_trt.train.loop import make_optimizer, train
from medseg_trt.train.models.frozen import FROZEN_DTYPES, keep_frozen_in
from medseg_trt.train.models.model import (
    TINY_LLAMA,
    LanguageInsert,
    build_model,
    count_parameters,
    frozen_names,
    model_spec,
)
from medseg_trt.train.models.transunet import TransUNet
from medseg_trt.train.models.variants import layer_weights
from medseg_trt.train.recipes.recipes import recipe
from medseg_trt.train.recipes.training_spec import TrainSpec

BLOCK, FINAL_NORM, TRANSUNET_AND_MAPS = 202_383_360, 4_096, 111_613_457  # LLaMA-7B, at 256 x 256 and 1 class
ATTENTION, MLP = 4 * 4096**2 + 4096, 3 * 4096 * 11008 + 4096  # each with its norm


@pytest.mark.parametrize(
    ("insert", "trainable", "frozen"),
    [
        ({}, 0, BLOCK + FINAL_NORM),
        ({"residual": "both", "placement": "after_norm"}, 0, BLOCK + FINAL_NORM),
        ({"norm": "pretrained"}, 0, BLOCK + FINAL_NORM),
        ({"norm": "none"}, 0, BLOCK),
        ({"weights": "random"}, 0, BLOCK + FINAL_NORM),
        ({"weights": "shuffled"}, 0, BLOCK + FINAL_NORM),
        ({"weights": "none"}, 0, FINAL_NORM),
        ({"weights": "none", "norm": "none"}, 0, 0),
        ({"parts": "attention"}, 0, ATTENTION + FINAL_NORM),
        ({"parts": "mlp"}, 0, MLP + FINAL_NORM),
        ({"num_layers": 3}, 0, 3 * BLOCK + FINAL_NORM),
        ({"trainable": True}, BLOCK, FINAL_NORM),
        ({"trainable": True, "weights": "random", "parts": "mlp", "num_layers": 2}, 2 * MLP, FINAL_NORM),
    ],
)
def test_trainable_and_frozen_parameter_counts_of_insert_variants(insert, trainable, frozen):
    with torch.device("meta"):
        counts = count_parameters(build_model(model_spec("llm-transunet", (256, 256), 1, InsertSpec(**insert))))
    assert (counts["trainable"], counts["frozen"]) == (TRANSUNET_AND_MAPS + trainable, frozen)


@pytest.mark.parametrize("dtype", FROZEN_DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_changes_all_that_is_trained_and_nothing_that_is_frozen(name, dtype):
    model = make_model(VARIANTS[name]).train()
    keep_frozen_in(model, dtype)
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = make_optimizer(model, TrainSpec(optimizer="sgd", learning_rate=1.0, weight_decay=0.0))
    model(torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert changed.isdisjoint(frozen_names(model))
    assert all((value.grad is None) == (key in frozen_names(model)) for key, value in model.named_parameters())
    layers = {key for key in before if key.startswith("insert.block.")}
    assert layers <= changed if VARIANTS[name].insert.trainable else layers <= frozen_names(model)
    assert {"insert.mapper1.weight", "insert.mapper2.weight", "patch_embedding.weight"} <= changed
    assert ("insert.final_norm.weight" in before) == (VARIANTS[name].insert.norm != "none")


def test_mapper_init_trunc02_draws_mappers_with_std_0_02():
    spec = model_spec("llm-transunet-small", SIZE, 3, InsertSpec(mapper_init="trunc02", weights="random"))
    maps: list[torch.Tensor] = []
    for chosen in (spec, replace(spec, insert=replace(spec.insert, mapper_init="default"))):
        torch.manual_seed(3)
        state = build_model(chosen).state_dict()
        maps += [state["insert.mapper1.weight"], state["insert.mapper2.weight"]]
    # 110 592 numbers: the deviation of their deviation is 0.02 / sqrt(2 n) = 4e-5, of their mean 6e-5; five of each.
    for drawn in maps[:2]:
        assert drawn.std().item() == pytest.approx(0.02, abs=2e-4)
        assert abs(drawn.mean().item()) < 3e-4
    assert not torch.equal(maps[0], maps[1].T)
    for usual in maps[2:]:  # U(-1, 1) / sqrt(fan in) has 1 / sqrt(3 fan in): 0.042 of 192 columns, 0.024 of 576
        assert usual.std().item() == pytest.approx((3 * usual.shape[1]) ** -0.5, rel=0.02)
        assert abs(usual.std().item() - 0.02) > 2e-3


def outside(spec: NetworkSpec, blocks: Sequence[FrozenBlock] = (), seed: int = 3) -> dict[str, torch.Tensor]:
    """Return the weights outside the insert with which a model of this seed starts."""
    torch.manual_seed(seed)
    state = build_model(spec, blocks).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("insert.")}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_configuration_of_one_seed_starts_from_the_same_weights_outside_the_insert(name):
    """TransUNet without a language block is the configuration that all are compared with."""
    baseline = outside(model_spec("transunet-tiny", SIZE, 3))
    weights = outside(VARIANTS[name].spec(), needed_blocks(VARIANTS[name].insert))
    assert weights.keys() == baseline.keys()
    assert all(torch.equal(weights[key], value) for key, value in baseline.items())
    other = outside(VARIANTS[name].spec(), needed_blocks(VARIANTS[name].insert), seed=4)
    assert not torch.equal(other["head.weight"], baseline["head.weight"])


def test_a_block_of_another_width_changes_nothing_outside_the_insert():
    wider = replace(TINY_LLAMA, intermediate_size=160)
    spec = replace(VARIANTS["published"].spec(), block=wider)
    weights = outside(spec, (random_block(wider, seed=0),))
    assert torch.equal(weights["head.weight"], outside(VARIANTS["published"].spec(), language_model(1))["head.weight"])


def test_the_published_model_starts_where_it_always_started():
    """Its insert drawn first, then all else, as runs of earlier versions began."""
    spec = VARIANTS["published"].spec()
    assert spec.block is not None
    torch.manual_seed(3)
    insert = LanguageInsert(spec.hidden_size, spec.block)
    expected = TransUNet(spec, insert).state_dict()
    torch.manual_seed(3)
    state = build_model(spec, language_model(1)).state_dict()
    for name, value in expected.items():
        assert name.startswith(("insert.block.", "insert.final_norm.")) or torch.equal(state[name], value), name


# Random and shuffled weights follow from the spec and the block.


def weights_of(insert: InsertSpec, blocks: Sequence[FrozenBlock] = ()) -> list[Weights]:
    return [in_numpy(tensors) for tensors in layer_weights(insert, TINY_LLAMA, blocks)]


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_random_and_shuffled_weights_depend_only_on_seed_and_position(kind):
    insert = InsertSpec(weights=kind, num_layers=2, seed=5)
    blocks = language_model()
    first = weights_of(insert, blocks)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  # the state that must not matter
    again = weights_of(replace(insert, residual="out", trainable=True), blocks)
    other = weights_of(replace(insert, seed=6), blocks)
    for layer in range(2):
        for name in random_block(TINY_LLAMA, seed=0).tensors:
            np.testing.assert_array_equal(first[layer][name], again[layer][name])
            is_constant = kind == "random" and "norm" in name
            assert np.array_equal(first[layer][name], other[layer][name]) == is_constant
    query = "self_attn.q_proj.weight"
    assert not np.array_equal(first[0][query], first[1][query])
    assert not np.array_equal(first[1][query], other[0][query])  # the layers of one seed are not the next one's


def test_shuffled_weights_are_permutations_of_the_same_dtype_and_shape():
    source = language_model(1)[0]
    block = replace(source, tensors={name: tensor.bfloat16() for name, tensor in source.tensors.items()})
    (layer,) = layer_weights(InsertSpec(weights="shuffled"), TINY_LLAMA, [block])
    for name, tensor in block.tensors.items():
        assert layer[name].dtype == torch.bfloat16
        assert layer[name].shape == tensor.shape
        assert torch.equal(layer[name].flatten().sort().values, tensor.flatten().sort().values)
        equal_share = (layer[name] == tensor).double().mean()
        by_chance = (tensor.flatten()[:, None] == tensor.flatten()).double().mean() if tensor.dim() == 1 else 0.02
        assert equal_share < by_chance + 0.1  # bfloat16 has few values, so that some fall on their like


def test_shuffling_does_not_depend_on_the_order_of_the_tensors_or_on_what_else_is_there():
    """A file keeps its tensors in another order than the reader, and may carry the final norm or not."""
    (block,) = language_model(1)
    backwards = dict(reversed(list(block.tensors.items())))
    del backwards["norm.weight"]
    insert = InsertSpec(weights="shuffled")
    (first,), (second,) = weights_of(insert, [block]), weights_of(insert, [replace(block, tensors=backwards)])
    for name in backwards:
        np.testing.assert_array_equal(first[name], second[name])


def test_numpy_draws_the_numbers_that_stored_models_were_made_with():
    """NumPy does not promise its streams for ever; where one changes, stored random and shuffled models would too."""
    (block,) = language_model(1)
    ramp = torch.arange(64.0)
    block = replace(block, tensors={**block.tensors, "input_layernorm.weight": ramp})
    (shuffled,) = weights_of(InsertSpec(weights="shuffled", seed=1), [block])
    (random,) = weights_of(InsertSpec(weights="random", seed=1))
    assert shuffled["input_layernorm.weight"][:8].tolist() == [43, 49, 27, 63, 25, 8, 33, 61]
    normals = [0.00450199796, -0.00618989347, -0.0223820377, 0.00132335746]
    np.testing.assert_allclose(random["mlp.up_proj.weight"][0, :4], normals, rtol=1e-7)  # printed with nine digits


def test_random_weights_have_the_spread_that_the_spec_says():
    (layer,) = weights_of(InsertSpec(weights="random", seed=2))
    for name, values in layer.items():
        if "norm" in name:
            assert (values == 1).all()
        else:  # the spread of n numbers is known to one part in sqrt(2 n): 2048 numbers or more, six times that
            assert abs(values.std() / 0.02 - 1) < 0.1
            assert abs(values.mean()) < 6 * 0.02 / values.size**0.5


# ONNX.


@pytest.mark.parametrize(
    "chosen",
    [
        variant(residual="both", norm="pretrained", parts="attention", placement=1, rotary=True, causal=True),
        variant(residual="in", norm="none", parts="mlp", placement="after_norm", weights="shuffled"),
        variant(residual="out", weights="random", num_layers=2, trainable=True),
    ],
    ids=["attention, rotary, causal, residual both", "MLP after encoder_norm", "two layers"],
)
def test_onnx_runtime_agrees_with_pytorch(chosen, tmp_path):
    model = make_model(chosen)
    save_graphs({"model.onnx": trace(fold(model)[0])}, tmp_path, "weights.bin")
    images = np.random.default_rng(0).random((2, 3, *SIZE), dtype=np.float32)
    published = make_model(VARIANTS["published"])
    with torch.inference_mode():
        expected, other = (network(torch.from_numpy(images)).numpy() for network in (model, published))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": images})
    # Some fifty roundings of 6e-8 each; 3e-6 is the most that was measured, and the published model is a tenth away.
    largest = np.abs(expected).max()
    assert np.abs(np.asarray(logits) - expected).max() < 2e-5 * largest
    assert np.abs(expected - other).max() > 0.1 * largest


# Checkpoints and runs.


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_brings_a_variant_back_without_its_frozen_weights(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chosen = VARIANTS[name]
    model = make_model(chosen)
    block_file, digest = None, None
    if blocks := needed_blocks(chosen.insert):
        block_file = tmp_path / "block.safetensors"
        digest = save_block(blocks, block_file)
    checkpoint = Checkpoint(
        weights=trained_weights(model),
        spec=chosen.spec(),
        preprocessing=Preprocessing(image_size=SIZE),
        classes=TWO_ORGANS,
        block_file=block_file,
        block_sha256=digest,
    )
    save_checkpoint(checkpoint, tmp_path / "saved" / "model.pt")
    assert len(list((tmp_path / "saved").iterdir())) == (1 if digest is None else 2)
    loaded = load_checkpoint(tmp_path / "saved" / "model.pt")
    assert loaded.spec == chosen.spec()
    assert loaded.weights.keys() == model.state_dict().keys() - frozen_names(model)
    assert any(key.startswith("insert.block.") for key in loaded.weights) == chosen.insert.trainable
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded.model()(images), model(images))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_a_recipe_chooses_the_variant_and_a_control_needs_no_block(image_folder, tmp_path):
    changes = (
        "train.epochs=1",
        "insert.weights=random",
        "insert.seed=3",
        "insert.residual=out",
        "insert.placement=1",
        "rotary=true",
    )
    spec = load_checkpoint(train(tiny_recipe(*changes), open_folder(image_folder), tmp_path)).spec
    assert spec.insert == InsertSpec(weights="random", seed=3, residual="out", placement=1)
    assert spec.block == replace(TINY_LLAMA, rotary=True)


def test_a_run_takes_several_layers_and_the_final_norm_from_one_file(image_folder, tmp_path):
    """And resumes with them; the checkpoint says where each layer came from."""
    block = tmp_path / "block.safetensors"
    save_block(language_model(), block)
    changes = ("train.epochs=1", "insert.num_layers=2", "insert.norm=pretrained")
    best = train(tiny_recipe(*changes), open_folder(image_folder), tmp_path / "run", block=block)
    checkpoint = load_checkpoint(best)
    assert checkpoint.provenance.block is not None
    assert [layer["seed"] for layer in checkpoint.provenance.block["layers"]] == [0, 1]
    insert = checkpoint.model().insert
    assert isinstance(insert, LanguageInsert)
    for layer, expected in zip(insert.layers, language_model(), strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, expected.tensors["mlp.up_proj.weight"])
    assert torch.equal(insert.final_norm.get_parameter("weight"), language_model()[0].tensors["norm.weight"])
    train(tiny_recipe(*changes), open_folder(image_folder), tmp_path / "run", block=block, resume=True)


@pytest.mark.network
@pytest.mark.parametrize("count", [1, 2])
def test_the_real_language_models_layers_and_norm_are_in_the_network(count, llama_gguf, image_folder, tmp_path):
    blocks = extract_last(llama_gguf, count, final_norm=True)
    save_block(blocks, tmp_path / "block.safetensors")
    changes = ("train.epochs=0", f"insert.num_layers={count}", "insert.norm=pretrained")
    best = train(
        tiny_recipe(*changes), open_folder(image_folder), tmp_path / "run", block=tmp_path / "block.safetensors"
    )
    insert = load_checkpoint(best).model().insert
    assert isinstance(insert, LanguageInsert)
    own = open_gguf(llama_gguf).read("output_norm.weight")
    assert torch.equal(insert.final_norm.get_parameter("weight"), own)
    values = open_gguf(llama_gguf).read(f"blk.{30 - count}.ffn_up.weight")  # of the oldest of them
    assert torch.equal(insert.layers[0].mlp.up_proj.weight, values)


def test_a_trained_block_starts_from_the_file_and_leaves_it(image_folder, tmp_path):
    block = write_block(tmp_path)
    changes = ("train.epochs=1", "insert.trainable=true", "causal=true")
    best = load_checkpoint(train(tiny_recipe(*changes), open_folder(image_folder), tmp_path / "run", block=block))
    assert best.spec.block == replace(TINY_LLAMA, causal=True)
    start = random_block(TINY_LLAMA, seed=0).tensors["mlp.up_proj.weight"]
    moved = (best.weights["insert.block.mlp.up_proj.weight"] - start).abs().max()
    assert 0 < moved < start.abs().max()


def test_a_run_that_was_begun_before_there_were_variants_goes_on(image_folder, tmp_path):
    block = write_block(tmp_path)
    train(tiny_recipe("train.epochs=1"), open_folder(image_folder), tmp_path / "run", block=block)
    last = tmp_path / "run" / "last.pt"
    content = torch.load(last, weights_only=True)
    for name in ("insert", "rotary", "causal"):
        del content["medseg_trt"]["provenance"]["recipe"][name]
    del content["medseg_trt"]["spec"]["insert"]
    torch.save(content, last)
    data = open_folder(image_folder)
    train(tiny_recipe("train.epochs=1"), data, tmp_path / "run", block=block, resume=True)
    with pytest.raises(UsageError, match="started with another recipe: rotary was false, is now true"):
        train(tiny_recipe("train.epochs=1", "rotary=true"), data, tmp_path / "run", block=block, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["insert.placement=3"], "after layer 3; llm-transunet-tiny has 2"),
        (["architecture=transunet-tiny", "insert.residual=in"], "no language block"),
        (["architecture=transunet-tiny", "causal=true"], "no language block"),
        (["insert.num_layers=2"], "num_layers is 2, but the block holds 1 layer.*--layers 2"),
        (["insert.norm=pretrained"], r"no norm\.weight.*Extract the block again.*--final-norm"),
        (["insert.parts=mlp", "causal=true"], "this insert has none"),
    ],
)
def test_a_run_of_an_impossible_variant_does_not_begin(changes, message, image_folder, tmp_path):
    block = None if "architecture=transunet-tiny" in changes else write_block(tmp_path)
    with pytest.raises(UsageError, match=message):
        train(tiny_recipe(*changes), open_folder(image_folder), tmp_path / "run", block=block)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    "changes", [[], ["insert.weights=shuffled"], ["insert.weights=none", "insert.norm=pretrained"]]
)
def test_a_variant_that_takes_from_the_language_model_asks_for_the_block(changes, image_folder, tmp_path):
    with pytest.raises(UsageError, match=r"needs a frozen block: --block block\.safetensors"):
        train(tiny_recipe(*changes), open_folder(image_folder), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("insert.residual=sideways", "'none', 'in', 'out' or 'both'"),
        ("insert.residuals=in", "there is no field insert.residuals; the nearest are: insert.residual"),
        ("insert.weights=none insert.trainable=true", "must be unset"),
        ("insert.seed=-1", "seed 0 or more"),
    ],
)
def test_invalid_insert_options_are_refused_with_an_explanation(change, message):
    with pytest.raises(UsageError, match=message):
        recipe("folder", change.split())


def test_weights_of_scaled_rotary_angles_are_refused_where_the_angles_matter():
    block = replace(random_block(TINY_LLAMA, seed=0), provenance={"rope_scaling": "llama3"})
    assert build_model(variant().spec(), block).insert is not None
    with pytest.raises(UsageError, match="'llama3' rotary scaling"):
        build_model(variant(rotary=True).spec(), block)


def test_a_spec_of_before_there_were_variants_is_the_published_model():
    data = json.loads(json.dumps(to_dict(variant().spec())))
    del data["insert"]
    assert from_dict(ModelSpec, data, "model.pt") == variant().spec()
