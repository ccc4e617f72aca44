"""Train and test what a table of the paper needs, as far as it is not there, and lay our figures beside the paper's.

A run is a data set, an architecture, a split and a seed; its folder is one of ``medseg-trt train``, with ``test.json``
once it was tested. Whatever is killed goes on where it stopped when the same command is typed again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from medseg_trt.errors import InputError, UsageError
from medseg_trt.files import sha256, write_json
from medseg_trt.progress import LOG, is_main_process
from medseg_trt.reproduce.paired_runs import Scores, scores_of
from medseg_trt.reproduce.paper_tables import CONFIGURATIONS, TABLES, Configuration
from medseg_trt.reproduce.results import ReproducedTable, Tested, write_table
from medseg_trt.spec import from_dict
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.datasets.official import DATASETS, open_dataset
from medseg_trt.train.recipes.recipes import recipe
from medseg_trt.train.recipes.training_spec import Recipe

FIRST_SEED = 1234
BATCH = 8  # of the paper's validation and test of lesions; unext_batch depends on it
TEST = "test.json"
GENERATED = "GENERATED"  # a file of this name marks a folder whose pictures are of nobody


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training and its test."""

    dataset: str
    configuration: Configuration
    recipe: Recipe
    data: DataFolder
    folder: Path
    split: str  # in words
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What ``reproduce`` was asked for."""

    table: str  # a key of TABLES
    root: Path  # of the unzipped archives
    out: Path
    seeds: int = 3
    splits: int = 5  # of the data sets that come undivided
    changes: tuple[str, ...] = ()  # of all recipes; an architecture is that without the block
    block: Path | None = None
    weights: Path | None = None  # what the encoder starts from

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            raise UsageError(f"the paper has no table {self.table!r}; choose one of: {', '.join(TABLES)}")
        if self.seeds < 1 or self.splits < 1:
            raise UsageError("seeds and splits must be 1 or more")


def reproduce(wanted: Wanted) -> Path:
    """Run what is missing, and return the JSON file of the table; the Markdown is beside it.

    Raises:
        InputError: none of the table's data sets is there, or one cannot be used; before anything is trained.
        UsageError: a recipe cannot be changed so, or runs of other recipes are in the way.
        ArtefactError: the block cannot be used.
    """
    table = TABLES[wanted.table]
    places = {name: find_dataset(name, wanted.root) for name in table.paper}
    missing = [name for name, place in places.items() if place is None]
    for name in missing:
        layouts = " or ".join(layout.description for layout in DATASETS[name].layouts if layout.identifies_dataset)
        LOG.warning("%s is left out: %s holds neither %s nor a folder %s/", name, wanted.root, layouts, name)
    if len(missing) == len(places):
        raise InputError(f"{wanted.root} holds none of the data sets of {wanted.table}: {', '.join(places)}")
    runs = [run for name, place in places.items() if place is not None for run in _plan(name, place, wanted)]
    if wanted.block is None and any(needs_block(run.recipe) for run in runs):
        raise UsageError("llm-transunet needs a frozen block: --block FILE, from 'medseg-trt block extract'")
    if wanted.weights is None and any(run.recipe.pretrained == "file" for run in runs):
        raise UsageError(
            "the paper starts from R50+ViT-B_16: --weights R50+ViT-B_16.npz; from random weights: --set pretrained=none"
        )
    tested: list[Tested] = []
    for number, run in enumerate(runs, 1):
        LOG.info("run %d of %d: %s", number, len(runs), run.folder.name)
        if not (run.folder / TEST).is_file():
            _train(run, wanted)
        if is_main_process():
            tested.append(_test(run, table.modes))
    path = wanted.out / f"{wanted.table}.json"
    if is_main_process():
        found = ReproducedTable(
            table=wanted.table, tested=tuple(tested), missing=tuple(missing), is_generated=_is_generated(wanted, places)
        )
        write_table(found, path)
    return path


def find_dataset(name: str, root: Path) -> Path | None:
    """Return where a data set lies below ``root``: in a folder of its key, or wherever a layout of its own is found."""
    if (root / name).is_dir():
        return root / name
    found = (layout.locate(root) for layout in DATASETS[name].layouts if layout.identifies_dataset)
    return next((place for place in found if place is not None), None)


def needs_block(chosen: Recipe) -> bool:
    """Say whether a recipe's network takes weights from a language model."""
    return chosen.architecture.startswith("llm-") and chosen.insert.needs_block_file


def _plan(name: str, place: Path, wanted: Wanted) -> list[Run]:
    """Return the runs of a data set, the two architectures in turn, once its data have been found to be sound."""
    chosen = recipe(name, wanted.changes)
    small = chosen.architecture.removeprefix("llm-")
    architectures: Mapping[Configuration, str] = {"transunet": small, "llm-transunet": f"llm-{small}"}
    first = open_dataset(name, place, chosen.data)
    is_divided = "split_seed" not in first.how
    first_split = chosen.data.split_seed
    splits = [None] if is_divided else list(range(first_split, first_split + wanted.splits))
    runs: list[Run] = []
    for split in splits:
        title = "official" if split is None else f"split{split}"
        common = (*wanted.changes, f"data.dataset={name}", *(() if split is None else (f"data.split_seed={split}",)))
        data = first if split in (None, first_split) else open_dataset(name, place, recipe(name, common).data)
        for seed, configuration in product(range(FIRST_SEED, FIRST_SEED + wanted.seeds), CONFIGURATIONS):
            own = recipe(name, (*common, f"architecture={architectures[configuration]}", f"train.seed={seed}"))
            folder = wanted.out / f"{name}-{architectures[configuration]}-{title}-seed{seed}"
            runs.append(
                Run(
                    dataset=name,
                    configuration=configuration,
                    recipe=own,
                    data=data,
                    folder=folder,
                    split=title,
                    seed=seed,
                )
            )
    return runs


def _train(run: Run, wanted: Wanted) -> None:
    from medseg_trt.train.loop import train

    block = wanted.block if needs_block(run.recipe) else None
    is_begun = (run.folder / "last.pt").is_file()
    train(run.recipe, run.data, run.folder, block=block, weights=wanted.weights, resume=is_begun)


def _test(run: Run, modes: Sequence[str]) -> Tested:
    """Score a run's best checkpoint on the test split, once."""
    path, best = run.folder / TEST, run.folder / "best.pt"
    if not path.is_file():
        write_json(path, {"checkpoint": sha256(best), "modes": _scores(run, best, modes)})
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["checkpoint"] != sha256(best):
        raise UsageError(f"{path} is of another {best.name}; remove it, and type the same command again")
    scores = {
        mode: {figure: from_dict(Scores, found, str(path)) for figure, found in figures.items()}
        for mode, figures in stored["modes"].items()
    }
    cases = {split: len(found) for split, found in run.data.splits.items()}
    return Tested(
        dataset=run.dataset, configuration=run.configuration, split=run.split, seed=run.seed, cases=cases, scores=scores
    )


def _scores(run: Run, best: Path, modes: Sequence[str]) -> dict[str, Any]:
    import torch

    from medseg_trt.metrics.protocols import METRICS
    from medseg_trt.train.checkpoint import load_checkpoint
    from medseg_trt.train.evaluate import evaluate
    from medseg_trt.train.models.model import runner

    checkpoint = load_checkpoint(best)
    network = runner(checkpoint.model().to("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, Any] = {}
    for mode in modes:
        scored = evaluate(
            network,
            run.data.cases("test"),
            checkpoint.preprocessing,
            run.data.classes,
            BATCH,
            hd95=METRICS[mode].hd95 == "if wanted",
            metric=mode,
        )
        figures = [*(["iou"] if scored.has_iou else []), "dice", *(["hd95"] if scored.hd95_unit else [])]
        found[mode] = {figure: asdict(scores_of(scored, figure)) for figure in figures}
    return found


def _is_generated(wanted: Wanted, places: Mapping[str, Path | None]) -> bool:
    folders = [wanted.root, *(place for place in places.values() if place is not None)]
    return any((folder / GENERATED).is_file() for folder in folders)
