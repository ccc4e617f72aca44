"""What the tests of engines start from."""

import json
import shutil
from pathlib import Path

import pytest
from engines_here import WithEngines, make_with_engines
from once import made_once

from medseg_trt.bundles.bundle import Bundle, load_bundle


@pytest.fixture(scope="session")
def with_engines(built, tmp_path_factory: pytest.TempPathFactory) -> WithEngines:
    """The bundle ``built`` with engines, shared by all processes of the run."""
    root = made_once(tmp_path_factory, "engines", lambda folder: make_with_engines(folder, built.bundle))
    texts = json.loads((root / "texts.json").read_text(encoding="utf-8"))
    return WithEngines(bundle=load_bundle(root / "model.medseg"), texts=texts)


@pytest.fixture
def copied(with_engines: WithEngines, tmp_path: Path) -> Bundle:
    """A copy that may be changed."""
    return load_bundle(shutil.copytree(with_engines.bundle.folder, tmp_path / "model.medseg"))
