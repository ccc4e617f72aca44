"""What the tests of training start from."""

import pytest
from tiny import write_block, write_pictures

from medseg_trt.train import runs
from medseg_trt.train.datasets.folder import open_folder


@pytest.fixture
def no_curve(monkeypatch):
    monkeypatch.setattr(runs, "draw_curve", lambda history, path: None)  # it takes ten times as long as an epoch here


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Five pictures and a frozen block."""
    folder = tmp_path_factory.mktemp("source")
    return open_folder(write_pictures(folder / "pictures", 5)), write_block(folder)
