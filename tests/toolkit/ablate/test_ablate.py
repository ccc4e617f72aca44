"""An ablation of tiny networks from end to end, and what its comparisons say of runs whose truth is known."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from tiny import LESION, write_block, write_description, write_pictures

from medseg_trt.ablate.ablate import AblationRequest, compare_all, plan
from medseg_trt.ablate.configurations import CONFIGURATIONS, QUESTIONS
from medseg_trt.ablate.results import Ablation, Comparison, markdown
from medseg_trt.cli import cli
from medseg_trt.errors import UsageError
from medseg_trt.reproduce.paired_runs import GAIN_CONFIDENCE, Gain, Scores
from medseg_trt.train import loop, runs

CHANGES = (
    "architecture=llm-transunet-tiny",
    "preprocessing.image_size=[32, 32]",
    "train.epochs=1",
    "train.batch_size=4",
)
CHOSEN = ("none", "frozen", "affine")


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def test_a_grid_is_trained_on_the_same_batches_resumed_and_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "draw_curve", lambda history, path: None)
    data, block = write_pictures(tmp_path / "data", count=8), write_block(tmp_path)
    batches, trained = dict[str, list[str]](), list[str]()
    real_train, real_loss = loop.train, loop.segmentation_loss

    def train(recipe, data, folder, **options):
        trained.append(folder.name)
        if len(trained) == 5:
            raise Killed
        return real_train(recipe, data, folder, **options)

    def loss(logits, labels, *rest, **options):
        batches.setdefault(trained[-1], []).append(hashlib.sha256(labels.numpy().tobytes()).hexdigest())
        return real_loss(logits, labels, *rest, **options)

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(loop, "segmentation_loss", loss)
    command = ["ablate", "--recipe", "folder", "--data", data, "--block", block, "-o", tmp_path / "out", "--seeds", 2]
    options = [part for change in CHANGES for part in ("--set", change)]
    command = [*map(str, command), *options, "--configurations", ",".join(CHOSEN), "--note", "Generated discs."]
    with pytest.raises(Killed):
        raise CliRunner().invoke(cli, command).exception or AssertionError("nobody was killed")
    ran = CliRunner().invoke(cli, [*command, "--json"])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    names = [f"{name}-{trained[0].split('-')[1]}-seed{seed}" for seed in (1234, 1235) for name in CHOSEN]
    assert trained == [*names[:5], *names[4:]]  # what was finished is not trained again
    by_seed = {seed: {tuple(batches[name]) for name in names if name.endswith(str(seed))} for seed in (1234, 1235)}
    assert [len(seen) for seen in by_seed.values()] == [1, 1]  # every configuration saw the same batches
    assert by_seed[1234] != by_seed[1235]

    printed = json.loads(ran.stdout)
    assert set(printed["means"]) == set(CHOSEN)
    asked = [item["question"]["text"] for item in printed["comparisons"]]
    assert asked == [item.text for item in QUESTIONS if {item.before, item.after} <= set(CHOSEN)]
    assert len(asked) == 2
    assert [item["confidence"] for item in printed["comparisons"]] == [pytest.approx(1 - (1 - GAIN_CONFIDENCE) / 2)] * 2
    page = (tmp_path / "out" / "ablation.md").read_text(encoding="utf-8")
    assert "Generated discs." in page
    assert "a trial of the command, not evidence" in page
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "out" / names[0] / "best.pt").write_bytes(b"another")
    changed = CliRunner().invoke(cli, command)
    assert "is of another best.pt; remove it" in str(changed.exception)


def made_scores(gains: dict[str, float], seeds: int = 5, noise: float = 0.01):
    """Return the Dice of 30 cases, which differ from configuration to configuration by these gains and by noise."""
    rng, cases = np.random.default_rng(0), 30
    base = rng.uniform(0.5, 0.8, cases)
    made = {}
    for name, added in gains.items():
        for seed in range(seeds):
            values = base + added + rng.normal(0, noise) + rng.normal(0, noise, cases)
            names = tuple(f"case{index}" for index in range(cases))
            made[name, "official", seed] = Scores(
                names=names, weights=(1.0,) * cases, values=tuple((float(v),) for v in values), mean=values.mean()
            )
    return made


def gain_of(comparison: Comparison) -> Gain:
    assert comparison.gain is not None
    return comparison.gain


def answers(scores) -> dict[str, str]:
    return {item.question.text: item.sentence for item in compare_all(scores)}


def test_ablation_answers_distinguish_gain_loss_and_no_difference():
    said = answers(made_scores({"none": 0.0, "frozen": 0.1, "affine": 0.25, "mappers": 0.1}))
    assert said["Does it beat no block?"] == "The frozen block beats no block."
    assert said["Does it beat an affine map?"] == "The frozen block is worse than an affine map."
    assert said["Does the block add to the two maps?"] == "Not shown: the difference cannot be told from zero."


def test_ablation_with_one_seed_answers_not_known():
    said = answers(made_scores({"none": 0.0, "frozen": 0.3}, seeds=1))
    assert set(said.values()) == {"Not known: one pair of runs cannot tell a gain from chance."}


def test_more_questions_widen_every_interval():
    gains = dict.fromkeys(CONFIGURATIONS, 0.0)
    scores = made_scores(gains)
    alone = compare_all({key: score for key, score in scores.items() if key[0] in ("none", "frozen")})
    together = compare_all(scores)
    assert len(together) == len(QUESTIONS)
    (first,), again = alone, together[0]
    assert gain_of(first).estimate == gain_of(again).estimate
    for name in ("bootstrap", "student"):
        (low, high), (wide_low, wide_high) = (getattr(gain_of(item), name) for item in (first, again))
        assert wide_low < low < high < wide_high


def test_multiplicity_correction_reduces_false_positives_of_ablations():
    """Of ablations without any effect, uncorrected intervals find one in many: there are eleven questions."""
    corrected = uncorrected = 0
    for trial in range(8):
        rng, scores = np.random.default_rng(trial), {}
        for name in CONFIGURATIONS:
            for seed in range(5):
                values = 0.7 + rng.normal(0, 0.02) + rng.normal(0, 0.02, 8)
                scores[name, "official", seed] = Scores(
                    names=tuple(map(str, range(8))),
                    weights=(1.0,) * 8,
                    values=tuple((float(value),) for value in values),
                    mean=float(values.mean()),
                )
        corrected += any(gain_of(item).is_distinguishable for item in compare_all(scores))
        for item in QUESTIONS:  # one question at a time is not corrected
            alone = {key: value for key, value in scores.items() if key[0] in (item.before, item.after)}
            if any(gain_of(answer).is_distinguishable for answer in compare_all(alone)):
                uncorrected += 1
                break
    assert corrected <= 2  # 8 draws of 5 % exceed 2 in 0.6 % of the cases
    assert uncorrected > corrected


def test_ablation_report_states_seeds_divisions_and_cases():
    scores = made_scores({"none": 0.0, "frozen": 0.1})
    results = Ablation(
        recipe="folder",
        changes=(),
        data="generated",
        note="",
        epochs=1,
        architecture="transunet-tiny",
        scored_split="test",
        cases=30,
        seeds=5,
        splits=("official",),
        means={"none": (0.6, 0.7), "frozen": (0.7, None)},
        comparisons=compare_all(scores),
    )
    page = markdown(results)
    assert "1 epoch; 5 seeds on 1 division of the data (official); scored after the last epoch on 30 cases" in page
    student = gain_of(results.comparisons[0]).student
    assert student is not None
    half = 50 * (student[1] - student[0])
    assert f"reaches {half:.1f} to {half:.1f} points to either side: smaller differences cannot be told" in page
    assert "not evidence" not in page
    assert "- Does it beat no block? The frozen block beats no block." in page
    assert "| none | no block | 65.00 | 7.07 |" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configurations": ("none", "magic")}, "no configuration is called 'magic'; choose from: none, mappers"),
        ({"configurations": ("none",)}, "name at least two configurations, each of them once"),
        ({"configurations": ("none", "none")}, "name at least two configurations, each of them once"),
        ({"seeds": 0}, "seeds and splits must be 1 or more"),
    ],
)
def test_an_impossible_grid_is_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        AblationRequest(recipe="folder", data=tmp_path, out=tmp_path, **options)


@pytest.mark.parametrize("described", [False, True])
def test_only_the_splits_of_a_paper_are_called_official(tmp_path, described):
    data = write_pictures(tmp_path / "data")
    if described:
        splits = {"train": [{"image": "case0"}], "val": [{"image": "case1"}]}
        write_description(data, splits, LESION)
    request = AblationRequest(
        recipe="folder", data=data, out=tmp_path / "out", configurations=("none", "affine"), changes=tuple(CHANGES)
    )
    name = "own" if described else "automatic"
    assert {run.split for run in plan(request)} == {name}
    assert {run.folder.name.split("-")[1] for run in plan(request)} == {name}
    with pytest.raises(UsageError, match=f"has a single division, called {name}, so --splits must be 1"):
        plan(replace(request, splits=2))


def test_a_block_is_asked_for_before_any_training(tmp_path):
    data = write_pictures(tmp_path / "data")
    options = [part for change in CHANGES for part in ("--set", change)]
    runs = tmp_path / "runs"
    ran = CliRunner().invoke(cli, ["ablate", "--recipe", "folder", "--data", str(data), *options, "-o", str(runs)])
    assert not list(runs.rglob("*.pt"))
    assert "frozen needs a frozen block: --block FILE" in str(ran.exception) or "shuffled needs" in str(ran.exception)
