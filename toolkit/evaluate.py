"""Compare checkpoints and bundles on the same labelled images: Dice and IoU per class."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.devices import AUTO, ComputeDevice
from medseg_trt.errors import UsageError
from medseg_trt.imaging.segment import Finish, Run
from medseg_trt.metrics.overlap import MeanScore
from medseg_trt.metrics.protocols import METRICS
from medseg_trt.progress import LOG
from medseg_trt.sessions.augmented import TimedRun, averaged
from medseg_trt.sessions.ensemble import mean_logits, require_alike
from medseg_trt.sessions.open import open_session
from medseg_trt.sessions.pytorch import open_reference
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.tiling.segment import check_tiles
from medseg_trt.tiling.windows import AS_RECORDED, TileChoice, Tiles, chosen_tiles, is_as_recorded, recorded_tiles
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.datasets.options import with_changes
from medseg_trt.train.evaluate import Evaluation, evaluate, metric_mode, require_scorable
from medseg_trt.train.provenance import Provenance, parse_provenance
from medseg_trt.train.recorded_data import open_recorded, recorded_options

POST_PROCESSED = ", post-processed"  # in the name of a network
BRANCHES = "in both / missed / false alarm / absent"


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A checkpoint or a bundle, ready to run."""

    name: str
    run: Run
    preprocessing: Preprocessing
    classes: Classes
    provenance: Provenance
    tiles: Tiles | None = None
    finish: Finish | None = None  # of masks of complete cases; None: they stay as the network makes them


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoreboard:
    """The scores of several networks on one split."""

    split: str
    title: str
    evaluations: dict[str, Evaluation]  # by network
    metric: str = "volume"  # a key of METRICS
    costs: dict[str, float] = field(default_factory=dict[str, float])  # with ``tta``: ms of a slice, by network

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
        return {
            "split": self.split,
            "title": self.title,
            "metric": self.metric,
            "networks": networks,
            **({"ms_per_slice": self.costs} if self.costs else {}),
        }

    def cost_lines(self) -> list[str]:
        """Say what test-time augmentation costs and gains: one line for each network."""
        names = list(self.costs)
        return [
            f"{augmented}: Dice {self.evaluations[plain].mean_dice:.4f} → {self.evaluations[augmented].mean_dice:.4f}, "
            f"{self.costs[plain]:.2f} → {self.costs[augmented]:.2f} ms a slice"
            for plain, augmented in zip(names[::2], names[1::2], strict=True)
        ]

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
    ensemble: bool = False,
    postprocess: bool = True,
    tta: str | None = None,
    tiles: TileChoice = AS_RECORDED,
    device: ComputeDevice = AUTO,
) -> list[Scoreboard]:
    """Score every checkpoint and bundle on every split; ``hd95`` adds the Hausdorff distance of the outlines.

    The data are read and split as in the networks' training, except for ``changes``, such as
    ``data.dataset=colondb``. ``ensemble`` adds the mean of all logits as one more network, whose masks stay raw. A
    bundle's masks are those of ``infer``: with the post-processing that it stores, unless ``postprocess`` is False.
    ``tta`` also scores every network with this test-time augmentation, a key of ``sessions.augmented.TTA``.
    ``tiles`` cuts images into windows, as ``infer`` does with it; by default every network makes masks of what it was
    trained on, windows or whole slices.
    Checkpoints run on ``device`` in float32, where ``auto`` is the GPU that PyTorch has; bundles as in ``infer``.

    Raises:
        DeviceError: the device is not there.
        UsageError: a network knows other classes than the data, or was trained with other options of the data, or
            there is no such metric; or an ensemble's networks prepare images in different ways.
        InputError: the data cannot be used, or has no such split.
        ArtefactError: a checkpoint or bundle cannot be used.
    """
    mode = metric_mode(metric, hd95)  # reports a typo before minutes are spent
    paths = list(dict.fromkeys([*checkpoints, *bundles]))
    names = {path: "/".join(path.parts[-2:]) for path in paths}  # enough to tell runs apart
    if len(set(names.values())) < len(paths):
        names = {path: str(path) for path in paths}
    with ExitStack() as stack:
        networks = [
            *(_from_checkpoint(path, names[path], device, stack) for path in checkpoints),
            *(_from_bundle(path, names[path], backend, verify_key, postprocess, device, stack) for path in bundles),
        ]
        data = _open_data(data_folder, networks, changes)
        if ensemble:
            networks.append(ensemble_of(networks))
        networks = [_tiled(network, tiles, metric) for network in networks]
        if mode.unit != "case" and any(network.finish is not None for network in networks):
            LOG.warning("%s scores masks of the network's size, which are not post-processed", metric)
        if tta is not None:
            networks = [variant for network in networks for variant in (_timed(network), _augmented(network, tta))]
        cases = {split: data.cases(split) for split in splits}
        for network in networks:
            _require_same_classes(network, data)
        return [
            Scoreboard(
                split=split,
                title=_title(data, split),
                evaluations={
                    network.name: evaluate(
                        network.run,
                        cases[split],
                        network.preprocessing,
                        data.classes,
                        batch,
                        hd95,
                        metric,
                        network.finish,
                        network.tiles,
                    )
                    for network in networks
                },
                metric=metric,
                costs=_costs(networks),
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


def _from_checkpoint(path: Path, name: str, device: ComputeDevice, stack: ExitStack) -> Network:
    checkpoint = load_checkpoint(path)
    session = stack.enter_context(open_reference(checkpoint, device))
    return Network(
        name=f"{name} ({session.backend})",
        run=session.run,
        preprocessing=checkpoint.preprocessing,
        classes=checkpoint.classes,
        provenance=checkpoint.provenance,
    )


def _from_bundle(
    path: Path,
    name: str,
    backend: str,
    verify_key: Path | None,
    postprocess: bool,
    device: ComputeDevice,
    stack: ExitStack,
) -> Network:
    bundle = replace(load_bundle(path, verify_key), raw_masks=not postprocess)
    session = stack.enter_context(open_session(bundle, backend, device=device))
    return Network(
        name=f"{name} ({session.backend}{POST_PROCESSED if bundle.postprocessing is not None else ''})",
        run=session.run,
        preprocessing=bundle.preprocessing,
        classes=bundle.classes,
        finish=bundle.finish if bundle.postprocessing is not None else None,
        provenance=parse_provenance(bundle.content.source.get("provenance", {}), str(path)),
    )


def ensemble_of(networks: Sequence[Network]) -> Network:
    """Return the mean of the networks' logits as a network.

    Raises:
        UsageError: there is one network alone, or they prepare images in different ways or know different classes.
    """
    first, *others = networks
    if not others:
        raise UsageError("an ensemble needs two networks or more; repeat --ckpt or --bundle")
    for other in others:
        require_alike(
            (first.name, first.preprocessing, first.classes), (other.name, other.preprocessing, other.classes)
        )
    return Network(
        name=f"ensemble of {len(networks)}",
        run=mean_logits([network.run for network in networks]),
        preprocessing=first.preprocessing,
        classes=first.classes,
        provenance=first.provenance,
    )


def _tiled(network: Network, choice: TileChoice, metric: str) -> Network:
    """Return a network with the windows that its images are cut into.

    Its masks stay raw, as those of ``infer``, unless they are made as its post-processing was learnt.
    """
    tiles = chosen_tiles(choice, recorded_tiles(network.preprocessing))
    if tiles is not None:
        check_tiles(network.preprocessing)
        require_scorable(metric, tiles)
    name, finish = network.name, network.finish
    if not is_as_recorded(tiles, network.preprocessing):
        name, finish = name.replace(POST_PROCESSED, ""), None
    if tiles is not None or network.preprocessing.windows is not None:
        name = f"{name}, {tiles or 'whole slices'}"
    return replace(network, name=name, tiles=tiles, finish=finish)


def _timed(network: Network) -> Network:
    return replace(network, run=TimedRun(run=network.run))


def _augmented(network: Network, tta: str) -> Network:
    """Return a network with test-time augmentation, which is timed as well."""
    run = averaged(network.run, tta, network.preprocessing.image_size)
    return replace(network, name=f"{network.name}, tta {tta}", run=TimedRun(run=run))


def _costs(networks: Sequence[Network]) -> dict[str, float]:
    """Return the milliseconds of a slice since the last call, of the networks that are timed."""
    return {network.name: network.run.take_ms() for network in networks if isinstance(network.run, TimedRun)}


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
    return " / ".join(f"{value:.{digits}f}" for value, digits in decimals if value is not None)
