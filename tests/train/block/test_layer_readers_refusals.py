"""A file that is damaged, of another architecture or malicious is refused, and the error names the fault."""

import hashlib
import json
import pickle
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_models import (
    change_tensors,
    gguf_tensors,
    write_gguf,
)
from safetensors.torch import load_file
from torch import Tensor

from medseg_trt.errors import ArtefactError
from medseg_trt.train.block.blocks import extract


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
        "self_attn.k_proj.weight has the shape (64, 64), but its geometry requires (32, 64)",
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
        ({"num_hidden_layers": "3"}, "does not state its number of layers"),
        ({"intermediate_size": 128}, "has the shape (96, 64), but its geometry requires (128, 64)"),
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
        "mlp.up_proj.weight has the shape (64, 96), but its geometry requires (96, 64)",
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
        "does not state its number of layers",
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
def test_extract_refuses_files_of_other_content(name, content, copy):
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
    "location", ["../elsewhere/part.safetensors", "{outside}/part.safetensors", "deeper/part.safetensors", "", None, 3]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(location, copy, tmp_path_factory):
    """The file that it leads to is there and sound, so that only the check can refuse it."""
    outside = tmp_path_factory.mktemp("outside")
    weights = (copy / "model.safetensors").read_bytes()
    for other in (outside, copy / "deeper", copy.parent / "elsewhere"):
        other.mkdir(exist_ok=True)
        (other / "part.safetensors").write_bytes(weights)
    target = location.format(outside=outside) if isinstance(location, str) else location
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
    for name, recorded in (("/home/somebody/llama", None), ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf")):
        (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
        provenance = extract(copy).provenance
        assert provenance["model"] == recorded
        assert str(copy) not in json.dumps(provenance)
