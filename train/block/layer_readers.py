"""Read LLaMA decoder layers from a Hugging Face, Meta or GGUF checkpoint; no other tensor is loaded."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from medseg_trt.errors import ArtefactError
from medseg_trt.files import sha256
from medseg_trt.spec import BlockSpec
from medseg_trt.train.block.gguf_file import GgufFile, open_gguf
from medseg_trt.train.block.hugging_face_folder import open_hugging_face
from medseg_trt.train.block.layer_choice import LayerChoice, Layout, match
from medseg_trt.train.block.layer_geometry import block_spec, check_layer, half_split, head_dim_of
from medseg_trt.train.block.meta_file import MetaFile, open_meta, part_paths
from medseg_trt.train.tensor_files.weight_files import read_json

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
META_NAMES: Mapping[str, str] = {  # Meta's name -> Hugging Face's
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
HUGGING_FACE_LAYOUT = Layout(
    pattern=re.compile(r"(?:model\.)?layers\.(\d{1,6})\."),
    names={name: name for name in GGUF_NAMES.values()},
    final_norm=("model.norm.weight", "norm.weight"),
)
META_LAYOUT = Layout(pattern=re.compile(r"layers\.(\d{1,6})\."), names=META_NAMES, final_norm=("norm.weight",))
GGUF_LAYOUT = Layout(pattern=re.compile(r"blk\.(\d{1,6})\."), names=GGUF_NAMES, final_norm=("output_norm.weight",))
MODEL_TYPES = ("llama", "mistral")  # the same layer; others with the same tensor names differ (Gemma, Granite)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer as read: Hugging Face's tensor names, half-split rotary layout.

    The last chosen layer may include the language model's final norm, ``norm.weight``.
    """

    spec: BlockSpec
    tensors: dict[str, Tensor]
    provenance: dict[str, Any]


def read_gguf(path: Path, choice: LayerChoice) -> tuple[Layer, ...]:
    """Read layers of a GGUF file of the architecture "llama"; quantised tensors become float32.

    llama.cpp stores the rows of q and k for interleaved rotary pairs; they are reordered to half-split.

    Raises:
        ArtefactError: the file is damaged, of another architecture, or has no such layer.
    """
    file = open_gguf(path)
    meta = file.metadata
    if (architecture := meta.get("general.architecture")) != "llama":
        raise ArtefactError(f"{path} is of the architecture {architecture!r}; only 'llama' can be read")
    spec = _gguf_spec(file)
    selection = match(choice, meta.get("llama.block_count"), file.tensors, GGUF_LAYOUT, path)
    for keys in selection.layers.values():
        _check(spec, {name: file.tensors[key].shape for name, key in keys.items()}, path)
    files = {path.name: sha256(path)}
    return tuple(
        Layer(
            spec=spec,
            tensors=_half_split_q_and_k({name: file.read(key) for name, key in keys.items()}, spec),
            provenance={
                "format": "gguf",
                "files": files,
                "model": meta.get("general.name"),
                "license": meta.get("general.license"),
                "architecture": architecture,
                "layer": number,
                "num_layers": selection.num_layers,
                "tensor_types": {name: file.tensors[key].type_name for name, key in keys.items()},
                "skipped": selection.skipped,
                "rope_layout": "half-split",
                "rope_scaling": "factors"
                if "rope_freqs.weight" in file.tensors
                else _scaling(meta.get("llama.rope.scaling.type")),
            },
        )
        for number, keys in selection.layers.items()
    )


def read_folder(source: Path, choice: LayerChoice) -> tuple[Layer, ...]:
    """Read layers of a folder in Hugging Face's layout, or in Meta's if it has no ``config.json``.

    Raises:
        ArtefactError: as :func:`read_hugging_face` and :func:`read_meta`.
    """
    is_meta = not (source / "config.json").is_file() and bool(part_paths(source))
    return (read_meta if is_meta else read_hugging_face)(source, choice)


def read_hugging_face(source: Path, choice: LayerChoice) -> tuple[Layer, ...]:
    """Read layers of a Hugging Face folder, or of one ``*.safetensors`` or ``*.bin`` with ``config.json`` beside it.

    Raises:
        ArtefactError: a file is damaged or missing, the model is of another architecture, or has no such layer.
    """
    folder = source if source.is_dir() else source.parent
    config = read_json(folder / "config.json")
    spec = _hugging_face_spec(config, folder / "config.json")
    shards = open_hugging_face(source)
    num_layers = config.get("num_hidden_layers")
    selection = match(choice, num_layers, shards.file_of_key, HUGGING_FACE_LAYOUT, source, shards.elsewhere)
    values = shards.read(selection.keys)
    files = shards.files(selection.keys)
    digests = {path: sha256(path) for path in (folder / "config.json", *files)}
    model = config.get("_name_or_path")
    layers: list[Layer] = []
    for number, keys in selection.layers.items():
        tensors = {name: values[key] for name, key in keys.items()}
        provenance = {
            "format": files[0].suffix.lower().removeprefix("."),
            "files": {path.name: digests[path] for path in (folder / "config.json", *shards.files(keys.values()))},
            "model": model
            if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", model)
            else None,  # no local paths
            "license": None,
            "architecture": config["model_type"],
            "layer": number,
            "num_layers": selection.num_layers,
            "tensor_types": _type_names(tensors),
            "skipped": selection.skipped,
            "rope_layout": "half-split",
            "rope_scaling": _scaling(_rope(config).get("rope_type", _rope(config).get("type"))),
        }
        layers.append(Layer(spec=spec, tensors=tensors, provenance=provenance))
    return tuple(layers)


def read_meta(source: Path, choice: LayerChoice) -> tuple[Layer, ...]:
    """Read layers of Meta's ``consolidated.NN.pth`` with ``params.json`` beside them; the parts are joined.

    Meta stores the rows of q and k for interleaved rotary pairs; they are reordered to half-split.

    Raises:
        ArtefactError: a part is damaged or missing or holds code, or the layer does not exist.
    """
    file = open_meta(source)
    selection = match(choice, file.params.get("n_layers"), file.keys(), META_LAYOUT, source)
    shapes = [{name: file.shape(key) for name, key in keys.items()} for keys in selection.layers.values()]
    spec = _meta_spec(file, shapes[0]["mlp.gate_proj.weight"][0])
    _check_parts(file, shapes[0]["self_attn.q_proj.weight"][0], spec)
    for of_layer in shapes:
        _check(spec, of_layer, source)
    files = {path.name: sha256(path) for path in (file.params_path, *file.parts)}
    layers: list[Layer] = []
    for number, keys in selection.layers.items():
        tensors = _half_split_q_and_k({name: file.read(key) for name, key in keys.items()}, spec)
        provenance = {
            "format": "meta",
            "files": files,
            "model": None,
            "license": None,
            "architecture": "llama",
            "layer": number,
            "num_layers": selection.num_layers,
            "tensor_types": _type_names(tensors),
            "skipped": selection.skipped,
            "rope_layout": "half-split",
            "rope_scaling": "llama3" if file.params.get("use_scaled_rope") else None,
        }
        layers.append(Layer(spec=spec, tensors=tensors, provenance=provenance))
    return tuple(layers)


READERS: Mapping[str, Callable[[Path, LayerChoice], tuple[Layer, ...]]] = {  # by suffix; "" is a folder
    "": read_folder,
    ".safetensors": read_hugging_face,
    ".bin": read_hugging_face,
    ".pth": read_meta,
    ".gguf": read_gguf,
}


def _gguf_spec(file: GgufFile) -> BlockSpec:
    meta = {key.removeprefix("llama."): value for key, value in file.metadata.items()}
    hidden, heads = meta.get("embedding_length"), meta.get("attention.head_count")
    head_dim = meta.get("attention.key_length", head_dim_of(hidden, heads))
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
            "head_dim": config.get("head_dim") or head_dim_of(hidden, heads),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "rope_theta": config.get("rope_theta") or _rope(config).get("rope_theta", 10000.0),
        },
        path,
    )


def _meta_spec(file: MetaFile, intermediate_size: int) -> BlockSpec:
    params = file.params
    return block_spec(
        {
            "hidden_size": params.get("dim"),
            "intermediate_size": intermediate_size,  # params.json has only the value before rounding
            "num_heads": params.get("n_heads"),
            "num_kv_heads": params.get("n_kv_heads") or params.get("n_heads"),
            "head_dim": params.get("head_dim") or head_dim_of(params.get("dim"), params.get("n_heads")),
            "rms_norm_eps": params.get("norm_eps"),
            "rope_theta": params.get("rope_theta") or 10000.0,
        },
        file.params_path,
    )


def _check_parts(file: MetaFile, query_rows: int, spec: BlockSpec) -> None:
    """Report the first missing part if the query rows divide into equal parts."""
    num_parts, wanted_rows = len(file.parts), spec.num_heads * spec.head_dim
    rows_of_part = query_rows // num_parts
    if num_parts * rows_of_part < wanted_rows and rows_of_part and wanted_rows % rows_of_part == 0:
        raise ArtefactError(
            f"{file.params_path.parent} has {num_parts} of {wanted_rows // rows_of_part} parts; "
            f"consolidated.{num_parts:02}.pth is missing, and every part is needed"
        )


def _check(spec: BlockSpec, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    try:
        check_layer(spec, shapes)
    except ValueError as error:
        raise ArtefactError(f"{source}: {error}") from error


def _half_split_q_and_k(tensors: dict[str, Tensor], spec: BlockSpec) -> dict[str, Tensor]:
    query, key = "self_attn.q_proj.weight", "self_attn.k_proj.weight"
    return tensors | {
        query: half_split(tensors[query], spec.num_heads),
        key: half_split(tensors[key], spec.num_kv_heads),
    }


def _type_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rotary settings: ``rope_parameters`` since transformers 5, ``rope_scaling`` before."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope if isinstance(rope, dict) else {}


def _scaling(kind: Any) -> str | None:
    """Return the name of the rotary scaling, which ``rope_theta`` does not describe; None without scaling."""
    return None if kind in (None, "none", "default") else str(kind)


def _shortest(value: Any) -> Any:
    """Return a float32 as the shortest decimal that rounds to it: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
