"""One layer out of a language model: the same from every kind of file, and refused where it is not LLaMA's."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from language_models import (
    NUM_LAYERS,
    SPEC,
    change_tensors,
    gguf_tensors,
    make_model,
    meta_tensors,
    permuted,
    write_gguf,
    write_meta,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.train.block import layer_readers
from medseg_trt.train.block.blocks import FrozenBlock, build_block, extract, extract_last, save_block
from medseg_trt.train.block.layer_geometry import half_split

# As in test_llama.py: everything is of size 1 and rounded to float32 some ten times.
FLOAT32 = 1e-5


def assert_same_block(actual: FrozenBlock, expected: FrozenBlock) -> None:
    assert actual.spec == expected.spec
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert actual.tensors[name].dtype == tensor.dtype
        assert torch.equal(actual.tensors[name], tensor), name


def parity(block: FrozenBlock, model: LlamaForCausalLM, layer: int) -> float:
    """Return how far the block is from transformers' model of this one layer, for tokens of size 1."""
    alone = deepcopy(model.model)
    alone.layers = torch.nn.ModuleList([model.model.layers[layer]])
    setattr(alone, "norm", torch.nn.Identity())  # noqa: B010  # pyright knows only the type that it had
    alone.config.num_hidden_layers = 1
    tokens = torch.randn(2, 11, SPEC.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = alone(inputs_embeds=tokens, use_cache=False).last_hidden_state
        return (build_block(block, rotary=True, causal=True)(tokens) - expected).abs().max().item()


def last_layers_parity(blocks: Sequence[FrozenBlock], model: LlamaForCausalLM) -> float:
    """Return how far the blocks and the final norm are from the end of transformers' model, for tokens of size 1."""
    end = deepcopy(model.model)
    end.layers = torch.nn.ModuleList(list(model.model.layers)[-len(blocks) :])
    end.config.num_hidden_layers = len(blocks)
    tokens = torch.randn(2, 11, SPEC.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = end(inputs_embeds=tokens, use_cache=False).last_hidden_state
        hidden = tokens
        for block in blocks:
            hidden = build_block(block, rotary=True, causal=True)(hidden)
        norm = blocks[-1].tensors["norm.weight"]
        hidden = torch.nn.functional.rms_norm(hidden, norm.shape, norm, SPEC.rms_norm_eps)
        return (hidden - expected).abs().max().item()


SOURCES = ["folder", "sharded", "bin_folder", "meta", "meta_parts", "gguf_file"]


@pytest.mark.parametrize("layer", [0, 1, 2, "last"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_file_gives_the_layer_of_transformers(source, layer, model, request):
    block = extract(request.getfixturevalue(source), layer)
    index = NUM_LAYERS - 1 if layer == "last" else layer
    assert block.spec == SPEC
    assert block.provenance["layer"] == index
    assert block.provenance["num_layers"] == NUM_LAYERS
    for name, tensor in block.tensors.items():
        assert torch.equal(tensor, model.model.layers[index].get_parameter(name)), name
    assert parity(block, model, index) < FLOAT32


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_every_layout_of_the_same_weights_gives_the_same_bytes(num_kv_heads, tmp_path):
    """Many heads, grouped queries, and one key head for all; a block's bytes are its geometry, weights and origin."""
    model = make_model(replace(SPEC, num_kv_heads=num_kv_heads))
    kv_heads = {"kv_heads": lambda writer: writer.add_head_count_kv(num_kv_heads)}
    sources = [write_gguf(tmp_path / "model.gguf", gguf_tensors(model), changes=kv_heads)]
    for num_parts in (1, 2, 4)[: num_kv_heads.bit_length()]:
        (tmp_path / f"meta{num_parts}").mkdir()
        sources.append(write_meta(tmp_path / f"meta{num_parts}", model, num_parts))
    model.save_pretrained(tmp_path / "hugging-face")
    sources.append(tmp_path / "hugging-face")
    digests: dict[str, set[str]] = {"one layer": set(), "two layers and the final norm": set()}
    for source in sources:
        block = replace(extract(source, 1), provenance={})
        digests["one layer"].add(save_block(block, tmp_path / "block.safetensors"))
        assert parity(block, model, 1) < FLOAT32
        blocks = [replace(layer, provenance={}) for layer in extract_last(source, 2, final_norm=True)]
        digests["two layers and the final norm"].add(save_block(blocks, tmp_path / "blocks.safetensors"))
        assert last_layers_parity(blocks, model) < FLOAT32
    assert [len(of_choice) for of_choice in digests.values()] == [1, 1]


def test_the_parity_of_the_end_catches_an_order_and_a_norm_that_are_wrong(model, folder):
    assert not torch.equal(model.model.norm.weight, torch.ones(SPEC.hidden_size))
    before, last = extract_last(folder, 2, final_norm=True)
    with_wrong_norm = [
        before,
        replace(last, tensors={**last.tensors, "norm.weight": last.tensors["norm.weight"].flip(0)}),
    ]
    swapped = [replace(last, tensors=layer_alone(last)), replace(before, tensors={**before.tensors, **norm_of(last)})]
    for wrong in (with_wrong_norm, swapped):
        assert last_layers_parity(wrong, model) > 100 * FLOAT32


def norm_of(block: FrozenBlock) -> dict[str, Tensor]:
    return {"norm.weight": block.tensors["norm.weight"]}


def layer_alone(block: FrozenBlock) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in block.tensors.items() if name != "norm.weight"}


@pytest.mark.parametrize("source", SOURCES)
def test_the_final_norm_comes_on_request_alone(source, model, request):
    plain = extract(request.getfixturevalue(source), 1)
    carrying = extract(request.getfixturevalue(source), 1, final_norm=True)
    assert "norm.weight" not in plain.tensors
    assert torch.equal(carrying.tensors["norm.weight"], model.model.norm.weight)
    assert layer_alone(carrying).keys() == plain.tensors.keys()
    left_out = plain.provenance["skipped"].keys() - carrying.provenance["skipped"].keys()
    assert left_out <= {"model.norm.weight", "norm.weight", "output_norm.weight"}
    assert len(left_out) == 1


@pytest.mark.parametrize("source", SOURCES)
def test_more_layers_than_there_are_cannot_be_taken(source, request):
    assert len(extract_last(request.getfixturevalue(source), NUM_LAYERS)) == NUM_LAYERS
    with pytest.raises(ArtefactError, match="has 3 layers; 4 cannot be read"):
        extract_last(request.getfixturevalue(source), NUM_LAYERS + 1)


def test_a_shard_without_the_final_norm_says_which_shard_has_it(model, folder, tmp_path):
    write_three_shards(model, folder, tmp_path, "safetensors")
    first, last = (tmp_path / shard_name(number, "safetensors") for number in (1, 3))
    with pytest.raises(ArtefactError, match=rf"lacks the final norm, model\.norm\.weight \(in {last.name}\)"):
        extract(first, 0, final_norm=True)
    assert extract(first, 0).provenance["layer"] == 0


FAULTS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "rows left as they are stored": lambda rows, _heads: rows,
    "permuted again": lambda rows, heads: torch.from_numpy(permuted(rows.numpy(), heads)),
    "all heads as one": lambda rows, _heads: half_split(rows, 1),
    "as many key heads as heads": lambda rows, _heads: half_split(rows, SPEC.num_heads),
}


@pytest.mark.parametrize("source", ["gguf_file", "meta", "meta_parts"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_parity_catches_rows_of_q_and_k_in_another_order(fault, source, model, request, monkeypatch):
    monkeypatch.setattr(layer_readers, "half_split", FAULTS[fault])
    assert parity(extract(request.getfixturevalue(source), 0), model, 0) > 1000 * FLOAT32


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_a_quantised_gguf_file_gives_the_rounded_rows_in_their_place(quantisation, model, tmp_path):
    """Every row is quantised on its own: the rows of the original, quantised and back, are what is to be found."""
    block = extract(write_gguf(tmp_path / "model.gguf", gguf_tensors(model), quantisation), 1)
    assert set(block.provenance["tensor_types"].values()) == {quantisation, "F32"}
    kind = GGMLQuantizationType[quantisation]
    for name, tensor in block.tensors.items():
        original = model.model.layers[1].get_parameter(name).detach().numpy()
        rounded = gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind) if "norm" not in name else original
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), rounded.reshape(original.shape), err_msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_kept_as_they_are(dtype, model, tmp_path):
    deepcopy(model).to(dtype).save_pretrained(tmp_path)
    block = extract(tmp_path)
    assert {tensor.dtype for tensor in block.tensors.values()} == {dtype}
    assert {weight.dtype for weight in build_block(block).parameters()} == {torch.float32}


def test_one_shard_is_enough_where_it_has_the_whole_layer(folder, tmp_path, model):
    tensors = load_file(folder / "model.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if ".layers.1." in key}, tmp_path / "part.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert_same_block(replace(extract(tmp_path / "part.safetensors", 1), provenance={}), extract(folder, 1))
    with pytest.raises(ArtefactError, match=r"part\.safetensors: layer 0 lacks .*input_layernorm.* give the folder"):
        extract(tmp_path / "part.safetensors", 0)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_shard_beside_the_index_is_enough_or_says_which_shards_have_the_rest(kind, model, folder, tmp_path):
    """As a user has who took config.json, the index and one of three shards from the hub."""
    write_three_shards(model, folder, tmp_path, kind)
    last, second = (tmp_path / shard_name(number, kind) for number in (3, 2))
    second.unlink()
    (tmp_path / shard_name(1, kind)).unlink()
    assert_same_block(extract(last), extract(folder))
    assert_same_block(extract(tmp_path), extract(folder))
    with pytest.raises(ArtefactError) as caught:
        extract(last, 1)
    assert str(caught.value) == (
        f"{last}: layer 1 lacks input_layernorm.weight, self_attn.q_proj.weight (in {shard_name(1, kind)}); "
        f"self_attn.k_proj.weight (in {second.name}); put these files into one folder with config.json and the index, "
        "and give the folder"
    )
    with pytest.raises(ArtefactError, match=rf"{re.escape(shard_name(1, kind))} is missing; according to the index"):
        extract(tmp_path, 0)


def shard_name(number: int, kind: str) -> str:
    return f"{'model' if kind == 'safetensors' else 'pytorch_model'}-{number:05}-of-00003.{kind}"


def write_three_shards(model: LlamaForCausalLM, folder: Path, target: Path, kind: str) -> None:
    """Write layer 0 and a part of layer 1, one tensor of layer 1, and all else."""
    shards: dict[str, dict[str, Tensor]] = {shard_name(number, kind): {} for number in (1, 2, 3)}
    for key, tensor in model.state_dict().items():
        first = ".layers.0." in key or key.endswith(
            ("layers.1.input_layernorm.weight", "layers.1.self_attn.q_proj.weight")
        )
        number = 1 if first else 2 if key.endswith("layers.1.self_attn.k_proj.weight") else 3
        shards[shard_name(number, kind)][key] = tensor
    for name, tensors in shards.items():
        save_file(tensors, target / name) if kind == "safetensors" else torch.save(tensors, target / name)
    single = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (target / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())


def test_a_model_without_its_head_has_shorter_names(folder, copy):
    tensors = load_file(folder / "model.safetensors")
    save_file({key.removeprefix("model."): tensor for key, tensor in tensors.items()}, copy / "model.safetensors")
    assert_same_block(extract(copy, 1), extract(folder, 1))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("layer", [-1, NUM_LAYERS, 10**6])
def test_missing_layer_error_lists_the_available_layers(source, layer, request):
    with pytest.raises(ArtefactError, match=f"no layer {layer}; it has 3: choose 0 to 2, or last"):
        extract(request.getfixturevalue(source), layer)


@pytest.mark.parametrize(
    ("source", "others", "rest"),
    [
        ("folder", "model.layers.N.*", {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}),
        ("meta_parts", "layers.N.*", {"output.weight", "tok_embeddings.weight", "norm.weight", "rope.freqs"}),
        ("gguf_file", "blk.N.*", {"output.weight", "token_embd.weight", "output_norm.weight"}),
    ],
)
def test_skipped_tensors_are_logged_and_recorded_in_the_provenance(source, others, rest, request, caplog):
    with caplog.at_level(logging.DEBUG, logger="medseg_trt"):
        skipped = extract(request.getfixturevalue(source), 1).provenance["skipped"]
    assert skipped == {**dict.fromkeys(rest, 1), f"{others}, the other layers": 9 * (NUM_LAYERS - 1)}
    assert all(name in caplog.text for name in skipped)


def test_the_stored_frequencies_of_older_checkpoints_are_left_out_by_name(folder, copy):
    change_tensors(copy, lambda tensors: tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    block = extract(copy, 1)
    assert block.provenance["skipped"]["model.layers.1.self_attn.rotary_emb.inv_freq"] == 1
    assert_same_block(block, extract(folder, 1))


def test_the_stored_frequencies_of_metas_older_checkpoints_are_left_out_by_name(model, meta, tmp_path):
    frequencies = "layers.1.attention.inner_attention.rope.freqs"
    write_meta(tmp_path, model)
    torch.save(meta_tensors(model) | {frequencies: torch.ones(8)}, tmp_path / "consolidated.00.pth")
    block = extract(tmp_path, 1)
    assert block.provenance["skipped"][frequencies] == 1
    assert_same_block(block, extract(meta, 1))


def test_a_layer_number_without_end_is_no_layer(folder, copy):
    endless = f"model.layers.{'2' * 5000}.input_layernorm.weight"  # Python refuses to make a number of it
    change_tensors(copy, lambda tensors: tensors | {endless: torch.ones(64)})
    assert_same_block(extract(copy), extract(folder))


def test_scaled_rotary_angles_are_recorded_and_cannot_be_switched_on(folder, copy, model, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    older = {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    newer = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0}}
    del config["rope_parameters"]
    factors = gguf_tensors(model) | {"rope_freqs.weight": np.ones(8, np.float32)}
    blocks = {"factors": extract(write_gguf(tmp_path / "model.gguf", factors))}
    (tmp_path / "meta").mkdir()
    assert_scaled(extract(write_meta(tmp_path / "meta", model, use_scaled_rope=True)), "llama3")
    for name, rope in (("linear", older), ("llama3", newer)):
        (copy / "config.json").write_text(json.dumps(config | rope))
        blocks[name] = extract(copy)
    for name, block in blocks.items():
        assert_same_block(block, extract(folder))
        assert_scaled(block, name)


def assert_scaled(block: FrozenBlock, name: str) -> None:
    assert block.provenance["rope_scaling"] == name
    with pytest.raises(UsageError, match=f"'{name}' rotary scaling.*leave rotary off"):
        build_block(block, rotary=True)
