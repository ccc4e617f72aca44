"""Pairs of keys in PEM, as openssl writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


def write_keys(
    folder: Path, name: str = "sign", kind: Callable[[], Any] = Ed25519PrivateKey.generate, encryption: Any = None
) -> tuple[Path, Path]:
    """Write a new pair and return the files of the private and the public key."""
    key = kind()
    private, public = folder / f"{name}.pem", folder / f"{name}-verify.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public
