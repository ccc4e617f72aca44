"""``block extract`` on the command line: one layer, the last ones, and the language model's final norm."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import TINY_LLAMA

from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.train.block.blocks import load_block, random_block, save_block


@pytest.fixture
def source(tmp_path) -> Path:
    """A block file of three generated layers."""
    save_block([random_block(TINY_LLAMA, seed=seed) for seed in range(3)], tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def extract(source: Path, *options: str) -> tuple[int, Path]:
    """Return how many layers were written, as the command says, and where."""
    output = source.parent / "block.safetensors"
    ran = CliRunner().invoke(cli, ["block", "extract", str(source), "-o", str(output), "--json", *options])
    if ran.exception is not None:
        raise ran.exception
    result = json.loads(ran.stdout)
    assert result["parameters"] == sum(block.num_parameters for block in load_block(output, result["sha256"]))
    return len(result["provenance"].get("layers", [None])), output


@pytest.mark.parametrize(("options", "seeds"), [((), [2]), (("--layer", "last"), [2]), (("--layers", "2"), [1, 2])])
def test_the_last_layers_are_taken(options, seeds, source):
    count, output = extract(source, *options)
    assert [block.provenance["seed"] for block in load_block(output)] == seeds
    assert count == len(seeds)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--layer", "1", "--layers", "2"), UsageError, "--layer takes one layer and --layers the last ones"),
        (("--layer", "last", "--layers", "1"), UsageError, "give one of the two"),
        (("--layer", "first"), UsageError, "a number from 0, or last"),
        (("--layers", "4"), ArtefactError, r"holds 3 layer\(s\)"),
        (("--final-norm",), ArtefactError, "without the final norm"),
    ],
)
def test_block_extract_refuses_wrong_layer_options_and_writes_nothing(options, error, message, source):
    with pytest.raises(error, match=message):
        extract(source, *options)
    assert [path.name for path in source.parent.iterdir()] == ["source.safetensors"]


@pytest.mark.network
def test_the_real_block_is_the_same_by_number_and_as_the_last(llama_gguf, tmp_path):
    contents = []
    for name, options in (("a", ()), ("b", ("--layer", "29")), ("c", ("--layers", "1"))):
        output = tmp_path / f"{name}.safetensors"
        ran = CliRunner().invoke(cli, ["block", "extract", str(llama_gguf), "-q", "-o", str(output), *options])
        assert ran.exit_code == 0, ran.output
        contents.append(output.read_bytes())
    assert contents[0] == contents[1] == contents[2]
