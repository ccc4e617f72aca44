"""A folder is made by one process of a run and found by the others."""

from pathlib import Path

import pytest
from once import made_once


@pytest.fixture
def factory(tmp_path_factory, tmp_path, monkeypatch) -> pytest.TempPathFactory:
    """One whose folders are the test's own, as two processes of one run have them."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    (tmp_path / "popen-gw0").mkdir()
    monkeypatch.setattr(tmp_path_factory, "getbasetemp", lambda: tmp_path / "popen-gw0")
    return tmp_path_factory


def test_made_once_reuses_the_folder_of_another_process(factory, tmp_path, monkeypatch):
    folder = made_once(factory, "bundle", lambda folder: (folder / "file").touch())
    monkeypatch.setattr(factory, "getbasetemp", lambda: tmp_path / "popen-gw1")
    assert made_once(factory, "bundle", lambda _: pytest.fail("made again")) == folder == tmp_path / "bundle"
    assert (folder / "file").exists()


def test_a_folder_that_was_left_unfinished_is_made_again(factory):
    def interrupted(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(factory, "bundle", interrupted)
    made_once(factory, "bundle", lambda folder: (folder / "file").touch())
    folder = made_once(factory, "bundle", lambda _: pytest.fail("made again"))
    assert [path.name for path in folder.iterdir()] == ["file"]
