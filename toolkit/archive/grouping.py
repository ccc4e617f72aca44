"""Group the files of an index into images: a file each, or a DICOM series by its UIDs, and name their masks.

The files of a series may lie in several folders, under any names. A series UID that several folders share is not always
one series: anonymisers repeat UIDs. Files of one patient, study and series are one series if all their positions
differ; otherwise each folder is read by itself, as are series within one folder.
"""

import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from medseg_trt.archive.containers import Container
from medseg_trt.archive.entries import joined
from medseg_trt.archive.index import container_of, fold_key, sort_key
from medseg_trt.archive.request import Names
from medseg_trt.errors import InputError
from medseg_trt.imaging.images import DICOM, MASK_SUFFIXES, READERS, file_stem
from medseg_trt.imaging.listing import DICOM_WITHOUT_IMAGE, OTHER_KIND, without_detached
from medseg_trt.inference.areas_table import AREAS
from medseg_trt.inference.resume import OVERLAYS, RECORD_SUFFIX, RECORDS_FOLDER
from medseg_trt.progress import LOG, track, unicode_text

CLASHES = """
SELECT id, path, stem FROM candidate WHERE reason IS NULL AND fold IN
(SELECT fold FROM candidate GROUP BY fold HAVING count(*) > 1)
"""
OTHER = """
SELECT path, stem FROM candidate WHERE fold = (SELECT fold FROM candidate WHERE id = ?) AND id <> ? ORDER BY id LIMIT 1
"""
IN_FOLDERS = "SELECT id, path, fold FROM candidate WHERE reason IS NULL AND instr(fold, ?)"
WRITTEN_SUFFIXES = (
    *MASK_SUFFIXES,
    RECORD_SUFFIX,
)  # of the files that an image gets, in folders like those of the input
SKIPPED = "skipped.csv"  # the table of what is not segmented
RESERVED = {
    OVERLAYS: "the overlays",
    RECORDS_FOLDER: "the records",
    AREAS: "a table",
    SKIPPED: "a table",
}  # in the output
FORGET_REASONS = f"""
UPDATE file SET reason = CASE kind WHEN '{DICOM}' THEN NULL ELSE '{OTHER_KIND}' END
WHERE kind = '{DICOM}' AND reason = '{DICOM_WITHOUT_IMAGE}' OR kind = '' AND reason = ''
"""  # that grouping gave, as files beside may have changed
UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
UNKNOWN = "unknown"
Series = tuple[str | None, tuple[Path, ...]]  # the name, None for that of the only file, and the files
SEPARATOR = b"\0"  # between the paths of a series' files
USABLE_DICOM = f"kind = '{DICOM}' AND reason IS NULL AND NOT alone"
SPREAD = f"""
CREATE TEMP TABLE spread AS SELECT input, patient, study, series FROM file
WHERE {USABLE_DICOM} AND series <> '' AND corner <> '' GROUP BY input, patient, study, series
HAVING count(DISTINCT parent) > 1 AND count(DISTINCT corner) = count(*)
"""
IN_SPREAD = "(input, patient, study, series) IN (SELECT input, patient, study, series FROM spread)"


class Grouping:
    """Makes the images of an index from its files."""

    def __init__(self, index: sqlite3.Connection, names: Names, containers: dict[Path, Container]) -> None:
        """Take an index whose files are all known.

        Args:
            index: open.
            names: how masks are named.
            containers: the open archive files.
        """
        self._index = index
        self._names = names
        self._containers = containers

    def run(self) -> None:
        """Group all folders that are not grouped yet; a commit after each.

        Raises:
            MissingExtraError: there are DICOM files and pydicom is not installed.
        """
        if self._index.execute("SELECT 1 FROM grouped").fetchone() is None:
            self._index.execute(FORGET_REASONS)
        self._index.execute("DROP TABLE IF EXISTS temp.spread")
        self._index.execute(SPREAD)
        folders = self._index.execute(
            "SELECT DISTINCT input, parent FROM file EXCEPT SELECT input, parent FROM grouped ORDER BY 1, 2"
        ).fetchall()
        for number, parent in track(folders, "group"):
            self._group_folder(number, parent)
            self._index.execute("INSERT INTO grouped VALUES (?, ?)", (number, parent))
            self._index.commit()
        marker = (-1, b"")  # stands for the series of several folders
        if not self._index.execute("SELECT 1 FROM grouped WHERE input = ? AND parent = ?", marker).fetchone():
            for row in self._index.execute("SELECT * FROM spread ORDER BY 1, 2, 3, 4").fetchall():
                self._group_spread(*row)
            self._index.execute("INSERT INTO grouped VALUES (?, ?)", marker)
            self._index.commit()

    def refuse_clashes(self) -> None:
        """Give a reason to every image whose files would have the name of another's, or of a folder.

        Names that differ only in case are one name on many disks.
        """
        execute = self._index.execute
        for identity, path, stem in execute(CLASHES).fetchall():
            other = execute(OTHER, (identity, identity)).fetchone()
            (other_path, other_stem) = map(os.fsdecode, other)
            differ = "" if os.fsencode(other_stem) == stem else " in a case or form of letters that many disks ignore"
            reason = (
                f"{os.fsdecode(path)} and {other_path} would share the name of their masks{differ}; rename one, or run "
                "them into two folders"
            )
            execute("UPDATE candidate SET reason = ? WHERE id = ?", (unicode_text(reason), identity))
        for name, held in RESERVED.items():
            below = (f"{name}/".encode(), f"{name}0".encode())  # 0 follows the slash
            for identity, path in execute(
                "SELECT id, path FROM candidate WHERE fold >= ? AND fold < ?", below
            ).fetchall():
                reason = f"{os.fsdecode(path)}: its mask would lie in {name}/, the name of {held}; rename that folder"
                execute("UPDATE candidate SET reason = ? WHERE id = ?", (unicode_text(reason), identity))
        for suffix in WRITTEN_SUFFIXES:
            self._refuse_below_files(suffix)

    def _refuse_below_files(self, suffix: str) -> None:
        """Give a reason to every image in a folder that has the name of another image's mask or record."""
        execute = self._index.execute
        for identity, path, fold in execute(IN_FOLDERS, (end := f"{suffix}/".encode(),)).fetchall():
            parts = fold.split(end)
            stems = [end.join(parts[:count]) for count in range(1, len(parts))]
            for other in (execute("SELECT path FROM candidate WHERE fold = ?", (stem,)).fetchone() for stem in stems):
                if other is not None:
                    written = "record" if suffix == RECORD_SUFFIX else "mask"
                    reason = (
                        f"{os.fsdecode(path)} lies in a folder *{suffix} that would have the name of the {written} of "
                        f"{os.fsdecode(other[0])}; rename that folder"
                    )
                    execute("UPDATE candidate SET reason = ? WHERE id = ?", (unicode_text(reason), identity))

    def _group_folder(self, number: int, parent: bytes) -> None:
        rows = self._index.execute(
            "SELECT path FROM file WHERE input = ? AND parent = ? AND reason IS NULL AND (kind <> ? OR alone)",
            (number, parent, DICOM),
        ).fetchall()
        known = [Path(os.fsdecode(path)) for (path,) in rows]
        self._leave_detached(number, parent, known)
        top = os.fsdecode(parent)
        for path in known:
            self._add(number, joined(top, file_stem(path)), path, (path,), path.name)
        paths = self._index.execute(
            f"SELECT path FROM file WHERE input = ? AND parent = ? AND {USABLE_DICOM} AND NOT {IN_SPREAD}",
            (number, parent),
        ).fetchall()
        for files in self._by_archive([Path(os.fsdecode(path)) for (path,) in paths]):
            series = self._found_series(files[0].parent, sorted(files))
            self._add_series(number, top, top.rpartition("/")[0], files[0].parent, series)

    def _group_spread(self, number: int, patient: str, study: str, series: str) -> None:
        rows = self._index.execute(
            f"SELECT path, parent FROM file WHERE input = ? AND patient = ? AND study = ? AND series = ? "
            f"AND {USABLE_DICOM} ORDER BY path",
            (number, patient, study, series),
        ).fetchall()
        files = [Path(os.fsdecode(path)) for path, _ in rows]
        common = _common_folder(files)
        top = os.path.commonpath([os.fsdecode(parent) for _, parent in rows])
        if len(self._by_archive(files)) > 1:
            reason = f"{common}: the slices of series {series} are in several archives; unpack them"
            self._add(number, joined(top, _safe(series)), common, files, _safe(series), reason)
            return
        series_parts = self._found_series(common, files)
        LOG.debug("%s: series %s lies in %d folders", common, series, len({path.parent for path in files}))
        named: list[Series] = [
            (_safe(series) if len(series_parts) == 1 else f"{_safe(series)}-{order}", members)
            for order, (_, members) in enumerate(series_parts, 1)
        ]
        self._add_series(number, top, top, common, named)

    def _add_series(self, number: int, top: str, beside: str, folder: Path, series: Sequence[Series]) -> None:
        """Add images: single files keep their names in the folder ``top``, series have theirs in ``beside``."""
        names = self._dicom_names(members[0] for _, members in series) if self._names == "dicom" else None
        for order, (stem, members) in enumerate(series):
            path = members[0] if stem is None else folder
            if names is not None:
                full = names[order]
            else:
                full = joined(top, file_stem(path)) if stem is None else joined(beside, stem)
            self._add(number, full, path, members, path.name if stem is None else full)

    def _dicom_names(self, firsts: Iterator[Path]) -> list[str]:
        """Return patient/study/series of the first files; images of one series are numbered."""
        names: list[str] = []
        for path in firsts:
            row = self._index.execute(
                "SELECT patient, study, series FROM file WHERE path = ?", (os.fsencode(path),)
            ).fetchone()
            names.append("/".join(map(_safe, row)))
        totals, seen = Counter(names), Counter[str]()
        for position, name in enumerate(names):
            seen[name] += 1
            if totals[name] > 1:
                names[position] = f"{name}-{seen[name]}"
        return names

    def _found_series(self, folder: Path, files: Sequence[Path]) -> list[Series]:
        """Return the series of DICOM files, and note the files that hold no image; the reader logs why."""
        reader = import_module(READERS[DICOM])
        with local_files(folder, files, self._containers) as (local_folder, locals_):
            back = dict(zip(locals_, files, strict=True))
            found = [
                (stem, tuple(back[path] for path in members))
                for stem, members in reader.find_series(local_folder, locals_)
            ]
        used = {path for _, members in found for path in members}
        for path in set(files) - used:
            self._index.execute("UPDATE file SET reason = ? WHERE path = ?", (DICOM_WITHOUT_IMAGE, os.fsencode(path)))
        return found

    def _leave_detached(self, number: int, parent: bytes, known: Sequence[Path]) -> None:
        """Note that the voxels of a detached header are used."""
        rows = self._index.execute(
            "SELECT path FROM file WHERE input = ? AND parent = ? AND reason = ?", (number, parent, OTHER_KIND)
        ).fetchall()
        others = [Path(os.fsdecode(path)) for (path,) in rows]
        for path in set(others) - set(without_detached(others, known)):
            self._index.execute("UPDATE file SET reason = '' WHERE path = ?", (os.fsencode(path),))

    def _by_archive(self, files: Sequence[Path]) -> list[list[Path]]:
        """Divide files by the archive file that holds them; those of their own are together."""
        groups: dict[Path | None, list[Path]] = {}
        for path in files:
            held = container_of(path, self._containers)
            groups.setdefault(None if held is None else held[0].path, []).append(path)
        return list(groups.values())

    def _add(
        self, number: int, stem: str, path: Path, files: Sequence[Path], name: str, reason: str | None = None
    ) -> None:
        self._index.execute(
            "INSERT INTO candidate (input, sort, stem, fold, path, files, reason) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                number,
                sort_key(joined(stem.rpartition("/")[0], name.rpartition("/")[2])),
                os.fsencode(stem),
                fold_key(stem),
                os.fsencode(path),
                SEPARATOR.join(map(os.fsencode, files)),
                None if reason is None else unicode_text(reason),
            ),
        )


@contextmanager
def local_files(
    folder: Path, files: Sequence[Path], containers: dict[Path, Container]
) -> Iterator[tuple[Path, list[Path]]]:
    """Yield files as they are, or copies of the members of an archive file, which are removed afterwards.

    Raises:
        InputError: a member is damaged.
    """
    members = [container_of(path, containers) for path in files]
    held = [member for member in members if member is not None]
    if not held:
        yield folder, [*files]
        return
    container, _ = held[0]
    if len(held) < len(files) or any(other is not container for other, _ in held):
        raise InputError(f"{folder}: its files are in several archives; unpack them")
    with TemporaryDirectory(prefix="medseg-trt-") as temporary:
        local_folder = Path(temporary) / (folder.stem if folder == container.path else folder.name)
        local_folder.mkdir()
        with container.local([name for _, name in held], local_folder) as copies:
            yield local_folder, [*copies]


def _common_folder(files: Sequence[Path]) -> Path:
    """Return the folder of files; where some paths are absolute, all are taken so."""
    folders = [path.parent for path in files]
    if len({folder.is_absolute() for folder in folders}) > 1:
        folders = [folder.absolute() for folder in folders]
    return Path(os.path.commonpath(folders))


def _safe(text: str) -> str:
    """Return a value of a DICOM header as a name of one folder or file."""
    name = UNSAFE.sub("_", text) or UNKNOWN
    return f"_{name[1:]}" if name.startswith(".") else name
