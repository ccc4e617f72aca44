"""What several tests of the toolkit start from."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fakes.bundles import FakeMachine
from measured_here import SHORT, measure_here
from once import made_once
from session_here import SessionHere
from tiny import make_checkpoint, picture, write_nifti, write_pictures, write_volumes

from medseg_trt.bench.benchmark import Bench, Measured, bench
from medseg_trt.building import executions, variants
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.cli import cli
from medseg_trt.sessions.open import open_session


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with two pictures and a volume."""
    folder = write_pictures(tmp_path / "data", count=2, size=(40, 52)) / "images"
    pixels = np.stack([picture(seed, (36, 28))[0] for seed in range(5)])
    write_nifti(folder / "scan.nii.gz", pixels.transpose(2, 1, 0))
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let builds open their sessions in this process."""
    for module in (executions, variants):
        monkeypatch.setattr(module, "ChildSession", SessionHere)


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``bench`` open its sessions in this process, and make up what it would look for inside."""
    measure_here(monkeypatch)


MIX = "vit=int8,block=w8a16,decoder=fp16"
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "w4a16", "int8+fp16", "w8a16+fp16", MIX)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A bundle of every precision, and what it was made of; do not write to it."""

    bundle: Path
    checkpoint: Path
    data: Path
    verify_key: Path  # it is signed
    manifest: Mapping[str, Any]  # as ``build --json`` printed it


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = made_once(tmp_path_factory, "precisions", make_built)
    printed = json.loads((root / "printed.json").read_text(encoding="utf-8"))
    assert printed["bundle"] == str(root / "model.medseg")
    return Built(
        bundle=root / "model.medseg",
        checkpoint=root / "model.pt",
        data=root / "data",
        verify_key=root / printed["public_key"],
        manifest=printed["manifest"],
    )


def make_built(root: Path) -> None:
    """Make everything that ``built`` names, and keep what ``build --json`` printed."""
    from fakes.keys import write_keys  # which cryptography is needed for

    data = write_volumes(root / "data", count=3)
    private, public = write_keys(root)
    checkpoint = make_checkpoint(root)
    command = ["build", "--ckpt", checkpoint, "--data", data, "-o", root / "model.medseg", "--max-dice-drop", "0.05"]
    precisions = ["--precision", ",".join(PRECISIONS[:-1]), "--precision", MIX, "--sign", str(private)]
    with pytest.MonkeyPatch.context() as patch:
        for module in (executions, variants):
            patch.setattr(module, "ChildSession", SessionHere)
        ran = CliRunner().invoke(cli, [*map(str, command), *precisions, "--json"])
    assert ran.exit_code == 0, ran.output
    printed = {**json.loads(ran.stdout), "public_key": public.name}
    (root / "printed.json").write_text(json.dumps(printed), encoding="utf-8")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path) -> Iterator[FakeMachine]:
    """A fake machine whose engine is the tiny bundle's network; its caches are in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = load_bundle(tiny_bundle)
    with open_session(bundle, "onnxruntime", threads=1) as session:
        model = bundle.content.model
        yield FakeMachine(monkeypatch, session.run, model.image_size, model.num_classes)


@pytest.fixture(scope="session")
def measured(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """What ``bench`` finds of that bundle: real masks, made-up times."""
    with pytest.MonkeyPatch.context() as patch:
        measure_here(patch)
        return bench(
            Bench(
                bundle=built.bundle,
                checkpoint=built.checkpoint,
                data=built.data,
                split="val",
                tier=SHORT,
                max_dice_drop=0.3,
                commands=("medseg-trt bench --bundle model.medseg",),
            ),
            tmp_path_factory.mktemp("scratch"),
        )
