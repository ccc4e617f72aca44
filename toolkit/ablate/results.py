"""The results of an ablation: one sentence a question, a table with corrected intervals, and a picture of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from medseg_trt.ablate.configurations import CONFIGURATIONS, Question
from medseg_trt.files import atomic_file, write_json
from medseg_trt.progress import plural
from medseg_trt.reproduce.paired_runs import GAIN_CONFIDENCE, Gain

SCHEMA = 1
NAME = "ablation"
FEW_PAIRS = 3  # below it, the results are called a trial of the command
TRIAL = "**{pairs} run(s) of each configuration: a trial of the command, not evidence.**"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The answer to one question."""

    question: Question
    gain: Gain | None  # of Dice, 0 … 1; None: no case has a figure for both
    confidence: float  # of both intervals of the gain, corrected for the number of questions

    @property
    def sentence(self) -> str:
        """Answer in one sentence; what the runs cannot tell is said to be unknown."""
        gain = self.gain
        if gain is None:
            return "There is no case for which both networks have a Dice."
        if gain.student is None:
            return "Not known: one pair of runs cannot tell a gain from chance."
        if not gain.is_distinguishable:
            return "Not shown: the difference cannot be told from zero."
        return self.question.yes if gain.estimate > 0 else self.question.no


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """All runs of an ablation."""

    recipe: str
    changes: tuple[str, ...]
    data: str
    note: str
    epochs: int
    architecture: str  # without the block
    scored_split: str
    cases: int  # of the scored split
    seeds: int
    splits: tuple[str, ...]
    means: Mapping[str, tuple[float | None, ...]]  # mean Dice of every run, by configuration
    comparisons: tuple[Comparison, ...]

    @property
    def pairs(self) -> int:
        """Runs of each configuration."""
        return self.seeds * len(self.splits)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        answers = [{**asdict(item), "sentence": item.sentence} for item in self.comparisons]
        return {"schema": SCHEMA, **asdict(self), "comparisons": answers}


def write_ablation(results: Ablation, out: Path) -> Path:
    """Write ``ablation.json``, ``ablation.md`` and ``ablation.png`` into a folder, and return the first."""
    path = out / f"{NAME}.json"
    draw(results, path.with_suffix(".png"))
    with atomic_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    write_json(path, results.to_dict())
    return path


def markdown(results: Ablation) -> str:
    """Return the results as a page: answers first, then the figures."""
    number, percent = len(results.comparisons), 100 * _confidence(results)
    lines = [
        f"# Ablation: {results.architecture} on {results.data}",
        "",
        *([results.note, ""] if results.note else []),
        *([TRIAL.format(pairs=results.pairs), ""] if results.pairs < FEW_PAIRS else []),
        f"Recipe {results.recipe}{' with ' + ', '.join(results.changes) if results.changes else ''}; "
        f"{plural(results.epochs, 'epoch')}; {plural(results.seeds, 'seed')} on "
        f"{plural(len(results.splits), 'division')} of the data ({', '.join(results.splits)}); scored after the last "
        f"epoch on {plural(results.cases, 'case')} of the {results.scored_split} split. With one seed, all "
        "configurations start from the same weights outside the block and see the same batches.",
        "",
        *(f"- {item.question.text} {item.sentence}" for item in results.comparisons),
        "",
        "Differences of the mean Dice in points of 100, over pairs of runs with one seed and split. All intervals "
        f"hold together with {100 * GAIN_CONFIDENCE:.0f} %: each of {number} has {percent:.2f} % (Bonferroni). "
        "The bootstrap draws cases and runs, Student's t the runs; a difference counts if neither holds zero."
        f"{_smallest_visible(results)}",
        "",
        "| question | before → after | difference | bootstrap | Student's t |",
        "|:--|:--|--:|--:|--:|",
        *(_row(item) for item in results.comparisons),
        "",
        "| configuration | | mean Dice | deviation over runs |",
        "|:--|:--|--:|--:|",
        *(_mean_row(name, means) for name, means in results.means.items()),
        "",
        f"![Differences with their intervals]({NAME}.png)",
        "",
    ]
    return "\n".join(lines)


def draw(results: Ablation, path: Path) -> None:
    """Draw every difference as a dot with its wider interval, and a line at zero."""
    from medseg_trt.errors import require

    figure_module = require("matplotlib.figure", "report")
    shown = [item for item in results.comparisons if item.gain is not None]
    figure = figure_module.Figure(figsize=(9, 1.2 + 0.42 * max(len(shown), 1)), layout="constrained")
    axes = figure.add_subplot()
    for row, item in enumerate(reversed(shown)):
        gain = item.gain
        assert gain is not None  # filtered above
        low, high = _outer(gain)
        color = "tab:blue" if gain.is_distinguishable else "0.45"
        axes.plot([100 * low, 100 * high], [row, row], color=color, linewidth=2)
        axes.plot(100 * gain.estimate, row, "o", color=color)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [f"{item.question.before} → {item.question.after}" for item in reversed(shown)])
    axes.set_xlabel(f"difference of Dice, points of 100, with {100 * _confidence(results):.2f} % intervals")
    axes.set_title(f"{results.architecture}, {results.data}: {results.pairs} pairs of runs")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _outer(gain: Gain) -> tuple[float, float]:
    """Return the interval that holds both."""
    both = (gain.bootstrap, gain.student) if gain.student is not None else (gain.bootstrap,)
    return min(low for low, _ in both), max(high for _, high in both)


def _smallest_visible(results: Ablation) -> str:
    """Say what the runs cannot show, whatever it is: a difference within half of the narrowest interval."""
    students = [item.gain.student for item in results.comparisons if item.gain is not None and item.gain.student]
    if not students:
        return ""
    halves = sorted(50 * (high - low) for low, high in students)
    return (
        f" With {plural(results.pairs, 'pair')} of runs, Student's interval reaches {halves[0]:.1f} to "
        f"{halves[-1]:.1f} points to either side: smaller differences cannot be told from zero."
    )


def _confidence(results: Ablation) -> float:
    return results.comparisons[0].confidence if results.comparisons else GAIN_CONFIDENCE


def _row(item: Comparison) -> str:
    names = f"{item.question.before} → {item.question.after}"
    gain = item.gain
    if gain is None:
        return f"| {item.question.text} | {names} | – | – | – |"
    student = _points(*gain.student) if gain.student is not None else "–"
    return f"| {item.question.text} | {names} | {100 * gain.estimate:+.2f} | {_points(*gain.bootstrap)} | {student} |"


def _points(low: float, high: float) -> str:
    return f"{100 * low:+.2f} … {100 * high:+.2f}"


def _mean_row(name: str, means: tuple[float | None, ...]) -> str:
    known = [100 * value for value in means if value is not None]
    centre = f"{mean(known):.2f}" if known else "–"
    spread = f"{stdev(known):.2f}" if len(known) > 1 else "–"
    return f"| {name} | {CONFIGURATIONS[name].description} | {centre} | {spread} |"
