"""Rungs 1 … n: fit a narrow LLaMA layer to the block, from statistics of its inner values on calibration tokens.

With ``h`` the block's sum after attention, ``r(h)`` the factor of its second norm, ``a_i`` the output of head group
``i`` and ``s_j`` that of neuron ``j``:

- the directions ``V`` are the leading eigenvectors of ``E[r(h)^2 h h']``
- head groups are kept by the centred energy of ``V' Wo_i a_i``: a part that is the same in all tokens is in the bias
- ``P``, ``O`` and the bias are a ridge fit of the inputs ``[t, a]`` to ``V' h``
- neurons are kept by ``var(s_j) |M2 Wd_j|^2``
- the output is a ridge fit of ``[z, s]`` of the layer itself to the block's normalised output
"""

from dataclasses import dataclass
from functools import cached_property

import scipy.linalg
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from medseg_trt.export.compress.affine import linear_of
from medseg_trt.export.compress.narrow_layer import NarrowLayer, rms_scale, scaled_rms_norm
from medseg_trt.export.compress.ridge import AffineMap, Moments, check_tokens, fit_ridge
from medseg_trt.export.compress.rungs import Rung
from medseg_trt.export.compress.tokens import Tokens, normalised
from medseg_trt.export.fold.fold_rule import linear
from medseg_trt.export.fold.layers import Attend, InverseRMS, Rotary
from medseg_trt.train.block.llama import LlamaBlock
from medseg_trt.train.models.model import LanguageInsert


@dataclass(frozen=True, kw_only=True, slots=True)
class InnerValues:
    """Values inside the block for the tokens of one image."""

    heads: Tensor  # (tokens, heads * head_dim): the attention output before Wo
    hidden: Tensor  # (tokens, language width): h
    neurons: Tensor  # (tokens, neurons): s
    output: Tensor  # (tokens, width): normalised


class NarrowFit:
    """Fits narrow layers of any size to one block; the block's statistics are computed once.

    Args:
        insert: the block, with one LLaMA layer of attention and MLP between its maps.
        tokens: that enter it, by image.
    """

    def __init__(self, insert: LanguageInsert, tokens: Tokens) -> None:
        (layer,) = insert.layers
        self.insert, self.layer, self.tokens = insert, layer, tokens
        self.language_width = layer.spec.hidden_size

    def fit(self, rung: Rung) -> NarrowLayer:
        """Return a layer of the sizes of a narrow rung.

        Raises:
            UsageError: there are too few tokens.
        """
        images, tokens, hidden = self.tokens.shape
        inputs = max(hidden + rung.heads * self.layer.spec.head_dim, rung.width + rung.neurons)  # of the two fits
        check_tokens(images * tokens, inputs + 1)
        directions = self.directions(rung.width)
        groups = self.head_groups(rung, directions)
        columns = self._head_columns(groups)
        with torch.no_grad():
            entering = self._fit_entering(directions, columns)
            narrow = self._untrained(rung, directions, groups, entering)
            leaving = self._fit_leaving(narrow, rung)
        narrow.hidden_out = linear_of(AffineMap(weight=leaving.weight[:, : rung.width], bias=leaving.bias), self.tokens)
        narrow.neurons_out = linear(leaving.weight[:, rung.width :].to(self.tokens.dtype))
        return narrow

    def directions(self, width: int) -> Float64[Tensor, "language_width width"]:
        """Return the leading eigenvectors of the second moment of the normalised sum after attention."""
        size = self.language_width
        _, vectors = scipy.linalg.eigh(self._statistics.second_moment.numpy(), subset_by_index=(size - width, size - 1))
        return torch.from_numpy(vectors[:, ::-1].copy())

    def head_groups(self, rung: Rung, directions: Tensor) -> Int64[Tensor, " groups"]:
        """Return the indices of the head groups to keep, in their order."""
        spec = self.layer.spec
        group_size = spec.num_heads // spec.num_kv_heads
        seen = directions.T @ self.layer.self_attn.o_proj.weight.double()  # (width, heads * head_dim)
        by_group = seen.unflatten(1, (spec.num_kv_heads, -1)).transpose(0, 1)
        energy = torch.einsum("gri,gij,grj->g", by_group, self._statistics.head_covariances, by_group)
        return energy.topk(rung.heads // group_size).indices.sort().values

    def neurons(self, count: int) -> Int64[Tensor, " neurons"]:
        """Return the indices of the neurons to keep, in their order."""
        written = self.insert.mapper2.weight.double() @ self.layer.mlp.down_proj.weight.double()
        share = self._statistics.neuron_variance * written.square().sum(0)
        return share.topk(count).indices.sort().values

    def inner_values(self, image: Tensor) -> InnerValues:
        """Return the values inside the block for the tokens of one image (tokens, width)."""
        layer, insert = self.layer, self.insert
        mapped = insert.mapper1(image[None]).to(layer.self_attn.o_proj.weight.dtype)
        collected: list[Tensor] = []
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: collected.append(inputs[0]))
        try:
            hidden = mapped + layer.self_attn(layer.input_layernorm(mapped))
        finally:
            handle.remove()
        entering = layer.post_attention_layernorm(hidden)
        neurons = nn.functional.silu(layer.mlp.gate_proj(entering)) * layer.mlp.up_proj(entering)
        leaving = insert.final_norm((hidden + layer.mlp.down_proj(neurons)).to(image.dtype)).to(image.dtype)
        return InnerValues(
            heads=collected[0][0].double(),
            hidden=hidden[0].double(),
            neurons=neurons[0].double(),
            output=normalised(insert.mapper2(leaving)[0].double()),
        )

    @cached_property
    def _statistics(self) -> "_Statistics":
        statistics = _Statistics(self.layer)
        with torch.no_grad():
            for image in self.tokens:
                statistics.add(self.inner_values(image))
        return statistics

    def _head_columns(self, groups: Tensor) -> Tensor:
        """Return the columns of ``Wo`` that read the kept head groups."""
        size = self.layer.spec.num_heads // self.layer.spec.num_kv_heads * self.layer.spec.head_dim
        return (groups[:, None] * size + torch.arange(size)).flatten()

    def _fit_entering(self, directions: Tensor, columns: Tensor) -> AffineMap:
        """Fit ``[P, O]`` and their bias."""
        moments = Moments(self.tokens.shape[-1] + len(columns), directions.shape[1])
        for image in self.tokens:
            values = self.inner_values(image)
            moments.add(torch.cat([image.double(), values.heads[:, columns]], -1), values.hidden @ directions)
        return fit_ridge(moments)

    def _fit_leaving(self, narrow: NarrowLayer, rung: Rung) -> AffineMap:
        """Fit ``[A, B]`` and their bias to the features that the layer itself computes."""
        moments = Moments(rung.width + rung.neurons, self.tokens.shape[-1])
        for image in self.tokens:
            features = torch.cat([feature[0] for feature in narrow.features(image[None])], -1)
            moments.add(features, self.inner_values(image).output)
        return fit_ridge(moments)

    def _untrained(self, rung: Rung, directions: Tensor, groups: Tensor, entering: AffineMap) -> NarrowLayer:
        """Return the layer without its output."""
        width, dtype, spec = self.tokens.shape[-1], self.tokens.dtype, self.layer.spec
        mapper1 = self.insert.mapper1.weight.double()
        root = torch.linalg.qr(mapper1, mode="r").R  # R'R = M1'M1 as for the Cholesky factor, also if M1 is singular
        root = nn.functional.pad(root, (0, 0, 0, width - len(root)))
        norm1, norm2 = self.layer.input_layernorm, self.layer.post_attention_layernorm
        attention, kept = self.layer.self_attn, self.neurons(rung.neurons)
        projections = torch.cat(
            [
                self._rows(attention.q_proj, groups, spec.num_heads // spec.num_kv_heads),
                self._rows(attention.k_proj, groups, 1),
                self._rows(attention.v_proj, groups, 1),
            ]
        )
        qkv = rms_scale(width, self.language_width) * (projections * norm1.weight.double()) @ mapper1
        project_in = torch.cat([entering.weight[:, :width], root, qkv])
        gate_up = torch.cat([self.layer.mlp.gate_proj.weight[kept], self.layer.mlp.up_proj.weight[kept]]).double()
        gate_up = rms_scale(rung.width, self.language_width) * (gate_up * norm2.weight.double()) @ directions
        return NarrowLayer(
            project_in=linear(project_in.to(dtype)),
            inverse_rms=InverseRMS(norm1.eps * self.language_width / width),
            attend=Attend(rung.heads, len(groups), causal=spec.causal, rotary=Rotary(spec) if spec.rotary else None),
            heads_out=linear_of(AffineMap(weight=entering.weight[:, width:], bias=entering.bias), self.tokens),
            norm=scaled_rms_norm(rung.width, self.language_width, norm2.eps, dtype),
            gate_up=linear(gate_up.to(dtype)),
            hidden_out=nn.Linear(rung.width, width, device="meta"),
            neurons_out=nn.Linear(rung.neurons, width, bias=False, device="meta"),
        )

    def _rows(self, projection: nn.Linear, groups: Tensor, heads_per_group: int) -> Tensor:
        """Return the rows of a projection that belong to the kept head groups."""
        by_group = projection.weight.double().unflatten(0, (-1, heads_per_group * self.layer.spec.head_dim))
        return by_group[groups].flatten(0, 1)


class _Statistics:
    """Moments of the block's inner values, in float64."""

    def __init__(self, layer: LlamaBlock) -> None:
        spec = layer.spec
        self.second_moment = torch.zeros(spec.hidden_size, spec.hidden_size, dtype=torch.float64)
        size = spec.num_heads // spec.num_kv_heads * spec.head_dim
        self._heads = [Moments(size, 1) for _ in range(spec.num_kv_heads)]
        self._neurons = torch.zeros(2, spec.intermediate_size, dtype=torch.float64)  # sums, sums of squares
        self._eps, self._rows = layer.post_attention_layernorm.eps, 0

    def add(self, values: InnerValues) -> None:
        """Add the tokens of one image."""
        scaled = values.hidden * torch.rsqrt(values.hidden.square().mean(-1, keepdim=True) + self._eps)
        self.second_moment += scaled.T @ scaled
        for moments, heads in zip(self._heads, values.heads.chunk(len(self._heads), -1), strict=True):
            moments.add(heads, heads[:, :1])
        self._neurons += torch.stack([values.neurons.sum(0), values.neurons.square().sum(0)])
        self._rows += len(values.neurons)

    @property
    def head_covariances(self) -> Float64[Tensor, "groups inputs inputs"]:
        """The covariance of every head group's output."""
        return torch.stack([moments.centred()[0] for moments in self._heads]) / self._rows

    @property
    def neuron_variance(self) -> Float64[Tensor, " neurons"]:
        """The variance of every neuron's output."""
        sums, squares = self._neurons
        return (squares / self._rows - (sums / self._rows).square()).clamp(min=0)
