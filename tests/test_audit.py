"""``make audit`` lists every file of a wheel and every package, and never reports success for an unchecked package."""

import hashlib
import json
import zipfile
from base64 import urlsafe_b64encode

import audit
import pytest


@pytest.fixture
def wheel(tmp_path):
    content = b"print('generated')\n"
    digest = urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    path = tmp_path / "audit" / "generated-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("generated/code.py", content)
        record = f"generated/code.py,sha256={digest},{len(content)}\ngenerated-1.0.dist-info/RECORD,,\n"
        archive.writestr("generated-1.0.dist-info/RECORD", record)
    return path


def test_every_file_of_a_wheel_is_a_component_with_its_digest(wheel):
    (component,) = audit.wheel_components(wheel)
    assert component["name"] == "generated/code.py"
    assert component["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(b"print('generated')\n").hexdigest()}]


def test_audit_covers_every_constraint_without_local_version_labels():
    lines = audit.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    packages = audit.tested_packages()
    assert len(packages) == len([line for line in lines if line and not line.startswith("#")])
    assert any(package.startswith("torch==") for package in packages)
    assert not any("+" in package for package in packages)


REPORT = {
    "dependencies": [
        {"name": "sound", "version": "1.0", "vulns": []},
        {"name": "unknown", "skip_reason": "Dependency not found on PyPI"},
    ]
}
VULNERABLE = {"name": "old", "version": "0.1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["0.2"]}]}


@pytest.fixture
def audited(wheel, monkeypatch):
    """Run ``main`` on a generated wheel with the given answers of the service."""

    def run(report, reachable=True):
        monkeypatch.setattr(audit, "ROOT", wheel.parents[1])
        monkeypatch.setattr(audit, "OUTPUT", wheel.parent)
        monkeypatch.setattr(audit, "write_components", lambda *_: 1)
        monkeypatch.setattr(audit, "is_reachable", lambda _: reachable)
        monkeypatch.setattr(audit, "audit", lambda *_: json.loads(json.dumps(report)))
        return audit.main()

    return run


def test_a_package_that_was_not_checked_is_named_and_is_no_success(audited, capsys):
    assert audited(REPORT) == 2
    shown = capsys.readouterr()
    assert "unknown: not checked: Dependency not found on PyPI" in shown.out
    assert "checked 1 of" in shown.out
    assert "NOT AUDITED: 1 of" in shown.err


def test_only_an_audit_of_every_package_without_a_finding_succeeds(audited):
    assert audited({"dependencies": REPORT["dependencies"][:1]}) == 0


def test_a_vulnerability_fails(audited, capsys):
    assert audited({"dependencies": [*REPORT["dependencies"], VULNERABLE]}) == 1
    assert "old 0.1: PYSEC-1, fixed in 0.2" in capsys.readouterr().out


def test_a_service_that_cannot_be_reached_is_no_success(audited, capsys):
    assert audited(REPORT, reachable=False) == 2
    assert "NOT AUDITED" in capsys.readouterr().err


def test_without_a_network_the_service_is_not_reachable():
    assert not audit.is_reachable("pip==1", "http://127.0.0.1:9/{package}")  # port 9, discard: nobody listens
