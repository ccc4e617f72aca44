r"""Does the frozen LLaMA block help on the real samples? Three seeds with it, three without, on organs and tumours.

The runs are made by these commands, two minutes to an hour each, and go on with ``--resume`` after a kill:

    medseg-trt samples get organs tumours llama-block -o data
    medseg-trt block extract data/llama-block/SmolLM2-135M-Instruct.Q4_1.gguf -o block.safetensors
    for seed in 1234 1235 1236; do for data in organs tumours; do
      medseg-trt train --recipe $data-demo --data data/$data --set train.seed=$seed --resume \
        -o runs/$data-llm-transunet-small-$seed --block block.safetensors
      medseg-trt train --recipe $data-demo --data data/$data --set train.seed=$seed --resume \
        -o runs/$data-transunet-small-$seed --set architecture=transunet-small
    done; done
    python benchmarks/language_block.py runs --data data

A run that is not complete is left out, and named. There are 2-5 patients: no clinical meaning.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from results_file import options, publish

from medseg_trt.reproduce.paired_runs import Pair, Scores, gain, mean_and_deviation, scores_of
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.datasets.folder import DataFolder
from medseg_trt.train.evaluate import evaluate
from medseg_trt.train.models.model import runner
from medseg_trt.train.recorded_data import open_recorded

DATA = ("organs", "tumours")
ARMS = ("transunet-small", "llm-transunet-small")
SPLITS = ("val", "test")
CAVEAT = "2-5 patients: no clinical meaning"
RUN = re.compile(rf"({'|'.join(DATA)})-({'|'.join(reversed(ARMS))})-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One run on one split."""

    data: str
    arm: str
    seed: int
    split: str
    epoch: int  # of best.pt
    dice: Scores  # of every case and class
    about: str  # the split, in words


def complete_runs(folder: Path) -> tuple[dict[tuple[str, str, int], Path], list[str]]:
    """Return the runs whose last epoch is done, by data, architecture and seed, and the names of the others."""
    runs: dict[tuple[str, str, int], Path] = {}
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        if (match := RUN.fullmatch(path.name)) is None:
            continue
        history, recipe = path / "history.jsonl", path / "recipe.json"
        epochs = json.loads(recipe.read_text())["train"]["epochs"] if recipe.is_file() else None
        done = json.loads(history.read_text().splitlines()[-1])["epoch"] if history.is_file() else None
        if done is not None and done == epochs:
            runs[match[1], match[2], int(match[3])] = path
        else:
            others.append(f"{path.name} ({'no epoch' if done is None else f'epoch {done}'} of {epochs})")
    return runs, others


def score(run: Path, data: DataFolder, key: tuple[str, str, int]) -> list[Scored]:
    """Score a run's best checkpoint, chosen on the validation split, on both splits."""
    checkpoint = load_checkpoint(run / "best.pt")
    epoch = checkpoint.provenance.epoch
    assert epoch is not None
    network = runner(checkpoint.model())
    name, arm, seed = key
    return [
        Scored(
            data=name,
            arm=arm,
            seed=seed,
            split=split,
            epoch=epoch,
            dice=scores_of(evaluate(network, data.cases(split), checkpoint.preprocessing, data.classes), "dice"),
            about=data.split_notes.get(split, ""),
        )
        for split in SPLITS
    ]


def row(data: str, split: str, scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the means of both networks, and the gain over the seeds that both have."""
    runs = [run for run in scored if (run.data, run.split) == (data, split)]
    of_arm = {arm: {run.seed: run for run in runs if run.arm == arm} for arm in ARMS}
    before, after = (of_arm[arm] for arm in ARMS)
    seeds = sorted(before.keys() & after.keys())
    pairs = [Pair(split=split, before=before[seed].dice, after=after[seed].dice) for seed in seeds]
    difference = gain(pairs) if pairs else None
    return {
        "data": data,
        "split": split,
        "about": runs[0].about,
        "cases": list(runs[0].dice.names),
        "runs": {arm: {seed: run.dice.mean for seed, run in sorted(of_arm[arm].items())} for arm in ARMS},
        "mean_and_deviation": {arm: mean_and_deviation([run.dice for run in of_arm[arm].values()]) for arm in ARMS},
        "paired_seeds": seeds,
        "gain": asdict(difference) if difference is not None else None,
        "verdict": difference.sentence() if difference is not None else "No seed is complete with both networks.",
    }


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the table and what it says."""
    lines = [
        "# The language block on real samples",
        "",
        f"**{CAVEAT}.**",
        "",
        "Mean Dice over the classes that occur, `medseg-trt evaluate` with `volume`, of `best.pt`, which was chosen on "
        "the validation split; mean ± standard deviation over seeds. Networks of one seed start from the same weights "
        "and see the same slices. Gain: with the block (SmolLM2-135M's last layer) minus without, in pairs of one "
        f"seed; 95 % intervals. Trained for {' or '.join(result['trained'])}.",
        "",
        "| data, split | cases | without the block | with the block | gain | bootstrap | t over seeds | pairs |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        lines.append(_markdown_row(row))
    lines += ["", *(f"- {row['data']}, {row['split']}: {row['verdict']}" for row in result["rows"])]
    lines += ["", "What the splits are:", ""]
    lines += [f"- {row['data']}, {row['split']}: {row['about'] or 'see its dataset.json'}" for row in result["rows"]]
    lines += ["", "Labels of the organs are TotalSegmentator's, not drawn by hand."]
    if result["incomplete"]:
        lines += ["", f"Left out, because they are not complete: {', '.join(result['incomplete'])}."]
    return "\n".join(lines) + "\n"


def _markdown_row(row: Mapping[str, Any]) -> str:
    cells = [f"{row['data']}, {row['split']}", str(len(row["cases"]))]
    for arm in ARMS:
        figures = row["mean_and_deviation"][arm]
        number = len(row["runs"][arm])
        spread = "" if figures is None or figures[1] is None else f" ± {figures[1]:.3f}"
        cells.append("–" if figures is None else f"{figures[0]:.3f}{spread} ({number} run{'s' * (number > 1)})")
    figures = row["gain"]
    cells += (
        [f"{figures['estimate']:+.3f}", _ends(figures["bootstrap"]), _ends(figures["student"])]
        if figures
        else ["–"] * 3
    )
    return f"| {' | '.join([*cells, str(len(row['paired_seeds']))])} |"


def _ends(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:+.3f} … {interval[1]:+.3f}"


def _length(run: Path) -> str:
    """Return how long a run was trained."""
    recipe = load_checkpoint(run / "best.pt").provenance.recipe
    assert recipe is not None
    train = recipe["train"]
    return f"{train['epochs']} epochs of {train['slices_per_epoch']} slices"


def main() -> None:
    """Score every complete run, and write the results."""
    parser = options(__doc__)
    parser.add_argument("runs", type=Path, help="the folder of the runs, called DATA-ARCHITECTURE-SEED")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the samples organs and tumours")
    chosen = parser.parse_args()
    runs, incomplete = complete_runs(chosen.runs)
    if not runs:
        raise SystemExit(f"{chosen.runs} holds no complete run; {', '.join(incomplete) or 'none at all'}")
    scored: list[Scored] = []
    for key, path in runs.items():
        data = open_recorded(chosen.data / key[0], load_checkpoint(path / "best.pt").provenance)
        scored += score(path, data, key)
        print(path.name, ", ".join(f"{run.split} {run.dice.mean:.3f}" for run in scored[-2:]), file=sys.stderr)
    trained = {_length(path) for path in runs.values()}
    names = [name for name in DATA if any(run.data == name for run in scored)]
    rows = [row(name, split, scored) for name in names for split in SPLITS]
    result = {
        "caveat": CAVEAT,
        "trained": sorted(trained),
        "rows": rows,
        "runs": [asdict(run) for run in scored],
        "incomplete": incomplete,
    }
    publish("language_block", result, to_markdown, chosen)


if __name__ == "__main__":
    main()
