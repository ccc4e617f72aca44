"""Write the results of ``reproduce`` beside the paper's, as JSON and Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg_trt.files import atomic_file, write_json
from medseg_trt.metrics.protocols import METRICS
from medseg_trt.reproduce.paired_runs import Gain, Pair, Scores, gain, mean_and_deviation
from medseg_trt.reproduce.paper_tables import TABLES, Figure, PaperTable

SCHEMA = 1
NAMES: Mapping[Figure, str] = {"dice": "Dice", "iou": "IoU", "hd95": "HD95"}
LOWER_IS_BETTER = ("hd95",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tested:
    """The scores of one run on the test split."""

    dataset: str
    configuration: str  # the network
    split: str
    seed: int
    cases: Mapping[str, int]  # by split
    scores: Mapping[str, Mapping[str, Scores]]  # by metric mode and figure


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproducedTable:
    """All runs of a table."""

    table: str  # a key of TABLES
    tested: tuple[Tested, ...]
    missing: tuple[str, ...] = ()  # data sets without data
    is_generated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One figure of one data set: a network and the one that it is compared with, ours and as published."""

    dataset: str
    mode: str
    figure: Figure
    before: str  # the network that ``after`` is compared with; the same where there is no other
    after: str
    ours: Mapping[str, tuple[float, float | None] | None]  # mean and standard deviation over runs
    paper: Mapping[str, float | None]
    gain: Gain | None

    @property
    def verdict(self) -> str:
        """A sentence on whether the block helps, or whether one network is better than the other."""
        if self.before == self.after:
            return f"{self.after} is compared with nothing."
        if self.gain is None:
            return "There is no case for which both networks have this figure."
        is_the_block = self.after == f"llm-{self.before}"
        subject = "The LLaMA block's" if is_the_block else f"{self.after}, compared with {self.before}: its"
        return self.gain.sentence(subject, lower_is_better=self.figure in LOWER_IS_BETTER)


def lines_of(results: ReproducedTable) -> list[Line]:
    """Return every figure of the table's data sets in every metric mode."""
    table = TABLES[results.table]
    return [
        _line(dataset, mode, figure, [run for run in results.tested if run.dataset == dataset], table, pair)
        for dataset in dict.fromkeys(run.dataset for run in results.tested)
        for mode in table.modes
        for figure in table.figures
        if all(figure in run.scores[mode] for run in results.tested if run.dataset == dataset)
        for pair in comparisons(list(dict.fromkeys(run.configuration for run in results.tested)))
    ]


def comparisons(networks: Sequence[str]) -> list[tuple[str, str]]:
    """Return which network every other is compared with: its counterpart without the block, or else the first one."""
    first, *others = networks
    pairs = [(name[4:] if name.startswith("llm-") and name[4:] in networks else first, name) for name in others]
    return pairs or [(first, first)]


def _line(
    dataset: str,
    mode: str,
    figure: Figure,
    tested: Sequence[Tested],
    table: PaperTable,
    pair: tuple[str, str],
) -> Line:
    runs_of = {name: {(run.split, run.seed): run for run in tested if run.configuration == name} for name in pair}
    before, after = (runs_of[name] for name in pair)
    pairs = [
        Pair(split=split, before=one.scores[mode][figure], after=after[split, seed].scores[mode][figure])
        for (split, seed), one in before.items()
    ]
    overlap = tested[0].cases["test"] / tested[0].cases["train"] if len({pair.split for pair in pairs}) > 1 else 0.0
    return Line(
        dataset=dataset,
        mode=mode,
        figure=figure,
        before=pair[0],
        after=pair[1],
        gain=gain(pairs, overlap) if pair[0] != pair[1] else None,
        ours={
            name: mean_and_deviation([run.scores[mode][figure] for run in runs.values()])
            for name, runs in runs_of.items()
        },
        paper={name: table.published(dataset, name, figure) for name in pair},
    )


def write_table(results: ReproducedTable, path: Path) -> None:
    """Write the JSON file ``path``, and a Markdown file beside it."""
    lines = lines_of(results)
    write_json(path, to_dict(results, lines))
    with atomic_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(to_markdown(results, lines), encoding="utf-8")


def to_dict(results: ReproducedTable, lines: Sequence[Line]) -> dict[str, Any]:
    """Return plain data that JSON can hold."""
    return {
        "schema": SCHEMA,
        "table": results.table,
        "is_generated": results.is_generated,
        "missing": list(results.missing),
        "runs": [
            {
                "dataset": run.dataset,
                "arm": run.configuration,
                "split": run.split,
                "seed": run.seed,
                "cases": run.cases,
            }
            for run in results.tested
        ],
        "lines": [{**asdict(line), "verdict": line.verdict} for line in lines],
    }


def to_markdown(results: ReproducedTable, lines: Sequence[Line]) -> str:
    """Return the table as Markdown."""
    table = TABLES[results.table]
    text = [f"# {table.title}", ""]
    if results.is_generated:
        text += ["**Generated images: these figures only show that the command works.**", ""]
    text += [_runs_of(results, dataset) for dataset in dict.fromkeys(line.dataset for line in lines)]
    text += [f"- {dataset}: left out, no data" for dataset in results.missing]
    for mode in table.modes:
        text += ["", f"## {mode}", "", f"{METRICS[mode].text[0].upper()}{METRICS[mode].text[1:]}.", ""]
        text += [
            "| data set | figure | network | ours | published | compared with | ours | published | gain, ours "
            "| bootstrap 95 % | t over runs 95 % | gain, published |",
            "|:--|:--|:--|--:|--:|:--|--:|--:|--:|--:|--:|--:|",
        ]
        text += [_row(line) for line in lines if line.mode == mode]
        text += [
            "",
            *(f"- {line.dataset}, {NAMES[line.figure]}: {line.verdict}" for line in lines if line.mode == mode),
        ]
    names = {run.configuration for run in results.tested}
    text += [
        "",
        *(
            f"- {name} on {dataset}, published elsewhere: {published.protocol}; not comparable with the paper"
            for dataset, networks in table.elsewhere.items()
            for name, published in networks.items()
            if name in names and any(line.dataset == dataset for line in lines)
        ),
    ]
    text += [
        "",
        "Ours are mean ± standard deviation over runs; the paper's are single runs without a spread, and it does not "
        "state its metric mode. A gain is a network minus the one that it is compared with, in pairs of one seed and "
        "one split, over the cases with a figure for both. The bootstrap resamples test cases and runs; the t interval "
        "is over runs, widened by test / train if splits of one data set overlap (Nadeau & Bengio 2003). A gain is "
        "distinguishable from zero if both intervals exclude zero; the intervals are not corrected for the number of "
        "comparisons.",
    ]
    return "\n".join(text) + "\n"


def _runs_of(results: ReproducedTable, dataset: str) -> str:
    tested = [run for run in results.tested if run.dataset == dataset]
    splits, seeds = ({getattr(run, name) for run in tested} for name in ("split", "seed"))
    networks = len({run.configuration for run in tested})
    cases = ", ".join(f"{count} {split}" for split, count in tested[0].cases.items())
    counts = f"{len(splits)} split(s) x {len(seeds)} seed(s) x {networks} network(s)"
    return f"- {dataset}: {len(tested)} runs, {counts}; {cases}"


def _row(line: Line) -> str:
    decimals = 2 if line.figure == "hd95" else 4
    cells = [line.dataset, NAMES[line.figure]]
    for name in (line.after, line.before):
        published = line.paper[name]
        cells += [name, _spread(line.ours[name], decimals), "–" if published is None else f"{published:.{decimals}f}"]
    if line.before == line.after:
        cells[-3:] = ["–", "–", "–"]
    gain = line.gain
    cells += [f"{gain.estimate:+.{decimals}f}", _ends(gain.bootstrap, decimals)] if gain else ["–", "–"]
    cells += [_ends(gain.student, decimals) if gain and gain.student else "–"]
    before, after = line.paper[line.before], line.paper[line.after]
    if line.after == f"llm-{line.before}" and before is not None and after is not None:
        cells.append(f"{after - before:+.{decimals}f}")
    else:
        cells.append("–")
    return f"| {' | '.join(cells)} |"


def _spread(statistics: tuple[float, float | None] | None, decimals: int) -> str:
    if statistics is None:
        return "–"
    mean, deviation = statistics
    return f"{mean:.{decimals}f}" + (f" ± {deviation:.{decimals}f}" if deviation is not None else ", one run")


def _ends(interval: tuple[float, float], decimals: int) -> str:
    return f"{interval[0]:+.{decimals}f} … {interval[1]:+.{decimals}f}"
