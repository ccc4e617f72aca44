"""Packages that the target machine has already: pip counts on their versions, and the kit does not carry them."""

import base64
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from medseg_trt.errors import UsageError
from medseg_trt.kit.spec import normalised, parse_given


def given_versions(given: Sequence[str], constraints: Sequence[str]) -> dict[str, str]:
    """Return the versions of given packages by normalised name; without one, the tested version.

    Raises:
        UsageError: none is given and none is tested.
    """
    tested = {normalised(line.partition("==")[0]): line.partition("==")[2] for line in constraints if "==" in line}
    versions: dict[str, str] = {}
    for text in given:
        name, version = parse_given(text)
        version = version or tested.get(name)
        if version is None:
            raise UsageError(f"--given {text}: its version is not known here; give NAME==VERSION")
        versions[name] = version if "+" in version else f"{version}+given"  # above the release of an index
    return versions


def constrained(constraints: Sequence[str], given: Mapping[str, str]) -> list[str]:
    """Return the tested versions with those of given packages in their place."""
    others = [line for line in constraints if normalised(line.partition("==")[0]) not in given]
    return [*others, *(f"{name}=={version}" for name, version in given.items())]


def write_stub(folder: Path, name: str, version: str) -> Path:
    """Write a wheel without content or dependencies, which stands for a given package while pip resolves."""
    stem = f"{name.replace('-', '_')}-{version}"
    files = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{file},sha256={_record_digest(text)},{len(text)}" for file, text in files.items()]
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
        wheel.writestr(f"{stem}.dist-info/RECORD", "\n".join([*rows, f"{stem}.dist-info/RECORD,,", ""]))
    return path


def _record_digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
