"""``install.sh`` names every part that is not right and then installs nothing; what it installs needs no network."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_in_kit import SAMPLE, stand_in_kit, write_wheel

from medseg_trt.kit.parts import MANIFEST

SHELL = shutil.which("dash") or "sh"  # the strictest that is here
FIRST, SECOND, THIRD = "kit.tar.001", "kit.tar.002", "kit.tar.003"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kits are for Linux")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return stand_in_kit(tmp_path_factory.mktemp("made") / "kit")


@pytest.fixture
def kit(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "a kit"))  # with a space


def install(kit: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``install.sh`` where pip's own settings lead nowhere; port 9 is discard: nobody listens."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(kit.parent),
        "XDG_CACHE_HOME": str(kit.parent / "cache"),
        "TMPDIR": str(kit.parent / "temporary"),
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_NO_BINARY": ":all:",
        "PYTHONPATH": str(kit.parent / "elsewhere"),
    }
    (kit.parent / "temporary").mkdir(exist_ok=True)
    command = [SHELL, kit / "install.sh", *arguments]
    return subprocess.run(command, env=environment, cwd=kit.parent, capture_output=True, text=True, check=False)


def install_new(kit: Path, name: str = "new") -> subprocess.CompletedProcess[str]:
    return install(kit, name, "--python", sys.executable)


def swap(kit: Path) -> None:
    (kit / FIRST).rename(kit / "held")
    (kit / SECOND).rename(kit / FIRST)
    (kit / "held").rename(kit / SECOND)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def forget_the_last_part(kit: Path) -> None:
    """Remove the last part and its line, and seal the manifest again: only the digest of the whole tells."""
    lines = (kit / MANIFEST).read_text(encoding="utf-8").splitlines(keepends=True)[:-1]
    last = [line for line in lines if line.startswith("part ")][-1]
    (kit / last.split()[3]).unlink()
    text = "".join(line for line in lines if line != last)
    seal = hashlib.sha256(text.encode()).hexdigest()
    (kit / MANIFEST).write_text(f"{text}seal {seal}\n", encoding="utf-8")


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda kit: (kit / SECOND).unlink(), [f"{SECOND} is missing; copy it again"]),
    "two missing": (
        lambda kit: [(kit / name).unlink() for name in (FIRST, THIRD)],
        [f"{FIRST} is missing; copy it again", f"{THIRD} is missing; copy it again"],
    ),
    "damaged": (lambda kit: flip_a_bit(kit / SECOND), [f"{SECOND} is damaged; copy it again"]),
    "cut": (
        lambda kit: os.truncate(kit / SECOND, 1000),
        [f"{SECOND} has 1000 bytes instead of 1048576; copy it again"],
    ),
    "extra": (
        lambda kit: (kit / "kit.tar.077").write_bytes(b"x"),
        ["kit.tar.077 is no part of this kit; remove it"],
    ),
    "swapped": (
        swap,
        [
            f"{FIRST} holds what belongs in {SECOND}; the parts were renamed: copy them again",
            f"{SECOND} holds what belongs in {FIRST}; the parts were renamed: copy them again",
        ],
    ),
    "no manifest": (lambda kit: (kit / MANIFEST).unlink(), ["kit.manifest is missing; copy it again"]),
    "damaged manifest": (lambda kit: flip_a_bit(kit / MANIFEST), ["kit.manifest is damaged; copy it again"]),
    "manifest with other line ends": (
        lambda kit: (kit / MANIFEST).write_bytes((kit / MANIFEST).read_bytes().replace(b"\n", b"\r\n")),
        ["kit.manifest is damaged; copy it again"],
    ),
    "cut manifest": (lambda kit: os.truncate(kit / MANIFEST, 200), ["kit.manifest is damaged; copy it again"]),
    "forgotten": (forget_the_last_part, ["the parts do not make the kit's archive; copy all of them again"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kit_that_is_not_whole_is_refused_and_nothing_is_written(fault, kit):
    plant, messages = FAULTS[fault]
    plant(kit)
    for done in (install(kit, "--check"), install_new(kit)):
        assert done.returncode == 5
        assert done.stderr.splitlines() == [f"install.sh: {message} (nothing was installed)" for message in messages]
        assert done.stdout == ""
    assert not (kit.parent / "new").exists()
    assert not list((kit.parent / "temporary").iterdir())


def test_a_whole_kit_passes_the_check_which_writes_nothing(kit):
    before = sorted(kit.parent.rglob("*"))
    done = install(kit, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "undamaged" in done.stdout
    assert sorted(path for path in kit.parent.rglob("*") if path.name != "temporary") == before


def test_a_killed_installation_begins_anew_and_a_finished_one_can_be_repeated(kit):
    (kit.parent / "new/bin").mkdir(parents=True)
    for name in (".kit-unfinished", "bin/python", "half-written"):  # as a kill leaves them
        (kit.parent / "new" / name).touch(mode=0o755)
    for _ in range(2):
        done = install_new(kit)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith(f"{kit.parent}/new/bin/medseg-trt doctor\n")
        program = subprocess.run([kit.parent / "new/bin/medseg-trt"], capture_output=True, text=True, check=True)
        assert program.stdout == "stand-in\n"
        sample = kit.parent / "cache/medseg-trt/samples" / SAMPLE[0]
        assert [path.name for path in sample.iterdir()] == [SAMPLE[1]]
        assert (sample / SAMPLE[1]).read_bytes() == SAMPLE[2]
        assert (kit.parent / "new/project/benchmarks/gpu_check.py").read_text(encoding="utf-8") == "generated"
        for name in (".kit-unfinished", "half-written"):
            assert not (kit.parent / "new" / name).exists()
        assert not list((kit.parent / "temporary").iterdir())


def test_an_environment_that_was_there_stays_where_pip_fails(tmp_path):
    kit = stand_in_kit(tmp_path / "kit", requirement="not-in-the-kit")
    own = make_environment(tmp_path / "own")
    done = install(kit, own)
    assert done.returncode == 1
    assert "No matching distribution found for not-in-the-kit" in done.stderr
    assert (own / "bin/python").exists()
    assert not list((tmp_path / "temporary").iterdir())


def test_a_new_environment_is_removed_where_the_machine_lacks_a_given_package(tmp_path):
    done = install_new(stand_in_kit(tmp_path / "kit", given=("not-on-this-machine==2.0",)))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("install.sh: pip could not install into ")
    assert "relies on not-on-this-machine==2.0 there" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_a_given_package_of_an_environment_is_used(tmp_path):
    own = make_environment(tmp_path / "own")
    (packages,) = own.glob("lib/python*/site-packages")
    with zipfile.ZipFile(write_wheel(tmp_path, "given", "2.0", {"given.py": ""})) as wheel:
        wheel.extractall(packages)
    done = install(stand_in_kit(tmp_path / "kit", given=("given==2.0",)), own)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_given_package_of_the_machines_python_is_used_by_a_new_environment(tmp_path):
    base = Path(sys.base_prefix, "bin", "python3")
    has_pip = [base, "-I", "-c", "import importlib.metadata as m; m.version('pip')"]
    if subprocess.run(has_pip, capture_output=True, check=False).returncode:
        pytest.skip(f"{base} has no pip, which stands for the given package")
    done = install(stand_in_kit(tmp_path / "kit", given=("pip",)), "new", "--python", base)
    assert (done.returncode, done.stderr) == (0, "")


def make_environment(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


@pytest.mark.parametrize(
    ("abi", "python", "message"),
    [("cpython-399-generated", sys.executable, "this kit needs Python"), ("", "/nowhere/python", "is not there")],
)
def test_another_python_is_refused_and_nothing_is_written(abi, python, message, tmp_path):
    done = install(stand_in_kit(tmp_path / "kit", abi=abi), "new", "--python", python)
    assert done.returncode == 6
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a folder for the environment"),
        (["--chekc"], "there is no option --chekc"),
        (["a", "b"], "name one environment"),
        (["a", "--python"], "--python needs the path"),
        (["temporary/.."], "exists and has no bin/python; choose another folder"),
        (["a:b"], "has a colon, quotes or a line break"),
        (["a\nb"], "has a colon, quotes or a line break"),
        (["it's"], "has a colon, quotes or a line break"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(arguments, message, kit):
    done = install(kit, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_own_project_folder_stays_and_one_of_a_kit_is_replaced(kit):
    assert install_new(kit).returncode == 0
    project = kit.parent / "new" / "project"
    (project / "benchmarks" / "gpu_check.py").unlink()
    assert install(kit, "new").returncode == 0
    assert (project / "benchmarks" / "gpu_check.py").is_file()
    shutil.rmtree(project)
    project.mkdir()
    (project / "mine.txt").write_text("mine", encoding="utf-8")
    done = install(kit, "new")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "project is not of a kit; move it elsewhere" in done.stderr
    assert (project / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_link_to_an_empty_folder_is_followed(kit):
    (kit.parent / "disk").mkdir()
    (kit.parent / "link").symlink_to("disk")
    done = install_new(kit, "link")
    assert done.returncode == 0, done.stderr
    assert (kit.parent / "disk" / "bin" / "medseg-trt").is_file()
    assert (kit.parent / "link").is_symlink()


def test_another_installation_into_the_same_folder_is_not_removed(kit):
    environment = kit.parent / "new"
    environment.mkdir()
    (environment / ".kit-unfinished").write_text(str(os.getpid()), encoding="utf-8")  # of a process that runs
    done = install_new(kit)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"process {os.getpid()} installs into" in done.stderr
    assert (environment / ".kit-unfinished").is_file()


def test_a_tool_that_is_missing_is_named(kit):
    tools = kit.parent / "tools"
    tools.mkdir()
    for name in ("head", "cut", "wc", "cat", "ls", "cp", "mv", "rm", "mkdir", "mktemp", "dirname"):
        (tools / name).symlink_to(shutil.which(name) or "")
    command = [shutil.which(SHELL) or SHELL, kit / "install.sh", "--check"]
    done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
    assert "sha256sum is not on PATH" in done.stderr


def test_a_full_disk_is_no_traceback(kit):
    import resource

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(kit.parent)}
    command = [SHELL, kit / "install.sh", "new", "--python", sys.executable]
    done = subprocess.run(
        command, env=environment, cwd=kit.parent, preexec_fn=small_files, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("install.sh: [Errno 27] File too large")
    assert "could not be unpacked" in done.stderr.splitlines()[1]
    assert not (kit.parent / "new").exists()
