"""The options of ``infer`` for archives."""

import json
from pathlib import Path

import pytest
from archive_runs import content, save_picture
from click.testing import CliRunner, Result

from medseg_trt.cli import cli
from medseg_trt.errors import UsageError


def infer(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(cli, ["infer", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in", "--part", "0/3"], "--part 0/3 is no part; write 1/8 for the first of eight, up to 8/8"),
        (["in", "--part", "4/3"], "--part 4/3 is no part"),
        (["in", "--num-parts", "3"], "--num-parts and --part-id need each other"),
        (["in", "--num-parts", "3", "--part-id", "3"], "--part 4/3 is no part"),
        (["in", "--part", "1/2", "--num-parts", "2", "--part-id", "0"], "say the same; give one of them"),
        (["in", "--part", "1/2", "--join"], "--join takes all parts"),
        (["in", "--where", "Modality"], "--where 'Modality' is no condition"),
        (["in", "--where", "Modalty=CT"], "DICOM has no attribute 'Modalty'"),
    ],
)
def test_infer_refuses_invalid_archive_options(arguments, words):
    result = infer(*arguments)
    assert isinstance(result.exception, UsageError)
    assert words in str(result.exception)


def test_without_an_input_the_usage_is_shown():
    result = infer()
    assert result.exit_code == 2
    assert "Missing argument 'INPUTS...': name an image or a folder, or give --list FILE" in result.output


def test_parts_run_as_nnu_net_s_do_and_are_joined(tiny_bundle, tmp_path):
    for seed, name in enumerate(("a/x.png", "b/x.png", "b/y.png")):
        save_picture(tmp_path / "in" / name, seed)
    common = [tmp_path / "in", "--tree", "--bundle", tiny_bundle, "--backend", "onnxruntime", "--json"]
    whole = json.loads(infer(*common, "-o", tmp_path / "whole").stdout)
    assert (whole["masks"], whole["joined"], whole["failed"], whole["left_out"]) == (3, True, {}, 0)
    parts = [
        json.loads(infer(*common, "-o", tmp_path / "out", "--num-parts", 2, "--part-id", number).stdout)
        for number in (0, 1)
    ]
    assert [(part["masks"], part["joined"]) for part in parts] == [(2, False), (1, True)]
    (tmp_path / "out" / "areas.csv").unlink()
    joined = infer(*common, "-o", tmp_path / "out", "--join", "--tta", "flips")
    assert joined.exit_code == 0, joined.output
    assert "without regard to --backend, --tta" in joined.stderr
    assert json.loads(joined.stdout)["masks"] == whole["masks"]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_nested_input_folder_error_suggests_the_tree_option(tiny_bundle, tmp_path):
    save_picture(tmp_path / "in" / "a" / "x.png")
    result = infer(tmp_path / "in", "--bundle", tiny_bundle, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "itself holds no image" in str(result.exception)
    assert "unless infer is given --tree" in str(result.exception)
