"""One layer out of a language model: the same from every kind of file, and refused where it is not LLaMA's."""

import hashlib
import json
import logging
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.spec import BlockSpec
from medseg_trt.train.block import layer_readers
from medseg_trt.train.block.blocks import FrozenBlock, build_block, extract, extract_last, save_block
from medseg_trt.train.block.layer_geometry import half_split
from medseg_trt.train.block.layer_readers import GGUF_NAMES, META_NAMES

NUM_LAYERS = 3
SPEC = BlockSpec(
    hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=3e-5, rope_theta=5e4
)
SHARD_SIZE = "60KB"  # a layer has 123 kB, so that its tensors are spread over several files
# As in test_llama.py: everything is of size 1 and rounded to float32 some ten times.
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model(SPEC)


def make_model(spec: BlockSpec) -> LlamaForCausalLM:
    """Return a language model of random weights."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else noise / weight.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """Its Hugging Face folder with one file; do not write to it."""
    folder = tmp_path_factory.mktemp("one-file")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory) -> Path:
    """Its Hugging Face folder with many files; do not write to it."""
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    assert len(list(folder.glob("*.safetensors"))) > NUM_LAYERS
    return folder


@pytest.fixture(scope="module")
def gguf_file(model, tmp_path_factory) -> Path:
    """Its GGUF file in float32; do not write to it."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", gguf_tensors(model))


@pytest.fixture(scope="module")
def bin_folder(model, tmp_path_factory) -> Path:
    """Its Hugging Face folder as it was before safetensors; do not write to it."""
    folder = tmp_path_factory.mktemp("bin")
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def meta(model, tmp_path_factory) -> Path:
    """Its folder in Meta's layout, in one part; do not write to it."""
    return write_meta(tmp_path_factory.mktemp("meta"), model)


@pytest.fixture(scope="module")
def meta_parts(model, tmp_path_factory) -> Path:
    """Its folder in Meta's layout, for two GPUs; do not write to it."""
    return write_meta(tmp_path_factory.mktemp("meta-parts"), model, num_parts=2)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A Hugging Face folder to write to."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def meta_tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Return a model's tensors as Meta names and orders them: what Hugging Face's converter began with."""
    state, config = model.state_dict(), model.config
    tensors = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
        "rope.freqs": torch.ones(8),
    }
    heads = {"attention.wq.weight": config.num_attention_heads, "attention.wk.weight": config.num_key_value_heads}
    for index in range(NUM_LAYERS):
        for key, name in META_NAMES.items():
            rows = state[f"model.layers.{index}.{name}"].numpy()
            tensors[f"layers.{index}.{key}"] = torch.tensor(permuted(rows, heads.get(key, 0)))
    return tensors


# Source: meta-llama/llama model.py. ColumnParallelLinear keeps a share of the outputs, which are PyTorch's rows, and
# RowParallelLinear a share of the inputs; ParallelEmbedding a share of the columns.
ROWS_APART = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
COLUMNS_APART = ("wo.weight", "w2.weight", "tok_embeddings.weight")


def meta_share(key: str, tensor: Tensor, part: int, num_parts: int) -> Tensor:
    """Return what one of several GPUs holds of a tensor."""
    if key.endswith(ROWS_APART):
        return tensor.chunk(num_parts, 0)[part].clone()
    return tensor.chunk(num_parts, 1)[part].clone() if key.endswith(COLUMNS_APART) else tensor


def write_meta(folder: Path, model: LlamaForCausalLM, num_parts: int = 1, **params: Any) -> Path:
    """Write a model in Meta's layout; ``params`` are changes of params.json."""
    config = model.config
    known = {
        "dim": config.hidden_size,
        "n_layers": NUM_LAYERS,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "multiple_of": 32,
        "ffn_dim_multiplier": 0.5,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": SPEC.rope_theta,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(known | params))
    for part in range(num_parts):
        share = {key: meta_share(key, tensor, part, num_parts) for key, tensor in meta_tensors(model).items()}
        torch.save(share, folder / f"consolidated.{part:02}.pth")
    return folder


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Return a model's tensors as llama.cpp's converter names and orders them."""
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for index, layer in enumerate(model.model.layers):
        for name, key in GGUF_NAMES.items():
            tensors[f"blk.{index}.{name}"] = layer.get_parameter(key)
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    return {name: permuted(rows, heads.get(name.split(".")[-2], 0)) for name, rows in arrays.items()}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder q and k for interleaved rotary pairs. Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    if not heads:
        return rows
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    quantisation: str = "F32",
    architecture: str = "llama",
    changes: Mapping[str, Callable[[GGUFWriter], None]] | None = None,
) -> Path:
    """Write a GGUF file with the gguf package; matrices are quantised, vectors stay in float32."""
    writer = GGUFWriter(path, architecture)
    entries = {
        "name": lambda writer: writer.add_name("Generated"),
        "layers": lambda writer: writer.add_block_count(NUM_LAYERS),
        "hidden": lambda writer: writer.add_embedding_length(SPEC.hidden_size),
        "intermediate": lambda writer: writer.add_feed_forward_length(SPEC.intermediate_size),
        "heads": lambda writer: writer.add_head_count(SPEC.num_heads),
        "kv_heads": lambda writer: writer.add_head_count_kv(SPEC.num_kv_heads),
        "eps": lambda writer: writer.add_layer_norm_rms_eps(SPEC.rms_norm_eps),
        "theta": lambda writer: writer.add_rope_freq_base(SPEC.rope_theta),
        "rotary": lambda writer: writer.add_rope_dimension_count(SPEC.head_dim),
        "words": lambda writer: writer.add_token_list(["a", "b"]),
    }
    for add in {**entries, **(changes or {})}.values():
        add(writer)
    for name, tensor in tensors.items():
        kind = GGMLQuantizationType[quantisation if tensor.ndim > 1 else "F32"]
        with np.errstate(invalid="ignore"):  # where a test quantises what is not finite
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_block(found: FrozenBlock, expected: FrozenBlock) -> None:
    assert found.spec == expected.spec
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


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
        found = tokens
        for block in blocks:
            found = build_block(block, rotary=True, causal=True)(found)
        norm = blocks[-1].tensors["norm.weight"]
        found = torch.nn.functional.rms_norm(found, norm.shape, norm, SPEC.rms_norm_eps)
        return (found - expected).abs().max().item()


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
    assert [len(found) for found in digests.values()] == [1, 1]


def test_the_parity_of_the_end_catches_an_order_and_a_norm_that_are_wrong(model, folder):
    assert not torch.equal(model.model.norm.weight, torch.ones(SPEC.hidden_size))
    before, last = extract_last(folder, 2, final_norm=True)
    turned = [before, replace(last, tensors={**last.tensors, "norm.weight": last.tensors["norm.weight"].flip(0)})]
    swapped = [replace(last, tensors=layer_alone(last)), replace(before, tensors={**before.tensors, **norm_of(last)})]
    for wrong in (turned, swapped):
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
    with pytest.raises(ArtefactError, match="has 3 layers; 4 cannot be taken"):
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
    with pytest.raises(ArtefactError, match=rf"{re.escape(shard_name(1, kind))} is not there; the index says that it"):
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
def test_a_layer_that_is_not_there_says_which_are(source, layer, request):
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
def test_what_is_left_out_is_named_in_the_log_and_in_the_provenance(source, others, rest, request, caplog):
    with caplog.at_level(logging.INFO, logger="medseg_trt"):
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


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def test_a_layer_number_without_end_is_no_layer(folder, copy):
    endless = f"model.layers.{'2' * 5000}.input_layernorm.weight"  # Python refuses to make a number of it
    change_tensors(copy, lambda tensors: tensors | {endless: torch.ones(64)})
    assert_same_block(extract(copy), extract(folder))


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_nan(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    damaged = deepcopy(tensors[name])
    damaged.reshape(-1)[5] = np.nan
    return tensors | {name: damaged}


ATTENTION = "model.layers.2.self_attn"
BAD_TENSORS: Mapping[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (without(f"{ATTENTION}.o_proj.weight"), "layer 2 lacks self_attn.o_proj.weight"),
    "attention bias": (
        lambda tensors: tensors | {f"{ATTENTION}.q_proj.bias": torch.zeros(64)},
        f"{ATTENTION}.q_proj.bias is no tensor of a LLaMA layer",
    ),
    "norm of the queries": (
        lambda tensors: tensors | {f"{ATTENTION}.q_norm.weight": torch.ones(16)},
        f"{ATTENTION}.q_norm.weight is no tensor of a LLaMA layer",
    ),
    "experts": (
        lambda tensors: tensors | {"model.layers.2.block_sparse_moe.gate.weight": torch.ones(8, 64)},
        "model.layers.2.block_sparse_moe.gate.weight is no tensor of a LLaMA layer",
    ),
    "wrong shape": (
        lambda tensors: tensors | {f"{ATTENTION}.k_proj.weight": torch.ones(64, 64)},
        "self_attn.k_proj.weight has the shape (64, 64), but its geometry asks for (32, 64)",
    ),
    "not finite": (
        lambda tensors: with_nan(tensors, f"{ATTENTION}.v_proj.weight"),
        "self_attn.v_proj.weight holds values that are not finite",
    ),
    "whole numbers": (
        lambda tensors: tensors | {f"{ATTENTION}.k_proj.weight": torch.ones(32, 64, dtype=torch.int8)},
        "tensors of the type torch.int8",
    ),
    "twice": (
        lambda tensors: tensors | {"layers.2.input_layernorm.weight": torch.ones(64)},
        "has one tensor of layer 2 twice: layers.2.input_layernorm.weight and model.layers.2.input_layernorm.weight",
    ),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_a_folder_whose_layer_is_not_exactly_a_llama_layer_is_refused(fault, copy):
    change, problem = BAD_TENSORS[fault]
    change_tensors(copy, change)
    with pytest.raises(ArtefactError, match=f"^{re.escape(str(copy))}.*{re.escape(problem)}"):
        extract(copy)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; only llama and mistral can be read"),
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"model_type": None}, "model_type is None"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 10**30}, "hidden_size is 10"),
        ({"num_attention_heads": 0, "head_dim": 16}, "num_heads is 0"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta is inf"),
        ({"num_hidden_layers": "3"}, "does not say how many layers"),
        ({"intermediate_size": 128}, "has the shape (96, 64), but its geometry asks for (128, 64)"),
    ],
)
def test_a_config_of_another_architecture_or_without_sense_is_refused(changes, problem, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ArtefactError, match=f"^{re.escape(str(copy))}.*{re.escape(problem)}"):
        extract(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5, "\xff"])
def test_a_config_that_is_no_json_object_is_refused(text, copy):
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtefactError, match=r"config\.json"):
        extract(copy)


def test_a_folder_without_config_or_weights_says_what_is_missing(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(
        ArtefactError, match=r"has no weights: none of model\.safetensors, .*pytorch_model\.bin\.index\.json"
    ):
        extract(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ArtefactError, match=r"config\.json is needed beside the weights"):
        extract(copy)


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


BAD_GGUF: Mapping[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], dict[str, Any], str]] = {
    "another architecture": (dict, {"architecture": "qwen2"}, "architecture 'qwen2'; only 'llama' can be read"),
    "attention bias": (
        lambda tensors: tensors | {"blk.2.attn_q.bias": np.zeros(64, np.float32)},
        {},
        "blk.2.attn_q.bias is no tensor of a LLaMA layer",
    ),
    "experts": (
        lambda tensors: tensors | {"blk.2.ffn_gate_inp.weight": np.zeros((8, 64), np.float32)},
        {},
        "blk.2.ffn_gate_inp.weight is no tensor",
    ),
    "missing": (without("blk.2.attn_v.weight"), {}, "layer 2 lacks attn_v.weight"),
    "wrong shape": (
        lambda tensors: tensors | {"blk.2.ffn_up.weight": np.zeros((64, 96), np.float32)},
        {},
        "mlp.up_proj.weight has the shape (64, 96), but its geometry asks for (96, 64)",
    ),
    "not finite": (
        lambda tensors: with_nan(tensors, "blk.2.ffn_norm.weight"),
        {},
        "post_attention_layernorm.weight holds values that are not finite",
    ),
    "quantised, not finite": (
        lambda tensors: with_nan(tensors, "blk.2.ffn_down.weight"),
        {"quantisation": "Q8_0"},
        "mlp.down_proj.weight holds values that are not finite",
    ),
    "values of another width": (
        dict,
        {"changes": {"value": lambda writer: writer.add_value_length(8)}},
        "llama.attention.value_length is 8, but a head has 16 columns",
    ),
    "rotary embedding of half a head": (
        dict,
        {"changes": {"rotary": lambda writer: writer.add_rope_dimension_count(8)}},
        "llama.rope.dimension_count is 8, but a head has 16 columns",
    ),
    "key/value heads that differ from layer to layer": (
        dict,
        {"changes": {"kv_heads": lambda writer: writer.add_head_count_kv([2, 2, 4])}},
        "num_kv_heads is None",
    ),
    "no number of layers": (
        dict,
        {"changes": {"layers": lambda writer: None}},
        "does not say how many layers it has",
    ),
    "no eps": (dict, {"changes": {"eps": lambda writer: None}}, "rms_norm_eps is None"),
}


@pytest.mark.parametrize("fault", BAD_GGUF)
def test_a_gguf_file_whose_layer_is_not_exactly_a_llama_layer_is_refused(fault, model, tmp_path):
    change, options, problem = BAD_GGUF[fault]
    path = write_gguf(tmp_path / "model.gguf", change(gguf_tensors(model)), **options)
    with pytest.raises(ArtefactError, match=f"^{re.escape(str(path))}.*{re.escape(problem)}"):
        extract(path)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "pytorch_model.bin", "consolidated.00.pth"])
def test_a_pickle_is_refused_under_every_name_and_runs_nothing(name, copy, meta):
    (copy / "params.json").write_bytes((meta / "params.json").read_bytes())
    (copy / name).write_bytes(pickle.dumps(Touch(copy / "touched")))
    with pytest.raises(ArtefactError, match=re.escape(name)):
        extract(copy / name)
    assert not (copy / "touched").exists()
    pickle.loads((copy / name).read_bytes())
    assert (copy / "touched").exists()  # it would have


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "weights.txt", "weights"])
@pytest.mark.parametrize("content", [b"", b"once upon a time there was a layer\n" * 100, bytes(4096)])
def test_a_file_of_something_else_is_refused(name, content, copy):
    (copy / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=re.escape(str(copy / name))):
        extract(copy / name)


def test_a_safetensors_file_cut_short_anywhere_is_refused(copy):
    whole = (copy / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (1, 7, 8, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        (copy / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ArtefactError, match=r"model\.safetensors is not a usable safetensors file"):
            extract(copy)


def test_a_source_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(
        ArtefactError, match=r"absent\.gguf does not exist; give a Hugging Face or Meta folder, or a .*\.pth"
    ):
        extract(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    "place", ["../elsewhere/part.safetensors", "{outside}/part.safetensors", "deeper/part.safetensors", "", None, 3]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(place, copy, tmp_path_factory):
    """The file that it leads to is there and sound, so that only the check can refuse it."""
    outside = tmp_path_factory.mktemp("outside")
    weights = (copy / "model.safetensors").read_bytes()
    for other in (outside, copy / "deeper", copy.parent / "elsewhere"):
        other.mkdir(exist_ok=True)
        (other / "part.safetensors").write_bytes(weights)
    target = place.format(outside=outside) if isinstance(place, str) else place
    keys = load_file(copy / "model.safetensors").keys()
    (copy / "model.safetensors").unlink()
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, target)}))
    with pytest.raises(ArtefactError, match=r"index\.json has no weight_map from tensors to files of its own folder"):
        extract(copy)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": None}, {"weight_map": "model.safetensors"}])
def test_an_index_without_a_weight_map_is_refused(content, copy):
    (copy / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=r"index\.json has no weight_map"):
        extract(copy)


def test_an_index_that_promises_what_a_shard_does_not_have_is_refused(copy):
    keys = list(load_file(copy / "model.safetensors"))
    change_tensors(copy, without("model.layers.2.mlp.up_proj.weight"))
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "model.safetensors")}))
    with pytest.raises(ArtefactError, match=r"model\.safetensors .*model\.layers\.2\.mlp\.up_proj\.weight"):
        extract(copy)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "absent.safetensors")}))
    with pytest.raises(ArtefactError, match=r"absent\.safetensors"):
        extract(copy)


def test_the_provenance_names_every_file_by_digest_and_no_path_of_this_machine(sharded, meta_parts, gguf_file, copy):
    for source, described in ((sharded, {"config.json"}), (meta_parts, {"params.json"}), (gguf_file, set())):
        files = extract(source, 1).provenance["files"]
        parent = source if source.is_dir() else source.parent
        assert files == {name: hashlib.sha256((parent / name).read_bytes()).hexdigest() for name in files}
        assert {name for name in files if name.endswith(".json")} == described
    assert len(extract(meta_parts).provenance["files"]) == 3
    config = json.loads((copy / "config.json").read_text())
    for name, told in (("/home/somebody/llama", None), ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf")):
        (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
        provenance = extract(copy).provenance
        assert provenance["model"] == told
        assert str(copy) not in json.dumps(provenance)
