"""What ``reproduce`` has found, as a table beside the paper's: JSON for machines, Markdown for readers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg_trt.files import atomic_file, write_json
from medseg_trt.metrics.protocols import METRICS
from medseg_trt.reproduce.paired_runs import Gain, Pair, Scores, gain, mean_and_deviation
from medseg_trt.reproduce.paper_tables import CONFIGURATIONS, TABLES, Configuration, Figure

SCHEMA = 1
NAMES: Mapping[Figure, str] = {"dice": "Dice", "iou": "IoU", "hd95": "HD95"}
LOWER_IS_BETTER = ("hd95",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tested:
    """The scores of one run on the test split."""

    dataset: str
    configuration: Configuration
    split: str
    seed: int
    cases: Mapping[str, int]  # by split
    scores: Mapping[str, Mapping[str, Scores]]  # by metric mode and figure


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproducedTable:
    """All runs of a table."""

    table: str  # a key of TABLES
    tested: tuple[Tested, ...]
    missing: tuple[str, ...] = ()  # data sets that were not there
    is_generated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One figure of one data set: ours and the paper's."""

    dataset: str
    mode: str
    figure: Figure
    ours: Mapping[Configuration, tuple[float, float | None] | None]  # mean and standard deviation over runs
    paper: Mapping[Configuration, float]
    gain: Gain | None

    @property
    def verdict(self) -> str:
        """Say in a sentence whether the block helps."""
        if self.gain is None:
            return "There is no case for which both networks have this figure."
        return self.gain.sentence(lower_is_better=self.figure in LOWER_IS_BETTER)


def lines_of(found: ReproducedTable) -> list[Line]:
    """Return every figure of the table's data sets, in every way of counting."""
    table = TABLES[found.table]
    return [
        _line(dataset, mode, figure, [each for each in found.tested if each.dataset == dataset], table.paper[dataset])
        for dataset in dict.fromkeys(each.dataset for each in found.tested)
        for mode in table.modes
        for figure in table.figures
        if all(figure in each.scores[mode] for each in found.tested if each.dataset == dataset)
    ]


def _line(
    dataset: str,
    mode: str,
    figure: Figure,
    tested: Sequence[Tested],
    paper: Mapping[Configuration, Mapping[Figure, float]],
) -> Line:
    of_configuration = {
        name: {(run.split, run.seed): run for run in tested if run.configuration == name} for name in CONFIGURATIONS
    }
    before, after = (of_configuration[name] for name in CONFIGURATIONS)
    pairs = [
        Pair(split=split, before=one.scores[mode][figure], after=after[split, seed].scores[mode][figure])
        for (split, seed), one in before.items()
    ]
    overlap = tested[0].cases["test"] / tested[0].cases["train"] if len({pair.split for pair in pairs}) > 1 else 0.0
    return Line(
        dataset=dataset,
        mode=mode,
        figure=figure,
        gain=gain(pairs, overlap),
        ours={
            name: mean_and_deviation([run.scores[mode][figure] for run in of_configuration[name].values()])
            for name in CONFIGURATIONS
        },
        paper={name: paper[name][figure] for name in CONFIGURATIONS},
    )


def write_table(found: ReproducedTable, path: Path) -> None:
    """Write ``path``, a JSON file, and the same as Markdown beside it."""
    lines = lines_of(found)
    write_json(path, to_dict(found, lines))
    with atomic_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(to_markdown(found, lines), encoding="utf-8")


def to_dict(found: ReproducedTable, lines: Sequence[Line]) -> dict[str, Any]:
    """Return plain data that JSON can hold."""
    return {
        "schema": SCHEMA,
        "table": found.table,
        "is_generated": found.is_generated,
        "missing": list(found.missing),
        "runs": [
            {
                "dataset": each.dataset,
                "arm": each.configuration,
                "split": each.split,
                "seed": each.seed,
                "cases": each.cases,
            }
            for each in found.tested
        ],
        "lines": [{**asdict(line), "verdict": line.verdict} for line in lines],
    }


def to_markdown(found: ReproducedTable, lines: Sequence[Line]) -> str:
    """Return the table and what it says."""
    table = TABLES[found.table]
    text = [f"# {table.title}", ""]
    if found.is_generated:
        text += ["**generated: pictures of nobody. These figures say that the command works, and nothing else.**", ""]
    text += [_runs_of(found, dataset) for dataset in dict.fromkeys(line.dataset for line in lines)]
    text += [f"- {dataset}: left out, it was not there" for dataset in found.missing]
    for mode in table.modes:
        text += ["", f"## {mode}", "", f"{METRICS[mode].text[0].upper()}{METRICS[mode].text[1:]}.", ""]
        text += [
            "| data set | figure | TransUNet, ours | paper | LLM-TransUNet, ours | paper | gain, ours | bootstrap 95 % "
            "| t over runs 95 % | gain, paper |",
            "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        text += [_row(line) for line in lines if line.mode == mode]
        text += [
            "",
            *(f"- {line.dataset}, {NAMES[line.figure]}: {line.verdict}" for line in lines if line.mode == mode),
        ]
    text += [
        "",
        "Ours are mean ± standard deviation over runs; the paper's are single runs without a spread, and it does not "
        "say how it counted. The gain is LLM-TransUNet minus TransUNet in pairs of one seed and one split, over what "
        "both have a figure for. The bootstrap draws test cases and runs anew; the t interval is over runs, widened by "
        "test / train where splits of one data set overlap (Nadeau & Bengio 2003). A gain counts where both exclude "
        "zero.",
    ]
    return "\n".join(text) + "\n"


def _runs_of(found: ReproducedTable, dataset: str) -> str:
    tested = [each for each in found.tested if each.dataset == dataset]
    splits, seeds = ({getattr(each, name) for each in tested} for name in ("split", "seed"))
    cases = ", ".join(f"{count} {split}" for split, count in tested[0].cases.items())
    return f"- {dataset}: {len(tested)} runs, {len(splits)} split(s) x {len(seeds)} seed(s) x 2 networks; {cases}"


def _row(line: Line) -> str:
    places = 2 if line.figure == "hd95" else 4
    cells = [line.dataset, NAMES[line.figure]]
    for name in CONFIGURATIONS:
        cells += [_spread(line.ours[name], places), f"{line.paper[name]:.{places}f}"]
    found = line.gain
    cells += [f"{found.estimate:+.{places}f}", _ends(found.bootstrap, places)] if found else ["–", "–"]
    cells += [_ends(found.student, places) if found and found.student else "–"]
    cells += [f"{line.paper[CONFIGURATIONS[1]] - line.paper[CONFIGURATIONS[0]]:+.{places}f}"]
    return f"| {' | '.join(cells)} |"


def _spread(found: tuple[float, float | None] | None, places: int) -> str:
    if found is None:
        return "–"
    mean, deviation = found
    return f"{mean:.{places}f}" + (f" ± {deviation:.{places}f}" if deviation is not None else ", one run")


def _ends(interval: tuple[float, float], places: int) -> str:
    return f"{interval[0]:+.{places}f} … {interval[1]:+.{places}f}"
