"""Specs survive JSON, refuse what cannot work, and have colours that can be told apart."""

import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest

from medseg_trt.errors import ArtefactError
from medseg_trt.imaging.overlay import ALPHA
from medseg_trt.network_spec import ModelSpec
from medseg_trt.spec import (
    BlockSpec,
    BuildSpec,
    Classes,
    InsertSpec,
    Preprocessing,
    from_dict,
    palette,
    to_dict,
)

SPECS = [
    BlockSpec(),
    BlockSpec(hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, rms_norm_eps=1e-5, rotary=True, causal=True),
    ModelSpec(image_size=(224, 224), num_classes=1),
    ModelSpec(architecture="llm-transunet", image_size=(256, 48), num_classes=9, dropout=0.0, block=BlockSpec()),
    Preprocessing(image_size=(224, 224)),
    Preprocessing(
        image_size=(32, 48),
        window=(-160.0, 240.0),
        mean=(0.1, 0.2, 0.3),
        std=(1.5, 2.0, 0.1),
        resize="nearest",
        spacing_mm=0.7,
    ),
    Classes(names=("background", "Milz – links")),
    Classes(names=("a", "b", "c"), colors=((0, 0, 0), (255, 0, 128), (1, 2, 3))),
    BuildSpec(precisions=("fp32", "int8"), max_abs_error=1e-3),
    InsertSpec(),
    InsertSpec(
        residual="both",
        norm="pretrained",
        placement=3,
        weights="shuffled",
        parts="attention",
        num_layers=2,
        trainable=True,
        seed=7,
    ),
    ModelSpec(
        architecture="llm-transunet",
        image_size=(32, 32),
        num_classes=2,
        block=BlockSpec(),
        insert=InsertSpec(placement="after_norm"),
    ),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_a_spec_comes_back_from_json_as_it_was(spec):
    data = json.loads(json.dumps(to_dict(spec)))
    restored = from_dict(type(spec), data, "config.json")
    assert restored == spec
    assert json.dumps(to_dict(restored)) == json.dumps(to_dict(spec))  # lists have become tuples again
    for field in fields(spec):
        assert type(getattr(restored, field.name)) is type(getattr(spec, field.name))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_a_spec_cannot_be_changed(spec):
    name = fields(spec)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(spec, name, getattr(spec, name))


def changed(spec: Any, **values: Any) -> dict[str, Any]:
    return {**to_dict(spec), **values}


MODEL, PICTURE, NAMED, INSERT = SPECS[3], SPECS[5], SPECS[7], SPECS[9]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_an_unknown_field_is_refused_by_name(spec):
    with pytest.raises(ArtefactError, match=r"config\.json: \w+ surprise is not a known field"):
        from_dict(type(spec), changed(spec, surprise=1), "config.json")


@pytest.mark.parametrize(
    ("spec", "values", "where"),
    [
        (MODEL, {"num_classes": "many"}, "num_classes"),
        (MODEL, {"image_size": [224]}, "image_size"),
        (MODEL, {"image_size": [224, 224, 3]}, "image_size"),
        (MODEL, {"image_size": [224.5, 224]}, r"image_size\.0"),
        (MODEL, {"block": {"hidden_size": None}}, r"block\.hidden_size"),
        (MODEL, {"block": {"surprise": 1}}, r"block\.surprise"),
        (MODEL, {"insert": {"surprise": 1}}, r"insert\.surprise"),
        (INSERT, {"residual": "around"}, "residual"),
        (INSERT, {"norm": 1}, "norm"),
        (INSERT, {"placement": "before"}, "placement"),
        (INSERT, {"placement": 1.5}, "placement"),
        (INSERT, {"weights": "trainable"}, "weights"),
        (INSERT, {"parts": "ffn"}, "parts"),
        (PICTURE, {"resize": "cubic"}, "resize"),
        (PICTURE, {"channel_order": "grb"}, "channel_order"),
        (PICTURE, {"window": ["low", 255]}, r"window\.0"),
        (NAMED, {"names": "background"}, "names"),
        (NAMED, {"names": ["a", "b", 3]}, r"names\.2"),
        (NAMED, {"colors": [[0, 0]]}, r"colors\.0"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_place(spec, values, where):
    pattern = rf"^config\.json: {type(spec).__name__} {where}.*(:| is| must) ."
    with pytest.raises(ArtefactError, match=pattern) as caught:
        from_dict(type(spec), changed(spec, **values), "config.json")
    assert "\n" not in str(caught.value)


def test_a_missing_field_and_what_is_no_object_are_refused():
    with pytest.raises(ArtefactError, match=r"config\.json: ModelSpec image_size is missing"):
        from_dict(ModelSpec, {"num_classes": 2}, "config.json")
    for data in (None, [], "text", 3):
        with pytest.raises(ArtefactError, match=r"config\.json: ModelSpec"):
            from_dict(ModelSpec, data, "config.json")


@pytest.mark.parametrize(
    ("size", "name", "pixels", "proposed"),
    [
        ((250, 224), "height", 250, "240 or 256"),
        ((224, 33), "width", 33, "32 or 48"),
        ((7, 16), "height", 7, "16 or 32"),
        ((16, 0), "width", 0, "16 or 32"),
        ((-16, 16), "height", -16, "16 or 32"),
    ],
)
def test_an_image_size_that_cannot_be_proposes_sizes_that_can(size, name, pixels, proposed):
    with pytest.raises(ValueError, match=f"the image {name} is {pixels} pixels; .* multiple of 16: try {proposed}"):
        ModelSpec(image_size=size, num_classes=2)
    for value in map(int, proposed.split(" or ")):
        assert ModelSpec(image_size=(value, value), num_classes=2).grid == (value // 16, value // 16)


def test_the_grid_has_rows_before_columns():
    assert ModelSpec(image_size=(32, 48), num_classes=2).grid == (2, 3)


SMALL = {"image_size": (32, 32), "num_classes": 2}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelSpec, {"image_size": (32, 32), "num_classes": 0}, "num_classes is 0"),
        (ModelSpec, {"image_size": (32, 32), "num_classes": 2, "num_heads": 7}, "hidden_size 768 .* num_heads 7"),
        (InsertSpec, {"num_layers": 0}, "num_layers must be 1 or more"),
        (InsertSpec, {"seed": -1}, "seed 0 or more"),
        (InsertSpec, {"placement": 0}, "after layer 0"),
        (InsertSpec, {"weights": "none", "trainable": True}, "must be unset"),
        (InsertSpec, {"weights": "none", "parts": "mlp"}, "must be unset"),
        (InsertSpec, {"weights": "none", "num_layers": 2}, "must be unset"),
        (InsertSpec, {"weights": "none", "norm": "none", "residual": "in"}, "nothing for residual=in"),
        (InsertSpec, {"weights": "none", "norm": "none", "residual": "both"}, "nothing for residual=both"),
        (ModelSpec, {**SMALL, "insert": InsertSpec(residual="in")}, "transunet has no language block"),
        (ModelSpec, {**SMALL, "block": BlockSpec(), "insert": InsertSpec(placement=13)}, "after layer 13; .* has 12"),
        (ModelSpec, {**SMALL, "block": BlockSpec(rotary=True), "insert": InsertSpec(parts="mlp")}, "has none"),
        (ModelSpec, {**SMALL, "block": BlockSpec(causal=True), "insert": InsertSpec(weights="none")}, "has none"),
        (BlockSpec, {"num_heads": 32, "num_kv_heads": 5}, "32 heads cannot share 5"),
        (BlockSpec, {"head_dim": 63}, "head_dim is 63"),
        (Preprocessing, {"image_size": (32, 32), "window": (240.0, -160.0)}, "the window .* is empty"),
        (Preprocessing, {"image_size": (32, 32), "window": (1.0, 1.0)}, "the window .* is empty"),
        (Preprocessing, {"image_size": (32, 32), "window": (0.0, float("inf"))}, "finite"),
        (Preprocessing, {"image_size": (32, 32), "mean": (0.0, float("nan"), 0.0)}, "finite"),
        (Preprocessing, {"image_size": (32, 32), "std": (1.0, float("nan"), 1.0)}, "finite"),
        (Preprocessing, {"image_size": (32, 32), "std": (1.0, 0.0, 1.0)}, "std .* must be positive"),
        (Preprocessing, {"image_size": (32, 32), "spacing_mm": 0.0}, "spacing_mm is 0.0"),
        (Preprocessing, {"image_size": (32, 32), "spacing_mm": -1.0}, "spacing_mm is -1.0"),
        (Preprocessing, {"image_size": (32, 32), "spacing_mm": float("nan")}, "finite"),
        (Classes, {"names": ("background",)}, "1 class names"),
        (Classes, {"names": tuple(map(str, range(257)))}, "257 class names"),
        (Classes, {"names": ("a", "b"), "colors": ((0, 0, 0),)}, "2 class names but 1 colours"),
        (Classes, {"names": ("a", "b"), "colors": ((0, 0, 0), (0, 256, 0))}, "0 to 255"),
        (Classes, {"names": ("a", "b"), "colors": ((0, 0, 0), (0, -1, 0))}, "0 to 255"),
    ],
)
def test_invalid_spec_values_are_refused_by_constructor_and_from_dict(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)
    with pytest.raises(ArtefactError, match=message):
        from_dict(kind, values, "config.json")


def test_a_model_written_before_there_were_inserts_is_the_published_one():
    written = {
        "architecture": "llm-transunet-tiny",
        "image_size": [32, 32],
        "num_classes": 3,
        "resnet_width": 32,
        "resnet_units": [1, 1, 1],
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "mlp_size": 64,
        "dropout": 0.1,
        "bridge_channels": 32,
        "decoder_channels": [32, 16, 16, 16],
        "block": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "rotary": False,
            "causal": False,
        },
    }
    restored = from_dict(ModelSpec, written, "model.pt")
    assert restored.insert == InsertSpec(
        residual="none",
        norm="ones",
        placement="before_norm",
        weights="pretrained",
        parts="full",
        num_layers=1,
        trainable=False,
    )
    assert restored.insert_position == 2


@pytest.mark.parametrize(("placement", "position"), [("before_norm", 12), ("after_norm", 13), (1, 1), (12, 12)])
def test_the_insert_stands_after_as_many_stages_as_its_placement_says(placement, position):
    spec = ModelSpec(**SMALL, block=BlockSpec(), insert=InsertSpec(placement=placement))
    assert spec.insert_position == position


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({}, True),
        ({"trainable": True}, True),
        ({"weights": "shuffled"}, True),
        ({"weights": "random"}, False),
        ({"weights": "none"}, False),
        ({"weights": "none", "norm": "none"}, False),
        ({"weights": "random", "norm": "pretrained"}, True),
    ],
)
def test_a_block_file_is_needed_where_something_is_taken_from_it(values, needed):
    assert InsertSpec(**values).needs_block_file == needed


def chroma(rgb: np.ndarray) -> np.ndarray:
    """Return how far sRGB colours, 0 … 255, are from the grey of the same lightness: CIELAB's C* (CIE 15, D65)."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    relative = linear @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T
    x, y, z = np.moveaxis(
        np.where(relative > 216 / 24389, np.cbrt(relative), (24389 / 27 * relative + 16) / 116), -1, 0
    )
    return np.hypot(500 * (x - y), 200 * (y - z))


# A difference of 2.3 is just noticeable between large fields side by side (Mahy et al. 1994). An organ is a small field
# among textures, so three times as much is asked for, after the overlay's blend with any grey of the scan.
LEAST_CHROMA = 3 * 2.3


def test_blended_palette_colours_have_minimum_chroma_on_every_grey():
    colours, greys = np.array(palette(256)[1:], float), np.repeat(np.arange(256.0)[:, np.newaxis], 3, axis=1)
    blended = ALPHA * colours[:, np.newaxis] + (1 - ALPHA) * greys
    assert chroma(greys).max() < 0.01
    assert chroma(blended).min() >= LEAST_CHROMA
    assert chroma(ALPHA * np.array([160.0] * 3) + (1 - ALPHA) * greys).max() < LEAST_CHROMA  # a grey class is not


def test_two_labels_are_one_logit_and_more_are_one_each():
    assert Classes(names=("background", "lesion")).num_logits == 1
    assert Classes(names=("background", "liver", "spleen")).num_logits == 3


def test_the_colours_of_256_classes_are_distinct_and_the_background_is_black():
    colours = palette(256)
    assert colours[0] == (0, 0, 0)
    assert len(set(colours)) == 256
    assert all(0 <= value <= 255 for colour in colours for value in colour)
    assert Classes(names=tuple(map(str, range(256)))).colors == colours


@pytest.mark.parametrize("count", [2, 9, 10, 30])
def test_a_class_keeps_its_colour_when_classes_are_added(count):
    assert palette(count) == palette(256)[:count]


@pytest.mark.parametrize(("count", "apart"), [(9, 50), (14, 50), (40, 50), (256, 30)])
def test_palette_colours_have_a_minimum_distance(count, apart):
    colours = np.array(palette(count), float)
    distances = np.linalg.norm(colours[:, np.newaxis] - colours, axis=2) + 1e3 * np.eye(count)
    assert distances.min() > apart  # of 442 between black and white
