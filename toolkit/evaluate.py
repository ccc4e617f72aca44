"""Compare checkpoints and bundles on the same labelled images: Dice and IoU per class."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import UsageError
from medseg_trt.imaging.segment import Run
from medseg_trt.metrics.overlap import MeanScore
from medseg_trt.metrics.protocols import METRICS
from medseg_trt.sessions.open import open_session
from medseg_trt.sessions.pytorch import open_reference
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.datasets.official import open_recorded, recorded_options
from medseg_trt.train.datasets.options import with_changes
from medseg_trt.train.evaluate import Evaluation, evaluate, metric_mode

BRANCHES = "in both / missed / false alarm / absent"


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A checkpoint or a bundle, ready to run."""

    name: str
    run: Run
    preprocessing: Preprocessing
    classes: Classes
    provenance: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoreboard:
    """The scores of several networks on one split."""

    split: str
    title: str
    evaluations: dict[str, Evaluation]  # by network
    metric: str = "volume"  # a key of METRICS

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        networks = {
            name: {
                **asdict(evaluation),
                "mean_dice": evaluation.mean_dice,
                "mean_iou": evaluation.mean_iou,
                "mean_hd95": evaluation.mean_hd95,
            }
            for name, evaluation in self.evaluations.items()
        }
        return {"split": self.split, "title": self.title, "metric": self.metric, "networks": networks}

    def heading(self) -> str:
        """Describe the scored images and the metric."""
        batch = next(
            (f" of {evaluation.batch}" for evaluation in self.evaluations.values() if evaluation.batch is not None), ""
        )
        return f"{self.title}\n{self.metric}{batch}: {METRICS[self.metric].text}"

    def header(self) -> list[str]:
        """Return the table's column names."""
        return ["class", *(f"{name}\n{_figure_names(evaluation)}" for name, evaluation in self.evaluations.items())]

    def cells(self) -> list[list[str]]:
        """Return the table's rows as text: one per class, then the means over the classes that occur."""
        evaluations = list(self.evaluations.values())
        rows = [
            [scores[0].name, *map(_cell, scores)]
            for scores in zip(*(evaluation.means for evaluation in evaluations), strict=True)
        ]
        means = [(evaluation.mean_dice, evaluation.mean_iou, evaluation.mean_hd95) for evaluation in evaluations]
        return [*rows, ["mean", *(_figures(*mean) for mean in means)]]

    def branches(self) -> tuple[list[str], list[list[str]]]:
        """Return a header and rows with how often each class is in both masks, in one, and in none."""
        unit = {"case": "cases", "image": "images", "batch": "batches"}[METRICS[self.metric].unit]
        header = ["class", *(f"{name}\n{unit}: {BRANCHES}" for name in self.evaluations)]
        rows = [
            [
                scores[0].name,
                *(f"{score.present} / {score.missed} / {score.false_alarms} / {score.absent}" for score in scores),
            ]
            for scores in zip(*(evaluation.means for evaluation in self.evaluations.values()), strict=True)
        ]
        return header, rows


def evaluate_all(
    checkpoints: Sequence[Path],
    bundles: Sequence[Path],
    data_folder: Path,
    splits: Sequence[str],
    backend: str,
    hd95: bool = False,
    *,
    metric: str = "volume",
    batch: int = 8,
    changes: Sequence[str] = (),
    verify_key: Path | None = None,
) -> list[Scoreboard]:
    """Score every checkpoint and bundle on every split; ``hd95`` adds the Hausdorff distance of the outlines.

    The data are read and split as in the networks' training, except for ``changes``, such as
    ``data.dataset=colondb``.

    Raises:
        UsageError: a network knows other classes than the data, or was trained with other options of the data, or
            there is no such metric.
        InputError: the data cannot be used, or has no such split.
        ArtefactError: a checkpoint or bundle cannot be used.
    """
    metric_mode(metric, hd95)  # reports a typo before minutes are spent
    paths = list(dict.fromkeys([*checkpoints, *bundles]))
    names = {path: "/".join(path.parts[-2:]) for path in paths}  # enough to tell runs apart
    if len(set(names.values())) < len(paths):
        names = {path: str(path) for path in paths}
    with ExitStack() as stack:
        networks = [
            *(_from_checkpoint(path, names[path], stack) for path in checkpoints),
            *(_from_bundle(path, names[path], backend, verify_key, stack) for path in bundles),
        ]
        data = _open_data(data_folder, networks, changes)
        cases = {split: data.cases(split) for split in splits}
        for network in networks:
            _require_same_classes(network, data)
        return [
            Scoreboard(
                split=split,
                title=_title(data, split),
                evaluations={
                    network.name: evaluate(
                        network.run, cases[split], network.preprocessing, data.classes, batch, hd95, metric
                    )
                    for network in networks
                },
                metric=metric,
            )
            for split in splits
        ]


def _open_data(folder: Path, networks: Sequence[Network], changes: Sequence[str]) -> DataFolder:
    options = {with_changes(recorded_options(network.provenance), changes): network for network in networks}
    if len(options) > 1:
        names = ", ".join(network.name for network in options.values())
        raise UsageError(f"{names} were trained with other options of the data; evaluate them one by one")
    ((chosen, network),) = options.items()
    return open_recorded(folder, network.provenance, chosen if changes else None)


def _from_checkpoint(path: Path, name: str, stack: ExitStack) -> Network:
    checkpoint = load_checkpoint(path)
    session = stack.enter_context(open_reference(checkpoint))
    return Network(
        name=f"{name} ({session.backend})",
        run=session.run,
        preprocessing=checkpoint.preprocessing,
        classes=checkpoint.classes,
        provenance=checkpoint.provenance,
    )


def _from_bundle(path: Path, name: str, backend: str, verify_key: Path | None, stack: ExitStack) -> Network:
    bundle = load_bundle(path, verify_key)
    session = stack.enter_context(open_session(bundle, backend))
    return Network(
        name=f"{name} ({session.backend})",
        run=session.run,
        preprocessing=bundle.preprocessing,
        classes=bundle.classes,
        provenance=bundle.content.source.get("provenance", {}),
    )


def _require_same_classes(network: Network, data: DataFolder) -> None:
    if network.classes.names != data.classes.names:
        raise UsageError(
            f"{network.name} knows the classes {', '.join(network.classes.names)}, "
            f"but {data.root} has {', '.join(data.classes.names)}"
        )


def _title(data: DataFolder, split: str) -> str:
    note = data.split_notes.get(split, "")
    return f"{data.name}, split {split}" + (f": {note}" if note else "") + (f" ({data.note})" if data.note else "")


def _figure_names(evaluation: Evaluation) -> str:
    distance = f"HD95 {evaluation.hd95_unit}" if evaluation.hd95_unit else None
    return " / ".join(filter(None, ("Dice", "IoU" if evaluation.has_iou else None, distance)))


def _cell(score: MeanScore) -> str:
    if score.dice is None:
        return "absent, false alarm" if score.false_alarms else "absent"
    return _figures(score.dice, score.iou, score.hd95)


def _figures(dice: float, iou: float | None, distance: float | None) -> str:
    decimals = ((dice, 3), (iou, 3), (distance, 1))
    return " / ".join(f"{value:.{places}f}" for value, places in decimals if value is not None)
