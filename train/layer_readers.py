"""Read one LLaMA decoder layer out of a GGUF file or out of a Hugging Face checkpoint; nothing else of it is loaded.

A reader is strict: every tensor of the layer is used or named as skipped, and a tensor that LLaMA's layer does not have
is an error, because then the layer is not LLaMA's.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from medseg_trt.errors import ArtefactError, require
from medseg_trt.files import sha256
from medseg_trt.spec import BlockSpec, from_dict
from medseg_trt.train.gguf_file import GgufFile, open_gguf
from medseg_trt.train.llama import LlamaBlock

LayerChoice = int | Literal["last"]
MAX_SIZE = 1 << 20  # of one axis of a layer; LLaMA-3 405B has 53248
MAX_JSON_BYTES = 1 << 24
HUGGING_FACE_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,6})\.")
GGUF_LAYER = re.compile(r"blk\.(\d{1,6})\.")
GGUF_NAMES: Mapping[str, str] = {  # llama.cpp's name -> Hugging Face's
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
HUGGING_FACE_NAMES: Mapping[str, str] = {name: name for name in GGUF_NAMES.values()}
SKIPPED_IN_LAYER = ("self_attn.rotary_emb.inv_freq",)  # follows from rope_theta; older checkpoints store it
MODEL_TYPES = ("llama", "mistral")  # the same layer; others with the same names compute something else (Gemma, Granite)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer as it was read: Hugging Face's tensor names, half-split rotary layout."""

    spec: BlockSpec
    tensors: dict[str, Tensor]
    provenance: dict[str, Any]


def read_gguf(path: Path, layer: LayerChoice) -> Layer:
    """Read one layer of a GGUF file of the architecture "llama"; quantised tensors become float32.

    llama.cpp stores the rows of q and k for interleaved rotary pairs; they are brought back to the half-split order.

    Raises:
        ArtefactError: the file is damaged, of another architecture, or has no such layer.
    """
    file = open_gguf(path)
    meta = file.metadata
    if (architecture := meta.get("general.architecture")) != "llama":
        raise ArtefactError(f"{path} is of the architecture {architecture!r}; only 'llama' can be read")
    spec = _gguf_spec(file)
    num_layers, index = _choose(layer, meta.get("llama.block_count"), path)
    keys, skipped = _match(file.tensors, GGUF_LAYER, index, GGUF_NAMES, path)
    try:
        check_layer(spec, {name: file.tensors[key].shape for name, key in keys.items()})
    except ValueError as error:
        raise ArtefactError(f"{path}: {error}") from error
    tensors = {name: file.read(key) for name, key in keys.items()}
    for name, heads in (("self_attn.q_proj.weight", spec.num_heads), ("self_attn.k_proj.weight", spec.num_kv_heads)):
        tensors[name] = half_split(tensors[name], heads)
    provenance = {
        "format": "gguf",
        "files": {path.name: sha256(path)},
        "model": meta.get("general.name"),
        "license": meta.get("general.license"),
        "architecture": architecture,
        "layer": index,
        "num_layers": num_layers,
        "tensor_types": {name: file.tensors[key].type_name for name, key in keys.items()},
        "skipped": skipped,
        "rope_layout": "half-split",
        "rope_scaling": "factors"
        if "rope_freqs.weight" in file.tensors
        else _scaling(meta.get("llama.rope.scaling.type")),
    }
    return Layer(spec=spec, tensors=tensors, provenance=provenance)


def read_hugging_face(source: Path, layer: LayerChoice) -> Layer:
    """Read one layer of a Hugging Face folder, or of one ``*.safetensors`` shard with ``config.json`` beside it.

    Raises:
        ArtefactError: a file is damaged or missing, the model is not LLaMA's kind, or there is no such layer.
    """
    folder = source if source.is_dir() else source.parent
    config = _read_json(folder / "config.json")
    spec = _hugging_face_spec(config, folder / "config.json")
    num_layers, index = _choose(layer, config.get("num_hidden_layers"), source)
    shards = _shards(source)
    keys, skipped = _match(shards, HUGGING_FACE_LAYER, index, HUGGING_FACE_NAMES, source)
    files = sorted({shards[key] for key in keys.values()})
    tensors: dict[str, Tensor] = {}
    for path in files:
        with open_safetensors(path) as file:
            tensors |= {name: file.get_tensor(key) for name, key in keys.items() if shards[key] == path}
    model = config.get("_name_or_path")
    provenance = {
        "format": "safetensors",
        "files": {path.name: sha256(path) for path in (folder / "config.json", *files)},
        "model": model
        if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", model)
        else None,  # no local paths
        "license": None,
        "architecture": config["model_type"],
        "layer": index,
        "num_layers": num_layers,
        "tensor_types": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        "skipped": skipped,
        "rope_layout": "half-split",
        "rope_scaling": _scaling(_rope(config).get("rope_type", _rope(config).get("type"))),
    }
    return Layer(spec=spec, tensors=tensors, provenance=provenance)


READERS: Mapping[str, Callable[[Path, LayerChoice], Layer]] = {  # by suffix; "" is a folder
    "": read_hugging_face,
    ".safetensors": read_hugging_face,
    ".gguf": read_gguf,
}


def check_layer(spec: BlockSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that these are the tensors of one layer of this geometry.

    Raises:
        ValueError: a tensor is missing, unknown, or has another shape.
    """
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in LlamaBlock(spec).state_dict().items()}
    if different := sorted(wanted.keys() ^ shapes.keys()):
        raise ValueError(f"{different[0]} is {'missing' if different[0] in wanted else 'no tensor of a LLaMA layer'}")
    for name, shape in shapes.items():
        if tuple(shape) != wanted[name]:
            raise ValueError(f"{name} has the shape {tuple(shape)}, but its geometry asks for {wanted[name]}")


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Reorder a q or k projection's rows: interleaved rotary pairs (llama.cpp, Meta) to half-split (Hugging Face)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def block_spec(values: Mapping[str, Any], source: Path) -> BlockSpec:
    """Make a geometry of values from outside; sizes that no real model has are refused before anything is allocated.

    Raises:
        ArtefactError: a value is missing, unknown or out of range.
    """
    for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
        if not isinstance(value := values.get(name), int) or not 0 < value <= MAX_SIZE:
            raise ArtefactError(f"{source}: {name} is {value!r}; it must be a whole number from 1 to {MAX_SIZE}")
    for name in ("rms_norm_eps", "rope_theta"):
        if not isinstance(value := values.get(name), int | float) or not 0 < value < math.inf:
            raise ArtefactError(f"{source}: {name} is {value!r}; it must be a positive number")
    return from_dict(BlockSpec, dict(values), str(source))


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file to read single tensors.

    Raises:
        ArtefactError: the file is damaged, also when that only shows while it is read.
    """
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtefactError(f"{path} is not a usable safetensors file: {error}") from error


def _gguf_spec(file: GgufFile) -> BlockSpec:
    meta = {key.removeprefix("llama."): value for key, value in file.metadata.items()}
    hidden, heads = meta.get("embedding_length"), meta.get("attention.head_count")
    head_dim = meta.get("attention.key_length", _share(hidden, heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.get(key, head_dim) != head_dim:
            raise ArtefactError(
                f"{file.path}: llama.{key} is {meta[key]}, but a head has {head_dim} columns; not supported"
            )
    return block_spec(
        {
            "hidden_size": hidden,
            "intermediate_size": meta.get("feed_forward_length"),
            "num_heads": heads,
            "num_kv_heads": meta.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": _shortest(meta.get("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(meta.get("rope.freq_base", 10000.0)),
        },
        file.path,
    )


def _hugging_face_spec(config: Mapping[str, Any], path: Path) -> BlockSpec:
    if (model_type := config.get("model_type")) not in MODEL_TYPES:
        raise ArtefactError(f"{path}: model_type is {model_type!r}; only {' and '.join(MODEL_TYPES)} can be read")
    for name, published in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if (value := config.get(name, published)) != published:
            raise ArtefactError(f"{path}: {name} is {value!r}, but LLaMA's layer has {published!r}; it cannot be read")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return block_spec(
        {
            "hidden_size": hidden,
            "intermediate_size": config.get("intermediate_size"),
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or _share(hidden, heads),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "rope_theta": config.get("rope_theta") or _rope(config).get("rope_theta", 10000.0),
        },
        path,
    )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how the rotary embedding is set up: ``rope_parameters`` since transformers 5, ``rope_scaling`` before."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope if isinstance(rope, dict) else {}


def _scaling(kind: Any) -> str | None:
    """Return the name of a change to the rotary angles that ``rope_theta`` does not describe, if there is one."""
    return None if kind in (None, "none", "default") else str(kind)


def _share(hidden: Any, heads: Any) -> Any:
    """Return the width of a head where a file does not give it; None where the numbers make no sense."""
    sensible = isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0
    return hidden // heads if sensible else None


def _shortest(value: Any) -> Any:
    """Return a float32 as the shortest decimal that means it: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _choose(layer: LayerChoice, num_layers: Any, source: Path) -> tuple[int, int]:
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ArtefactError(f"{source} does not say how many layers it has (it says {num_layers!r})")
    index = num_layers - 1 if layer == "last" else layer
    if not 0 <= index < num_layers:
        raise ArtefactError(
            f"{source} has no layer {layer}; it has {num_layers}: choose 0 to {num_layers - 1}, or last"
        )
    return num_layers, index


def _match(
    keys: Iterable[str], pattern: re.Pattern[str], index: int, names: Mapping[str, str], source: Path
) -> tuple[dict[str, str], dict[str, int]]:
    """Find the layer's tensors: Hugging Face's name -> the file's key, and how many keys were skipped, by group."""
    found: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    for key in keys:
        match = pattern.match(key)
        name = key[match.end() :] if match else key
        if match is not None and int(match[1]) != index:
            skipped[f"{match[0].replace(match[1], 'N')}*, the other layers"] += 1
        elif match is None or name in SKIPPED_IN_LAYER:
            skipped[key] += 1
        elif name not in names or names[name] in found:
            raise ArtefactError(f"{source}: {key} is no tensor of a LLaMA layer; this is another architecture")
        else:
            found[names[name]] = key
    if missing := [name for name, target in names.items() if target not in found]:
        raise ArtefactError(
            f"{source}: layer {index} lacks {', '.join(missing)}; if the model is split, "
            "give the folder or the part that has it"
        )
    return {name: found[name] for name in names.values()}, dict(sorted(skipped.items()))


def _shards(source: Path) -> dict[str, Path]:
    """Return every tensor's key and the file that it is in."""
    index = source / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
            raise ArtefactError(
                f"{index} has no weight_map from tensors to files of its own folder; it is not to be trusted"
            )
        return {key: source / name for key, name in weight_map.items()}
    file = source / "model.safetensors" if source.is_dir() else source
    if not file.is_file():
        raise ArtefactError(f"{source} has neither model.safetensors nor model.safetensors.index.json")
    with open_safetensors(file) as opened:
        return dict.fromkeys(opened.keys(), file)


def _is_file_name(name: Any) -> bool:
    """Tell whether this names a file in a folder and no way out of it.

    Links, as in Hugging Face's cache, are the owner's.
    """
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ArtefactError(f"{path} has more than {MAX_JSON_BYTES} bytes; it is not what its name says")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is needed beside the weights and cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds no JSON object")
    return content
