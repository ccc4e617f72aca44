"""Train every configuration with the same seeds, splits, first weights and batches, score it, and compare pairs.

A run is one configuration with one seed on one split; its folder is one of ``medseg-trt train``, with ``scores.json``
after the test. Finished runs are kept, and interrupted ones resumed, when the command is repeated. Runs follow each
other in one process. The last epoch is scored, so that no epoch is chosen on the images that judge it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from medseg_trt.ablate.configurations import CONFIGURATIONS, QUESTIONS, Question
from medseg_trt.ablate.results import Ablation, Comparison, write_ablation
from medseg_trt.errors import UsageError
from medseg_trt.progress import LOG
from medseg_trt.reproduce.paired_runs import GAIN_CONFIDENCE, Pair, Scores, gain, scores_of
from medseg_trt.reproduce.tested_run import BATCH, stored_scores, tested_network
from medseg_trt.spec import from_dict
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.datasets.official import open_dataset
from medseg_trt.train.recipes.recipes import recipe
from medseg_trt.train.recipes.training_spec import Recipe

FIRST_SEED = 1234
SCORES = "scores.json"
SAME_FOR_ALL = ("train.best=last",)
OFFICIAL, OWN, AUTOMATIC = "official", "own", "automatic"  # splits of a paper, of dataset.json, and of this program


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRequest:
    """The recipe, the data and the grid of an ablation."""

    recipe: str  # a key of RECIPES
    data: Path
    out: Path
    block: Path | None = None  # the frozen block; None: only configurations that need none
    weights: tuple[Path, ...] = ()  # initial ones of the encoder
    seeds: int = 3
    splits: int = 1  # of data without splits of their own
    configurations: tuple[str, ...] = tuple(CONFIGURATIONS)
    changes: tuple[str, ...] = ()  # of the recipe, in every configuration
    note: str = ""  # printed with the results

    def __post_init__(self) -> None:
        for name in self.configurations:
            if name not in CONFIGURATIONS:
                raise UsageError(f"no configuration is called {name!r}; choose from: {', '.join(CONFIGURATIONS)}")
        if len(set(self.configurations)) < max(len(self.configurations), 2):
            raise UsageError("name at least two configurations, each of them once")
        if self.seeds < 1 or self.splits < 1:
            raise UsageError("seeds and splits must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRun:
    """One training and its test."""

    configuration: str
    recipe: Recipe
    data: DataFolder
    folder: Path
    split: str
    seed: int


def ablate(request: AblationRequest) -> Path:
    """Train and score all missing runs; return the JSON file of the results, with Markdown and a picture beside it.

    Raises:
        UsageError: an unknown configuration, an invalid change of the recipe, a missing block, or a run folder of
            another recipe.
        InputError: the data cannot be used.
        ArtefactError: the block cannot be used.
    """
    runs = plan(request)
    scores: dict[tuple[str, str, int], Scores] = {}
    for number, run in enumerate(runs, 1):
        LOG.info("run %d of %d: %s", number, len(runs), run.folder.name)
        scores[run.configuration, run.split, run.seed] = _scored(run, request)
    first = runs[0]
    results = Ablation(
        recipe=request.recipe,
        changes=request.changes,
        data=first.data.name,
        note=request.note,
        epochs=first.recipe.train.epochs,
        architecture=first.recipe.architecture.removeprefix("llm-"),
        scored_split=_scored_split(first.data),
        cases=len(first.data.splits[_scored_split(first.data)]),
        seeds=request.seeds,
        splits=tuple(dict.fromkeys(run.split for run in runs)),
        means={name: tuple(score.mean for key, score in scores.items() if key[0] == name) for name, _, _ in scores},
        comparisons=compare_all(scores, _test_over_train(first.data)),
    )
    return write_ablation(results, request.out)


def plan(request: AblationRequest) -> list[AblationRun]:
    """Return the runs: every configuration of a seed and a split before the next seed.

    Raises:
        UsageError: the recipe has no language block, a change is invalid, or the block is missing.
        InputError: the data cannot be used.
    """
    base = recipe(request.recipe, (*request.changes, *SAME_FOR_ALL))
    plain = base.architecture.removeprefix("llm-")
    whole = open_dataset(None, request.data, base.data)
    single = _single_split(whole)
    opened = {single: whole}
    if "split_seed" in whole.how:
        first = base.data.split_seed
        opened = {
            f"split{seed}": open_dataset(
                None, request.data, recipe(request.recipe, (*request.changes, f"data.split_seed={seed}")).data
            )
            for seed in range(first, first + request.splits)
        }
    elif request.splits > 1:
        raise UsageError(f"{request.data} has a single division, called {single}, so --splits must be 1")
    runs: list[AblationRun] = []
    for split, seed, name in product(opened, range(FIRST_SEED, FIRST_SEED + request.seeds), request.configurations):
        configuration = CONFIGURATIONS[name]
        architecture = f"llm-{plain}" if configuration.has_insert else plain
        own_split = () if split == single else (f"data.split_seed={split.removeprefix('split')}",)
        common = (*request.changes, *SAME_FOR_ALL, *own_split, f"train.seed={seed}", f"architecture={architecture}")
        chosen = recipe(request.recipe, (*common, *configuration.changes))
        if configuration.has_insert and chosen.insert.needs_block_file and request.block is None:
            raise UsageError(f"{name} needs a frozen block: --block FILE, from 'medseg-trt block extract'")
        runs.append(
            AblationRun(
                configuration=name,
                recipe=chosen,
                data=opened[split],
                folder=request.out / f"{name}-{split}-seed{seed}",
                split=split,
                seed=seed,
            )
        )
    return runs


def compare_all(scores: Mapping[tuple[str, str, int], Scores], test_over_train: float = 0.0) -> tuple[Comparison, ...]:
    """Answer every question whose two configurations were run, with intervals corrected for their number (Bonferroni).

    Args:
        scores: by configuration, split and seed.
        test_over_train: as for ``paired_runs.gain``; ignored for a single split.
    """
    there = {name for name, _, _ in scores}
    asked = [question for question in QUESTIONS if {question.before, question.after} <= there]
    splits = {split for _, split, _ in scores}
    ratio = test_over_train if len(splits) > 1 else 0.0
    confidence = 1 - (1 - GAIN_CONFIDENCE) / max(len(asked), 1)
    return tuple(_compared(question, scores, ratio, confidence) for question in asked)


def _compared(
    question: Question, scores: Mapping[tuple[str, str, int], Scores], ratio: float, confidence: float
) -> Comparison:
    pairs = [
        Pair(split=split, before=score, after=scores[question.after, split, seed])
        for (name, split, seed), score in scores.items()
        if name == question.before
    ]
    return Comparison(question=question, gain=gain(pairs, ratio, confidence), confidence=confidence)


def _scored(run: AblationRun, request: AblationRequest) -> Scores:
    """Train a run unless it is finished, score it unless that is stored, and return its scores."""
    from medseg_trt.train.loop import train

    path = run.folder / SCORES
    if not path.is_file():
        needs_block = run.recipe.architecture.startswith("llm-") and run.recipe.insert.needs_block_file
        train(
            run.recipe,
            run.data,
            run.folder,
            block=request.block if needs_block else None,
            weights=request.weights,
            resume=(run.folder / "last.pt").is_file(),
        )
    best = run.folder / "best.pt"
    stored = stored_scores(path, best, lambda: {"scores": asdict(_scores(run, best))})
    return from_dict(Scores, stored["scores"], str(path))


def _scores(run: AblationRun, best: Path) -> Scores:
    from medseg_trt.train.evaluate import evaluate

    checkpoint, network = tested_network(best)
    cases = run.data.cases(_scored_split(run.data))
    metric = run.recipe.train.validate_with
    return scores_of(evaluate(network, cases, checkpoint.preprocessing, run.data.classes, BATCH, metric=metric), "dice")


def _single_split(data: DataFolder) -> str:
    """Name the division of data that are divided in one way only."""
    if data.layout:
        return OFFICIAL
    return OWN if data.has_given_splits else AUTOMATIC


def _scored_split(data: DataFolder) -> str:
    return "test" if data.splits.get("test") else "val"


def _test_over_train(data: DataFolder) -> float:
    return len(data.splits[_scored_split(data)]) / len(data.splits["train"])
