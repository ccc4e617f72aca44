"""What runs on the nodes of a Ray cluster: an actor that keeps one session and segments blocks of images."""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import numpy as np

from medseg_trt import __version__, pipeline
from medseg_trt.archive.containers import Container
from medseg_trt.archive.fed_sources import FedSources
from medseg_trt.archive.mask_tree import MaskTree
from medseg_trt.archive.request import ArchiveRequest
from medseg_trt.bundles.bundle import Bundle, load_bundle
from medseg_trt.errors import ArtefactError, DeviceError, InputError
from medseg_trt.imaging.images import Source
from medseg_trt.inference.resume import Record
from medseg_trt.inference.to_folder import MaskFolder, MaskFormat

POLL_S = 0.5  # how often a waiting actor checks that its run is alive


@dataclass(frozen=True, kw_only=True, slots=True)
class RayJob:
    """What every actor needs to know."""

    version: str  # of medseg-trt on the driver
    bundle: str  # its folder
    manifest_sha256: str  # of that bundle on the driver
    output: str
    overlay: bool
    mask_format: MaskFormat
    containers: tuple[str, ...]  # archive files that hold images
    options: Mapping[str, Any]  # of ``pipeline.infer``


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockResult:
    """What became of a block of images."""

    masks: int
    kept: int
    refused: list[tuple[str, str]]  # the stem of an image, and the reason
    made_by: str

    def to_json(self) -> str:
        """Return the result as text."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "BlockResult":
        """Return the result of ``to_json``."""
        fields = json.loads(text)
        return cls(**{**fields, "refused": [(stem, reason) for stem, reason in fields["refused"]]})


class Segmenter:
    """An actor of Ray Data: opens its session once, and segments one block of images after another."""

    def __init__(self, job: RayJob) -> None:
        """Check that this node has the driver's version and bundle, and start the run, which waits for images.

        Raises:
            DeviceError: this node has another version of medseg-trt.
            ArtefactError: the bundle is not the driver's.
        """
        if job.version != __version__:
            raise DeviceError(f"a node has medseg-trt {__version__} and the driver {job.version}; install one version")
        bundle = load_bundle(Path(job.bundle))
        if bundle.manifest_sha256 != job.manifest_sha256:
            raise ArtefactError(f"{job.bundle} on a node is not the driver's bundle; copy it there")
        self._written = _FedTree(job)
        self._run = Thread(target=self._segment, args=(bundle, job.options), daemon=True)
        self._error: BaseException | None = None
        self._run.start()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Segment blocks; a batch has one JSON text for each, and so has the result."""
        results = [self._block([source_of(fields) for fields in json.loads(text)]) for text in batch["sources"]]
        return {"result": np.array(results, object)}

    def close(self) -> None:
        """End the run after the images that it was given; Ray ends the process instead."""
        self._written.end()
        self._run.join()

    def _block(self, sources: Sequence[Source]) -> str:
        masks, kept, refused = self._written.num_masks, self._written.kept, len(self._written.reasons)
        self._written.feed(sources)
        while not self._written.wait(POLL_S):
            if not self._run.is_alive():
                raise self._error or DeviceError("the run has ended before its images")
        return BlockResult(
            masks=self._written.num_masks - masks,
            kept=self._written.kept - kept,
            refused=self._written.reasons[refused:],
            made_by=self._written.made_by,
        ).to_json()

    def _segment(self, bundle: Bundle, options: Mapping[str, Any]) -> None:
        try:
            for _ in pipeline.infer([], bundle, destination=self._written, **options):
                pass
        except BaseException as error:
            self._error = error


class _FedTree(MaskTree):
    """Writes masks and records of the images that it is fed, and no table; earlier masks of the same run are kept."""

    def __init__(self, job: RayJob) -> None:
        super().__init__(
            Path(job.output),
            ArchiveRequest(),
            overlay=job.overlay,
            mask_format=job.mask_format,
            resume=True,
            on_error=_ignore,
        )
        self.reasons: list[tuple[str, str]] = []
        self._sources = FedSources()
        self._open = {Path(path): Container(Path(path)) for path in job.containers}
        self._fed, self._done, self._changed = 0, 0, Condition()

    @property
    def made_by(self) -> str:
        """What the masks depend on, besides their images."""
        return self._made_by

    def feed(self, sources: Sequence[Source]) -> None:
        """Hand over images."""
        self._fed += len(sources)
        self._sources.feed(sources)

    def end(self) -> None:
        """Let the run end after the images that were handed over."""
        self._sources.close()

    def wait(self, seconds: float) -> bool:
        """Wait for all images that were handed over, and return whether they are done."""
        with self._changed:
            return self._changed.wait_for(lambda: self._done == self._fed, seconds)

    def find_sources(self, inputs: Sequence[Path], bundle: Bundle) -> Sequence[Source]:
        return self._sources

    @contextmanager
    def opened(self) -> Generator[None, None, None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            self.close()

    @property
    def containers(self) -> dict[Path, Container]:
        return self._open

    def refuse(self, source: Source, error: Exception) -> None:
        MaskFolder.refuse(self, source, error)
        self.reasons.append((source.stem, self.refused[-1][1]))
        self._count()

    def _note_mask(self, source: Source, record: Record) -> None:
        self.num_masks += 1
        self._count()

    def _count(self) -> None:
        with self._changed:
            self._done += 1
            self._changed.notify_all()


def fields_of(source: Source) -> list[Any]:
    """Return an image as JSON has it."""
    return [source.stem, str(source.path), [str(file) for file in source.files]]


def source_of(fields: Sequence[Any]) -> Source:
    """Return the image of ``fields_of``."""
    stem, path, files = fields
    return Source(path=Path(path), files=tuple(map(Path, files)), stem=stem)


def _ignore(_path: Path, _error: InputError) -> None:
    """The driver reports what cannot be used."""
