"""Meta's parts are joined along the right axis, and a folder whose parts are not of one whole model is refused."""

import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg_trt.errors import ArtefactError
from medseg_trt.spec import BlockSpec
from medseg_trt.train.block.blocks import build_block, extract
from medseg_trt.train.block.meta_file import open_meta

WIDTH, INNER, HEADS, HEAD_DIM, NUM_LAYERS = 32, 48, 4, 8, 2
PARAMS = {"dim": WIDTH, "n_layers": NUM_LAYERS, "n_heads": HEADS, "multiple_of": 16, "norm_eps": 3e-5, "vocab_size": -1}
Parts = list[dict[str, Tensor]]


def whole_tensors() -> dict[str, Tensor]:
    """Return the tensors of a model under Meta's names, each value of size 1."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"tok_embeddings.weight": (16, WIDTH), "norm.weight": (WIDTH,), "output.weight": (16, WIDTH)}
    for index in range(NUM_LAYERS):
        shapes |= {f"layers.{index}.attention.w{letter}.weight": (WIDTH, WIDTH) for letter in "qkvo"}
        shapes |= {f"layers.{index}.feed_forward.w{number}.weight": (INNER, WIDTH) for number in (1, 3)}
        shapes |= {f"layers.{index}.feed_forward.w2.weight": (WIDTH, INNER)}
        shapes |= {f"layers.{index}.{name}_norm.weight": (WIDTH,) for name in ("attention", "ffn")}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {key: tensor / 6 if tensor.dim() > 1 else 1 + 0.2 * tensor for key, tensor in tensors.items()}


def make_parts(num_parts: int = 2) -> Parts:
    """Return each GPU's share: rows of wq, wk, wv, w1 and w3, columns of wo and w2, and all of the norms."""
    parts: Parts = [{} for _ in range(num_parts)]
    for key, tensor in whole_tensors().items():
        axis = None if "norm" in key else 1 if re.search(r"\.w[o2]\.|tok_emb", key) else 0
        for number, part in enumerate(parts):
            part[key] = tensor if axis is None else tensor.chunk(num_parts, axis)[number].clone()
    return parts


def write(folder: Path, parts: Parts, **params: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    for number, tensors in enumerate(parts):
        torch.save(tensors, folder / f"consolidated.{number:02}.pth")
    return folder


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("source", ["folder", "first part", "last part"])
def test_every_tensor_of_a_layer_is_joined_to_the_one_that_was_split(num_parts, source, tmp_path):
    write(tmp_path, make_parts(num_parts))
    number = {"first part": 0, "last part": num_parts - 1}.get(source)
    file = open_meta(tmp_path if number is None else tmp_path / f"consolidated.{number:02}.pth")
    whole = whole_tensors()
    assert set(file.keys()) == whole.keys()
    for key in (key for key in whole if key.startswith("layers.")):
        assert file.shape(key) == whole[key].shape
        assert torch.equal(file.read(key), whole[key]), key


def test_meta_checkpoint_of_16_parts_is_joined(tmp_path):
    parts = make_parts(16)
    file = open_meta(write(tmp_path, parts))
    assert [path.name for path in file.parts] == [f"consolidated.{number:02}.pth" for number in range(16)]
    key = "layers.1.feed_forward.w1.weight"
    assert torch.equal(file.read(key), whole_tensors()[key])


def test_a_joined_tensor_is_in_memory_and_no_longer_in_the_file(tmp_path):
    file = open_meta(write(tmp_path, make_parts(1)))
    norm, matrix = (file.read(f"layers.0.{name}.weight") for name in ("attention_norm", "attention.wq"))
    before = norm.clone(), matrix.clone()
    for tensor in file.parts[tmp_path / "consolidated.00.pth"].values():
        tensor.zero_()
    assert torch.equal(norm, before[0])
    assert torch.equal(matrix, before[1])


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_layer_computes_what_metas_own_formulas_give(num_parts, tmp_path):
    """Complex rotation of neighbouring columns, in float64, of weights that were not split.

    Source: meta-llama/llama ``model.py``, ``apply_rotary_emb`` and class ``TransformerBlock``.
    """
    block = extract(write(tmp_path, make_parts(num_parts)), 1)
    assert block.spec == BlockSpec(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=3e-5,
        rope_theta=10000.0,
    )
    tokens = torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = build_block(block, rotary=True, causal=True)(tokens)[0].numpy()
    weights = {key.removeprefix("layers.1."): value.double().numpy() for key, value in whole_tensors().items()}
    expected = reference(tokens[0].double().numpy(), weights, neighbours=True)
    # everything is of size 1 and rounded to float32 some ten times, each by 6e-8
    assert np.abs(output - expected).max() < 1e-5
    assert np.abs(reference(tokens[0].double().numpy(), weights, neighbours=False) - expected).max() > 1e-2


def reference(tokens: np.ndarray, weights: Mapping[str, np.ndarray], *, neighbours: bool) -> np.ndarray:
    """Compute one causal layer; rotary pairs are columns 2 i and 2 i + 1, or with the fault i and i + half."""
    angles = np.outer(np.arange(len(tokens)), 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))

    def norm(values: np.ndarray, name: str) -> np.ndarray:
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + 3e-5) * weights[f"{name}_norm.weight"]

    def rotated(heads: np.ndarray) -> np.ndarray:
        pairs = (
            heads.reshape(len(tokens), HEADS, HEAD_DIM // 2, 2) if neighbours else np.stack(np.split(heads, 2, -1), -1)
        )
        rotated_pairs = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
        return np.stack((rotated_pairs.real, rotated_pairs.imag), -1).reshape(heads.shape)

    def projected(values: np.ndarray, letter: str) -> np.ndarray:
        return (values @ weights[f"attention.w{letter}.weight"].T).reshape(len(tokens), HEADS, HEAD_DIM)

    inside = norm(tokens, "attention")
    query, key, value = rotated(projected(inside, "q")), rotated(projected(inside, "k")), projected(inside, "v")
    scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(HEAD_DIM)
    shares = np.exp(np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf))
    collected = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), value).reshape(tokens.shape)
    tokens = tokens + collected @ weights["attention.wo.weight"].T
    inside = norm(tokens, "ffn")
    gate = inside @ weights["feed_forward.w1.weight"].T
    return (
        tokens
        + (gate / (1 + np.exp(-gate)) * (inside @ weights["feed_forward.w3.weight"].T))
        @ weights["feed_forward.w2.weight"].T
    )


def dropped(number: int, key: str) -> Callable[[Parts], object]:
    return lambda parts: parts[number].pop(key)


def changed(number: int, key: str, tensor: Tensor) -> Callable[[Parts], object]:
    return lambda parts: parts[number].update({key: tensor})


WQ, W1, NORM = "layers.1.attention.wq.weight", "layers.1.feed_forward.w1.weight", "layers.1.ffn_norm.weight"
BAD_PARTS: Mapping[str, tuple[Callable[[Parts], object], str]] = {
    "the last part is absent": (lambda parts: parts.pop(), "has 1 of 2 parts; consolidated.01.pth is missing"),
    "a tensor is absent": (lambda parts: [part.pop(WQ) for part in parts], "layer 1 lacks attention.wq.weight"),
    "a part lacks a tensor": (dropped(1, WQ), f"consolidated.01.pth lacks {WQ}, which other parts have"),
    "the first part lacks a tensor": (dropped(0, WQ), f"consolidated.00.pth lacks {WQ}, which other parts have"),
    "shares of two sizes": (
        changed(1, W1, torch.zeros(8, WIDTH)),
        f"the parts of {W1} do not fit together: (24, 32) float32, (8, 32) float32",
    ),
    "shares of two types": (
        changed(1, W1, torch.zeros(24, WIDTH, dtype=torch.float16)),
        f"the parts of {W1} do not fit together: (24, 32) float32, (24, 32) float16",
    ),
    "a matrix of one axis": (
        lambda parts: [part.update({"layers.1.attention.wo.weight": torch.zeros(16)}) for part in parts],
        "the parts of layers.1.attention.wo.weight do not fit together: (16,)",
    ),
    "no axis": (lambda parts: [part.update({WQ: torch.tensor(1.0)}) for part in parts], "do not fit together: ()"),
    "norms of two models": (changed(1, NORM, torch.ones(WIDTH)), f"{NORM} differs between the parts"),
    "another width": (
        lambda parts: [part.update({"layers.1.feed_forward.w3.weight": torch.zeros(16, WIDTH)}) for part in parts],
        "mlp.up_proj.weight has the shape (32, 32), but its geometry requires (48, 32)",
    ),
    "a bias": (
        changed(0, "layers.1.attention.wq.bias", torch.zeros(16)),
        "layers.1.attention.wq.bias is no tensor of a LLaMA layer",
    ),
    "experts": (
        changed(1, "layers.1.feed_forward.gate.weight", torch.zeros(8, WIDTH)),
        "layers.1.feed_forward.gate.weight is no tensor of a LLaMA layer",
    ),
    "not finite": (changed(0, W1, torch.full((24, WIDTH), np.nan)), "mlp.gate_proj.weight holds values that are not"),
    "values that are not there": (
        changed(0, W1, torch.zeros(1).expand(24, WIDTH)),
        f"{W1} is no plain tensor with all its values in the file",
    ),
    "a sparse tensor": (
        changed(0, W1, torch.eye(24, WIDTH).to_sparse()),
        "holds other things than tensors and plain data (torch._utils._rebuild_sparse_tensor)",
    ),
    "a tensor without values": (
        changed(0, W1, torch.zeros(24, WIDTH, device="meta")),
        "holds other things than tensors and plain data (torch._utils._rebuild_meta_tensor_no_storage)",
    ),
    "a number among the tensors": (
        lambda parts: parts[0].update(steps=7),  # pyright: ignore[reportCallIssue, reportArgumentType]  # the fault
        "steps is no plain tensor",
    ),
}


@pytest.mark.parametrize("fault", BAD_PARTS)
def test_parts_that_are_not_one_whole_llama_are_refused(fault, tmp_path):
    change, problem = BAD_PARTS[fault]
    parts = make_parts()
    change(parts)
    with pytest.raises(ArtefactError, match=f"^{re.escape(str(tmp_path))}.*{re.escape(problem)}"):
        extract(write(tmp_path, parts))


def test_a_part_in_the_middle_that_is_absent_is_named(tmp_path):
    write(tmp_path, make_parts(4))
    (tmp_path / "consolidated.01.pth").unlink()
    for source in (tmp_path, tmp_path / "consolidated.02.pth"):
        with pytest.raises(ArtefactError, match=r"lacks consolidated\.01\.pth; every part is needed"):
            extract(source)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"dim": None}, "hidden_size is None"),
        ({"dim": "32"}, "hidden_size is '32'"),
        ({"n_heads": 0}, "num_heads is 0"),
        ({"n_heads": 10**30, "head_dim": 8}, "num_heads is 10"),
        ({"n_kv_heads": 3}, "4 heads cannot share 3"),
        ({"n_kv_heads": 2}, "self_attn.k_proj.weight has the shape (32, 32), but its geometry requires (16, 32)"),
        ({"norm_eps": None}, "rms_norm_eps is None"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"n_layers": None}, "does not state its number of layers"),
        ({"dim": 64}, "parts"),
    ],
)
def test_parameters_without_sense_are_refused(params, problem, tmp_path):
    with pytest.raises(ArtefactError, match=f"^{re.escape(str(tmp_path))}.*{re.escape(problem)}"):
        extract(write(tmp_path, make_parts(), **params))


def test_meta_head_dim_larger_than_width_over_heads_is_supported(tmp_path):
    (tensors,) = make_parts(1)
    for index in range(NUM_LAYERS):
        for letter in "qkv":
            tensors[f"layers.{index}.attention.w{letter}.weight"] = torch.zeros(HEADS * 16, WIDTH)
        tensors[f"layers.{index}.attention.wo.weight"] = torch.zeros(WIDTH, HEADS * 16)
    assert extract(write(tmp_path, [tensors], head_dim=16)).spec.head_dim == 16


def test_without_its_parameters_the_file_that_is_missing_is_named(tmp_path):
    write(tmp_path, make_parts(1))
    (tmp_path / "params.json").unlink()
    for source in (tmp_path, tmp_path / "consolidated.00.pth"):
        with pytest.raises(ArtefactError, match=r"params\.json is needed beside the weights"):
            extract(source)


def test_a_folder_with_a_config_is_hugging_faces_and_its_part_may_still_be_given(tmp_path):
    write(tmp_path, make_parts(1))
    expected = extract(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtefactError, match="model_type is None"):
        extract(tmp_path)
    block = extract(tmp_path / "consolidated.00.pth")
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in block.tensors.items())


class Touch:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["alone", "in a zip archive", "among the tensors", "in another part"])
def test_a_part_that_would_run_code_is_refused_and_does_not_run(where, tmp_path):
    parts = make_parts(2)
    trap: Any = Touch(tmp_path / "touched")
    write(tmp_path, parts)
    number = 1 if where == "in another part" else 0
    path = tmp_path / f"consolidated.{number:02}.pth"
    if where == "alone":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap if where == "in a zip archive" else parts[number] | {"trap": trap}, path)
    with pytest.raises(ArtefactError, match=re.escape(path.name)):
        extract(tmp_path)
    assert not (tmp_path / "touched").exists()
    with suppress(RuntimeError):  # "alone" is no archive of torch's, which is found out after the code has run
        torch.load(path, weights_only=False)
    assert (tmp_path / "touched").exists()  # it would have


def test_a_part_cut_short_anywhere_is_refused(tmp_path):
    write(tmp_path, make_parts(1))
    path = tmp_path / "consolidated.00.pth"
    whole = path.read_bytes()
    for size in np.linspace(0, len(whole) - 1, 29, dtype=int):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtefactError, match=r"consolidated\.00\.pth"):
            extract(tmp_path)


def test_damaged_bytes_are_refused_or_give_a_block(tmp_path):
    """The pickle is at the beginning, and the list of what is in the archive at the end."""
    write(tmp_path, make_parts(1))
    path = tmp_path / "consolidated.00.pth"
    whole, refused = path.read_bytes(), 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        content = bytearray(whole)
        for offset in (*rng.integers(0, 3000, 4), -rng.integers(1, 1500)):
            content[offset] = rng.integers(256)
        path.write_bytes(content)
        try:
            extract(tmp_path)
        except ArtefactError:
            refused += 1
    assert refused > 50
