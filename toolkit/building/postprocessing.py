"""Learn a bundle's post-processing on complete cases of the validation split, and judge every graph's masks after it.

The gate of a build compares single slices, which say nothing of components of volumes. So, where a step was chosen,
every execution segments the cases that it was chosen on, and the gate compares the corrected masks with the corrected
masks of the checkpoint's network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medseg_trt.building.contract import Contract
from medseg_trt.building.executions import ExecutionTrials, execution_child
from medseg_trt.building.reference import Reference
from medseg_trt.bundles.manifest import Variant
from medseg_trt.export.gate import GateVerdict, compare
from medseg_trt.imaging.images import Image
from medseg_trt.imaging.segment import MaskRun, Run, segment
from medseg_trt.postprocess.apply import postprocess
from medseg_trt.postprocess.learn import PredictedCase, counts_of, learn_postprocessing
from medseg_trt.postprocess.steps import Postprocessing
from medseg_trt.progress import LOG, plural, track
from medseg_trt.sessions.base import Session
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.tiling.segment import tiled
from medseg_trt.tiling.windows import num_windows, recorded_tiles, window_size
from medseg_trt.train.datasets.folder import Case, read_case

SPLIT = "val"
MAX_RUNS = 512  # of the network, on slices or windows of complete cases; a large network takes minutes
MAX_PIXELS = 1 << 27  # of their labels: 128 MiB, which stay in memory three times
BATCH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LearntSteps:
    """Steps that raise Dice of the checkpoint's masks, and the cases that they were chosen on."""

    post: Postprocessing
    cases: tuple[Case, ...]
    corrected: tuple[PredictedCase, ...]  # the masks of the checkpoint's network after the steps


def learn(reference: Reference) -> LearntSteps | None:
    """Choose the steps by the masks of the checkpoint's network; None where no step raises Dice.

    Raises:
        InputError: an image of the validation split cannot be used.
    """
    folder, preprocessing = reference.images.labelled, reference.contract.preprocessing
    if folder is None or not folder.splits.get(SPLIT):
        LOG.info("no post-processing is learnt: there are no labelled validation images")
        return None
    classes, predicted, used = reference.contract.classes, list[PredictedCase](), list[Case]()
    runs = pixels = 0
    for case in track(folder.cases(SPLIT), "masks to post-process"):
        image, truth = read_case(case, len(classes.names))
        runs, pixels = runs + len(truth) * _inputs_per_slice(image, preprocessing), pixels + truth.size
        if runs > MAX_RUNS or pixels > MAX_PIXELS:
            break
        predicted.append(_predicted(case.name, reference.network, None, image, truth, preprocessing))
        used.append(case)
    if not predicted:
        LOG.info("no post-processing is learnt: the first case takes more than %d runs or is too large", MAX_RUNS)
        return None
    left_out = len(folder.cases(SPLIT)) - len(used)
    description = f"{folder.name}, split {SPLIT}" + (f", without {plural(left_out, 'case')}" if left_out else "")
    post = learn_postprocessing(predicted, classes, description)
    if post is None:
        LOG.info("no post-processing raises Dice on %s", description)
        return None
    return LearntSteps(post=post, cases=tuple(used), corrected=tuple(_corrected(predicted, post, classes)))


def judged_postprocessing(
    learnt: LearntSteps | None,
    reference: Reference,
    folder: Path,
    variants: Mapping[str, Variant],
    tried: ExecutionTrials,
) -> Postprocessing | None:
    """Return the steps if every execution keeps the corrected masks; else None, with a warning.

    Args:
        learnt: the steps and the cases.
        reference: the checkpoint's network, and where executions run; its limit of the gate holds here, too.
        folder: of the bundle that is being made.
        variants: its graphs.
        tried: the executions.
    """
    if learnt is None:
        return None
    for execution in tried.executions:
        if not execution.executed:
            continue
        with execution_child(folder, variants[execution.variant], execution, reference.device) as session:
            verdict = _verdict(learnt, session, reference.contract, reference.spec.max_dice_drop)
        LOG.info("%s with post-processing: %s", session.description, verdict)
        if not verdict.holds:
            LOG.warning(
                "the bundle gets no post-processing: %s does not keep its masks: %s", session.description, verdict
            )
            return None
    LOG.info("post-processing: %s on %s", learnt.post.gain, learnt.post.description)
    return learnt.post


def _verdict(learnt: LearntSteps, session: Session, contract: Contract, limit: float) -> GateVerdict:
    masks, num_labels = session.masks if session.gives_masks else None, len(contract.classes.names)
    candidate = list[PredictedCase]()
    for case in track(learnt.cases, "masks after post-processing"):
        image, truth = read_case(case, num_labels)
        predicted = _predicted(case.name, session.run, masks, image, truth, contract.preprocessing)
        candidate += _corrected([predicted], learnt.post, contract.classes)
    names = [case.name for case in candidate for _ in case.truth]
    counts = [counts_of((case.predicted for case in side), side, num_labels) for side in (learnt.corrected, candidate)]
    return compare(counts[0], counts[1], names, limit)


def _corrected(predicted: Sequence[PredictedCase], post: Postprocessing, classes: Classes) -> list[PredictedCase]:
    return [replace(case, predicted=postprocess(case.predicted, post, classes, case.spacing_mm)) for case in predicted]


def _inputs_per_slice(image: Image, preprocessing: Preprocessing) -> int:
    tiles = recorded_tiles(preprocessing)
    if tiles is None:
        return 1
    return num_windows(image.size, window_size(tiles, preprocessing, image.spacing_in_plane), tiles.overlap)


def _predicted(
    name: str, run: Run, masks: MaskRun | None, image: Image, truth: np.ndarray, preprocessing: Preprocessing
) -> PredictedCase:
    tiles = recorded_tiles(preprocessing)
    in_windows = None if tiles is None else tiled(run, image, preprocessing, tiles)
    labels = segment(run, image, preprocessing, BATCH, masks=masks, pixels_to_masks=in_windows)
    return PredictedCase(name=name, predicted=labels, truth=truth, spacing_mm=image.spacing_mm)
