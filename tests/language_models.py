"""Generated language models of random weights, and their files in every layout that the readers know."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from medseg_trt.spec import BlockSpec
from medseg_trt.train.block.layer_readers import GGUF_NAMES, META_NAMES

NUM_LAYERS = 3
SPEC = BlockSpec(
    hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=3e-5, rope_theta=5e4
)
SHARD_SIZE = "60KB"  # a layer has 123 kB, so that its tensors are spread over several files


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


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write ``model.safetensors`` of a folder again, changed."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
