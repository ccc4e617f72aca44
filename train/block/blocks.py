"""The frozen LLaMA block: extracted from a language model's checkpoint into one small safetensors file.

The file contains one decoder layer, or several consecutive layers of one model, whose tensors are called ``0.…``,
``1.…``. The metadata contain the geometry and the provenance. Equal blocks have equal bytes, so a checkpoint can
identify its block by SHA-256.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg_trt import __version__
from medseg_trt.errors import ArtefactError, UsageError, require
from medseg_trt.files import atomic_file, sha256
from medseg_trt.progress import LOG
from medseg_trt.spec import BlockSpec, to_dict
from medseg_trt.train.block.layer_choice import FINAL_NORM, LayerChoice, LayerNumber
from medseg_trt.train.block.layer_geometry import block_spec, check_layer
from medseg_trt.train.block.layer_readers import READERS
from medseg_trt.train.block.llama import LlamaBlock
from medseg_trt.train.tensor_files.weight_files import is_finite, open_safetensors

SCHEMA = 1
METADATA_KEY = "medseg_trt"  # a single entry, because safetensors writes several in random order
MAX_METADATA_BYTES = 1 << 20
SUFFIXES = ", ".join(filter(None, READERS))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenBlock:
    """The weights of one LLaMA decoder layer, all of one type, with geometry and provenance.

    ``tensors`` have Hugging Face's names and half-split rotary layout; the optional ``norm.weight`` is the language
    model's norm after its last layer. ``provenance`` is JSON-serialisable.
    """

    spec: BlockSpec
    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_layer(self.spec, {name: tuple(tensor.shape) for name, tensor in self.tensors.items()})
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            raise ValueError(f"its tensors are {', '.join(sorted(map(str, dtypes)))}; all must be one of {DTYPES}")
        for name, tensor in self.tensors.items():
            if not is_finite(tensor):
                raise ValueError(f"{name} holds values that are not finite")

    @property
    def num_parameters(self) -> int:
        """The number of weights."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def extract(source: Path, layer: LayerNumber = "last", *, final_norm: bool = False) -> FrozenBlock:
    """Read one decoder layer of a language model, or of a block file.

    Args:
        source: a Hugging Face folder, one ``.safetensors`` or ``.bin`` shard of it with ``config.json`` beside it,
            Meta's folder or ``consolidated.00.pth`` with ``params.json`` beside it, a GGUF file, or a block file.
        layer: which layer, from 0, or "last".
        final_norm: also read the language model's norm after its last layer; always kept from a block file.

    Raises:
        ArtefactError: the source is missing, damaged, of another architecture, or has no such layer or norm.
    """
    return _extract(source, LayerChoice(layer=layer, final_norm=final_norm))[0]


def extract_last(source: Path, count: int, *, final_norm: bool = False) -> tuple[FrozenBlock, ...]:
    """Read the last ``count`` decoder layers in order; arguments and errors are those of :func:`extract`."""
    if count < 1:
        raise UsageError(f"{count} layers cannot be taken; give 1 or more")
    return _extract(source, LayerChoice(count=count, final_norm=final_norm))


def _extract(source: Path, choice: LayerChoice) -> tuple[FrozenBlock, ...]:
    suffix = "" if source.is_dir() else source.suffix.lower()
    if not source.exists() or suffix not in READERS:
        problem = "cannot be read" if source.exists() else "does not exist"
        raise ArtefactError(f"{source} {problem}; give a Hugging Face or Meta folder, or a {SUFFIXES} file")
    if suffix == ".safetensors" and _is_block_file(source):
        return _chosen(load_block(source), choice, source)
    LOG.info("read %s of %s", choice, source)
    layers = READERS[suffix](source, choice)
    LOG.debug("not needed by the block: %s", ", ".join(layers[0].provenance["skipped"]) or "nothing")
    return tuple(
        _checked(layer.spec, _same_type(layer.tensors, source), {**layer.provenance, "medseg_trt": __version__}, source)
        for layer in layers
    )


def _chosen(blocks: Sequence[FrozenBlock], choice: LayerChoice, source: Path) -> tuple[FrozenBlock, ...]:
    """Return the chosen layers of a block file."""
    chosen = [block for block in blocks if choice.layer in ("last", block.provenance.get("layer"))][-choice.count :]
    if len(chosen) < choice.count:
        request = f"no layer {choice.layer}; leave the layer out" if choice.count == 1 else f"{len(blocks)} layer(s)"
        raise ArtefactError(f"{source} is an extracted block and holds {request}")
    if choice.final_norm and FINAL_NORM not in chosen[-1].tensors:
        raise ArtefactError(
            f"{source} is an extracted block without the final norm; extract it again from the language model"
        )
    return tuple(chosen)


def random_block(spec: BlockSpec, seed: int, std: float = 0.02) -> FrozenBlock:
    """Return a block of seeded normal weights, equal on every machine; the norms are ones.

    Args:
        spec: its geometry.
        seed: of NumPy's generator.
        std: the standard deviation; 0.02 is LLaMA's initialisation.
    """
    random = np.random.default_rng(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaBlock(spec).state_dict().items()}
    tensors = {
        name: torch.ones(shape) if "norm" in name else torch.from_numpy(random.standard_normal(shape, np.float32)) * std
        for name, shape in shapes.items()
    }
    provenance = {"format": "random", "seed": seed, "std": std, "rope_layout": "half-split", "medseg_trt": __version__}
    return FrozenBlock(spec=replace(spec, rotary=False, causal=False), tensors=tensors, provenance=provenance)


def build_block(block: FrozenBlock, *, rotary: bool = False, causal: bool = False) -> LlamaBlock:
    """Build the frozen module of one layer in float32 and evaluation mode, without the final norm.

    Args:
        block: its weights.
        rotary: use the rotary embedding, which the published model does not.
        causal: use the causal mask, which the published model does not.

    Raises:
        UsageError: the weights were trained with scaled rotary angles, which are not implemented.
    """
    if rotary and (scaling := block.provenance.get("rope_scaling")):
        raise UsageError(
            f"the block was trained with {scaling!r} rotary scaling, which is not supported; leave rotary off"
        )
    with torch.device("meta"):
        module = LlamaBlock(replace(block.spec, rotary=rotary, causal=causal))
    module.load_state_dict({name: block.tensors[name].float() for name in module.state_dict()}, assign=True)
    return module.requires_grad_(False).eval()


def save_block(block: FrozenBlock | Sequence[FrozenBlock], path: Path) -> str:
    """Write the layers of a block as safetensors, atomically; equal blocks give equal bytes.

    Returns:
        The file's SHA-256.

    Raises:
        ValueError: no layers, or layers of different geometries.
    """
    safetensors_torch = require("safetensors.torch", "train")
    layers = (block,) if isinstance(block, FrozenBlock) else tuple(block)
    if len({layer.spec for layer in layers}) != 1:
        raise ValueError("a block has one layer or more, all of one geometry")
    header = {"schema": SCHEMA, "spec": to_dict(layers[0].spec), "provenance": provenance_of(layers)}
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True, allow_nan=False)}
    prefixes = [""] if len(layers) == 1 else [f"{number}." for number in range(len(layers))]
    tensors = {
        prefix + name: tensor.contiguous()
        for prefix, layer in zip(prefixes, layers, strict=True)
        for name, tensor in layer.tensors.items()
    }
    with atomic_file(path) as temporary:
        safetensors_torch.save_file(tensors, temporary, metadata)
        digest = sha256(temporary)
    return digest


def load_block(path: Path, digest: str | None = None) -> tuple[FrozenBlock, ...]:
    """Read the layers of a block that :func:`save_block` wrote, in the model's order.

    Args:
        path: the safetensors file.
        digest: the expected SHA-256, which is checked before the file is parsed.

    Raises:
        ArtefactError: the file is missing, damaged, not a block, or has another digest.
    """
    if not path.is_file():
        raise ArtefactError(f"{path} does not exist; make it: medseg-trt block extract SOURCE -o {path}")
    if digest is not None and (actual_digest := sha256(path)) != digest:
        raise ArtefactError(f"{path} is another block: its SHA-256 is {actual_digest[:12]}…, expected {digest[:12]}…")
    with open_safetensors(path) as file:
        header = _header(file.metadata() or {}, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    spec, provenances = block_spec(header["spec"], path), _provenances(header["provenance"], path)
    parts = [tensors] if len(provenances) == 1 else _tensors_of_layers(tensors, len(provenances), path)
    return tuple(_checked(spec, part, origin, path) for part, origin in zip(parts, provenances, strict=True))


def provenance_of(blocks: Sequence[FrozenBlock]) -> dict[str, Any]:
    """Return the provenance of the layers of one file: that of the only layer, or ``{"layers": [...]}``."""
    if len(blocks) == 1:
        return dict(blocks[0].provenance)
    return {"layers": [dict(block.provenance) for block in blocks]}


def _provenances(provenance: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    if "layers" not in provenance:
        return [provenance]
    layers = provenance["layers"]
    sound = isinstance(layers, list) and len(layers) > 1 and all(isinstance(layer, dict) for layer in layers)
    if not sound or len(provenance) > 1:
        raise ArtefactError(f"{path} has a damaged header: provenance.layers is no list of several layers")
    return layers


def _tensors_of_layers(tensors: Mapping[str, Tensor], num_layers: int, path: Path) -> list[dict[str, Tensor]]:
    """Group the tensors of a file by layer."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        if not re.fullmatch(r"0|[1-9]\d{0,5}", number) or int(number) >= num_layers:
            raise ArtefactError(f"{path}: {key} is no tensor of one of its {num_layers} layers")
        parts[int(number)][name] = tensor
    return parts


def _is_block_file(path: Path) -> bool:
    with open_safetensors(path) as file:
        return METADATA_KEY in (file.metadata() or {})


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise ArtefactError(
            f"{path} is no extracted block; make one: medseg-trt block extract {path} -o block.safetensors"
        )
    if len(text) > MAX_METADATA_BYTES or len(metadata) > 1:
        raise ArtefactError(f"{path} has more metadata than a block; it is not trusted")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        schema = header.get("schema") if isinstance(header, dict) else None
        raise ArtefactError(f"{path} has block schema {schema!r}; this version reads {SCHEMA}. Extract the block again")
    kinds = {"schema": int, "spec": dict, "provenance": dict}
    if header.keys() != kinds.keys() or not all(isinstance(header[name], kind) for name, kind in kinds.items()):
        raise ArtefactError(f"{path} has a damaged header: expected {', '.join(kinds)}, found {', '.join(header)}")
    return header


def _same_type(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Convert tensors of different types to float32; keep a common type."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if unusable := sorted(str(dtype) for dtype in dtypes - set(DTYPES)):
        raise ArtefactError(f"{source} has tensors of the type {', '.join(unusable)}; only {DTYPES} can be read")
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _checked(
    spec: BlockSpec, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any], source: Path
) -> FrozenBlock:
    try:
        return FrozenBlock(spec=spec, tensors=tensors, provenance=provenance)
    except ValueError as error:
        raise ArtefactError(f"{source}: {error}") from error
