"""``inspect model.pt --data DIR``: the analysis of the block, and what it refuses."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import TWO_ORGANS, make_checkpoint, write_volumes

from medseg_trt.cli import cli
from medseg_trt.errors import UsageError
from medseg_trt.inspection.block import analyse_checkpoint

SIZE = (64, 64)  # 16 tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("data"), count=2, slices=24, size=SIZE)


def test_the_analysis_of_a_checkpoint_is_printed_beside_its_description(tmp_path: Path, data: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, classes=TWO_ORGANS, size=SIZE)
    ran = CliRunner().invoke(cli, ["inspect", str(checkpoint), "--data", str(data), "--json"])
    assert ran.exit_code == 0, ran.output
    analysis = json.loads(ran.stdout)["block"]["analysis"]
    assert (analysis["tokens"], analysis["held_out_tokens"], analysis["slices"]) == (12 * 16, 12 * 16, 24)
    assert analysis["files"] == ["scan0"]
    assert 0 < analysis["common_energy"] < 1
    assert 0 < analysis["attention_uniformity"] <= 1
    assert 1 < analysis["effective_rank"] < analysis["language_width"] == 64
    assert analysis["affine"]["relative"] > 0


def test_a_network_without_a_block_has_nothing_to_analyse(tmp_path: Path, data: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, classes=TWO_ORGANS, size=SIZE, architecture="transunet-tiny")
    with pytest.raises(UsageError, match="no language block"):
        analyse_checkpoint(checkpoint, data)


def test_inspect_refuses_data_for_a_bundle(tmp_path: Path, data: Path) -> None:
    ran = CliRunner().invoke(cli, ["inspect", str(tmp_path / "model.medseg"), "--data", str(data)])
    assert isinstance(ran.exception, UsageError)
    assert "--data DIR analyses the language block of a checkpoint" in str(ran.exception)
