"""The frozen block: a real one, its file that never changes by a byte, and every damaged or altered file refused."""

import hashlib
import json
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.spec import BlockSpec
from medseg_trt.train.block import blocks
from medseg_trt.train.block.blocks import (
    METADATA_KEY,
    FrozenBlock,
    build_block,
    extract,
    extract_last,
    load_block,
    random_block,
    save_block,
)
from medseg_trt.train.block.gguf_file import open_gguf
from medseg_trt.train.models.model import SMOLLM2_135M, TINY_LLAMA
from medseg_trt.train.tensor_files.weight_files import open_safetensors

Damage = Callable[[dict[str, Any]], object]


@pytest.fixture
def block() -> FrozenBlock:
    return random_block(TINY_LLAMA, seed=1)


@pytest.fixture
def file(block, tmp_path) -> Path:
    save_block(block, tmp_path / "block.safetensors")
    return tmp_path / "block.safetensors"


@pytest.fixture(scope="module")
def real(llama_gguf) -> FrozenBlock:
    return extract(llama_gguf)


def only(blocks: tuple[FrozenBlock, ...]) -> FrozenBlock:
    (block,) = blocks
    return block


def assert_same(actual: FrozenBlock, expected: FrozenBlock) -> None:
    assert (actual.spec, actual.provenance) == (expected.spec, expected.provenance)
    assert actual.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(actual.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert all(actual.tensors[name].dtype == tensor.dtype for name, tensor in expected.tensors.items())


def test_a_real_model_gives_its_published_geometry(real, llama_gguf):
    """Source: config.json of HuggingFaceTB/SmolLM2-135M-Instruct."""
    assert (
        real.spec
        == SMOLLM2_135M
        == BlockSpec(
            hidden_size=576,
            intermediate_size=1536,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            rms_norm_eps=1e-5,
            rope_theta=1e5,
        )
    )
    assert real.num_parameters == 3_540_096
    assert real.num_parameters == sum(parameter.numel() for parameter in build_block(real).parameters())
    described = {name: real.provenance[name] for name in ("layer", "num_layers", "license", "architecture", "format")}
    assert described == {
        "layer": 29,
        "num_layers": 30,
        "license": "apache-2.0",
        "architecture": "llama",
        "format": "gguf",
    }
    assert real.provenance["files"] == {llama_gguf.name: hashlib.sha256(llama_gguf.read_bytes()).hexdigest()}
    assert real.provenance["skipped"].keys() == {
        "blk.N.*, the other layers",
        "output_norm.weight",
        "token_embd.weight",
    }


def test_a_real_model_gives_its_dequantised_rows_in_their_place(real, llama_gguf):
    file = open_gguf(llama_gguf)
    for name, key, heads in (
        ("self_attn.q_proj", "attn_q", 9),
        ("self_attn.k_proj", "attn_k", 3),
        ("mlp.up_proj", "ffn_up", 0),
    ):
        tensor = file.tensors[f"blk.29.{key}.weight"]
        kind = gguf.GGMLQuantizationType[tensor.type_name]
        data = np.fromfile(llama_gguf, np.uint8, tensor.size, offset=tensor.start).reshape(tensor.shape[0], -1)
        rows = gguf.quants.dequantize(data, kind)
        order = np.arange(len(rows)).reshape(max(heads, 1), -1)
        if heads:  # llama.cpp has the rows 0, 32, 1, 33 … of each head of 64
            order = np.hstack((order[:, 0::2], order[:, 1::2]))
        np.testing.assert_array_equal(real.tensors[f"{name}.weight"].numpy(), rows[order.reshape(-1)])


def test_extracting_twice_gives_the_same_bytes_and_digest(real, llama_gguf, tmp_path):
    digests = [
        save_block(real, tmp_path / "one.safetensors"),
        save_block(extract(llama_gguf), tmp_path / "two.safetensors"),
        save_block(load_block(tmp_path / "one.safetensors"), tmp_path / "three.safetensors"),
        save_block(extract(tmp_path / "one.safetensors"), tmp_path / "four.safetensors"),
    ]
    contents = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(contents) == 1
    assert set(digests) == {hashlib.sha256(contents.pop()).hexdigest()}


def test_the_order_of_tensors_and_provenance_does_not_change_the_bytes(block, tmp_path):
    reordered = FrozenBlock(
        spec=block.spec,
        tensors=dict(reversed(block.tensors.items())),
        provenance=dict(reversed(block.provenance.items())),
    )
    assert save_block(reordered, tmp_path / "turned") == save_block(block, tmp_path / "block")


def test_the_real_block_of_one_layer_has_the_digest_that_checkpoints_know(real, llama_gguf, tmp_path):
    """The bytes hold the version of medseg-trt too; this is the digest of 0.1.0."""
    block = replace(real, provenance={**real.provenance, "medseg_trt": "0.1.0"})
    assert save_block(block, tmp_path / "block.safetensors").startswith("5733bb5e84a77e9e")


def test_several_real_layers_and_the_final_norm_are_those_of_the_file(real, llama_gguf, tmp_path):
    before, last = extract_last(llama_gguf, 2, final_norm=True)
    assert [block.provenance["layer"] for block in (before, last)] == [28, 29]
    alone = extract(llama_gguf, 28)
    assert all(torch.equal(before.tensors[name], tensor) for name, tensor in alone.tensors.items())
    stored = open_gguf(llama_gguf).read("output_norm.weight")
    assert torch.equal(last.tensors["norm.weight"], stored)
    assert stored.std() > 0.1  # a norm of ones would be found
    assert all(torch.equal(last.tensors[name], tensor) for name, tensor in real.tensors.items())
    assert "output_norm.weight" not in last.provenance["skipped"]


def several(count: int = 3, *, norm: bool = True) -> tuple[FrozenBlock, ...]:
    """Return generated layers, each of its own values and origin, and the last with a final norm."""
    layers = [random_block(TINY_LLAMA, seed=seed) for seed in range(count)]
    if norm:
        tensors = {**layers[-1].tensors, "norm.weight": torch.linspace(0.5, 1.5, TINY_LLAMA.hidden_size)}
        layers[-1] = replace(layers[-1], tensors=tensors)
    return tuple(replace(layer, provenance={**layer.provenance, "layer": 5 + i}) for i, layer in enumerate(layers))


@pytest.mark.parametrize("norm", [False, True])
def test_several_layers_come_back_in_their_order(norm, tmp_path):
    layers = several(12, norm=norm)  # "10." would come before "2." in the order of names
    digest = save_block(layers, tmp_path / "block.safetensors")
    loaded = load_block(tmp_path / "block.safetensors", digest)
    for one, other in zip(loaded, layers, strict=True):
        assert_same(one, other)
    assert save_block(loaded, tmp_path / "again.safetensors") == digest
    names = set(load_file(tmp_path / "block.safetensors"))
    assert {"0.mlp.up_proj.weight", "11.mlp.up_proj.weight"} < names
    assert ("11.norm.weight" in names) == norm


def test_a_block_of_several_layers_gives_the_last_ones_and_each_by_its_number(tmp_path):
    layers, path = several(3), tmp_path / "block.safetensors"
    save_block(layers, path)
    for one, other in zip(extract_last(path, 2, final_norm=True), layers[1:], strict=True):
        assert_same(one, other)
    assert_same(extract(path), layers[2])
    assert_same(extract(path, 6), layers[1])
    with pytest.raises(ArtefactError, match="is an extracted block and holds 3 layer"):
        extract_last(path, 4)
    with pytest.raises(ArtefactError, match="holds no layer 4; leave the layer out"):
        extract(path, 4)
    with pytest.raises(ArtefactError, match="without the final norm; extract it again from the language model"):
        extract(path, 6, final_norm=True)


def test_a_final_norm_is_no_part_of_the_layer(tmp_path):
    plain, carrying = several(1, norm=False), several(1)
    tokens = torch.randn(1, 3, TINY_LLAMA.hidden_size, generator=torch.Generator().manual_seed(0))
    one, other = (build_block(block[0]) for block in (plain, carrying))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(one(tokens), other(tokens))
    assert save_block(plain, tmp_path / "plain") != save_block(carrying, tmp_path / "carrying")


def test_layers_of_two_geometries_or_none_at_all_are_no_block(tmp_path):
    other = random_block(replace(TINY_LLAMA, num_kv_heads=4), seed=0)
    for layers in ((), (*several(1), other)):
        with pytest.raises(ValueError, match="one layer or more, all of one geometry"):
            save_block(layers, tmp_path / "block.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="0 layers cannot be taken"):
        extract_last(tmp_path, 0)


SEVERAL: Mapping[str, tuple[Damage | None, Callable[[dict[str, torch.Tensor]], Any] | None, str]] = {
    "one layer too few": (
        lambda header: header["provenance"]["layers"].pop(),
        None,
        r"2\..* is no tensor of one of its 2",
    ),
    "one layer too many": (lambda header: header["provenance"]["layers"].append({}), None, "is missing"),
    "one alone": (lambda header: header["provenance"].update(layers=[{}]), None, "no list of several layers"),
    "no list": (lambda header: header["provenance"].update(layers="three"), None, "no list of several layers"),
    "layers and more": (lambda header: header["provenance"].update(layer=3), None, "no list of several layers"),
    "a layer without a number": (None, lambda tensors: tensors.update(x=torch.zeros(1)), "x is no tensor of one of"),
    "a number written otherwise": (
        None,
        lambda tensors: tensors.update({"02.mlp.x": torch.zeros(1)}),
        r"02\.mlp\.x is no tensor of one of its 3",
    ),
    "a tensor missing": (None, lambda tensors: tensors.pop("1.mlp.up_proj.weight"), "mlp.up_proj.weight is missing"),
    "a final norm of another width": (
        None,
        lambda tensors: tensors.update({"2.norm.weight": torch.ones(32)}),
        r"norm\.weight has the shape \(32,\)",
    ),
}


@pytest.mark.parametrize("fault", SEVERAL)
def test_a_changed_block_of_several_layers_is_refused(fault, tmp_path):
    file = tmp_path / "block.safetensors"
    save_block(several(3), file)
    change_header, change_tensors, problem = SEVERAL[fault]
    if change_header is not None:
        damage = change_header
        rewrite(file, lambda header: damage(header) and None)
    if change_tensors is not None:
        with open_safetensors(file) as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        change_tensors(tensors)
        save_file(tensors, file, metadata)
    with pytest.raises(ArtefactError, match=f"{re.escape(str(file))}.*{problem}"):
        load_block(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_comes_back_as_it_was_saved(dtype, block, tmp_path):
    block = replace(
        block,
        tensors={name: tensor.to(dtype) for name, tensor in block.tensors.items()},
        provenance={"model": "générée", "layer": 4, "files": {"a.gguf": "0" * 64}, "skipped": {}, "license": None},
    )
    digest = save_block(block, tmp_path / "block.safetensors")
    assert_same(only(load_block(tmp_path / "block.safetensors", digest)), block)
    assert_same(extract(tmp_path / "block.safetensors", 4), block)
    with pytest.raises(ArtefactError, match="holds no layer 3; leave the layer out"):
        extract(tmp_path / "block.safetensors", 3)


def test_a_random_block_depends_on_its_seed_alone():
    one, same, other = (random_block(TINY_LLAMA, seed=seed, std=0.1) for seed in (1, 1, 2))
    assert_same(one, same)
    assert one.provenance["seed"] == 1
    for name, tensor in one.tensors.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert not torch.equal(tensor, other.tensors[name])
            # at least 2048 weights: their deviation strays by 0.1 / sqrt(2 * 2048) = 0.0016; four of that
            assert tensor.std().item() == pytest.approx(0.1, abs=0.0064)
            assert abs(tensor.mean().item()) < 4 * 0.1 / 2048**0.5


def test_the_module_is_frozen_in_float32_and_has_the_switches_it_was_asked_for(block):
    half = replace(block, tensors={name: tensor.half() for name, tensor in block.tensors.items()})
    for rotary, causal in ((False, False), (True, False), (False, True)):
        module = build_block(half, rotary=rotary, causal=causal)
        assert module.spec == replace(TINY_LLAMA, rotary=rotary, causal=causal)
        assert not module.training
        for name, parameter in module.named_parameters():
            assert not parameter.requires_grad
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, half.tensors[name].float())


def test_another_digest_is_refused_before_anything_is_parsed(block, file, monkeypatch):
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert_same(only(load_block(file, expected)), block)

    def parse(path: Path) -> None:
        raise AssertionError(f"{path} was parsed")

    monkeypatch.setattr(blocks, "open_safetensors", parse)
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(ArtefactError, match=f"is another block: its SHA-256 is .*expected {expected[:12]}"):
        load_block(file, expected)
    with pytest.raises(AssertionError, match="was parsed"):
        load_block(file, hashlib.sha256(file.read_bytes()).hexdigest())


def test_a_block_that_is_not_there_says_how_to_make_it(tmp_path):
    with pytest.raises(
        ArtefactError, match=r"absent does not exist; make it: medseg-trt block extract SOURCE -o .*absent"
    ):
        load_block(tmp_path / "absent")


def rewrite(file: Path, damage: Damage, key: str = METADATA_KEY) -> None:
    """Write the file again with a header that ``damage`` has changed, or that it returns."""
    tensors = load_file(file)
    with open_safetensors(file) as opened:
        header = json.loads(opened.metadata()[METADATA_KEY])
    changed = damage(header)
    text = changed if isinstance(changed, str) else json.dumps(header)
    save_file(tensors, file, {key: text})


HEADERS: Mapping[str, tuple[Damage, str]] = {
    "no JSON": (lambda header: "{", "damaged header"),
    "JSON without end": (lambda header: "[" * 10**5, "damaged header"),
    "a list": (lambda header: "[]", "block schema None"),
    "another schema": (lambda header: header.update(schema=2), "block schema 2; this version reads 1"),
    "a part too many": (lambda header: header.update(code="print()"), "damaged header: .*found .*code"),
    "a part missing": (lambda header: header.pop("provenance"), "damaged header"),
    "a part of another kind": (lambda header: header.update(provenance=[]), "damaged header"),
    "a size too many": (lambda header: header["spec"].update(num_experts=8), "num_experts"),
    "a size missing": (lambda header: header["spec"].pop("head_dim"), "head_dim is None"),
    "another size": (lambda header: header["spec"].update(num_kv_heads=4), "geometry requires"),
    "a huge size": (lambda header: header["spec"].update(hidden_size=1 << 40), "hidden_size is"),
    "a size of zero": (lambda header: header["spec"].update(num_kv_heads=0), "num_kv_heads is 0"),
    "another eps": (lambda header: header["spec"].update(rms_norm_eps=0), "rms_norm_eps is 0"),
    "eps is not a number": (lambda header: header["spec"].update(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "more than a header": (
        lambda header: header["provenance"].update(note="x" * (1 << 20)),
        "more metadata than a block",
    ),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_changed_header_is_refused(fault, file):
    damage, problem = HEADERS[fault]
    rewrite(file, damage)
    with pytest.raises(ArtefactError, match=f"{re.escape(str(file))}.*{problem}"):
        load_block(file)


def test_a_header_that_was_only_rewritten_is_accepted(block, file):
    rewrite(file, lambda header: None)
    assert_same(only(load_block(file)), block)


def test_a_safetensors_file_that_is_no_block_says_how_to_make_one(file):
    rewrite(file, lambda header: None, key="format")
    with pytest.raises(ArtefactError, match="is no extracted block; make one: medseg-trt block extract"):
        load_block(file)


def test_a_second_entry_of_metadata_is_refused(file):
    with open_safetensors(file) as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata | {"more": "x"})
    with pytest.raises(ArtefactError, match="more metadata than a block;"):
        load_block(file)


Tensors = dict[str, torch.Tensor]
TENSORS: Mapping[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "mlp.up_proj.weight"},
        "mlp.up_proj.weight is missing",
    ),
    "unknown": (
        lambda tensors: tensors | {"self_attn.q_proj.bias": torch.zeros(64)},
        "self_attn.q_proj.bias is no tensor of a LLaMA layer",
    ),
    "another shape": (
        lambda tensors: tensors | {"mlp.up_proj.weight": torch.zeros(64, 96)},
        "mlp.up_proj.weight has the shape (64, 96), but its geometry requires (96, 64)",
    ),
    "one of another type": (
        lambda tensors: tensors | {"input_layernorm.weight": torch.ones(64, dtype=torch.float16)},
        "torch.float16, torch.float32",
    ),
    "float64": (lambda tensors: {name: tensor.double() for name, tensor in tensors.items()}, "torch.float64"),
    "infinite": (
        lambda tensors: tensors | {"input_layernorm.weight": torch.full((64,), torch.inf)},
        "input_layernorm.weight holds values that are not finite",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_changed_tensors_are_refused_in_a_file_and_in_memory(fault, block, file):
    change, problem = TENSORS[fault]
    with open_safetensors(file) as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata)
    with pytest.raises(ArtefactError, match=f"{re.escape(str(file))}.*{re.escape(problem)}"):
        load_block(file)
    with pytest.raises(ValueError, match=re.escape(problem)):
        replace(block, tensors=change(dict(block.tensors)))


def test_a_block_file_cut_short_anywhere_is_refused(file):
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 1, 8, header // 2, header, header + 1, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ArtefactError, match="is not a usable safetensors file"):
            load_block(file)


@pytest.mark.parametrize(
    "content", [b"no block at all\n" * 1000, pickle.dumps({"spec": 1}), struct.pack("<Q", 2**60) * 4]
)
def test_text_and_pickles_are_no_blocks(content, file):
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match="is not a usable safetensors file"):
        load_block(file)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(block, file, monkeypatch):
    before = file.read_bytes()

    def full_disk(path: Path) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(blocks, "sha256", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_block(random_block(TINY_LLAMA, seed=2), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
