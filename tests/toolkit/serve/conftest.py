"""A server that the tests of this folder share, and the masks that ``infer`` writes."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pytest
from server_process import ServerProcess, running_server
from stored_bundle import stored_bundle
from tiny import picture, write_nifti

from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import infer

if TYPE_CHECKING:
    from archives import RecordingArchive


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_bundle(tmp_path_factory.mktemp("serve") / "tiny.medseg")


@pytest.fixture(scope="session")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server([bundle], tmp_path_factory.mktemp("spool") / "spool") as running:
        yield running


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of every format that the server takes; the volume has more slices than a batch."""
    folder = tmp_path_factory.mktemp("inputs")
    for index in range(4):
        PIL.Image.fromarray(picture(index, (40 + index, 52))[0]).save(folder / f"image{index}.png")
    PIL.Image.fromarray(picture(7, (48, 40))[0]).save(folder / "photo.jpg")
    PIL.Image.fromarray(picture(8, (48, 40))[0]).save(folder / "one.tif")
    PIL.Image.fromarray(picture(1, (40, 40))[0]).save(
        folder / "stack.tif", save_all=True, append_images=[PIL.Image.fromarray(picture(2, (40, 40))[0])]
    )
    write_nifti(folder / "volume.nii.gz", np.stack([picture(i, (36, 28))[0] for i in range(11)]).transpose(2, 1, 0))
    return folder


@pytest.fixture(scope="session")
def masks(inputs: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the masks that ``infer`` writes of ``inputs``."""
    written = MaskFolder(tmp_path_factory.mktemp("masks"))
    for _ in infer([inputs], bundle, backend="onnxruntime", threads=1, destination=written):
        pass
    assert len(written.masks) == 8
    return written.folder


@pytest.fixture(scope="module")
def archive() -> Iterator["RecordingArchive"]:
    """A DICOM node that keeps what it is sent."""
    from archives import recording_archive

    with recording_archive() as opened:
        yield opened
