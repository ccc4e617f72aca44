"""What our weights are called elsewhere: in Google's ``.npz`` files, in timm, and in the authors' checkpoints.

Each table goes from our name to another file's, with the way in which the tensor lies there.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from medseg_trt.train.block.layer_readers import META_NAMES

Layout = Literal["same", "hwio", "flat", "transposed", "heads_in", "heads_out", "position", "query", "key", "value"]
Rule = tuple[str, Callable[[re.Match[str]], str], Layout]

SCALE = {"weight": "scale", "bias": "bias"}  # of a norm: PyTorch's word -> Flax's
PROJECTIONS: Mapping[str, Layout] = {"query": "query", "key": "key", "value": "value"}
META_NAME = {ours: theirs for theirs, ours in META_NAMES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Elsewhere:
    """Where one of our tensors is in another file."""

    name: str
    layout: Layout  # "same", or as ``pretrained.LAYOUTS`` explains it


def names_elsewhere(rules: Sequence[Rule], ours: Iterable[str]) -> dict[str, Elsewhere]:
    """Return where each of our tensors is.

    Raises:
        KeyError: no rule knows one of them.
    """
    return {name: _elsewhere(rules, name) for name in ours}


def _elsewhere(rules: Sequence[Rule], name: str) -> Elsewhere:
    for pattern, write, layout in rules:
        if (match := re.fullmatch(pattern, name)) is not None:
            return Elsewhere(name=write(match), layout=layout)
    raise KeyError(name)


def _next(number: str) -> int:
    return int(number) + 1


NORM, WEIGHT_OR_BIAS = r"(weight|bias)", r"(weight|bias)"
BOTTLENECK = r"resnet\.block(\d)\.(\d+)\."
NPZ: Sequence[Rule] = (
    (r"resnet\.root\.0\.weight", lambda m: "conv_root/kernel", "hwio"),
    (rf"resnet\.root\.1\.{NORM}", lambda m: f"gn_root/{SCALE[m[1]]}", "flat"),
    (rf"{BOTTLENECK}conv(\d)\.weight", lambda m: f"block{m[1]}/unit{_next(m[2])}/conv{m[3]}/kernel", "hwio"),
    (rf"{BOTTLENECK}gn(\d)\.{NORM}", lambda m: f"block{m[1]}/unit{_next(m[2])}/gn{m[3]}/{SCALE[m[4]]}", "flat"),
    (rf"{BOTTLENECK}shortcut\.0\.weight", lambda m: f"block{m[1]}/unit{_next(m[2])}/conv_proj/kernel", "hwio"),
    (rf"{BOTTLENECK}shortcut\.1\.{NORM}", lambda m: f"block{m[1]}/unit{_next(m[2])}/gn_proj/{SCALE[m[3]]}", "flat"),
    (r"patch_embedding\.weight", lambda m: "embedding/kernel", "hwio"),
    (r"patch_embedding\.bias", lambda m: "embedding/bias", "flat"),
    (r"position_embedding", lambda m: "Transformer/posembed_input/pos_embedding", "position"),
    (
        rf"layers\.(\d+)\.attention_norm\.{NORM}",
        lambda m: f"Transformer/encoderblock_{m[1]}/LayerNorm_0/{SCALE[m[2]]}",
        "flat",
    ),
    (
        rf"layers\.(\d+)\.mlp_norm\.{NORM}",
        lambda m: f"Transformer/encoderblock_{m[1]}/LayerNorm_2/{SCALE[m[2]]}",
        "flat",
    ),
    (
        r"layers\.(\d+)\.attention\.(query|key|value)\.weight",
        lambda m: f"Transformer/encoderblock_{m[1]}/MultiHeadDotProductAttention_1/{m[2]}/kernel",
        "heads_in",
    ),
    (
        r"layers\.(\d+)\.attention\.out\.weight",
        lambda m: f"Transformer/encoderblock_{m[1]}/MultiHeadDotProductAttention_1/out/kernel",
        "heads_out",
    ),
    (
        r"layers\.(\d+)\.attention\.(query|key|value|out)\.bias",
        lambda m: f"Transformer/encoderblock_{m[1]}/MultiHeadDotProductAttention_1/{m[2]}/bias",
        "flat",
    ),
    (
        r"layers\.(\d+)\.fc(\d)\.weight",
        lambda m: f"Transformer/encoderblock_{m[1]}/MlpBlock_3/Dense_{int(m[2]) - 1}/kernel",
        "transposed",
    ),
    (
        r"layers\.(\d+)\.fc(\d)\.bias",
        lambda m: f"Transformer/encoderblock_{m[1]}/MlpBlock_3/Dense_{int(m[2]) - 1}/bias",
        "flat",
    ),
    (rf"encoder_norm\.{NORM}", lambda m: f"Transformer/encoder_norm/{SCALE[m[1]]}", "flat"),
)

STAGE = "patch_embed.backbone.stages"
TIMM: Sequence[Rule] = (
    (r"resnet\.root\.0\.weight", lambda m: "patch_embed.backbone.stem.conv.weight", "same"),
    (rf"resnet\.root\.1\.{NORM}", lambda m: f"patch_embed.backbone.stem.norm.{m[1]}", "same"),
    (rf"{BOTTLENECK}conv(\d)\.weight", lambda m: f"{STAGE}.{int(m[1]) - 1}.blocks.{m[2]}.conv{m[3]}.weight", "same"),
    (rf"{BOTTLENECK}gn(\d)\.{NORM}", lambda m: f"{STAGE}.{int(m[1]) - 1}.blocks.{m[2]}.norm{m[3]}.{m[4]}", "same"),
    (
        rf"{BOTTLENECK}shortcut\.0\.weight",
        lambda m: f"{STAGE}.{int(m[1]) - 1}.blocks.{m[2]}.downsample.conv.weight",
        "same",
    ),
    (
        rf"{BOTTLENECK}shortcut\.1\.{NORM}",
        lambda m: f"{STAGE}.{int(m[1]) - 1}.blocks.{m[2]}.downsample.norm.{m[3]}",
        "same",
    ),
    (rf"patch_embedding\.{WEIGHT_OR_BIAS}", lambda m: f"patch_embed.proj.{m[1]}", "same"),
    (r"position_embedding", lambda m: "pos_embed", "position"),
    (rf"layers\.(\d+)\.attention_norm\.{NORM}", lambda m: f"blocks.{m[1]}.norm1.{m[2]}", "same"),
    (rf"layers\.(\d+)\.mlp_norm\.{NORM}", lambda m: f"blocks.{m[1]}.norm2.{m[2]}", "same"),
    *(
        (
            rf"layers\.(\d+)\.attention\.{projection}\.{WEIGHT_OR_BIAS}",
            lambda m: f"blocks.{m[1]}.attn.qkv.{m[2]}",
            layout,
        )
        for projection, layout in PROJECTIONS.items()
    ),
    (rf"layers\.(\d+)\.attention\.out\.{WEIGHT_OR_BIAS}", lambda m: f"blocks.{m[1]}.attn.proj.{m[2]}", "same"),
    (rf"layers\.(\d+)\.fc(\d)\.{WEIGHT_OR_BIAS}", lambda m: f"blocks.{m[1]}.mlp.fc{m[2]}.{m[3]}", "same"),
    (rf"encoder_norm\.{NORM}", lambda m: f"norm.{m[1]}", "same"),
)

HYBRID = "transformer.embeddings.hybrid_model"
ENCODER = "transformer.encoder.layer"
ANY = r"(\w+)"
_COMMON: Sequence[Rule] = (
    (r"resnet\.root\.0\.weight", lambda m: f"{HYBRID}.root.conv.weight", "same"),
    (rf"resnet\.root\.1\.{NORM}", lambda m: f"{HYBRID}.root.gn.{m[1]}", "same"),
    (
        rf"{BOTTLENECK}(conv\d|gn\d)\.{ANY}",
        lambda m: f"{HYBRID}.body.block{m[1]}.unit{_next(m[2])}.{m[3]}.{m[4]}",
        "same",
    ),
    (
        rf"{BOTTLENECK}shortcut\.0\.weight",
        lambda m: f"{HYBRID}.body.block{m[1]}.unit{_next(m[2])}.downsample.weight",
        "same",
    ),
    (
        rf"{BOTTLENECK}shortcut\.1\.{NORM}",
        lambda m: f"{HYBRID}.body.block{m[1]}.unit{_next(m[2])}.gn_proj.{m[3]}",
        "same",
    ),
    (rf"patch_embedding\.{ANY}", lambda m: f"transformer.embeddings.patch_embeddings.{m[1]}", "same"),
    (r"position_embedding", lambda m: "transformer.embeddings.position_embeddings", "same"),
    (rf"layers\.(\d+)\.attention_norm\.{NORM}", lambda m: f"{ENCODER}.{m[1]}.attention_norm.{m[2]}", "same"),
    (rf"layers\.(\d+)\.mlp_norm\.{NORM}", lambda m: f"{ENCODER}.{m[1]}.ffn_norm.{m[2]}", "same"),
    (rf"layers\.(\d+)\.(fc\d)\.{ANY}", lambda m: f"{ENCODER}.{m[1]}.ffn.{m[2]}.{m[3]}", "same"),
    (rf"layers\.(\d+)\.attention\.{ANY}\.{ANY}", lambda m: f"{ENCODER}.{m[1]}.attn.{m[2]}.{m[3]}", "same"),
    (rf"bridge\.(\d)\.{ANY}", lambda m: f"decoder.conv_more.{m[1]}.{m[2]}", "same"),
    (rf"decoder\.(\d)\.(conv\d)\.(\d)\.{ANY}", lambda m: f"decoder.blocks.{m[1]}.{m[2]}.{m[3]}.{m[4]}", "same"),
    (rf"head\.{ANY}", lambda m: f"segmentation_head.0.{m[1]}", "same"),
)
TRANSUNET: Sequence[Rule] = (
    *_COMMON,
    (rf"encoder_norm\.{NORM}", lambda m: f"transformer.encoder.encoder_norm.{m[1]}", "same"),
)
LLM4MEDSEG: Sequence[Rule] = (
    *_COMMON,
    (rf"encoder_norm\.{NORM}", lambda m: f"transformer.encoder_norm.{m[1]}", "same"),
    (r"insert\.mapper(\d)\.weight", lambda m: f"transformer.llama_dim_mapper{m[1]}.weight", "same"),
    (r"insert\.block\.(.+)", lambda m: f"transformer.llama.layers.0.{META_NAME[m[1]]}", "same"),
    (r"insert\.final_norm\.weight", lambda m: "transformer.llama.norm.weight", "same"),
)
