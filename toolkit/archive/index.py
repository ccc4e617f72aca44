"""The index of an archive: an SQLite file in the user's cache that is built once, a few files at a time, and kept.

Every run lists the inputs again, which reads no file, and looks only at files that are new or whose size or time of
change differ. An interrupted run goes on where it stopped. Processes that want the same index wait for each other.
"""

import hashlib
import json
import os
import re
import sqlite3
import unicodedata
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from medseg_trt.archive.containers import Container
from medseg_trt.archive.dicom_attributes import Attributes, read_attributes
from medseg_trt.archive.entries import ARCHIVE_SUFFIXES, INNER_ARCHIVE, Entry, Problem
from medseg_trt.archive.request import ArchiveRequest, Condition
from medseg_trt.errors import InputError, UsageError
from medseg_trt.files import cache_folder, lock
from medseg_trt.imaging.images import DICOM, kind_of
from medseg_trt.imaging.listing import OTHER_KIND
from medseg_trt.imaging.signatures import HEAD_BYTES
from medseg_trt.progress import LOG, track, unicode_text

VERSION = 3  # of the tables and of what they say
MAX_DIGITS = 4000  # of a number in a name that sorts by its value; Python converts few more
UNREADABLE = "unreadable"  # the kind of a file that could not be opened
AGAIN = "unreadable before"  # the same file in the next run, until it was looked at
BATCH = 500  # files that are looked at between two commits
SCHEMA = """
CREATE TABLE IF NOT EXISTS file (
    path BLOB PRIMARY KEY, input INTEGER, parent BLOB, size INTEGER, mtime INTEGER, pass INTEGER,
    kind TEXT, reason TEXT, patient TEXT, study TEXT, series TEXT, corner TEXT, sort BLOB, alone INTEGER
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS file_parent ON file (input, parent);
CREATE INDEX IF NOT EXISTS file_kind ON file (kind);
CREATE TABLE IF NOT EXISTS problem (input INTEGER, sort BLOB, file BLOB, reason TEXT, refused INTEGER);
CREATE TABLE IF NOT EXISTS grouped (input INTEGER, parent BLOB, PRIMARY KEY (input, parent));
CREATE TABLE IF NOT EXISTS candidate (
    id INTEGER PRIMARY KEY, input INTEGER, sort BLOB, stem BLOB, fold BLOB, path BLOB, files BLOB,
    reason TEXT
);
CREATE INDEX IF NOT EXISTS candidate_fold ON candidate (fold);
"""

UNCHANGED = "size = excluded.size AND mtime = excluded.mtime"
OLD_KIND = f"CASE kind WHEN '{UNREADABLE}' THEN '{AGAIN}' ELSE kind END"
TO_LOOK_AT = f"kind IS NULL OR kind = '{AGAIN}'"
IN_USE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
UNWRITABLE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
)


@contextmanager
def open_index(key: str) -> Generator[sqlite3.Connection, None, None]:
    """Open the index with a key, alone: other processes wait. A damaged index is made anew.

    Raises:
        UsageError: there is no space for the index, or for the copy that a run makes of it, or another program uses it.
    """
    folder = cache_folder("archives")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{key}.sqlite"
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _wait_for_lock(descriptor)
        with closing(_connected(path)) as index:
            yield index
    except sqlite3.OperationalError as error:
        code = error.sqlite_errorcode & 0xFF  # without the details, see https://www.sqlite.org/rescode.html
        if code in IN_USE:
            raise UsageError(f"the index of the inputs, {path}, is used by another program: {error}") from error
        if code not in UNWRITABLE:
            raise
        raise UsageError(
            f"the index of the inputs, {path}, or its copy in {gettempdir()} cannot be written: {error}; free some "
            "space, or choose other folders with XDG_CACHE_HOME and TMPDIR"
        ) from error
    finally:
        os.close(descriptor)


def index_key(inputs: Sequence[Path], request: ArchiveRequest, lines: Path | None) -> str:
    """Return the digest of everything that the content of an index depends on, except the files themselves.

    Args:
        inputs: that the user named.
        request: which images are wanted.
        lines: a file with the list of further inputs, or None.
    """
    asked = [VERSION, str(Path.cwd()), [str(path) for path in inputs], request.names, [*map(str, request.where)]]
    digest = hashlib.sha256(json.dumps(asked).encode())
    if lines is not None:
        with lines.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def record_entries(index: sqlite3.Connection, entries: Iterable[tuple[int, Entry | Problem]]) -> bool:
    """Note what the inputs hold now, and return whether that differs from what the index knows.

    Args:
        index: an open index.
        entries: the number of each input, and what it holds.
    """
    (number,) = index.execute("SELECT coalesce(max(pass), 0) + 1 FROM file").fetchone()
    index.execute("DELETE FROM problem")
    for input_number, item in track(entries, "list"):
        if isinstance(item, Entry):
            _record_file(index, input_number, item, number)
        else:
            reason = unicode_text(item.reason)
            row = (input_number, sort_key(item.path), os.fsencode(item.path), reason, item.refused)
            index.execute("INSERT INTO problem VALUES (?, ?, ?, ?, ?)", row)
    vanished = index.execute("DELETE FROM file WHERE pass < ?", (number,)).rowcount
    (new,) = index.execute("SELECT count(*) FROM file WHERE kind IS NULL").fetchone()
    if new or vanished:
        _forget_images(index)
    index.commit()
    return bool(new or vanished)


def classify(index: sqlite3.Connection, where: Sequence[Condition], containers: dict[Path, Container]) -> None:
    """Look at the first bytes of every new file, and at the header of every new DICOM file.

    Files that could not be read before are looked at again.

    Raises:
        MissingExtraError: there are DICOM files, or conditions, and pydicom is not installed.
    """
    (total,) = index.execute(f"SELECT count(*) FROM file WHERE {TO_LOOK_AT}").fetchone()
    with TemporaryDirectory(prefix="medseg-trt-") as folder:
        for raw, old_kind in track(_files_to_look_at(index), "index", total):
            kind, attributes = _look_at(Path(os.fsdecode(raw)), where, containers, Path(folder))
            reason = None if attributes.reason is None else unicode_text(attributes.reason)
            index.execute(
                "UPDATE file SET kind = ?, reason = ?, patient = ?, study = ?, series = ?, corner = ?, "
                "alone = alone OR ? WHERE path = ?",
                (kind, reason, *_labels(attributes), attributes.is_damaged, raw),
            )
            if old_kind == AGAIN and kind != UNREADABLE:
                _forget_images(index)


def container_of(path: Path, containers: dict[Path, Container]) -> tuple[Container, str] | None:
    """Return the archive file that holds a member and the member's name there; None for a file of its own."""
    for parent in path.parents if containers else ():
        if parent in containers:
            return containers[parent], path.relative_to(parent).as_posix()
    return None


def sort_key(name: str) -> bytes:
    """Return a key whose bytes sort as ``images.natural_key`` does, in folders, too."""

    def digits(match: re.Match[str]) -> str:
        number = str(int(match[0])) if len(match[0]) <= MAX_DIGITS else match[0]
        return f"\0{len(number):04}{number}"

    lowered = re.sub(r"\d+", digits, name.lower().replace("/", "\1"))
    return (lowered + "\0\0" + name).encode("utf-8", "surrogatepass")


def fold_key(stem: str) -> bytes:
    """Return a key that is equal for names that are one name on a file system that ignores case."""
    return unicodedata.normalize("NFC", stem).casefold().encode("utf-8", "surrogatepass")


def _files_to_look_at(index: sqlite3.Connection) -> Iterator[tuple[bytes, str | None]]:
    """Yield the paths and kinds of files that were not looked at yet; a commit after every few."""
    select = f"SELECT path, kind FROM file WHERE {TO_LOOK_AT} LIMIT ?"
    while rows := index.execute(select, (BATCH,)).fetchall():
        yield from rows
        index.commit()


def _forget_images(index: sqlite3.Connection) -> None:
    """Let the files be grouped into images anew."""
    index.execute("DELETE FROM grouped")
    index.execute("DELETE FROM candidate")


def _record_file(index: sqlite3.Connection, input_number: int, item: Entry, number: int) -> None:
    index.execute(
        "INSERT INTO file (path, input, parent, size, mtime, pass, sort, alone) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (path) DO UPDATE SET pass = excluded.pass, size = excluded.size, mtime = excluded.mtime, "
        f"kind = CASE WHEN {UNCHANGED} THEN {OLD_KIND} END, "
        f"alone = CASE WHEN {UNCHANGED} THEN alone ELSE excluded.alone END",
        (
            os.fsencode(item.path),
            input_number,
            os.fsencode(item.parent),
            item.size,
            item.mtime_ns,
            number,
            sort_key(str(item.path)),
            item.alone,
        ),
    )


def _look_at(
    path: Path, where: Sequence[Condition], containers: dict[Path, Container], folder: Path
) -> tuple[str, Attributes]:
    """Return the kind of a file, empty where it is unsupported, and what the index keeps of it."""
    member = container_of(path, containers)
    if member is None:
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            return UNREADABLE, Attributes(reason=f"{path} cannot be read: {error.strerror}")
        return _kind_and_attributes(path, path, where)
    container, name = member
    local = folder / path.name
    try:
        container.copy(name, local, HEAD_BYTES)
        if kind_of(local) == DICOM:
            local.unlink()
            container.copy(name, local)
        return _kind_and_attributes(local, path, where)
    except InputError as error:
        return UNREADABLE, Attributes(reason=str(error))
    finally:
        local.unlink(missing_ok=True)


def _kind_and_attributes(local: Path, path: Path, where: Sequence[Condition]) -> tuple[str, Attributes]:
    if path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return "", Attributes(reason=INNER_ARCHIVE)
    kind = kind_of(local)
    if kind is None:
        return "", Attributes(reason=OTHER_KIND)
    if kind != DICOM:
        asked = ", ".join(map(str, where))
        return kind, Attributes(reason=f"not chosen by --where {asked}: it is not DICOM" if where else None)
    keywords = [condition.keyword for condition in where]
    attributes = read_attributes(local, keywords)
    if attributes.is_damaged:
        return kind, attributes
    unmet = [
        f"not chosen by --where {condition}"
        for condition, value in zip(where, attributes.values, strict=True)
        if not condition.holds(value)
    ]
    if unmet and attributes.reason is None:
        attributes = Attributes(reason=unmet[0])
    return kind, attributes


def _labels(attributes: Attributes) -> tuple[str, ...]:
    texts = (attributes.patient, attributes.study, attributes.series, attributes.corner)
    return tuple(text.encode("utf-8", "backslashreplace").decode("utf-8") for text in texts)


def _connected(path: Path) -> sqlite3.Connection:
    for attempt in range(2):
        index = sqlite3.connect(path)
        try:
            index.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; {SCHEMA}")
            (state,) = index.execute("PRAGMA quick_check(1)").fetchone()
            if state == "ok":
                return index
        except sqlite3.DatabaseError as error:
            if attempt or isinstance(error, sqlite3.OperationalError):  # such as a full disk
                index.close()
                raise
        index.close()
        LOG.warning("%s is damaged; the archive is indexed again", path)
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
    raise sqlite3.DatabaseError(f"{path} cannot be made")


def _wait_for_lock(descriptor: int) -> None:
    try:
        if not lock(descriptor):
            LOG.info("another process indexes the same archive; waiting for it")
            lock(descriptor, wait=True)
    except OSError as error:
        LOG.warning("the index cannot be locked (%s); let no two commands index one archive at once", error.strerror)
