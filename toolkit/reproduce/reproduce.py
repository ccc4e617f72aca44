"""Train and test the networks of a table of the paper, and write the results beside the paper's.

A run is a combination of data set, architecture, split and seed. Its folder is one of ``medseg-trt train``, with
``test.json`` after the test. Finished runs are kept, and interrupted ones resumed, when the command is repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from medseg_trt.errors import InputError, UsageError
from medseg_trt.progress import LOG, is_main_process
from medseg_trt.reproduce.paired_runs import Scores, scores_of
from medseg_trt.reproduce.paper_tables import CONFIGURATIONS, TABLES
from medseg_trt.reproduce.results import ReproducedTable, Tested, write_table
from medseg_trt.reproduce.tested_run import BATCH, stored_scores, tested_network
from medseg_trt.spec import from_dict
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.datasets.official import DATASETS, open_dataset
from medseg_trt.train.models.presets import MODELS
from medseg_trt.train.recipes.recipes import recipe
from medseg_trt.train.recipes.training_spec import Recipe

FIRST_SEED = 1234
STARTS = {  # by the first word of a network's name
    "transunet": "R50+ViT-B_16, as in the paper: --weights R50+ViT-B_16.npz",
    "swin": "swin_tiny_patch4_window7_224.pth",
    "ds": "swin_base_patch4_window7_224_22k.pth and swin_tiny_patch4_window7_224.pth",
}
TEST = "test.json"
GENERATED = "GENERATED"  # a file of this name marks a folder of generated images


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training and its test."""

    dataset: str
    configuration: str  # the network, as the table calls it
    recipe: Recipe
    data: DataFolder
    folder: Path
    split: str  # "official" or "splitNUMBER"
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceRequest:
    """The table, the data and the options of a reproduction."""

    table: str  # a key of TABLES
    root: Path  # of the unzipped archives
    out: Path
    seeds: int = 3
    splits: int = 5  # of data sets without an official split
    changes: tuple[str, ...] = ()  # of all recipes; architectures are named without llm-
    block: Path | None = None
    weights: tuple[Path, ...] = ()  # what TransUNet's encoder starts from
    models: tuple[str, ...] = ()  # keys of MODELS; none: the paper's two networks
    weights_of: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)  # by other networks, without llm-

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            raise UsageError(f"the paper has no table {self.table!r}; choose one of: {', '.join(TABLES)}")
        if self.seeds < 1 or self.splits < 1:
            raise UsageError("seeds and splits must be 1 or more")
        for name in (*self.models, *self.weights_of):
            if name not in MODELS:
                raise UsageError(f"no network is called {name!r}; choose from: {', '.join(MODELS)}")
        if len(set(self.models)) < len(self.models):
            raise UsageError(f"--models {','.join(self.models)} names a network twice")
        if self.models and any(change.startswith("architecture=") for change in self.changes):
            raise UsageError("--models and --set architecture exclude each other")

    def initial_weights(self, architecture: str) -> tuple[Path, ...]:
        """Return the files that a network starts from."""
        plain = architecture.removeprefix("llm-")
        return self.weights_of.get(plain, self.weights if plain.startswith("transunet") else ())


def reproduce_table(request: ReproduceRequest) -> Path:
    """Train and test all missing runs, and return the JSON file of the table; the Markdown file is beside it.

    Raises:
        InputError: no data set of the table exists, or one cannot be used; raised before any training.
        UsageError: an invalid change of a recipe, or a run folder of another recipe.
        ArtefactError: the block cannot be used.
    """
    table = TABLES[request.table]
    folders = {name: find_dataset(name, request.root) for name in table.paper}
    missing = [name for name, folder in folders.items() if folder is None]
    for name in missing:
        layouts = " or ".join(layout.description for layout in DATASETS[name].layouts if layout.identifies_dataset)
        LOG.warning("%s is left out: %s holds neither %s nor a folder %s/", name, request.root, layouts, name)
    if len(missing) == len(folders):
        raise InputError(f"{request.root} holds none of the data sets of {request.table}: {', '.join(folders)}")
    runs = [run for name, folder in folders.items() if folder is not None for run in _plan(name, folder, request)]
    if request.block is None and any(needs_block(run.recipe) for run in runs):
        raise UsageError("llm-transunet needs a frozen block: --block FILE, from 'medseg-trt block extract'")
    for run in runs:
        if run.recipe.pretrained == "file" and not request.initial_weights(run.recipe.architecture):
            plain = run.recipe.architecture.removeprefix("llm-")
            prefix = "" if plain.startswith("transunet") else f"{plain}="
            raise UsageError(
                f"{plain} starts from {STARTS[plain.partition('-')[0]]}: --weights {prefix}FILE; "
                "from random weights: --set pretrained=none"
            )
    tested: list[Tested] = []
    for number, run in enumerate(runs, 1):
        LOG.info("run %d of %d: %s", number, len(runs), run.folder.name)
        if not (run.folder / TEST).is_file():
            _train(run, request)
        if is_main_process():
            tested.append(_test(run, table.modes))
    path = request.out / f"{request.table}.json"
    if is_main_process():
        results = ReproducedTable(
            table=request.table,
            tested=tuple(tested),
            missing=tuple(missing),
            is_generated=_is_generated(request, folders),
        )
        write_table(results, path)
    return path


def find_dataset(name: str, root: Path) -> Path | None:
    """Return the folder of a data set below ``root``: the one with its key as name, or the first with its layout."""
    if (root / name).is_dir():
        return root / name
    folders = (layout.locate(root) for layout in DATASETS[name].layouts if layout.identifies_dataset)
    return next((folder for folder in folders if folder is not None), None)


def needs_block(chosen: Recipe) -> bool:
    """Return whether a recipe's network needs weights of a language model."""
    return chosen.architecture.startswith("llm-") and chosen.insert.needs_block_file


def _plan(name: str, data_folder: Path, request: ReproduceRequest) -> list[Run]:
    """Return the runs of a data set, the networks in turn, once its data have been found to be sound."""
    chosen = recipe(name, request.changes)
    small = chosen.architecture.removeprefix("llm-")
    architectures = {name: name for name in request.models} or dict(
        zip(CONFIGURATIONS, (small, f"llm-{small}"), strict=True)
    )
    first = open_dataset(name, data_folder, chosen.data)
    is_divided = "split_seed" not in first.how
    first_split = chosen.data.split_seed
    splits = [None] if is_divided else list(range(first_split, first_split + request.splits))
    runs: list[Run] = []
    for split in splits:
        title = "official" if split is None else f"split{split}"
        common = (*request.changes, f"data.dataset={name}", *(() if split is None else (f"data.split_seed={split}",)))
        data = first if split in (None, first_split) else open_dataset(name, data_folder, recipe(name, common).data)
        for seed, configuration in product(range(FIRST_SEED, FIRST_SEED + request.seeds), architectures):
            architecture = architectures[configuration]
            start = ("pretrained=none",) if architecture.removeprefix("llm-").startswith("unet") else ()
            own = recipe(name, (*common, f"architecture={architecture}", f"train.seed={seed}", *start))
            folder = request.out / f"{name}-{architectures[configuration]}-{title}-seed{seed}"
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


def _train(run: Run, request: ReproduceRequest) -> None:
    from medseg_trt.train.loop import train

    block = request.block if needs_block(run.recipe) else None
    is_begun = (run.folder / "last.pt").is_file()
    weights = request.initial_weights(run.recipe.architecture) if run.recipe.pretrained == "file" else ()
    train(run.recipe, run.data, run.folder, block=block, weights=weights, resume=is_begun)


def _test(run: Run, modes: Sequence[str]) -> Tested:
    """Score a run's best checkpoint on the test split, unless its scores are stored."""
    path, best = run.folder / TEST, run.folder / "best.pt"
    stored = stored_scores(path, best, lambda: {"modes": _scores(run, best, modes)})
    scores = {
        mode: {figure: from_dict(Scores, stored_scores, str(path)) for figure, stored_scores in figures.items()}
        for mode, figures in stored["modes"].items()
    }
    cases = {split: len(names) for split, names in run.data.splits.items()}
    return Tested(
        dataset=run.dataset, configuration=run.configuration, split=run.split, seed=run.seed, cases=cases, scores=scores
    )


def _scores(run: Run, best: Path, modes: Sequence[str]) -> dict[str, Any]:
    from medseg_trt.metrics.protocols import METRICS
    from medseg_trt.train.evaluate import evaluate

    checkpoint, network = tested_network(best)
    scores_of_mode: dict[str, Any] = {}
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
        scores_of_mode[mode] = {figure: asdict(scores_of(scored, figure)) for figure in figures}
    return scores_of_mode


def _is_generated(request: ReproduceRequest, data_folders: Mapping[str, Path | None]) -> bool:
    folders = [request.root, *(folder for folder in data_folders.values() if folder is not None)]
    return any((folder / GENERATED).is_file() for folder in folders)
