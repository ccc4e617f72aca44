"""The models of a server: a bundle, its open session and its queue, under a name and a version."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from numpy import ndarray

from medseg_trt.bundles.bundle import MANIFEST, Bundle, load_bundle
from medseg_trt.errors import UsageError
from medseg_trt.files import sha256
from medseg_trt.imaging.images import Image, Mask
from medseg_trt.imaging.preprocess import outside_fraction, resampled_size
from medseg_trt.imaging.segment import segmentation_stages
from medseg_trt.progress import LOG
from medseg_trt.serve.batching import BatchQueue, CancelledError, RequestQueue
from medseg_trt.serve.settings import ServeSettings
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import open_session
from medseg_trt.sessions.streams import open_streams
from medseg_trt.tiling.segment import tiled

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # stands in addresses and file names
VERSION_DIGITS = 12
INFER_BATCH = 4  # slices per run of ``infer``, whose masks are to be met bit for bit
AHEAD = 2  # batches of a volume that are prepared ahead of the network


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServedModel:
    """A bundle that is ready to run. It is read once: replacing the folder changes nothing until a restart."""

    name: str
    digest: str  # SHA-256 of the manifest
    bundle: Bundle
    session: Session
    queue: BatchQueue
    shares_runs: bool  # whether slices of several requests may run together
    _numbers: "count[int]"

    @property
    def version(self) -> str:
        """The first digits of the digest."""
        return self.digest[:VERSION_DIGITS]

    def segment(
        self,
        image: Image,
        request: RequestQueue,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Mask:
        """Return the mask of an image, the same bits that ``infer`` writes.

        Args:
            image: the image.
            request: its place in the queue.
            on_progress: called with the number of finished slices and of all.

        Raises:
            CancelledError: the request was cancelled.
        """
        run, preprocessing, tiles = self.session.run, self.bundle.preprocessing, self.bundle.tiles
        if tiles is not None:
            masks, to_masks = None, tiled(run, image, preprocessing, tiles)
        else:
            masks = self.session.masks if self.session.gives_masks else None
            to_masks = self.session.device_pipeline(image.pixels, image.spacing_in_plane)
        stages = segmentation_stages(run, image, preprocessing, masks, to_masks)
        # Windows of a slice run together, and other requests wait for one slice at most.
        step = 1 if self.shares_runs or tiles is not None else INFER_BATCH
        labels = np.empty(image.pixels.shape[:3], np.uint8)
        pending = []
        starts = list(range(0, len(labels), step))
        ahead = max(AHEAD * INFER_BATCH // step, 1)

        def finish_first() -> None:
            start, future = pending.pop(0)
            finished = stages.finish(future.result())
            labels[start : start + len(finished)] = finished
            on_progress(start + len(finished), len(labels))

        for start in starts:
            if request.cancelled:
                raise CancelledError("the request was cancelled")
            values = stages.prepare(image.pixels[start : start + step])
            key = self._key(image, to_masks is not None)
            pending.append((start, request.submit(key, stages.run, values)))
            if len(pending) > ahead:
                finish_first()
        while pending:
            finish_first()
        return Mask.of(image, self.bundle.finish(image, labels), self.bundle.classes, self.bundle.unusual(image))

    def run(self, values: ndarray, request: RequestQueue) -> ndarray:
        """Return the logits of prepared images."""
        key = "logits" if self.shares_runs else next(self._numbers)
        if not self.shares_runs:
            return request.submit(key, self.session.run, values).result()
        futures = [request.submit(key, self.session.run, values[i : i + 1]) for i in range(len(values))]
        return np.concatenate([future.result() for future in futures])

    def run_masks(
        self, values: ndarray, size: tuple[int, int], resampled: tuple[int, int], request: RequestQueue
    ) -> ndarray:
        """Return the labels of prepared images at the size of their sources, of a bundle that gives masks."""
        run = partial(self.session.masks, size=size, resampled=resampled)
        key = ("masks", size, resampled) if self.shares_runs else next(self._numbers)
        return request.submit(key, run, values).result()

    def outside_fraction(self, image: Image) -> float:
        """Return the share of an image's pixels outside the network's field of view, which become background.

        Windows leave none out.
        """
        if self.bundle.tiles is not None:
            return 0.0
        return outside_fraction(image.size, self.bundle.preprocessing, image.spacing_in_plane)

    def _key(self, image: Image, runs_alone: bool) -> object:
        """Return what slices that may share a run have in common; where none may, nobody else has it."""
        if runs_alone or not self.shares_runs:
            return next(self._numbers)
        if not self.session.gives_masks:
            return "logits"
        return "masks", image.size, resampled_size(image.size, self.bundle.preprocessing, image.spacing_in_plane)

    def close(self) -> None:
        """End the queue and free the network."""
        self.queue.close()
        self.session.close()


def is_batch_invariant(session: Session, bundle: Bundle, max_batch: int) -> bool:
    """Say whether a slice gets the same bits in every batch up to ``max_batch``, at every position in it.

    Kernels are chosen by shape, not by value, so that seeded noise decides it for this session.
    """
    height, width = bundle.preprocessing.image_size
    noise = np.random.default_rng(0).standard_normal((max_batch, 3, height, width)).astype(np.float32)
    alone = [session.run(noise[i : i + 1])[0] for i in range(max_batch)]
    return all(
        np.array_equal(output, alone[i])
        for size in range(2, max_batch + 1)
        for i, output in enumerate(session.run(noise[:size]))
    )


def open_models(
    settings: ServeSettings, on_batch: Callable[[str, int, float], None] = lambda _name, _slices, _seconds: None
) -> tuple[ServedModel, ...]:
    """Open every bundle; all or none.

    Raises:
        UsageError: two bundles have the same name, or a name that cannot stand in an address.
        ArtefactError: a bundle cannot be used.
    """
    names = _names(settings.bundles)
    models: list[ServedModel] = []
    try:
        for name, folder in zip(names, settings.bundles, strict=True):
            models.append(_open(name, folder, settings, partial(on_batch, name)))
    except BaseException:
        for model in models:
            model.close()
        raise
    return tuple(models)


def _open(name: str, folder: Path, settings: ServeSettings, on_batch: Callable[[int, float], None]) -> ServedModel:
    digest = sha256(folder / MANIFEST) if (folder / MANIFEST).is_file() else ""
    bundle = load_bundle(folder, settings.verify_key)
    session = open_session(bundle, settings.backend, settings.threads, settings.precision)
    limits = settings.limits
    streams = open_streams(bundle, session, settings.precision, settings.threads, INFER_BATCH, settings.streams)
    largest_batch = INFER_BATCH if streams is not None else max(limits.max_batch, INFER_BATCH)
    shares_runs = is_batch_invariant(session, bundle, largest_batch)
    if not shares_runs and streams is None:
        LOG.warning(
            "%s: %s gives other last bits in larger batches, so each request runs by itself",
            name,
            session.description,
        )
    queue = BatchQueue(
        max_batch=limits.max_batch if streams is None else 1,
        delay_s=limits.batch_delay_s,
        max_requests=limits.max_requests,
        on_batch=on_batch,
        num_threads=1 if streams is None else streams.count,
    )
    return ServedModel(
        name=name,
        digest=digest,
        bundle=bundle,
        session=streams or session,
        queue=queue,
        shares_runs=shares_runs,
        _numbers=count(),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name.removesuffix(".medseg") for folder in folders]
    for name in names:
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be a model's name: letters, digits, '.', '_' and '-'; rename the bundle")
    if len(set(names)) < len(names):
        raise UsageError(f"two bundles have the same name: {', '.join(names)}; rename one")
    return names
