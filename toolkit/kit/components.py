"""List what a kit contains: as CycloneDX 1.6, and the licences as text."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from medseg_trt.kit.spec import normalised
from medseg_trt.kit.wheel_file import Wheel
from medseg_trt.samples.catalogue import SAMPLES


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a kit contains beside the sources of the tests."""

    version: str  # of medseg-trt
    wheels: tuple[Wheel, ...]
    samples: tuple[str, ...]


def cyclonedx(contents: Contents, total_sha256: str) -> dict[str, Any]:
    """Return the list of components, with the SHA-256 of every wheel and sample package.

    Args:
        contents: of the kit.
        total_sha256: the digest of the archive; kits with equal archives have the same serial number.
    """
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, total_sha256)}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": {"type": "file", "name": "medseg-trt-kit", "version": contents.version} | _hash(total_sha256),
        },
        "components": [
            *(_wheel_component(wheel) for wheel in contents.wheels),
            *(_sample_component(name) for name in contents.samples),
        ],
    }


def licence_list(contents: Contents) -> str:
    """Return the licence of every package and sample, with the names of the licence files inside each wheel."""
    lines = ["The licences of what this kit contains, as the packages state them; the texts are inside the wheels.", ""]
    for wheel in contents.wheels:
        lines.append(f"{wheel.name} {wheel.version}: {wheel.licence or 'not stated'}")
        lines += [f"    {name}" for name in wheel.licence_files]
    for name in contents.samples:
        sample = SAMPLES[name]
        lines.append(f"sample {name}, from {sample.package} {sample.version}: {sample.licence}")
    return "\n".join(lines) + "\n"


def _wheel_component(wheel: Wheel) -> dict[str, Any]:
    url = f"pkg:pypi/{normalised(wheel.name)}@{wheel.version.replace('+', '%2B')}"
    stated = {"expression": wheel.licence} if wheel.is_spdx else {"license": {"name": wheel.licence}}
    return {
        "type": "library",
        "bom-ref": wheel.file,
        "name": wheel.name,
        "version": wheel.version,
        "purl": url,
        **({"licenses": [stated]} if wheel.licence else {}),
    } | _hash(wheel.sha256)


def _sample_component(name: str) -> dict[str, Any]:
    sample = SAMPLES[name]
    return {
        "type": "data",
        "bom-ref": sample.file,
        "name": sample.package,
        "version": sample.version,
        "description": sample.description,
        "purl": f"pkg:pypi/{normalised(sample.package)}@{sample.version}",
        "licenses": [{"license": {"name": sample.licence}}],
    } | _hash(sample.sha256)


def _hash(sha256: str) -> dict[str, Any]:
    return {"hashes": [{"alg": "SHA-256", "content": sha256}]}
