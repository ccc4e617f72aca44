"""What several tests of the toolkit start from."""

from pathlib import Path

import numpy as np
import pytest
from tiny import picture, write_nifti, write_pictures


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with two pictures and a volume."""
    folder = write_pictures(tmp_path / "data", count=2, size=(40, 52)) / "images"
    pixels = np.stack([picture(seed, (36, 28))[0] for seed in range(5)])
    write_nifti(folder / "scan.nii.gz", pixels.transpose(2, 1, 0))
    return folder
