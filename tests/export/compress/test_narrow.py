"""The narrow rungs, on generated blocks and tokens: what is kept, what is computed, and what planted faults do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from generated_block import GEOMETRY, IMAGES, TOKENS, WIDTH, generated_insert, generated_tokens
from torch import Tensor

from medseg_trt.errors import UsageError
from medseg_trt.export.compress.held_out import held_out_error
from medseg_trt.export.compress.narrow import NarrowFit
from medseg_trt.export.compress.narrow_layer import rms_scale
from medseg_trt.export.compress.rungs import Rung
from medseg_trt.train.models.model import LanguageInsert

WHOLE = Rung(kind="narrow", width=32, neurons=48, heads=4)
EXACT_LIMIT = 2e-3  # the ridge of 1e-5 shrinks directions that tokens hardly have: 7e-4 seen; a fault is 1e-1 and more


def inner_values_in_numpy(block: LanguageInsert, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the second norm's result and the neurons, as the published equations give them, token by token."""
    weights = {name: weight.numpy() for name, weight in block.state_dict().items()}
    x = tokens @ weights["mapper1.weight"].T
    n = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * weights["block.input_layernorm.weight"]
    q, k, v = (n @ weights[f"block.self_attn.{name}_proj.weight"].T for name in "qkv")
    heads = list[np.ndarray]()
    for head in range(GEOMETRY.num_heads):
        of_head, of_group = (slice(8 * index, 8 * index + 8) for index in (head, head // 2))
        scores = np.exp(q[:, of_head] @ k[:, of_group].T / 8**0.5)
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, of_group])
    h = x + np.concatenate(heads, -1) @ weights["block.self_attn.o_proj.weight"].T
    z = h / np.sqrt(np.square(h).mean(-1, keepdims=True) + 1e-6)
    scaled = z * weights["block.post_attention_layernorm.weight"]
    gate, up = (scaled @ weights[f"block.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return z, gate / (1 + np.exp(-gate)) * up


def test_a_layer_of_all_sizes_computes_the_inner_values_of_the_block() -> None:
    block, tokens = generated_insert(), generated_tokens()
    fit = NarrowFit(block, tokens)
    layer = fit.fit(WHOLE)
    z, s = (features[0].numpy() for features in layer.features(tokens[:1]))
    wanted_z, wanted_s = inner_values_in_numpy(block, tokens[0].numpy())
    directions = fit.directions(32).numpy()
    assert np.abs(z * rms_scale(32, 32) @ directions.T - wanted_z).max() < EXACT_LIMIT
    assert np.abs(s - wanted_s).max() < EXACT_LIMIT * np.abs(wanted_s).max()


def test_a_layer_of_all_sizes_has_a_fifth_of_the_error_of_a_small_one_on_other_tokens() -> None:
    block, tokens, held_out = generated_insert(), generated_tokens(), generated_tokens(seed=1)
    fit = NarrowFit(block, tokens)
    small, whole = (
        held_out_error(fit.fit(rung), block, held_out)
        for rung in (Rung(kind="narrow", width=12, neurons=12, heads=2), WHOLE)
    )
    assert whole.relative < small.relative / 5
    assert whole.within(0.05, 0.05)


def test_narrow_projection_preserves_the_norm_of_the_mapped_tokens() -> None:
    """``|R t| = |M1 t|``, also for a map that is wider in than out, whose Cholesky factor does not exist."""
    for language_width in (32, 16):
        block, tokens = generated_insert(replace(GEOMETRY, hidden_size=language_width)), generated_tokens()
        layer = NarrowFit(block, tokens).fit(Rung(kind="narrow", width=8, neurons=8, heads=2))
        _, rooted, _ = layer.project_in(tokens).split([8, WIDTH, 32], dim=-1)
        assert torch.allclose(rooted.norm(dim=-1), block.mapper1(tokens).norm(dim=-1), rtol=1e-12)


def test_directions_are_those_of_the_largest_second_moment() -> None:
    block, tokens = generated_insert(), generated_tokens()
    z = np.concatenate([inner_values_in_numpy(block, image)[0] for image in tokens.numpy()])
    values, vectors = np.linalg.eigh(z.T @ z)
    directions = NarrowFit(block, tokens).directions(3).numpy()
    aligned = np.abs(np.sum(directions * vectors[:, :-4:-1], axis=0))
    assert values[-1] > 1.1 * values[-2]  # or the order would be chance
    assert aligned == pytest.approx(np.ones(3), abs=1e-6)


def test_head_groups_are_selected_by_variance_between_tokens_not_by_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group 0 writes much, the same for all tokens; group 1 writes less, and every token something else."""
    block = _block_with_a_constant_group()
    fit = NarrowFit(block, generated_tokens())
    directions = fit.directions(16)
    rung = Rung(kind="narrow", width=16, neurons=8, heads=2)
    assert fit.head_groups(rung, directions).tolist() == [1]

    by_energy = held_out_error(fit.fit(rung), block, generated_tokens(seed=1))
    monkeypatch.setattr(NarrowFit, "head_groups", _by_size)
    assert fit.head_groups(rung, directions).tolist() == [0]
    by_size = held_out_error(fit.fit(rung), block, generated_tokens(seed=1))
    assert by_size.unexplained > 2 * by_energy.unexplained


def test_neurons_are_kept_by_what_differs_between_tokens() -> None:
    block = generated_insert()
    loud = 5
    with torch.no_grad():
        block.block.mlp.down_proj.weight[:, loud] *= 30  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    kept = NarrowFit(block, generated_tokens()).neurons(4)
    assert loud in kept
    assert kept.tolist() == sorted(kept.tolist())


def test_too_few_tokens_for_its_unknowns_are_refused() -> None:
    fit = NarrowFit(generated_insert(), generated_tokens()[:2])
    tokens, needed = 2 * TOKENS, 2 * (32 + 48 + 1)
    with pytest.raises(UsageError, match=rf"^{tokens} tokens .* {needed}"):
        fit.fit(WHOLE)
    assert needed <= IMAGES * TOKENS


def _by_size(fit: NarrowFit, rung: Rung, directions: Tensor) -> Tensor:
    """Choose head groups by the energy of what they write, its mean included."""
    with torch.no_grad():
        written = [fit.inner_values(image).heads for image in fit.tokens]
    weight = directions.T @ fit.layer.self_attn.o_proj.weight.double()
    size = torch.stack(
        [
            sum(((heads[:, columns] @ weight[:, columns].T).square().sum() for heads in written), torch.tensor(0.0))
            for columns in (slice(0, 16), slice(16, 32))
        ]
    )
    return size.topk(rung.heads // 2).indices.sort().values


def _block_with_a_constant_group() -> LanguageInsert:
    block = generated_insert()
    attention = block.layers[0].self_attn
    with torch.no_grad():
        for projection, heads in ((attention.q_proj, 2), (attention.k_proj, 1)):
            projection.weight[: 8 * heads] = 0  # uniform attention: the mean of all tokens
            projection.weight[8 * heads :] *= 6
        attention.v_proj.weight[:8] *= 4
        attention.v_proj.weight[8:] *= 2
    return block
