"""A table of the paper from generated archives: what is missing runs, what is finished is kept, and it says so."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from official import write_busi, write_isic2017, write_synapse
from tiny import write_block

from medseg_trt.cli import cli
from medseg_trt.reproduce import reproduce
from medseg_trt.reproduce.paper_tables import TABLES
from medseg_trt.train import loop, runs

CHANGES = (
    "data.count=any",
    "architecture=transunet-tiny",
    "preprocessing.image_size=[32, 32]",
    "train.epochs=1",
    "train.batch_size=4",
    "pretrained=none",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with two generated archives of the first table and one of the second."""
    folder = tmp_path_factory.mktemp("archives")
    write_isic2017(folder)
    write_busi(folder)
    write_synapse(folder / "synapse")
    (folder / reproduce.GENERATED).touch()
    write_block(folder)
    return folder


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    monkeypatch.setattr(runs, "draw_curve", lambda history, path: None)


def run(root: Path, out: Path, table: str = "table1", *options: str, changes=CHANGES):
    arguments = ["reproduce", table, "--data", root, "--block", root / "block0.safetensors", "-o", out, *options]
    sets = [part for change in changes for part in ("--set", change)]
    return CliRunner().invoke(cli, [*map(str, arguments), *sets])


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def test_reproduce_table1_end_to_end_and_resumed_after_a_kill(root, tmp_path, monkeypatch):
    out, trained, real = tmp_path / "out", [], loop.train

    def train(recipe, data, folder, **options):
        trained.append(folder.name)
        if len(trained) == 5:
            raise Killed
        return real(recipe, data, folder, **options)

    monkeypatch.setattr(loop, "train", train)
    options = ("--seeds", "1", "--splits", "2")
    with pytest.raises(Killed):
        raise run(root, out, "table1", *options).exception or AssertionError("nobody was killed")
    ran = run(root, out, "table1", *options, "--json")
    assert ran.exit_code == 0, ran.output
    names = [
        f"{name}-{configuration}-{split}-seed1234"
        for name, splits in (("isic2017", ["official"]), ("busi", ["split41", "split42"]))
        for split in splits
        for configuration in ("transunet-tiny", "llm-transunet-tiny")
    ]
    assert trained == [*names[:5], *names[4:]]  # what was finished is not trained again
    assert {path.name for path in out.iterdir()} == {*names, "table1.json", "table1.md"}

    printed = json.loads(ran.stdout)
    assert printed["is_generated"]
    assert printed["missing"] == ["clinicdb", "colondb"]
    assert "clinicdb is left out" in ran.stderr
    assert {(line["dataset"], line["mode"], line["figure"]) for line in printed["lines"]} == {
        (dataset, mode, figure)
        for dataset in ("isic2017", "busi")
        for mode in ("per_image", "unext_batch")
        for figure in ("iou", "dice")
    }
    for line in printed["lines"]:
        assert line["paper"] == {
            name: TABLES["table1"].paper[line["dataset"]][name][line["figure"]] for name in line["ours"]
        }
        runs_per_configuration = {"isic2017": 1, "busi": 2}[line["dataset"]]
        assert line["gain"]["runs"] == runs_per_configuration
        assert all((spread is None) == (runs_per_configuration == 1) for _, spread in line["ours"].values())
        assert "LLaMA block" in line["verdict"]
        if line["mode"] == "per_image":  # every image of the test split counts the same, absent or not
            means = {configuration: mean for configuration, (mean, _) in line["ours"].items()}
            assert line["gain"]["estimate"] == pytest.approx(means["llm-transunet"] - means["transunet"])
    text = (out / "table1.md").read_text()
    assert "**Generated images: these figures only show" in text
    assert "| isic2017 | IoU |" in text
    assert "0.7355" in text
    assert "cannot tell whether the LLaMA block's gain is other than zero" in text

    def never(*given, **options):
        pytest.fail("a finished run was trained again")

    monkeypatch.setattr(loop, "train", never)
    assert "table: " in run(root, out, "table1", *options).stdout
    shutil.copyfile(out / names[0] / "best.pt", out / names[1] / "best.pt")
    changed = run(root, out, "table1", *options).exception
    assert "is of another best.pt; remove it" in str(changed)


def test_the_second_table_has_volumes_and_distances(root, tmp_path):
    ran = run(
        root, tmp_path / "out", "table2", "--seeds", "1", "--json", changes=(*CHANGES, "train.slices_per_epoch=4")
    )
    assert ran.exit_code == 0, ran.output
    printed = json.loads(ran.stdout)
    assert {(line["mode"], line["figure"]) for line in printed["lines"]} == {
        (mode, figure) for mode in ("volume", "volume_transunet") for figure in ("dice", "hd95")
    }
    assert printed["missing"] == ["acdc"]


def test_what_cannot_be_run_is_refused_before_anything_is_trained(root, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("something was trained"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    base = write_busi(tmp_path / "broken")
    (base / "benign" / "benign (3)_mask.png").unlink()
    assert "holds none of the data sets of table1" in str(run(root / "synapse", tmp_path / "out").exception)
    assert "has no table 'table3'; choose one of: table1, table2" in str(
        run(root, tmp_path / "out", "table3").exception
    )
    assert "benign (3)" in str(run(tmp_path / "broken", tmp_path / "out").exception)
    assert "there is no field train.epoch" in str(run(root, tmp_path / "out", changes=["train.epoch=1"]).exception)
    without = CliRunner().invoke(cli, ["reproduce", "table1", "--data", str(root), "--set", "data.count=any"])
    assert "needs a frozen block: --block FILE" in str(without.exception)
    assert "--weights R50+ViT-B_16.npz" in str(run(root, tmp_path / "out", changes=CHANGES[:-1]).exception)
    assert not (tmp_path / "out").exists()


def test_other_networks_stand_in_the_same_table_with_what_was_published_of_them(root, tmp_path):
    """The untrained networks: the data, the plan and the table are what is shown."""
    changes = tuple(change for change in CHANGES if not change.startswith(("architecture", "preprocessing")))
    size = ("preprocessing.image_size=[64, 64]", "train.epochs=0", "train.first_of_equals=false")
    networks = "transunet-tiny,unet-tiny,swin-unet-tiny,llm-swin-unet-tiny"
    options = ("--seeds", "1", "--splits", "1", "--models", networks, "--json")
    ran = run(root, tmp_path / "out", "table1", *options, changes=(*changes, *size))
    assert ran.exit_code == 0, ran.output
    lines = json.loads(ran.stdout)["lines"]
    assert {(line["before"], line["after"]) for line in lines} == {
        ("transunet-tiny", "unet-tiny"),
        ("transunet-tiny", "swin-unet-tiny"),
        ("swin-unet-tiny", "llm-swin-unet-tiny"),
    }
    assert all(set(line["paper"].values()) == {None} for line in lines), "nobody has published the tiny ones"
    verdicts = {line["after"]: line["verdict"] for line in lines}
    assert "the LLaMA block's gain" in verdicts["llm-swin-unet-tiny"]
    assert "unet-tiny, compared with transunet-tiny: its gain" in verdicts["unet-tiny"]


def test_published_figures_are_those_of_the_data_set_and_none_where_there_is_none():
    first, second = TABLES["table1"], TABLES["table2"]
    assert second.published("synapse", "swin-unet", "dice") == 0.7913
    assert second.published("synapse", "llm-transunet", "hd95") == 25.7007
    assert second.published("acdc", "swin-unet", "hd95") is None
    assert first.published("busi", "unet", "iou") == 0.6861
    assert first.published("isic2017", "unet", "iou") is None
    assert first.published("busi", "ds-transunet-b", "iou") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--models", "unet,resnet"), "no network is called 'resnet'"),
        (("--models", "unet,unet"), "names a network twice"),
        (("--models", "swin-unet"), "swin_tiny_patch4_window7_224.pth: --weights swin-unet=FILE"),
        (("--models", "ds-transunet-b"), "and swin_tiny_patch4_window7_224.pth: --weights ds-transunet-b=FILE"),
        (("--models", "unet", "--weights", "unett=a.pth"), "no network is called 'unett'"),
    ],
)
def test_models_that_cannot_be_run_are_refused(options, message, root, tmp_path):
    assert message in str(run(root, tmp_path / "out", "table1", *options, changes=("data.count=any",)).exception)
    both = run(root, tmp_path / "out", "table1", "--models", "unet").exception
    assert "exclude each other" in str(both)
