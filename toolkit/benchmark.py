"""Measure a bundle against the PyTorch checkpoint it came from, on the same images: agreement first, then speed."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from medseg_trt.bundle import Bundle, Execution, load_bundle
from medseg_trt.errors import AccuracyGateError
from medseg_trt.export.verify import labels_of, run_in_batches
from medseg_trt.measure import time_interleaved
from medseg_trt.report import BenchRow, Report, machine
from medseg_trt.segment import prepared_slices
from medseg_trt.session import Session, choose, open_reference, open_session
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint
from medseg_trt.train.datasets.folder import read_case
from medseg_trt.train.datasets.official import open_recorded
from medseg_trt.train.evaluate import evaluate

EXACT_DISAGREEMENT = 0.001  # share of pixels: a network that gives other masks is not timed
ROUNDED_FACTOR = 3  # by which a rounded network may disagree more often here than on the images of its build


def bench(
    bundle_folder: Path,
    checkpoint_path: Path,
    data_folder: Path,
    split: str,
    *,
    batch: int,
    warmup_ms: float,
    duration_s: float,
) -> Report:
    """Compare, then time.

    Raises:
        AccuracyGateError: the bundle's masks are not the checkpoint's; nothing is timed then.
        InputError: the data cannot be used.
        ArtefactError: the checkpoint or the bundle cannot be used.
    """
    bundle, checkpoint = load_bundle(bundle_folder), load_checkpoint(checkpoint_path)
    data = open_recorded(data_folder, checkpoint.provenance)
    cases = data.cases(split)
    inputs = np.concatenate(
        [prepared_slices(read_case(case, len(data.classes.names))[0], checkpoint.preprocessing) for case in cases]
    )
    with ExitStack() as stack:
        reference = stack.enter_context(open_reference(checkpoint))
        sessions: dict[str, tuple[Session, float]] = {
            f"PyTorch fp32, {checkpoint_path.name}": (reference, _size_mb(checkpoint, checkpoint_path))
        }
        allowed = dict.fromkeys(sessions, EXACT_DISAGREEMENT)
        for execution in _best_of_each_precision(bundle):
            precision = bundle.variant(execution).precision
            session = stack.enter_context(open_session(bundle, execution.backend, precision=precision))
            name = f"{session.description}, {bundle.folder.name}"
            sessions[name] = (session, _variant_size_mb(bundle, execution))
            allowed[name] = EXACT_DISAGREEMENT + ROUNDED_FACTOR * (1 - execution.verification["agreement"])
        truth = run_in_batches(reference.run, inputs, batch)
        answers = {name: run_in_batches(session.run, inputs, batch) for name, (session, _) in sessions.items()}
        agreement = {name: float((labels_of(answer) == labels_of(truth)).mean()) for name, answer in answers.items()}
        for name, share in agreement.items():
            if not 1 - share <= allowed[name]:
                raise AccuracyGateError(
                    f"{name} agrees with PyTorch on {100 * share:.2f} % of the pixels only; it is not timed"
                )
        dice = {
            name: evaluate(session.run, cases, checkpoint.preprocessing, data.classes).mean_dice
            for name, (session, _) in sessions.items()
        }
        runs = {name: session.run for name, (session, _) in sessions.items()}
        timings = time_interleaved(
            runs, np.resize(inputs, (batch, *inputs.shape[1:])), warmup_ms=warmup_ms, duration_s=duration_s
        )
        rows = tuple(
            BenchRow(
                name=name,
                backend=session.backend,
                device=session.device,
                executed=True,
                max_abs_error=float(np.abs(answers[name] - truth).max()),
                agreement=agreement[name],
                mean_dice=dice[name],
                timing=timings[name],
                size_mb=size_mb,
            )
            for name, (session, size_mb) in sessions.items()
        )
    images = f"{len(inputs)} slices of {data.name}, split {split}"
    return Report(images=images, batch=batch, rows=rows, machine=machine())


def _size_mb(checkpoint: Checkpoint, path: Path) -> float:
    return _total_mb([path, *([checkpoint.block_file] if checkpoint.block_file else [])])


def _best_of_each_precision(bundle: Bundle) -> list[Execution]:
    precisions = dict.fromkeys(bundle.variant(execution).precision for execution in bundle.content.executions)
    return [choose(bundle, precision=precision) for precision in precisions]


def _variant_size_mb(bundle: Bundle, execution: Execution) -> float:
    variant = bundle.variant(execution)
    return _total_mb([bundle.folder / variant.graph, bundle.folder / variant.weights])


def _total_mb(files: Sequence[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6
