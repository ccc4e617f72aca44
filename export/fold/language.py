"""Fold the language insert into fewer and wider matrix products, as few as possible in the language model's width.

With ``e`` the transformer's tokens, ``M1`` and ``M2`` the maps, ``g`` a norm's weight and ``r(x)`` the number by which
an RMSNorm multiplies a token, the published insert is ``M2 N(h + W2 s)`` with ``x = M1 e`` and ``h = x + A(g r(x) x)``.

- ``Wq (g r(x) x) = r(x) (Wq g M1) e``: query, key and value come from ``e`` in the product that gives ``x``
- a LayerNorm cancels the scale of a token: where one follows, the division of the final RMSNorm is not needed
- without it, ``M2 (h + W2 s) = M2 h + (M2 W2) s``

The equations hold for any weights. A rule that is not exact or not cheaper merges nothing and gives its reason.
``cancel_final_norm`` counts as exact where the epsilon that it moves is below ``MAX_EPS_SHARE``.
"""

from collections.abc import Iterator

import torch
from torch import nn

from medseg_trt.export.fold.fold_rule import FoldResult, constant, counted, layers_of_type, linear, stacked
from medseg_trt.export.fold.layers import (
    Attend,
    Branch,
    FoldedInsert,
    InverseRMS,
    Rotary,
    RotaryTable,
    SwiGLU,
    WeightedRMSNorm,
)
from medseg_trt.train.block.llama import LlamaBlock, RMSNorm, rotary_angles
from medseg_trt.train.models.model import LanguageInsert
from medseg_trt.train.models.segmentation_model import SegmentationModel

NO_BLOCK = FoldResult(reason="the network has no language block")
NO_LAYER = FoldResult(reason="weights=none: there is no language layer between the maps")
# Of a LayerNorm's eps, as a share of the variance beside it: it changes the output by half as much, and logits of
# order 1 by less than a tenth of the 1e-4 that a build allows. As published, with the maps as drawn, it is 3e-6.
MAX_EPS_SHARE = 2e-5


def merge_language_projections(model: SegmentationModel) -> FoldResult:
    """Merge the query, key and value projections, and gate and up; the other rules of this module require it."""
    insert = model.insert
    if not isinstance(insert, LanguageInsert):
        return NO_BLOCK
    if insert.train_only:
        model.insert = None
        return FoldResult(reason="train_only=true: the block is dropped after the training")
    if isinstance(insert.block, nn.GELU):
        return FoldResult(reason="weights=gelu: an activation stands between the maps")
    branches = [branch for layer in insert.layers for branch in _branches(layer)]
    model.insert = FoldedInsert(
        insert.mapper1,
        branches,
        insert.final_norm,
        insert.mapper2,
        inner_residual=insert.inner_residual,
        outer_residual=insert.outer_residual,
    )
    return counted(len(branches), NO_LAYER.reason)


def fold_mapper1(model: SegmentationModel) -> FoldResult:
    """Merge the first branch's input projection with ``mapper1``, so that both read the tokens in one product."""
    insert = model.insert
    if not isinstance(insert, FoldedInsert):
        return NO_BLOCK
    if not len(insert.branches):
        return NO_LAYER
    if not _narrows(insert):
        return _no_saving(insert)
    first, mapper1 = insert.branches[0], insert.mapper1.weight
    assert isinstance(first, Branch)
    norm, project = first.norm, first.project_in
    assert isinstance(norm, RMSNorm)
    assert isinstance(project, nn.Linear)
    scaled = norm.weight.double()[:, None] * mapper1.double()
    rows = (constant(block.double() @ scaled, mapper1) for block in project.weight.split(insert.language_width))
    insert.mapper1 = linear(torch.cat([mapper1, *rows]))
    insert.inverse_rms = InverseRMS(norm.eps)
    first.norm, first.project_in = nn.Identity(), nn.Identity()
    return FoldResult(count=1)


def cancel_final_norm(model: SegmentationModel) -> FoldResult:
    """Remove the RMSNorm before ``mapper2``: the LayerNorm that follows cancels it; ``mapper2`` gets its weight.

    ``LayerNorm(r y)`` with ``eps`` is ``LayerNorm(y)`` with ``eps / r**2 = eps * (mean square + RMSNorm's eps)``, which
    depends on the token. The value for a token of zeros, the smallest, is used: the output then changes by about half
    of ``_eps_share`` at most, for any magnitude of the token.
    """
    insert = model.insert
    if not isinstance(insert, FoldedInsert):
        return NO_BLOCK
    norm = insert.final_norm
    if not isinstance(norm, RMSNorm):
        return FoldResult(reason="norm=none: there is no final norm")
    if insert.inner_residual or insert.outer_residual:
        return FoldResult(reason=f"residual={model.spec.insert.residual}: the sum that follows needs the tokens' scale")
    if (name := model.norm_after_insert) is None:
        return FoldResult(reason=f"placement={model.spec.insert.placement}: no LayerNorm follows that undoes the scale")
    follower = model.get_submodule(name)
    assert isinstance(follower, nn.LayerNorm)
    mapper2 = insert.mapper2.weight.double() * norm.weight.double()
    if (share := _eps_share(mapper2, follower.eps)) > MAX_EPS_SHARE:
        return FoldResult(
            reason=f"the eps of {name} is {share:.0e} of the variance that mapper2 gives it; "
            f"exact to rounding up to {MAX_EPS_SHARE:.0e}"
        )
    insert.mapper2 = linear(constant(mapper2, insert.mapper2.weight))
    insert.final_norm = nn.Identity()
    replaced = nn.LayerNorm(list(follower.normalized_shape), follower.eps * norm.eps, device="meta")
    replaced.weight, replaced.bias = follower.weight, follower.bias
    model.set_submodule(name, replaced)
    return FoldResult(count=1)


def fold_mapper2(model: SegmentationModel) -> FoldResult:
    """Merge the last branch's output matrix with ``mapper2``, so that its output has the network's width."""
    insert = model.insert
    if not isinstance(insert, FoldedInsert):
        return NO_BLOCK
    if not len(insert.branches):
        return NO_LAYER
    if not isinstance(insert.final_norm, nn.Identity):
        return FoldResult(reason="the final norm stands between the last layer and mapper2")
    if not _narrows(insert):
        return _no_saving(insert)
    last, mapper2 = insert.branches[-1], insert.mapper2.weight
    assert isinstance(last, Branch)
    last.project_out = linear(constant(mapper2.double() @ last.project_out.weight.double(), mapper2))
    insert.branches = insert.branches[:-1]
    insert.last_branch = last
    return FoldResult(count=1)


def tabulate_rotary(model: SegmentationModel) -> FoldResult:
    """Compute the rotary embedding's cosines and sines once, for as many tokens as the image has."""
    rows, columns = model.spec.grid
    like = next(model.parameters()).detach()
    replaced = layers_of_type(model, Rotary)
    for parent, name, layer in replaced:
        setattr(parent, name, RotaryTable(*rotary_angles(rows * columns, layer.spec, like)))
    return counted(len(replaced), "rotary=false: queries and keys are not rotated")


def use_single_node_norms(model: SegmentationModel) -> FoldResult:
    """Replace every RMSNorm by one that is traced to one node instead of four."""
    replaced = layers_of_type(model, RMSNorm)
    for parent, name, layer in replaced:
        setattr(parent, name, WeightedRMSNorm(layer.weight, layer.eps))
    return counted(len(replaced), "there is no RMSNorm")


def _branches(layer: LlamaBlock) -> Iterator[Branch]:
    if layer.has_attention:
        attention = layer.self_attn
        spec = attention.spec
        yield Branch(
            layer.input_layernorm,
            stacked(attention.q_proj, attention.k_proj, attention.v_proj),
            Attend(spec.num_heads, spec.num_kv_heads, causal=spec.causal, rotary=Rotary(spec) if spec.rotary else None),
            attention.o_proj,
        )
    if layer.has_mlp:
        mlp = layer.mlp
        yield Branch(layer.post_attention_layernorm, stacked(mlp.gate_proj, mlp.up_proj), SwiGLU(), mlp.down_proj)


def _narrows(insert: FoldedInsert) -> bool:
    """Whether a product from or to the network's width is smaller than one from or to the language model's."""
    return insert.mapper1.in_features < insert.language_width


def _no_saving(insert: FoldedInsert) -> FoldResult:
    return FoldResult(
        reason=f"the network is {insert.mapper1.in_features} wide and the language block {insert.language_width}: "
        "the folded matrix would not be smaller"
    )


def _eps_share(mapper2: torch.Tensor, eps: float) -> float:
    """Return eps over the mean variance of ``mapper2 n``, for normalised tokens ``n`` of uniform direction."""
    if mapper2.is_meta:  # only shapes are known
        return 0.0
    variance = (mapper2 - mapper2.mean(0)).square().sum() / len(mapper2)
    return eps / max(variance.item(), torch.finfo(mapper2.dtype).tiny)
