"""Recipes are valid, every field can be changed from the command line, and a typo says what would be right."""

import pytest

from medseg_trt.errors import UsageError
from medseg_trt.train.recipes.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_the_way_through_plain_data(name):
    assert recipe(name) == RECIPES[name]()


def test_fields_are_changed_at_any_depth():
    changed = recipe(
        "organs-demo",
        ["train.epochs=3", "preprocessing.image_size=[64, 96]", "architecture=transunet-tiny", "train.optimizer=sgd"],
    )
    assert changed.train.epochs == 3
    assert changed.preprocessing.image_size == (64, 96)
    assert changed.architecture == "transunet-tiny"
    assert changed.train.optimizer == "sgd"
    assert changed.train.learning_rate == RECIPES["organs-demo"]().train.learning_rate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.epoch=3", "the nearest are: train.epochs"),
        ("epochs=3", "the nearest are: train.epochs"),
        ("train.epochs=x", "train.epochs must be an integer, not 'x'"),
        ("train.drop_last=9", "train.drop_last must be true or false, not 9"),
        ("data.count=x", "data.count must be 'official' or 'any', not 'x'"),
        ("train.epochs", "field=value"),
        ("train.epochs=many", "epochs"),
        ("train.optimizer=lion", "adamw"),
        ("train.schedule=step", "cosine"),
        ("train.epochs.more=3", "no field train.epochs.more"),
        ("architecture=vnet", "llm-transunet"),
        ("preprocessing.window=[5, 5]", "empty"),
        ('augmentation=[{"name": "affine", "options": {"degrees": 5}}]', "degrees, scale, shift; given are: degrees"),
    ],
)
def test_invalid_recipe_change_is_refused_with_an_explanation(change, message):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        recipe("organs-demo", [change])


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UsageError, match="organs-demo"):
        recipe("organ-demo")
