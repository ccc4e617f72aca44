"""List what a wheel contains and the tested packages in CycloneDX, and check the packages for known vulnerabilities.

``make audit`` builds the wheel and runs this file with the tools of the dependency group ``audit``. It writes
``build/audit/components.cdx.json`` and ``vulnerabilities.json``. Exit code 1: a package has a known vulnerability;
2: a package could not be checked, so that nothing is known about it, for example without a network.
"""

import base64
import binascii
import csv
import io
import json
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "tests" / "constraints.txt"
OUTPUT = ROOT / "build" / "audit"
SERVICE = "https://pypi.org/pypi/{package}/{version}/json"
TIMEOUT_S = 30


def tested_packages() -> list[str]:
    """Return the tested versions, ``NAME==VERSION``; without the label of a build, such as ``+cpu``, as on PyPI."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return [line.partition("+")[0].strip() for line in lines if "==" in line and not line.startswith("#")]


def wheel_components(wheel: Path) -> list[dict[str, Any]]:
    """Return a component for each file of a wheel, with the SHA-256 of its RECORD."""
    with zipfile.ZipFile(wheel) as archive:
        (record,) = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
        rows = list(csv.reader(io.StringIO(archive.read(record).decode("utf-8"))))
    return [_file_component(name, digest) for name, digest, _size in rows if digest]


def _file_component(name: str, digest: str) -> dict[str, Any]:
    algorithm, _, encoded = digest.partition("=")
    assert algorithm == "sha256", name
    content = binascii.hexlify(base64.urlsafe_b64decode(f"{encoded}=")).decode()
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [{"alg": "SHA-256", "content": content}]}


def write_components(wheel: Path, requirements: Path, output: Path) -> int:
    """Write the list of components, and return their number."""
    pyproject = str(ROOT / "pyproject.toml")
    options = ["--pyproject", pyproject, "--output-format", "JSON", "--output-file", str(output)]
    subprocess.run([*tool("cyclonedx_py"), "requirements", str(requirements), *options], check=True)
    data = json.loads(output.read_text(encoding="utf-8"))
    data["components"] += wheel_components(wheel)
    output.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return len(data["components"])


def tool(module: str) -> list[str]:
    """Return the command that runs a module of this environment, without the current folder in ``sys.path``."""
    return [sys.executable, "-P", "-m", module]


def is_reachable(package: str, service: str = SERVICE) -> bool:
    """Return whether the vulnerability service knows a package, ``NAME==VERSION``."""
    name, _, version = package.partition("==")
    try:
        with urllib.request.urlopen(service.format(package=name, version=version), timeout=TIMEOUT_S) as response:
            return "vulnerabilities" in json.load(response)
    except (OSError, ValueError):  # no network, an HTTP error, or no JSON
        return False


def audit(requirements: Path, output: Path) -> dict[str, Any]:
    """Run pip-audit on the tested versions and return its report; without a report, its error is shown."""
    pinned = ["--requirement", str(requirements), "--no-deps", "--disable-pip", "--vulnerability-service", "pypi"]
    report = ["--format", "json", "--output", str(output), "--progress-spinner", "off"]
    output.unlink(missing_ok=True)
    done = subprocess.run([*tool("pip_audit"), *pinned, *report], capture_output=True, text=True, check=False)
    if not output.is_file():
        sys.exit(f"pip-audit failed: {done.stderr.strip()}")
    return json.loads(output.read_text(encoding="utf-8"))


def findings(report: dict[str, Any]) -> tuple[list[str], list[str], int]:
    """Return a line for each vulnerability, a line for each package that was not checked, and the number checked."""
    packages = report["dependencies"]
    skipped = [
        f"{package['name']}: not checked: {package['skip_reason']}" for package in packages if "vulns" not in package
    ]
    vulnerable = [
        f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in "
        f"{', '.join(vulnerability['fix_versions']) or 'no version'}"
        for package in packages
        for vulnerability in package.get("vulns", ())
    ]
    return vulnerable, skipped, len(packages) - len(skipped)


def main() -> int:
    """Write both files, print the findings, and return the exit code."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    packages = tested_packages()
    requirements = OUTPUT / "requirements.txt"
    requirements.write_text("\n".join(packages) + "\n", encoding="utf-8")
    (wheel,) = OUTPUT.glob("*.whl")
    components = OUTPUT / "components.cdx.json"
    print(f"{components.relative_to(ROOT)}: {write_components(wheel, requirements, components)} components")
    if not is_reachable(packages[0]):
        print(f"NOT AUDITED: no package was checked; PyPI's service does not answer for {packages[0]}", file=sys.stderr)
        return 2
    vulnerable, skipped, checked = findings(audit(requirements, OUTPUT / "vulnerabilities.json"))
    for line in [*vulnerable, *skipped]:
        print(line)
    print(f"checked {checked} of {len(packages)} packages with PyPI: {len(vulnerable)} known vulnerabilities")
    if skipped:
        print(f"NOT AUDITED: {len(skipped)} of {len(packages)} packages, listed above", file=sys.stderr)
    return 1 if vulnerable else 2 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
