"""Segment an archive on an existing Ray cluster: Ray Data hands blocks of images to actors with a session each.

Inputs, bundle, output and the user's key for records must be on disks that all nodes share; inputs and output may be
prefixes of a bucket instead. The nodes write masks and records; the driver joins the tables from the records, as it
does for parts.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from medseg_trt import __version__
from medseg_trt.archive.mask_tree import MaskTree
from medseg_trt.archive.object_store import absolute, shown
from medseg_trt.archive.parts import PartRefused
from medseg_trt.archive.ray_worker import BlockResult, RayJob, Segmenter, fields_of
from medseg_trt.bundles.bundle import Bundle
from medseg_trt.errors import DeviceError, InputError, MedsegError, UsageError, require
from medseg_trt.imaging.images import Source
from medseg_trt.progress import LOG, track

BLOCK = 16  # images that an actor gets at once; a lost actor repeats so many at most
SILENCE_S = 600.0  # without a finished block, after which the run is given up


def run_on_ray(
    tree: MaskTree, inputs: Sequence[Path], bundle: Bundle, address: str, options: Mapping[str, Any]
) -> None:
    """Segment the images of an archive on a cluster and write the tables.

    Masks that an earlier run has finished are kept. A worker that dies is replaced, and its block is repeated.

    Args:
        tree: where the masks go.
        inputs: that the user named.
        bundle: in a folder that all nodes can read.
        address: of the cluster, ``host:port``; ``auto`` is the one that runs on this machine.
        options: of ``pipeline.infer``, such as ``backend`` and ``batch``.

    Raises:
        MissingExtraError: Ray is not installed.
        DeviceError: there is no cluster, a node has another version, or no block is finished for ``SILENCE_S``.
        UsageError: masks are missing in the end, or the nodes ran the network in different ways.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    ray = _connected(address)
    try:
        with closing(tree):
            sources = tree.find_sources(inputs, bundle)
            job = RayJob(
                version=__version__,
                bundle=str(bundle.folder.resolve()),
                manifest_sha256=bundle.manifest_sha256,
                output=str(absolute(tree.output)),
                overlay=tree.overlay,
                mask_format=tree.mask_format,
                containers=tuple(str(absolute(path)) for path in tree.containers),
                options=options,
            )
            made_by, refused = _collected(tree, _results(ray, job, sources), -(-len(sources) // BLOCK))
            tree.remove_leftovers()  # of workers that were lost
            if missing := tree.join_records(refused, made_by):
                raise UsageError(
                    f"{len(missing)} masks are missing or not sealed with this user's key; all nodes need the same "
                    f"{shown(tree.output)} and the same state folder: run again to go on"
                )
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    ray = require("ray", "ray")
    require("ray.data", "ray")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DeviceError(
            f"no Ray cluster of this version answers at {address}; run ray start --head, or give --ray HOST:6379 "
            f"({_first_line(error)})"
        ) from error
    return ray


def _collected(tree: MaskTree, results: Iterator[BlockResult], num_blocks: int) -> tuple[str, list[PartRefused]]:
    """Sum up the results, and report what could not be used; return how the masks were made."""
    refused: list[PartRefused] = []
    ways: set[str] = set()
    for result in track(results, "infer", total=num_blocks):
        tree.num_masks += result.masks
        tree.kept += result.kept
        ways.add(result.made_by)
        for stem, reason in result.refused:
            position, source = tree.plan.named(stem)
            tree.note_refused(source.path, source.label, InputError(reason))
            refused.append(PartRefused(position=position, file=str(source.path), reason=reason))
    if len(ways) != 1:
        raise UsageError("the nodes ran the network in different ways; give --backend and --threads")
    return ways.pop(), refused


def _results(ray: Any, job: RayJob, sources: Sequence[Source]) -> Iterator[BlockResult]:
    """Yield the results of blocks as they come.

    Raises:
        DeviceError: no block is finished for ``SILENCE_S``, or Ray gives up.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    blocks = [{"sources": text} for text in _blocks(sources)]
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=max(int(ray.cluster_resources().get("CPU", 2)) - 1, 1))
    rows = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
        Segmenter, fn_constructor_args=(job,), compute=pool, num_cpus=1, batch_size=1
    )
    queue: Queue[BlockResult | BaseException | None] = Queue()

    def take() -> None:
        try:
            for row in rows.iter_rows():
                queue.put(BlockResult.parse(row["result"]))
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    Thread(target=take, name="medseg-trt ray", daemon=True).start()
    while True:
        try:
            item = queue.get(timeout=SILENCE_S)
        except Empty:
            raise DeviceError(
                f"no block of images was finished for {SILENCE_S:g} s; Ray needs a free CPU beside those of the "
                "actors: see ray status, and run again to go on"
            ) from None
        if item is None:
            return
        if isinstance(item, BaseException):
            raise _as_error(item) from item
        yield item


def _blocks(sources: Sequence[Source]) -> Iterator[str]:
    remaining = iter(sources)
    while block := [fields_of(_absolute(source)) for source in islice(remaining, BLOCK)]:
        yield json.dumps(block)


def _absolute(source: Source) -> Source:
    """Return the image with paths that hold in every folder."""
    return Source(path=absolute(source.path), files=tuple(map(absolute, source.files)), stem=source.stem)


def _as_error(error: BaseException) -> MedsegError:
    LOG.debug("Ray", exc_info=error)
    if isinstance(error, MedsegError):
        return DeviceError(_first_line(error))
    return DeviceError(f"the run on Ray has failed: {_first_line(error)}; run again to go on")


def _first_line(error: BaseException) -> str:
    """Return the line of an error that says what happened: Ray appends the worker's traceback, last line last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("medseg_trt.errors.")]
    return (named or lines[-1:] or [type(error).__name__])[-1]
