"""Find out whether many images are computed faster beside each other, each on its share of the cores.

The threads of one image wait for each other at every operation, and for whatever else the processor does, reading and
writing images among it. A single image is faster on all cores.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy import ndarray

from medseg_trt.building.executions import MIN_RUNS, ROUNDS, SECONDS, ExecutionTrials, execution_child, label_of
from medseg_trt.bundles.manifest import MAX_STREAMS, Execution, Variant
from medseg_trt.errors import ArtefactError, DeviceError
from medseg_trt.machine import cores
from medseg_trt.progress import LOG
from medseg_trt.sessions.backends import BACKENDS

MIN_STREAM_GAIN = 0.05  # of an image's time; less is within what two measurements differ by, and costs memory


def with_streams(
    folder: Path, variants: Mapping[str, Variant], tried: ExecutionTrials, image: ndarray
) -> ExecutionTrials:
    """Return the trials whose best execution tells how many images it computes beside each other, where that pays.

    It is one where the back-end has no streams, the machine one core, the last bits differ, or little is gained.

    Args:
        folder: where the graphs are.
        variants: the graphs by name.
        tried: the executions, the best first.
        image: the golden input.
    """
    best, *others = tried.executions
    count = min(cores(), MAX_STREAMS)
    if not best.executed or not BACKENDS[best.backend].streams or count < 2:
        return tried
    try:
        alone_ms, beside_ms = _times(folder, variants[best.variant], best, image, count)
    except (ArtefactError, DeviceError) as error:
        LOG.info("%s runs one image at a time: %s", label_of(best), error)
        return tried
    LOG.info(
        "%s: %.1f ms an image alone, %.1f ms beside others, %d at once", *(label_of(best), alone_ms, beside_ms, count)
    )
    if beside_ms > (1 - MIN_STREAM_GAIN) * alone_ms:
        return tried
    return replace(tried, executions=(replace(best, streams=count), *others))


def _times(folder: Path, variant: Variant, execution: Execution, image: ndarray, count: int) -> tuple[float, float]:
    """Return the milliseconds of an image alone, and of one beside others.

    Raises:
        DeviceError: the logits differ.
    """
    best_ms = {1: float("inf"), count: float("inf")}
    logits: dict[int, ndarray] = {}
    for _ in range(ROUNDS):
        for streams in best_ms:
            with execution_child(folder, variant, execution, streams=streams) as session:
                logits[streams] = session.run(image)
                median_ms = float(np.median(session.time(image, SECONDS, MIN_RUNS)))
            best_ms[streams] = min(best_ms[streams], median_ms)
    if not np.array_equal(logits[1], logits[count]):
        raise DeviceError("it gives other last bits on fewer cores")
    return best_ms[1], best_ms[count]
