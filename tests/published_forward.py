"""The published forward pass of TransUNet and LLM4MedSeg, written down once more under the authors' own names.

An oracle for ``medseg-trt import``: nothing of ``medseg_trt.train`` is used. Written from the names and shapes of the
two repositories and from what their layers compute, as functions of a state dict, in evaluation mode.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
HYBRID = "transformer.embeddings.hybrid_model"


def published_logits(
    state: State, image: Tensor, *, vit_heads: int, llama_head_dim: int = 0, eps: float = 1e-6
) -> Tensor:
    """Return the logits of an image (batch, 1 or 3, height, width) under a state dict with the authors' names."""
    if image.shape[1] == 1:
        image = image.repeat(1, 3, 1, 1)
    x, features = _resnet(state, image)
    embedded = F.conv2d(
        x,
        state["transformer.embeddings.patch_embeddings.weight"],
        state["transformer.embeddings.patch_embeddings.bias"],
    )
    rows, columns = embedded.shape[2:]
    hidden = embedded.flatten(2).transpose(-1, -2) + state["transformer.embeddings.position_embeddings"]
    layer = 0
    while f"transformer.encoder.layer.{layer}.attention_norm.weight" in state:
        hidden = _vit_layer(state, f"transformer.encoder.layer.{layer}.", hidden, vit_heads)
        layer += 1
    norm = "transformer.encoder.encoder_norm."
    if "transformer.llama_dim_mapper1.weight" in state:
        hidden = F.linear(hidden, state["transformer.llama_dim_mapper1.weight"])
        hidden = _llama_layer(state, "transformer.llama.layers.0.", hidden, llama_head_dim, eps)
        hidden = _rms_norm(hidden, state["transformer.llama.norm.weight"], eps)
        hidden = F.linear(hidden, state["transformer.llama_dim_mapper2.weight"])
        norm = "transformer.encoder_norm."
    hidden = _layer_norm(state, norm, hidden)
    x = hidden.permute(0, 2, 1).reshape(len(hidden), -1, rows, columns)
    x = _conv_bn_relu(state, "decoder.conv_more.", x)
    for block in range(4):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        if block < 3:
            x = torch.cat([x, features[block]], dim=1)
        x = _conv_bn_relu(state, f"decoder.blocks.{block}.conv1.", x)
        x = _conv_bn_relu(state, f"decoder.blocks.{block}.conv2.", x)
    return F.conv2d(x, state["segmentation_head.0.weight"], state["segmentation_head.0.bias"], padding=1)


def _std_conv(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    variance = ((weight - mean) ** 2).mean(dim=(1, 2, 3), keepdim=True)
    return F.conv2d(x, (weight - mean) / torch.sqrt(variance + 1e-5), None, stride, padding)


def _group_norm(state: State, prefix: str, x: Tensor, groups: int, eps: float) -> Tensor:
    return F.group_norm(x, groups, state[f"{prefix}.weight"], state[f"{prefix}.bias"], eps)


def _resnet(state: State, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    size = image.shape[2:]
    x = _std_conv(image, state[f"{HYBRID}.root.conv.weight"], 2, 3)
    x = F.relu(_group_norm(state, f"{HYBRID}.root.gn", x, 32, 1e-6))
    features = [x]
    x = F.max_pool2d(x, 3, 2, 0)
    for block in (1, 2, 3):
        unit = 1
        while f"{HYBRID}.body.block{block}.unit{unit}.conv1.weight" in state:
            stride = 2 if block > 1 and unit == 1 else 1
            x = _bottleneck(state, f"{HYBRID}.body.block{block}.unit{unit}.", x, stride)
            unit += 1
        if block < 3:
            expected_size = (size[0] // 4 // block, size[1] // 4 // block)
            padded = x.new_zeros(*x.shape[:2], *expected_size)
            padded[:, :, : x.shape[2], : x.shape[3]] = x
            features.append(padded)
    return x, features[::-1]


def _bottleneck(state: State, prefix: str, x: Tensor, stride: int) -> Tensor:
    residual = x
    if f"{prefix}downsample.weight" in state:
        residual = _std_conv(x, state[f"{prefix}downsample.weight"], stride)
        residual = _group_norm(state, f"{prefix}gn_proj", residual, residual.shape[1], 1e-5)
    y = F.relu(_group_norm(state, f"{prefix}gn1", _std_conv(x, state[f"{prefix}conv1.weight"]), 32, 1e-6))
    y = F.relu(_group_norm(state, f"{prefix}gn2", _std_conv(y, state[f"{prefix}conv2.weight"], stride, 1), 32, 1e-6))
    y = _group_norm(state, f"{prefix}gn3", _std_conv(y, state[f"{prefix}conv3.weight"]), 32, 1e-6)
    return F.relu(residual + y)


def _layer_norm(state: State, prefix: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{prefix}weight"], state[f"{prefix}bias"], 1e-6)


def _linear(state: State, prefix: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{prefix}weight"], state[f"{prefix}bias"])


def _attend(query: Tensor, key: Tensor, value: Tensor, head_dim: int) -> Tensor:
    split = [
        projection.reshape(*projection.shape[:2], -1, head_dim).permute(0, 2, 1, 3)
        for projection in (query, key, value)
    ]
    scores = split[0] @ split[1].transpose(-1, -2) / math.sqrt(head_dim)
    return (scores.softmax(-1) @ split[2]).permute(0, 2, 1, 3).flatten(2)


def _vit_layer(state: State, prefix: str, x: Tensor, heads: int) -> Tensor:
    normed = _layer_norm(state, f"{prefix}attention_norm.", x)
    query, key, value = (_linear(state, f"{prefix}attn.{name}.", normed) for name in ("query", "key", "value"))
    x = x + _linear(state, f"{prefix}attn.out.", _attend(query, key, value, x.shape[-1] // heads))
    normed = _layer_norm(state, f"{prefix}ffn_norm.", x)
    inner = F.gelu(_linear(state, f"{prefix}ffn.fc1.", normed))
    return x + _linear(state, f"{prefix}ffn.fc2.", inner)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _llama_layer(state: State, prefix: str, x: Tensor, head_dim: int, eps: float) -> Tensor:
    normed = _rms_norm(x, state[f"{prefix}attention_norm.weight"], eps)
    query, key, value = (F.linear(normed, state[f"{prefix}attention.{name}.weight"]) for name in ("wq", "wk", "wv"))
    x = x + F.linear(_attend(query, key, value, head_dim), state[f"{prefix}attention.wo.weight"])
    normed = _rms_norm(x, state[f"{prefix}ffn_norm.weight"], eps)
    gate, up = (F.linear(normed, state[f"{prefix}feed_forward.{name}.weight"]) for name in ("w1", "w3"))
    return x + F.linear(F.silu(gate) * up, state[f"{prefix}feed_forward.w2.weight"])


def _conv_bn_relu(state: State, prefix: str, x: Tensor) -> Tensor:
    x = F.conv2d(x, state[f"{prefix}0.weight"], padding=1)
    mean, variance, weight, bias = (
        state[f"{prefix}1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return F.relu(F.batch_norm(x, mean, variance, weight, bias))
