"""Files that other projects collected to break readers: each is an image, or one line that says why not.

pydicom and nibabel ship theirs in their wheels; Pillow's are in its source package, which pip fetches once a run.
"""

import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nibabel
import pydicom
import pytest

from medseg_trt.errors import InputError, MissingExtraError
from medseg_trt.imaging.images import read_image

PILLOW = "pillow==13.0.0"
MAX_SECONDS = 2.0  # of one file; the slowest takes a third of a second on an idle core
FEWEST_IMAGES = {"pydicom": 70, "nibabel": 5, "Pillow": 550}  # a reader that refuses everything would pass otherwise


def outcomes(name: str, root: Path) -> Iterator[tuple[Path, str]]:
    """Read every file below a folder; yield it with what came of it."""
    for path in sorted(candidate for candidate in root.rglob("*") if candidate.is_file()):
        start = time.process_time()
        try:
            image = read_image(path)
            outcome = "image"
            assert image.pixels.size > 0, path
            assert image.pixels.shape[3] in (1, 3), path
        except (InputError, MissingExtraError) as error:
            outcome, line = type(error).__name__, str(error)
        else:
            line = str(path)
        assert str(path) in line, line
        assert "\n" not in line, line
        assert time.process_time() - start < MAX_SECONDS, f"{name}: {path} took {time.process_time() - start:.1f} s"
        yield path, outcome


def check(name: str, root: Path) -> None:
    results = dict(outcomes(name, root))
    counts = Counter(results.values())
    print(f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in counts.most_common())}")
    assert len(results) == sum(path.is_file() for path in root.rglob("*"))
    assert counts["image"] >= FEWEST_IMAGES[name]


def test_every_test_file_of_pydicom_is_an_image_or_one_line():
    check("pydicom", Path(pydicom.__file__).parent / "data" / "test_files")


def test_every_test_file_of_nibabel_is_an_image_or_one_line():
    check("nibabel", Path(nibabel.__file__).parent / "tests" / "data")


@pytest.mark.network
def test_every_test_picture_of_pillow_is_an_image_or_one_line(tmp_path):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--no-binary=pillow", f"--dest={tmp_path}", PILLOW]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    archive = next(tmp_path.glob("pillow-*.tar.gz"), None)
    if archive is None:
        pytest.skip(f"pip could not fetch {PILLOW}: {done.stderr.strip().splitlines()[-1:]}")
    with tarfile.open(archive) as sdist:
        sdist.extractall(tmp_path, filter="data")
    check("Pillow", next(tmp_path.glob("pillow-*/Tests/images")))
