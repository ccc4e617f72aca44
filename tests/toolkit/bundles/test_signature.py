"""Signed bundles: who is believed, with a key and without one, and what an attacker who re-hashes gets."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption
from fakes.bundles import LIBRARY_FILE, rehash, with_engine
from fakes.keys import write_keys
from tiny import write_pictures

from medseg_trt import pipeline
from medseg_trt.bundles import bundle as bundle_module
from medseg_trt.bundles.bundle import MANIFEST, load_bundle
from medseg_trt.bundles.signature import fingerprint, read_private_key, read_public_key, sign, signature_of, verify
from medseg_trt.cli import cli
from medseg_trt.engines import rebuild
from medseg_trt.errors import ArtefactError, MissingExtraError, UsageError


@pytest.fixture
def keys(tmp_path):
    return write_keys(tmp_path)


@pytest.fixture
def signed(tiny_bundle, tmp_path, keys):
    folder = shutil.copytree(tiny_bundle, tmp_path / "model.medseg")
    sign(folder / MANIFEST, read_private_key(keys[0]))
    return folder


def refused(folder, key, match):
    with pytest.raises(ArtefactError, match=match) as caught:
        load_bundle(folder, key)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


def test_load_bundle_accepts_the_signing_key(signed, keys):
    assert load_bundle(signed, keys[1]).signed_by == fingerprint(read_public_key(keys[1]))
    assert load_bundle(signed).signed_by is None


def test_load_bundle_refuses_another_key(signed, tmp_path):
    refused(signed, write_keys(tmp_path, "other")[1], "was not signed with the key of .*other-verify.pem")


def test_an_unsigned_bundle_is_refused_where_a_key_is_given(tiny_bundle, keys):
    refused(tiny_bundle, keys[1], "is not signed, and .* was given to verify it")


def test_whoever_rehashes_fools_the_digests_and_not_the_signature(signed, keys):
    content = (signed / "fp32.onnx").read_bytes() + b"\x12\x01x"  # still a graph, whose producer is called x
    (signed / "fp32.onnx").write_bytes(content)
    refused(signed, None, "is not what manifest.json says it is")
    (signed / "model.onnx").write_bytes(content)  # the same graph under its other name
    rehash(signed)
    assert load_bundle(signed).signed_by is None  # the digests agree again
    refused(signed, keys[1], "was changed since")


def test_every_flipped_byte_of_manifest_and_signature_is_refused(signed, keys):
    rng = np.random.default_rng(3)
    for path in (signed / MANIFEST, signature_of(signed / MANIFEST)):
        good = path.read_bytes()
        for _ in range(128):
            index = int(rng.integers(len(good)))
            path.write_bytes(good[:index] + bytes([good[index] ^ 1 << int(rng.integers(8))]) + good[index + 1 :])
            refused(signed, keys[1], "was changed since")
        for length in (0, 1, len(good) - 1):
            path.write_bytes(good[:length])
            refused(signed, keys[1], "was changed since")
        path.write_bytes(good + b"\0")
        refused(signed, keys[1], "was changed since")
        path.write_bytes(good)
    load_bundle(signed, keys[1])


def test_the_signature_is_of_the_bytes_that_are_parsed_whatever_the_file_holds_meanwhile(signed, keys):
    """Between two reads of a file somebody may replace it."""
    path = signed / MANIFEST
    good = path.read_bytes()
    tampered = good.replace(b'"background"', b'"foreground"')
    assert tampered != good
    with pytest.raises(ArtefactError, match="was changed since"):
        verify(path, tampered, keys[1])  # the file is still as it was signed
    path.write_bytes(tampered)
    assert verify(path, good, keys[1]) == fingerprint(read_public_key(keys[1]))


def test_a_bundle_is_made_of_the_bytes_that_were_verified(signed, keys, monkeypatch):
    path = signed / MANIFEST
    good = path.read_bytes()
    read = bundle_module.read_limited

    def replaced_after_it_was_read(file, limit):
        content = read(file, limit)
        if file == path:
            path.write_bytes(good.replace(b'"background"', b'"foreground"'))
        return content

    monkeypatch.setattr(bundle_module, "read_limited", replaced_after_it_was_read)
    assert load_bundle(signed, keys[1]).classes.names[0] == "background"


def test_a_manifest_is_not_even_parsed_before_its_signature_is_right(signed, keys, monkeypatch):
    (signed / MANIFEST).write_text("{")
    monkeypatch.setattr("medseg_trt.bundles.bundle._read_manifest", lambda *_: pytest.fail("it was parsed"))
    refused(signed, keys[1], "was changed since")


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_a_file_that_is_no_key_says_how_to_make_one(signed, tmp_path, content):
    (tmp_path / "bad.pem").write_bytes(content)
    for read in (read_public_key, read_private_key):
        with pytest.raises(UsageError, match=r"bad\.pem holds no .* key.*openssl genpkey -algorithm ed25519"):
            read(tmp_path / "bad.pem")
    with pytest.raises(UsageError, match="cannot be read"):
        load_bundle(signed, tmp_path / "absent.pem")


def test_keys_of_other_kinds_and_with_passwords_are_told_apart(tmp_path):
    private, public = write_keys(tmp_path, "ec", lambda: generate_private_key(SECP256R1()))
    for read, path in ((read_private_key, private), (read_public_key, public)):
        with pytest.raises(UsageError, match="another kind than Ed25519"):
            read(path)
    locked, _ = write_keys(tmp_path, "locked", encryption=BestAvailableEncryption(b"secret"))
    with pytest.raises(UsageError, match="without a password"):
        read_private_key(locked)


class NotInstalled:
    """An import system in which cryptography is not."""

    def find_spec(self, name, _path=None, _target=None):
        if name == "cryptography":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_signature_check_without_cryptography_names_the_extra(signed, keys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"pip install 'medseg-trt\[sign\]'"):
        load_bundle(signed, keys[1])


def test_openssl_makes_our_keys_and_checks_our_signature(signed, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")

    def openssl(*arguments):
        return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)

    private, public = tmp_path / "made.pem", tmp_path / "made-verify.pem"
    assert openssl("genpkey", "-algorithm", "ed25519", "-out", private).returncode == 0
    assert openssl("pkey", "-in", private, "-pubout", "-out", public).returncode == 0
    signature = sign(signed / MANIFEST, read_private_key(private))
    load_bundle(signed, public)
    options = ["-pubin", "-inkey", public, "-rawin", "-in", signed / MANIFEST, "-sigfile", signature]
    checked = openssl("pkeyutl", "-verify", *options)
    assert "Signature Verified Successfully" in checked.stdout


def test_a_rebuild_takes_the_signature_away_and_says_so(tiny_bundle, tmp_path, keys, caplog):
    folder = with_engine(tiny_bundle, tmp_path / "model.medseg")
    (folder / LIBRARY_FILE).unlink()
    rehash(folder)
    sign(folder / MANIFEST, read_private_key(keys[0]))
    bundle = load_bundle(folder, keys[1])
    rebuild._replace_engines(bundle, [])
    assert "its signature is removed" in caplog.text
    assert load_bundle(folder).content.engines == ()
    refused(folder, keys[1], "is not signed")


# --- the command line ------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments)])


def test_build_signs_last_and_infer_verifies(built, tmp_path):
    assert signature_of(built.bundle / MANIFEST).name not in built.manifest["files"]
    pictures = write_pictures(tmp_path / "data", count=1) / "images"
    verified = run(
        "infer", pictures, "--bundle", built.bundle, "-o", tmp_path / "masks", "--verify-key", built.verify_key
    )
    assert verified.exit_code == 0, verified.output
    assert f"is signed with the key {fingerprint(read_public_key(built.verify_key))}" in verified.stderr
    plain = run("infer", pictures, "--bundle", built.bundle, "-o", tmp_path / "masks")
    assert "its signature was not checked; to check it: --verify-key" in plain.stderr
    signature_of(built.bundle / MANIFEST).rename(tmp_path / "signature")
    try:
        unsigned = [
            run("infer", pictures, "--bundle", built.bundle, "-o", tmp_path / "masks", *v) for v in ([], ["-v"])
        ]
    finally:
        (tmp_path / "signature").rename(signature_of(built.bundle / MANIFEST))
    assert ["origin was not checked" in result.stderr for result in unsigned] == [False, True]


def test_a_bad_key_stops_a_build_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("medseg_trt.train.checkpoint.load_checkpoint", lambda *_: pytest.fail("the build began"))
    (tmp_path / "bad.pem").write_bytes(b"no key")
    with pytest.raises(UsageError, match="holds no private key"):
        pipeline.build(tmp_path / "model.pt", sign_key=tmp_path / "bad.pem")


@pytest.mark.parametrize("command", ["infer", "evaluate", "bench"])
def test_every_command_that_opens_a_bundle_verifies_it(command, tiny_bundle, tmp_path, keys):
    data = write_pictures(tmp_path / "data", count=2)
    rest = {
        "infer": [data / "images", "-o", tmp_path / "masks"],
        "evaluate": ["--data", data],
        "bench": ["--data", data, "--ckpt", tiny_bundle.parent / "model" / "model.pt"],
    }
    ran = run(command, "--bundle", tiny_bundle, "--verify-key", keys[1], *rest[command])
    assert isinstance(ran.exception, ArtefactError), ran.output
    assert "is not signed" in str(ran.exception)
