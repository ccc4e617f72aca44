"""The configurations of an ablation, and the questions that pairs of them answer."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """One way to use the language block, or something else in its position."""

    description: str
    changes: tuple[str, ...] = ()  # of the recipe
    has_insert: bool = True  # False: the network without llm-


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A comparison of two configurations: whether ``after`` scores higher than ``before``."""

    text: str
    before: str  # keys of CONFIGURATIONS
    after: str
    yes: str  # a sentence for a gain that is distinguishable from zero
    no: str  # a sentence for a loss that is distinguishable from zero


CONFIGURATIONS: Mapping[str, Configuration] = {
    "none": Configuration(description="no block", has_insert=False),
    "mappers": Configuration(description="the two maps and the norm alone", changes=("insert.weights=none",)),
    "mlp": Configuration(
        description="an MLP of the same trained parameters: the two maps with GELU between them",
        changes=("insert.weights=gelu",),
    ),
    "affine": Configuration(description="one trained affine map", changes=("insert.weights=affine",)),
    "random": Configuration(description="a frozen block of random weights", changes=("insert.weights=random",)),
    "shuffled": Configuration(
        description="the pretrained block, frozen, with the values of every tensor permuted",
        changes=("insert.weights=shuffled",),
    ),
    "frozen": Configuration(description="the pretrained block, frozen, as published"),
    "trainable": Configuration(description="the pretrained block, trained", changes=("insert.trainable=true",)),
    "rotary": Configuration(description="frozen, with the rotary embedding", changes=("rotary=true",)),
    "mask": Configuration(description="frozen, with the causal mask", changes=("causal=true",)),
    "residual": Configuration(description="frozen, with a residual around both maps", changes=("insert.residual=out",)),
    "train-only": Configuration(
        description="frozen with a residual, bypassed by half of every training batch and after the training",
        changes=("insert.residual=out", "insert.train_only=true"),
    ),
}
QUESTIONS: tuple[Question, ...] = (
    Question(
        text="Does it beat no block?",
        before="none",
        after="frozen",
        yes="The frozen block beats no block.",
        no="The frozen block is worse than no block.",
    ),
    Question(
        text="Does pretraining matter? (random weights)",
        before="random",
        after="frozen",
        yes="Pretrained weights beat random ones.",
        no="Pretrained weights are worse than random ones.",
    ),
    Question(
        text="Does pretraining matter? (shuffled weights)",
        before="shuffled",
        after="frozen",
        yes="Pretrained weights beat the same values shuffled.",
        no="Pretrained weights are worse than the same values shuffled.",
    ),
    Question(
        text="Does it beat an affine map?",
        before="affine",
        after="frozen",
        yes="The frozen block beats an affine map.",
        no="The frozen block is worse than an affine map.",
    ),
    Question(
        text="Does the block add to the two maps?",
        before="mappers",
        after="frozen",
        yes="The frozen block beats its two maps alone.",
        no="The frozen block is worse than its two maps alone.",
    ),
    Question(
        text="Does it beat an MLP of the same trained parameters?",
        before="mlp",
        after="frozen",
        yes="The frozen block beats an MLP of the same trained parameters.",
        no="The frozen block is worse than an MLP of the same trained parameters.",
    ),
    Question(
        text="Does training the block help?",
        before="frozen",
        after="trainable",
        yes="A trained block beats the frozen one.",
        no="A trained block is worse than the frozen one.",
    ),
    Question(
        text="Does the rotary embedding help?",
        before="frozen",
        after="rotary",
        yes="The rotary embedding helps.",
        no="The rotary embedding hurts.",
    ),
    Question(
        text="Does the causal mask help?",
        before="frozen",
        after="mask",
        yes="The causal mask helps.",
        no="The causal mask hurts.",
    ),
    Question(
        text="Does a residual around the block help?",
        before="frozen",
        after="residual",
        yes="The residual helps.",
        no="The residual hurts.",
    ),
    Question(
        text="Does a block that only the training has help?",
        before="none",
        after="train-only",
        yes="A block that is dropped after the training beats no block.",
        no="A block that is dropped after the training is worse than none.",
    ),
)
