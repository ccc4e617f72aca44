"""The settings of a server: addresses, limits and destinations, checked before anything is opened."""

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from medseg_trt.errors import UsageError

MOST_STREAMS = 4  # each holds its own copy of the weights in the form that the library computes with
AE_TITLE = re.compile(r"[ -\[\]-~]{1,16}")  # DICOM PS3.5: up to 16 characters of ASCII without the backslash
DESTINATION = re.compile(r"(?P<title>[^@]+)@(?P<host>[^@\s]+):(?P<port>\d{1,5})")
EXTRA = "serve"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one client may ask for; beyond it a request is refused with the protocol's own error."""

    max_body_bytes: int = 1 << 30
    max_pixels: int = 1 << 28  # of a decoded image; the readers have further limits
    max_zip_members: int = 4096
    body_timeout_s: float = 120.0  # for receiving one request
    request_timeout_s: float = 120.0  # for a mask that is answered at once
    max_requests: int = 64  # waiting for or in one model
    max_jobs: int = 256  # accepted and not finished
    max_connections: int = 512
    max_batch: int = 4  # slices per run of the network
    batch_delay_s: float = 0.002  # how long an incomplete batch waits for another request
    keep_s: float = 3600.0  # how long results, and DICOM objects that were sent, stay
    min_free_bytes: int = 256 << 20  # of the spool's disk; below, nothing new is accepted
    drain_s: float = 30.0  # after SIGTERM


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """Where segmentations are sent: a DICOM node, or the address of a DICOMweb service."""

    name: str  # as the command line writes it
    host: str
    port: int
    ae_title: str = ""  # of a DICOM node
    url: str = ""  # of a DICOMweb service


@dataclass(frozen=True, kw_only=True, slots=True)
class DicomSettings:
    """The DICOM node."""

    port: int
    host: str = "127.0.0.1"
    ae_title: str = "MEDSEG"
    allowed: tuple[str, ...] = ()  # calling AE titles; empty: all
    send_to: tuple[Destination, ...] = ()
    output: Path | None = None  # a folder that also gets the segmentations
    model: str | None = None  # the bundle that segments; None: the only one
    secondary_capture: bool = False
    quiet_s: float = 10.0  # after the last object of an open association
    released_s: float = 1.0  # after the end of the association; several may carry one series
    retry_s: float = 5.0  # the first pause after a failed transfer; each further one is twice as long
    max_retry_s: float = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """Everything that a server is started with."""

    bundles: tuple[Path, ...]
    spool: Path
    host: str = "127.0.0.1"
    port: int = 8000
    backend: str = "auto"
    precision: str | None = None
    threads: int | None = None
    streams: int = MOST_STREAMS  # runs of one bundle that may overlap on a processor
    verify_key: Path | None = None
    token: str | None = None
    insecure: bool = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    dicom: DicomSettings | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.bundles:
            raise UsageError("give at least one bundle: --bundle model.medseg")
        if not is_loopback(self.host) and self.token is None and not self.insecure:
            raise UsageError(
                f"{self.host} can be reached from other machines; give --token-file, or type --insecure to serve "
                "everyone without a password"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise UsageError("TLS needs both --tls-certificate and --tls-key")
        if self.dicom is not None and not (is_loopback(self.dicom.host) or self.dicom.allowed or self.insecure):
            raise UsageError(
                f"the DICOM node on {self.dicom.host} can be reached from other machines; name who may send with "
                "--allow-ae, or type --insecure to accept from everyone"
            )


def is_loopback(host: str) -> bool:
    """Return whether an address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_ae_title(text: str) -> str:
    """Return a valid application entity title.

    Raises:
        UsageError: it is none.
    """
    title = text.strip()
    if not AE_TITLE.fullmatch(title):
        raise UsageError(f"{text!r} is no AE title: 1 to 16 characters of ASCII without the backslash")
    return title


def parse_destination(text: str) -> Destination:
    """Return the destination that ``AET@host:port`` or ``http(s)://host/path`` names.

    Raises:
        UsageError: it is none.
    """
    text = text.strip()
    if text.startswith(("http://", "https://")):
        address = urlsplit(text)
        try:
            port = address.port or (443 if address.scheme == "https" else 80)
        except ValueError as error:
            raise UsageError(f"{text!r} has a port that is no number") from error
        if not address.hostname or address.username or address.query or address.fragment:
            raise UsageError(f"{text!r} is no address of a DICOMweb service; write http://host:port/path")
        return Destination(name=text, host=address.hostname, port=port, url=text.rstrip("/"))
    match = DESTINATION.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise UsageError(f"{text!r} is no destination; write AET@host:port, for example ARCHIVE@10.0.0.5:104")
    return Destination(name=text, ae_title=parse_ae_title(match["title"]), host=match["host"], port=int(match["port"]))


def read_token(path: Path) -> str:
    """Return the bearer token of a file.

    Raises:
        UsageError: it is shorter than 16 characters, or not of printable ASCII.
    """
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{path} holds no token of at least 16 printable ASCII characters without spaces")
    return token
