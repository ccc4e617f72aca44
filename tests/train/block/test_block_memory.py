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
from medseg_trt.train.weights import weight_files

def load(path, what, mapped=False, real=weight_files.load_pickled):
    return real(path, what)

weight_files.load_pickled = load
main()
"""


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


def assert_within_the_limit(row):
    """The benchmark says where the limit comes from: what the layer needs, and 96 MiB for libraries and allocator."""
    assert row["checkpoint_bytes"] > 2.5 * row["limit_bytes"]  # who reads the whole is found out
    assert row["checkpoint_bytes_on_disk"] < row["checkpoint_bytes"] / 5
    assert 0 < row["added_bytes"] < row["limit_bytes"]


def test_a_layer_of_metas_parts_needs_memory_for_a_layer(benchmark, model):
    (row,) = measure(benchmark, model, ["Meta, float16 in 2 parts"])
    assert_within_the_limit(row)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["Hugging Face, float16", "Meta, float16", "GGUF, F16", "GGUF, Q8_0"])
def test_a_layer_of_every_layout_needs_memory_for_a_layer(layout, benchmark, model):
    (row,) = measure(benchmark, model, [layout])
    assert row["added_bytes"] < row["limit_bytes"]


def test_the_limit_catches_a_reader_that_loads_the_whole_file(benchmark, model, tmp_path):
    (tmp_path / "model").mkdir()
    source = benchmark.write_meta(model, tmp_path / "model")
    arguments = ["block", "extract", "-q", str(source), "-o", str(tmp_path / "block.safetensors")]
    whole = benchmark.peak_bytes([sys.executable, "-c", WHOLE, *arguments])
    mapped = benchmark.peak_bytes([sys.executable, "-m", "medseg_trt", *arguments])
    assert whole - mapped > 1.5 * benchmark.LIMIT_CONSTANT
