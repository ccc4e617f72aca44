"""A kit of generated wheels for the running Python, which ``install.sh`` checks and installs in seconds."""

import base64
import hashlib
import importlib.util
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from medseg_trt.kit.interpreter import probe
from medseg_trt.kit.make import INSTALLER
from medseg_trt.kit.parts import MANIFEST, Manifest, write_parts

PART_BYTES = 1 << 20  # pip alone takes several
VERSION = "9.9"
SAMPLE = ("0" * 64, "generated-sample.whl", b"generated sample")  # folder of the cache, name, content
ENTRY_POINT = "[console_scripts]\nmedseg-trt = medseg_trt.cli:main\n"
MODULES = {
    "medseg_trt/__init__.py": "",
    "medseg_trt/cli.py": "def main():\n    print('stand-in')\n",
    "medseg_trt/files.py": (
        "import os\nfrom pathlib import Path\n\n\ndef cache_folder(*parts):\n"
        "    return Path(os.environ['XDG_CACHE_HOME']).joinpath('medseg-trt', *parts)\n"
    ),
}


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, str], *headers: str) -> Path:
    """Write a wheel of pure Python with its RECORD; ``headers`` are further lines of its METADATA."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *headers, ""])
    contents = {
        **files,
        f"{stem}.dist-info/METADATA": metadata,
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in contents.items()}
    record = [
        f"{path},sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},{len(contents[path])}"
        for path, digest in digests.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, text in contents.items():
            wheel.writestr(inside, text)
        wheel.writestr(f"{stem}.dist-info/RECORD", "\n".join([*record, f"{stem}.dist-info/RECORD,,", ""]))
    return path


def zip_pip(folder: Path) -> None:
    """Write the installed pip as the wheel that ``install.sh`` runs, compiled, which saves time in every run."""
    spec = importlib.util.find_spec("pip")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    with zipfile.ZipFile(folder / "pip-0-py3-none-any.whl", "w") as wheel:
        for path in sorted(package.rglob("*.py")):
            compiled = Path(importlib.util.cache_from_source(str(path)))
            source = compiled if compiled.is_file() else path
            wheel.write(source, path.relative_to(package.parent).with_suffix(source.suffix).as_posix())
        for path in package.rglob("*.pem"):
            wheel.write(path, path.relative_to(package.parent).as_posix())


def stand_in_kit(folder: Path, *, given: tuple[str, ...] = (), requirement: str = "medseg-trt", abi: str = "") -> Path:
    """Write a kit of generated wheels, a sample package and a project folder.

    Args:
        folder: of the kit; it must not exist.
        given: packages that the manifest says the machine has; the wheel needs them.
        requirement: what is asked of pip.
        abi: another one than that of the running Python.
    """
    content = folder.with_name(f"{folder.name}-content")
    needs = [f"Requires-Dist: {package.partition('==')[0]}" for package in given]
    entry = {f"medseg_trt-{VERSION}.dist-info/entry_points.txt": ENTRY_POINT}
    write_wheel(content / "wheels", "medseg-trt", VERSION, MODULES | entry, *needs)
    zip_pip(content / "wheels")
    (content / "requirements.txt").write_text(f"{requirement}\n", encoding="utf-8")
    (content / "samples" / SAMPLE[0]).mkdir(parents=True)
    (content / "samples" / SAMPLE[0] / SAMPLE[1]).write_bytes(SAMPLE[2])
    (content / "project" / "benchmarks").mkdir(parents=True)
    (content / "project" / "benchmarks" / "gpu_check.py").write_text("generated", encoding="utf-8")
    folder.mkdir()
    shutil.copyfile(INSTALLER, folder / INSTALLER.name)
    python = probe(Path(sys.executable))
    assert python is not None
    parts, total = write_parts(content, folder, PART_BYTES)
    Manifest(
        project="medseg-trt",
        version=VERSION,
        python=python.minor,
        abi=abi or python.abi,
        given=given,
        parts=parts,
        total_sha256=total,
    ).write(folder / MANIFEST, ())
    return folder
