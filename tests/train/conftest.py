"""What the tests of training start from."""

import shutil
from pathlib import Path

import pytest
from tiny import make_checkpoint, write_block, write_pictures

from medseg_trt.train import runs
from medseg_trt.train.checkpoint import block_name, load_checkpoint
from medseg_trt.train.datasets.folder import open_folder


@pytest.fixture
def no_curve(monkeypatch):
    monkeypatch.setattr(runs, "draw_curve", lambda history, path: None)  # it takes ten times as long as an epoch here


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Five pictures and a frozen block."""
    folder = tmp_path_factory.mktemp("source")
    return open_folder(write_pictures(folder / "pictures", 5)), write_block(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache of blocks, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "medseg-trt" / "blocks"


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory) -> Path:
    """A checkpoint with a frozen block beside it; do not write to its folder."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), provenance={"recipe": {"name": "generated"}, "epoch": 3})


@pytest.fixture
def saved(checkpoint_path, tmp_path) -> Path:
    """The checkpoint and its block, in a folder to write to."""
    folder = tmp_path / "saved"
    folder.mkdir()
    digest = load_checkpoint(checkpoint_path).block_sha256
    assert digest is not None
    for name in ("model.pt", block_name(digest)):
        shutil.copyfile(checkpoint_path.parent / name, folder / name)
    return folder / "model.pt"
