"""Measure a bundle against the PyTorch checkpoint it came from, on the same images: agreement first, then speed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medseg_trt.bundle import Bundle, load_bundle
from medseg_trt.errors import AccuracyGateError
from medseg_trt.export.verify import labels_of, run_in_batches
from medseg_trt.measure import time_interleaved
from medseg_trt.report import BenchRow, Report, machine
from medseg_trt.segment import prepared_slices
from medseg_trt.session import Session, open_reference, open_session
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint
from medseg_trt.train.datasets.folder import open_folder, read_case
from medseg_trt.train.evaluate import evaluate

MIN_AGREEMENT = 0.999  # a network that gives other masks is not timed


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
    data = open_folder(data_folder)
    cases = data.cases(split)
    inputs = np.concatenate(
        [prepared_slices(read_case(case, len(data.classes.names))[0], checkpoint.preprocessing) for case in cases]
    )
    with open_reference(checkpoint) as reference, open_session(bundle) as candidate:
        sessions: dict[str, tuple[Session, float]] = {
            f"PyTorch fp32, {checkpoint_path.name}": (reference, _size_mb(checkpoint, checkpoint_path)),
            f"{candidate.description}, {bundle.folder.name}": (candidate, _bundle_size_mb(bundle)),
        }
        truth = run_in_batches(reference.run, inputs, batch)
        answers = {name: run_in_batches(session.run, inputs, batch) for name, (session, _) in sessions.items()}
        agreement = {name: float((labels_of(answer) == labels_of(truth)).mean()) for name, answer in answers.items()}
        for name, share in agreement.items():
            if share < MIN_AGREEMENT:
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


def _bundle_size_mb(bundle: Bundle) -> float:
    variant = bundle.variant(bundle.default)
    return _total_mb([bundle.folder / variant.graph, bundle.folder / variant.weights])


def _total_mb(files: Sequence[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6
