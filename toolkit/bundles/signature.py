"""Sign a bundle's manifest with Ed25519, and refuse a bundle that a key does not vouch for.

A digest tells damage: whoever changes a file on purpose writes its new digest too. A signature tells malice, as long as
the private key is not where the attacker is. It is detached, 64 bytes over the manifest's own, in a file beside it; the
manifest holds the digest of everything else. ``openssl`` makes the keys, and can check the signature without us:

    openssl genpkey -algorithm ed25519 -out sign.pem
    openssl pkey -in sign.pem -pubout -out verify.pem
    openssl pkeyutl -verify -pubin -inkey verify.pem -rawin -in manifest.json -sigfile manifest.json.sig

Source: RFC 8032.
"""

import hashlib
from pathlib import Path
from typing import Any

from medseg_trt.errors import ArtefactError, UsageError, require
from medseg_trt.files import atomic_file

SUFFIX = ".sig"  # after the manifest's name
SIGNATURE_BYTES = 64
MAX_KEY_BYTES = 1 << 16
SHOWN_DIGITS = 16  # of a key's fingerprint
MAKE_KEYS = (
    "make a pair: openssl genpkey -algorithm ed25519 -out sign.pem; openssl pkey -in sign.pem -pubout -out verify.pem"
)


def read_private_key(path: Path) -> Any:
    """Return the Ed25519 key that signs, from a PEM file.

    Raises:
        UsageError: there is none in the file.
        MissingExtraError: ``cryptography`` is not installed.
    """
    serialization, ed25519 = _serialization(), _ed25519()
    try:
        key = serialization.load_pem_private_key(_key_bytes(path), password=None)
    except (ValueError, TypeError, _unsupported()) as error:  # TypeError: it is encrypted
        raise UsageError(f"{path} holds no private key in PEM without a password; {MAKE_KEYS}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError(f"{path} holds a key of another kind than Ed25519; {MAKE_KEYS}")
    return key


def read_public_key(path: Path) -> Any:
    """Return the Ed25519 key that verifies, from a PEM file.

    Raises:
        UsageError: there is none in the file.
        MissingExtraError: ``cryptography`` is not installed.
    """
    serialization, ed25519 = _serialization(), _ed25519()
    try:
        key = serialization.load_pem_public_key(_key_bytes(path))
    except (ValueError, _unsupported()) as error:
        raise UsageError(f"{path} holds no public key in PEM; {MAKE_KEYS}") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError(f"{path} holds a key of another kind than Ed25519; {MAKE_KEYS}")
    return key


def sign(manifest: Path, key: Any) -> Path:
    """Write the signature of a manifest beside it, the last thing that happens to a bundle; return its path.

    Args:
        manifest: complete.
        key: from ``read_private_key``.
    """
    path = signature_of(manifest)
    with atomic_file(path) as temporary:
        temporary.write_bytes(key.sign(manifest.read_bytes()))
    return path


def verify(manifest: Path, content: bytes, key_file: Path) -> str:
    """Check the signature of a manifest's bytes, before anything is made of them; return the key's fingerprint.

    Raises:
        ArtefactError: there is no signature, or it is not this key's, or not of these bytes.
        UsageError: the file holds no key.
        MissingExtraError: ``cryptography`` is not installed.
    """
    key = read_public_key(key_file)
    path = signature_of(manifest)
    if not path.is_file():
        raise ArtefactError(
            f"{manifest.parent} is not signed, and {key_file} was given to verify it; it is not used. "
            "Sign it when it is built: medseg-trt build --ckpt run/best.pt --sign sign.pem"
        )
    signature = path.read_bytes() if path.stat().st_size == SIGNATURE_BYTES else b""
    try:
        key.verify(signature, content)
    except _invalid_signature() as error:
        raise ArtefactError(
            f"{manifest} was not signed with the key of {key_file}, or was changed since; the bundle is not used. "
            "Get it again from who built it"
        ) from error
    return fingerprint(key)


def fingerprint(key: Any) -> str:
    """Return what people compare: the first digits of the SHA-256 of a public key's 32 bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:SHOWN_DIGITS]


def signature_of(manifest: Path) -> Path:
    """Return where the signature of a manifest lies."""
    return manifest.with_name(manifest.name + SUFFIX)


def _key_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; {MAKE_KEYS}") from error


def _serialization() -> Any:
    return require("cryptography.hazmat.primitives.serialization", "sign")


def _ed25519() -> Any:
    return require("cryptography.hazmat.primitives.asymmetric.ed25519", "sign")


def _unsupported() -> Any:
    return require("cryptography.exceptions", "sign").UnsupportedAlgorithm


def _invalid_signature() -> Any:
    return require("cryptography.exceptions", "sign").InvalidSignature
