"""Seal records with a key that only this user has, so that a record that came with a folder is not believed.

A record says that an image is finished. Whoever can put files into an output folder, for example in an archive that the
user unpacks there, could otherwise have his own masks kept as finished. The key is 32 random bytes in the user's state
folder, ``$XDG_STATE_HOME/medseg-trt`` or ``~/.local/state/medseg-trt``, made at the first run. Where it cannot be kept,
records of other runs are not believed and images are segmented again.
Source: RFC 2104 (HMAC); XDG Base Directory Specification.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from medseg_trt.files import open_regular, state_folder
from medseg_trt.progress import LOG

KEY_BYTES = 32
KEY_FILE = "record.key"


def record_key() -> bytes:
    """Return this user's key; without a place to keep it, a new one that no other run has."""
    path = state_folder() / KEY_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _stored(path) or _created(path)
    except OSError as error:
        LOG.warning("%s cannot be used (%s), so this run cannot be continued later", path, error.strerror)
        return secrets.token_bytes(KEY_BYTES)


def seal(key: bytes, content: bytes) -> str:
    """Return the HMAC-SHA256 of a record as hexadecimal digits."""
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def is_sealed(key: bytes, content: bytes, digits: object) -> bool:
    """Return whether ``digits`` is the seal of ``content``."""
    return isinstance(digits, str) and digits.isascii() and hmac.compare_digest(seal(key, content), digits)


def _stored(path: Path) -> bytes | None:
    """Return the key in a file that only this user can read; None where there is none."""
    try:
        with open_regular(path) as file:
            status, content = os.fstat(file.fileno()), file.read(KEY_BYTES + 1)
    except FileNotFoundError:
        return None
    is_private = not hasattr(os, "geteuid") or (
        status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o77
    )
    if len(content) == KEY_BYTES and is_private:
        return content
    LOG.warning(
        "%s may be known to others or is damaged; a new key is made, and earlier runs cannot be continued", path
    )
    path.unlink()
    return None


def _created(path: Path) -> bytes:
    """Write a new key, complete from the start, and return the one that is there then: another run may be first."""
    temporary = path.with_name(f"{KEY_FILE}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return _stored(path) or secrets.token_bytes(KEY_BYTES)
