"""Put several checkpoints and bundles side by side on the same labelled images: Dice and IoU per class."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg_trt.bundle import load_bundle
from medseg_trt.errors import UsageError
from medseg_trt.metrics import MeanScore
from medseg_trt.segment import Run
from medseg_trt.session import open_reference, open_session
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.datasets.official import open_recorded, recorded_options
from medseg_trt.train.datasets.options import with_changes
from medseg_trt.train.evaluate import Evaluation, evaluate


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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        networks = {name: {**asdict(found), "mean_dice": found.mean_dice} for name, found in self.evaluations.items()}
        return {"split": self.split, "title": self.title, "networks": networks}

    def header(self) -> list[str]:
        """Return the table's column names."""
        return [
            "class",
            *(
                f"{name}\nDice / IoU{f' / HD95 {found.hd95_unit}' if found.hd95_unit else ''}"
                for name, found in self.evaluations.items()
            ),
        ]

    def cells(self) -> list[list[str]]:
        """Return the table's rows as text: a class each, and the mean Dice over the classes that occur."""
        evaluations = list(self.evaluations.values())
        rows = [
            [scores[0].name, *map(_cell, scores)]
            for scores in zip(*(found.means for found in evaluations), strict=True)
        ]
        return [*rows, ["mean", *(f"{found.mean_dice:.3f}" for found in evaluations)]]


def evaluate_all(
    checkpoints: Sequence[Path],
    bundles: Sequence[Path],
    data_folder: Path,
    splits: Sequence[str],
    backend: str,
    hd95: bool = False,
    changes: Sequence[str] = (),
) -> list[Scoreboard]:
    """Score every checkpoint and bundle on every split; with ``hd95`` also measure the distance between the outlines.

    The data are read and divided as the networks' training read and divided them, but for ``changes``, such as
    ``data.dataset=colondb``.

    Raises:
        UsageError: a network knows other classes than the data, or was trained with other options of the data.
        InputError: the data cannot be used, or has no such split.
        ArtefactError: a checkpoint or bundle cannot be used.
    """
    paths = list(dict.fromkeys([*checkpoints, *bundles]))
    names = {path: "/".join(path.parts[-2:]) for path in paths}  # enough to tell runs apart
    if len(set(names.values())) < len(paths):
        names = {path: str(path) for path in paths}
    with ExitStack() as stack:
        networks = [
            *(_from_checkpoint(path, names[path], stack) for path in checkpoints),
            *(_from_bundle(path, names[path], backend, stack) for path in bundles),
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
                    network.name: evaluate(network.run, cases[split], network.preprocessing, data.classes, hd95=hd95)
                    for network in networks
                },
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


def _from_bundle(path: Path, name: str, backend: str, stack: ExitStack) -> Network:
    bundle = load_bundle(path)
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
    what = data.split_notes.get(split, "")
    return f"{data.name}, split {split}" + (f": {what}" if what else "") + (f" ({data.note})" if data.note else "")


def _cell(score: MeanScore) -> str:
    if score.dice is None or score.iou is None:
        return "absent, false alarm" if score.false_alarms else "absent"
    distance = "" if score.hd95 is None else f" / {score.hd95:.1f}"
    return f"{score.dice:.3f} / {score.iou:.3f}{distance}"
