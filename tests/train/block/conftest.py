"""Files of one generated language model in every layout, for the tests of the block."""

from pathlib import Path

import pytest
import torch
from language_models import NUM_LAYERS, SHARD_SIZE, SPEC, gguf_tensors, make_model, write_gguf, write_meta
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model(SPEC)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """Its Hugging Face folder with one file; do not write to it."""
    folder = tmp_path_factory.mktemp("one-file")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory) -> Path:
    """Its Hugging Face folder with many files; do not write to it."""
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    assert len(list(folder.glob("*.safetensors"))) > NUM_LAYERS
    return folder


@pytest.fixture(scope="module")
def gguf_file(model, tmp_path_factory) -> Path:
    """Its GGUF file in float32; do not write to it."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", gguf_tensors(model))


@pytest.fixture(scope="module")
def bin_folder(model, tmp_path_factory) -> Path:
    """Its Hugging Face folder as it was before safetensors; do not write to it."""
    folder = tmp_path_factory.mktemp("bin")
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def meta(model, tmp_path_factory) -> Path:
    """Its folder in Meta's layout, in one part; do not write to it."""
    return write_meta(tmp_path_factory.mktemp("meta"), model)


@pytest.fixture(scope="module")
def meta_parts(model, tmp_path_factory) -> Path:
    """Its folder in Meta's layout, for two GPUs; do not write to it."""
    return write_meta(tmp_path_factory.mktemp("meta-parts"), model, num_parts=2)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A Hugging Face folder to write to."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path
