"""One layer of a large checkpoint is extracted without the checkpoint in memory, as the benchmark measures it."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from medseg_trt.spec import BlockSpec

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "block_extract_memory.py"
WHOLE = """
from medseg_trt.cli import main
from medseg_trt.train.tensor_files import weight_files

def load(path, kind, mapped=False, real=weight_files.load_pickled):
    return real(path, kind)

weight_files.load_pickled = load
main()
"""
# Of the layer as it is stored and of the layer in the type of the block file: each is in memory once, and the largest
# tensor, less than a quarter of them, is there a second time while it is joined, reordered, dequantised or checked.
LIMIT_OF_LAYER = 1.25
LIMIT_CONSTANT = 96 << 20  # libraries that only larger tensors make PyTorch use, and the memory allocator's slack


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("block_extract_memory", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARK.parent)  # it imports what the benchmarks share
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def model(benchmark):
    """32 layers of 6 MB and the words, 330 MB in float16; sparse, so that the disk holds one layer."""
    spec = BlockSpec(hidden_size=512, intermediate_size=1376, num_heads=4, num_kv_heads=4)
    return benchmark.Model(spec=spec, num_layers=45, vocabulary=32000)


def measure(benchmark, model, layouts):
    return list(benchmark.measure(model, {layout: benchmark.LAYOUTS[layout] for layout in layouts}))


def limit_bytes(row):
    return int(LIMIT_OF_LAYER * (row["layer_bytes_stored"] + row["block_bytes"])) + LIMIT_CONSTANT


def assert_within_the_limit(row):
    assert row["checkpoint_bytes"] > 2.5 * limit_bytes(row)  # who reads the whole exceeds the limit
    assert row["checkpoint_bytes_on_disk"] < row["checkpoint_bytes"] / 5
    assert 0 < row["added_bytes"] < limit_bytes(row)


def test_a_layer_of_metas_parts_needs_memory_for_a_layer(benchmark, model):
    (row,) = measure(benchmark, model, ["Meta, float16 in 2 parts"])
    assert_within_the_limit(row)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["Hugging Face, float16", "Meta, float16", "GGUF, F16", "GGUF, Q8_0"])
def test_a_layer_of_every_layout_needs_memory_for_a_layer(layout, benchmark, model):
    (row,) = measure(benchmark, model, [layout])
    assert row["added_bytes"] < limit_bytes(row)


def test_the_limit_catches_a_reader_that_loads_the_whole_file(benchmark, model, tmp_path):
    (tmp_path / "model").mkdir()
    source = benchmark.write_meta(model, tmp_path / "model")
    arguments = ["block", "extract", "-q", str(source), "-o", str(tmp_path / "block.safetensors")]
    whole = benchmark.peak_bytes([sys.executable, "-c", WHOLE, *arguments])
    mapped = benchmark.peak_bytes([sys.executable, "-m", "medseg_trt", *arguments])
    assert whole - mapped > 1.5 * LIMIT_CONSTANT
