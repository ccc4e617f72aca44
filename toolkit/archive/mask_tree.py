"""Write the masks of an archive into a tree of folders; what was written is noted on disk, not in memory."""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from medseg_trt.archive.containers import Container
from medseg_trt.archive.grouping import SKIPPED, local_files
from medseg_trt.archive.index import container_of
from medseg_trt.archive.object_store import ObjectOutput, is_object_path, shown
from medseg_trt.archive.parts import (
    MAX_NAMED,
    PARTS,
    PartNote,
    PartRefused,
    counts_of_parts,
    notes_of,
    remove_note,
    require_complete,
    write_note,
)
from medseg_trt.archive.plan import Plan, Skipped, make_plan
from medseg_trt.archive.request import ArchiveRequest, Part
from medseg_trt.archive.skipped_table import require_own_tables, write_skipped
from medseg_trt.bundles.bundle import Bundle
from medseg_trt.errors import InputError, UsageError
from medseg_trt.files import PARTIAL, remove_abandoned
from medseg_trt.imaging.images import MASK_SUFFIXES, Image, Mask, Source, file_stem
from medseg_trt.imaging.slide_mask import SlideMask
from medseg_trt.inference.areas_table import AREAS, AreaTable, unusual_reason
from medseg_trt.inference.output_folder import require_outside, require_own_folders
from medseg_trt.inference.resume import (
    OVERLAYS,
    RECORDS_FOLDER,
    Record,
    digests_of,
    has_its_files,
    read_record,
    record_name,
)
from medseg_trt.inference.to_folder import MaskFolder, MaskFormat
from medseg_trt.progress import LOG, plural


class MaskTree(MaskFolder):
    """Write a mask for every image of an archive, ``areas.csv``, ``skipped.csv`` and, on request, ``overlays/``.

    Of a part of a run, the tables are written once all parts have ended.
    """

    def __init__(
        self,
        folder: Path,
        request: ArchiveRequest,
        *,
        part: Part | None = None,
        overlay: bool = False,
        resume: bool = False,
        mask_format: MaskFormat = "auto",
        on_error: Callable[[Path, InputError], None] | None = None,
    ) -> None:
        """Choose the folder, the images and what is written; nothing is written before the run.

        Args:
            folder: the output folder, which need not exist; or a prefix of a bucket.
            request: which images are wanted, and how their masks are named.
            part: the part of the images that is segmented; None for all.
            overlay: as for ``MaskFolder``.
            resume: as for ``MaskFolder``.
            mask_format: as for ``MaskFolder``.
            on_error: as for ``MaskFolder``.
        """
        self.output = folder
        self._remote = ObjectOutput(folder) if is_object_path(folder) else None
        local = folder if self._remote is None else self._remote.folder
        super().__init__(local, overlay=overlay, resume=resume, mask_format=mask_format, on_error=on_error)
        self.is_joined = part is None  # whether the tables are those of all images
        self._request = request
        self._part = part
        self._plan: Plan | None = None
        self._unusable: list[PartRefused] = []

    @property
    def plan(self) -> Plan:
        """The images of the run, after ``find_sources``."""
        assert self._plan is not None
        return self._plan

    @property
    def containers(self) -> dict[Path, Container]:
        """The open archive files among the inputs."""
        return self.plan.containers

    @property
    def tables_text(self) -> str:
        """Where the tables are, in words."""
        if self.is_joined:
            return f"areas in {shown(self.output / AREAS)}, what was not segmented in {shown(self.output / SKIPPED)}"
        return "the tables follow when all parts have ended"

    def summary(self) -> dict[str, Any]:
        """Return the result of a run, for JSON: numbers of masks, whose names follow from those of their images."""
        return {
            "masks": self.num_masks,
            "areas": shown(self.output / AREAS),
            "skipped": shown(self.output / SKIPPED),
            "joined": self.is_joined,
            "kept": self.kept,
            "failed": dict(self.refused),
            "left_out": self.num_left_out,
            "unusual": self.num_unusual,
        }

    def find_sources(self, inputs: Sequence[Path], bundle: Bundle) -> Sequence[Source]:
        """Index the inputs; note what cannot be used.

        Raises:
            InputError: there is no image at all; ``skipped.csv`` then says why.
            UsageError: the output folder is in the bundle, or holds other files under the names of the tables; or parts
                would be written to a bucket.
            DeviceError: the bucket cannot be read or written.
        """
        try:
            return self._found(inputs, bundle)
        except BaseException:
            self.close()
            raise

    def _found(self, inputs: Sequence[Path], bundle: Bundle) -> Plan:
        if self._remote is not None:
            if self._part is not None:
                raise UsageError(f"{shown(self.output)}: parts are joined in a folder alone; give --ray, or a folder")
            for name in (AREAS, SKIPPED):
                self._remote.fetch(name)
        require_outside(self.folder, bundle.folder)
        require_own_folders(self.folder, self.folder / RECORDS_FOLDER / PARTS)
        require_own_tables(self.folder)
        self._plan = make_plan(inputs, self._request, [bundle.folder], self.output, self._part)
        self.num_sources = len(self._plan)
        self.num_left_out = self._plan.num_left_out
        if self._part is None or self._part.number == 1:  # the first part speaks for all
            for item in self._plan.skipped():
                if item.refused:
                    reason = item.reason if item.file in item.reason else f"{item.file}: {item.reason}"
                    self.note_refused(Path(item.file), item.file, InputError(reason))
        if not self._plan.num_images:
            self._write_tables(None, ())
            table = shown(self.output / SKIPPED)
            raise InputError(f"the inputs hold no image that can be used; {table} lists the reasons")
        return self._plan

    @contextmanager
    def opened(self) -> Generator[None, None, None]:
        """Make the folder, and write the tables at the end, also after an interrupt; of a part, its note."""
        self._table = AreaTable()
        try:
            if self.resume:
                self.remove_leftovers()
            (self.folder / RECORDS_FOLDER).mkdir(parents=True, exist_ok=True)  # it marks the folder as one of masks
            if self._part is not None:
                remove_note(self.folder, self._part)
            try:
                yield
            finally:
                if self._part is None:
                    self._write_tables(self._table, self._unusable)
            if self._part is not None:
                self._end_part(self._part)
        finally:
            self._table.close()
        if self.kept:
            LOG.info("%s of an earlier run %s kept", plural(self.kept, "mask"), "was" if self.kept == 1 else "were")

    @contextmanager
    def local_files(self, source: Source) -> Generator[Source, None, None]:
        """Yield the image in files of its own: copies where it lies in an archive file."""
        if container_of(source.files[0], self.containers) is None:
            yield source
            return
        folder = source.path if source.is_series else source.path.parent
        with local_files(folder, source.files, self.containers) as (local_folder, files):
            path = local_folder if source.is_series else files[0]
            try:
                yield Source(path=path, files=tuple(files), stem=source.stem)
            except InputError as error:
                raise InputError(_renamed(str(error), [*zip(files, source.files, strict=True)])) from error

    def read_local(self, source: Source, local: Source) -> Image:
        """Read an image, which keeps the path that the user knows."""
        image = super().read_local(source, local)
        return image if local is source else replace(image, path=source.path)

    def slide_mask_path(self, source: Source) -> Path:
        """Return the file that the mask of a slide is written to; its folder is no link."""
        self._require_no_links(source)
        return super().slide_mask_path(source)

    def name_of(self, source: Source, mask: Mask | SlideMask) -> str:
        """Return the path of an image below the input, with slashes; its mask's, if that has other names."""
        folder, slash, name = source.stem.rpartition("/")
        is_named_by_file = not source.is_series and name == file_stem(source.path)
        return f"{folder}{slash}{source.path.name}" if is_named_by_file else source.stem

    def write(self, source: Source, image: Image, mask: Mask, bundle: Bundle) -> bool:
        """Write the files of one image; return False if the image is refused."""
        try:
            self._require_no_links(source)
        except InputError as error:
            self.refuse(source, error)
            return False
        return super().write(source, image, mask, bundle)

    def refuse(self, source: Source, error: Exception) -> None:
        """Report an image that cannot be used, and keep it for the tables."""
        super().refuse(source, error)
        reason = self.refused[-1][1]
        position, _ = self.plan.named(source.stem)
        self._unusable.append(PartRefused(position=position, file=str(source.path), reason=reason))

    def close(self) -> None:
        """Delete what was kept on disk for the run alone."""
        if self._plan is not None:
            self._plan.close()
        if self._remote is not None:
            self._remote.close()

    def _earlier_record(self, source: Source, key: str | None) -> Record | None:
        if self._remote is None:
            return super()._earlier_record(source, key)
        fetched = [record_name(source.stem)]
        try:
            self._remote.fetch(fetched[0])
            record = read_record(self.folder, source.stem, key, self._seal_key)
            if record is None:
                return None
            fetched += digests_of(source.stem, record)
            is_there = all(map(self._remote.fetch, fetched[1:]))
            return record if is_there and has_its_files(self.folder, source.stem, record) else None
        finally:
            self._remote.remove(fetched)

    def _finish_files(self, source: Source, record: Record) -> None:
        super()._finish_files(source, record)
        if self._remote is not None:
            self._remote.send([*digests_of(source.stem, record), record_name(source.stem)])

    def _note_mask(self, source: Source, record: Record) -> None:
        assert self._table is not None
        self.num_masks += 1
        if unusual_reason(record.areas) is not None:
            self.num_unusual += 1  # their names are in the table alone: there may be many
        self._table.add(f"{source.stem}{record.mask_suffix}", record.areas)

    def _require_no_links(self, source: Source) -> None:
        parts = source.stem.split("/")
        parents = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        folders = [f"{base}{parent}" for base in ("", f"{RECORDS_FOLDER}/", f"{OVERLAYS}/") for parent in parents]
        for name in (*folders, *(f"{source.stem}{suffix}" for suffix in MASK_SUFFIXES)):
            if os.path.islink(path := os.path.join(self.folder, name)):
                raise InputError(f"{source.label}: {path} is a link, which no mask is written through; remove it")

    def remove_leftovers(self) -> None:
        """Delete the partial files of processes that have died."""
        for folder, _, files in os.walk(self.folder):
            for name in files:
                if name.startswith(PARTIAL):
                    remove_abandoned(Path(folder, name))

    def join(self, inputs: Sequence[Path], bundle: Bundle) -> None:
        """Write the tables of all images from the records of the parts that have ended; nothing is segmented.

        Raises:
            UsageError: a part is missing, masks are missing or were changed, or the parts had different options; or the
                output is a bucket.
        """
        if self._remote is not None:
            raise UsageError(f"{shown(self.output)}: parts are joined in a folder alone")
        self.find_sources(inputs, bundle)
        try:
            counts = counts_of_parts(self.folder, self._seal_key)
            if not counts:
                raise UsageError(f"{self.folder} has no parts to join; run them with --part 1/8 up to --part 8/8")
            notes = notes_of(self.folder, counts[-1], self.plan.digest(), self._seal_key)
            require_complete(notes, counts[-1])
            self._join_parts(notes)
            refused = [item for note in notes.values() for item in note.refused]
            for item in refused:
                self.note_refused(Path(item.file), item.file, InputError(item.reason))
            self.num_masks = self.plan.num_images - len(refused)
        finally:
            self.close()

    def _end_part(self, part: Part) -> None:
        """Leave the note of a part, and join the parts if it is the last one."""
        images = self.plan.digest()
        note = PartNote(images=images, made_by=self._made_by, refused=tuple(self._unusable))
        write_note(self.folder, part, note, self._seal_key)
        notes = notes_of(self.folder, part.of, images, self._seal_key)
        if len(notes) == part.of and len({other.made_by for other in notes.values()}) == 1:
            self._join_parts(notes)

    def _join_parts(self, notes: Mapping[int, PartNote]) -> None:
        refused = [item for note in notes.values() for item in note.refused]
        if missing := self.join_records(refused, next(iter(notes.values())).made_by):
            numbers = sorted({position % len(notes) + 1 for position in missing})
            parts = ", ".join(f"{number}/{len(notes)}" for number in numbers[:MAX_NAMED])
            raise UsageError(f"masks are missing or have changed; run these parts again with --continue: {parts}")

    def join_records(self, unusable: Sequence[PartRefused], made_by: str) -> list[int]:
        """Write the tables of all images from their records; return the positions of images without a valid one.

        Args:
            unusable: the images that have no mask.
            made_by: bundle, back-end and options of the masks; others do not count.
        """
        refused = sorted(unusable, key=lambda item: item.position)
        without_mask, missing, num_unusual = {item.position for item in refused}, list[int](), 0
        with closing(AreaTable()) as table:
            wanted = (item for item in self.plan.of(None).numbered() if item[0] not in without_mask)
            for position, source in wanted:
                record = self._earlier_record(source, None)
                if record is None or not record.key.endswith(made_by):
                    missing.append(position)
                else:
                    table.add(f"{source.stem}{record.mask_suffix}", record.areas)
                    num_unusual += unusual_reason(record.areas) is not None
            if not missing:
                self._write_tables(table, refused)
                self.is_joined = True
                self.num_unusual = num_unusual if self._part is None else self.num_unusual  # a part's are its own
        return missing

    def _write_tables(self, table: AreaTable | None, unusable: Sequence[PartRefused]) -> None:
        if table is not None:
            table.write(self.folder)
        late = (Skipped(file=item.file, reason=item.reason, refused=True) for item in unusable)
        write_skipped(self.folder, chain(self.plan.skipped(), late))
        if self._remote is not None:
            self._remote.send([SKIPPED] if table is None else [AREAS, SKIPPED])


def _renamed(message: str, names: Sequence[tuple[Path, Path]]) -> str:
    """Return a message about temporary copies with the names that the user knows."""
    for copy, path in names:
        message = message.replace(str(copy), str(path))
    return message
