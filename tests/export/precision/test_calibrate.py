import hashlib
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from medseg_trt.errors import InputError, UsageError
from medseg_trt.export.graph.trace import INPUT, OnnxGraph
from medseg_trt.export.precision.calibrate import Range, calibrate, observed_graph
from medseg_trt.export.precision.quantize import quantisation_parameters
from medseg_trt.imaging.digest import image_digests

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 3, 8, 8), dtype=np.float32)
NORMAL = RNG.normal(0.5, 1.0, (6, 5000)).astype(np.float32)  # one row an image
OUTLIER = RNG.normal(size=(6, 5000)).astype(np.float32)
OUTLIER[1, 7] = OUTLIER[4, 11] = 40  # two of 30 000
RECTIFIED = np.maximum(NORMAL, 0)


def observe(values: np.ndarray, images: np.ndarray = IMAGES):
    """Return a network that makes one row of ``values`` of every image."""
    rows = dict(zip(image_digests(images), values, strict=True))
    return lambda batch: {"x": rows[image_digests(batch)[0]]}


def range_of(values: np.ndarray) -> Range:
    return calibrate(observe(values), IMAGES, ["x"]).ranges["x"]


def whole_range(values: np.ndarray) -> Range:
    """Return the range that covers everything."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    return Range(low=low, high=high, bound=max(-low, high))


def error_of(values: np.ndarray, limits: Range, codes: type) -> float:
    """Return the mean squared error of rounding, in float64, by the definition of QuantizeLinear."""
    scale, zero = quantisation_parameters(limits, codes)
    info, exact = np.iinfo(codes), values.astype(np.float64)
    rounded = (np.rint(exact / scale) + zero).clip(info.min, info.max)
    return float(np.square((rounded - float(zero)) * scale - exact).mean())


@pytest.mark.parametrize("values", [NORMAL, OUTLIER, RECTIFIED], ids=["normal", "outlier", "rectified"])
@pytest.mark.parametrize("codes", [np.int8, np.uint8])
def test_mse_is_within_a_tenth_of_the_best_range_that_a_search_on_the_values_finds(values, codes):
    limit = range_of(values)
    whole = whole_range(values)
    shares = np.linspace(0.02, 1, 99)
    tried = (Range(low=share * whole.low, high=share * whole.high, bound=share * whole.bound) for share in shares)
    best = min(error_of(values, limits, codes) for limits in tried)
    # The search knows values, not bins, but moves both ends together; the estimate takes rounding for uniform noise.
    assert error_of(values, limit, codes) < 1.1 * best


def test_calibrated_ranges_contain_zero_and_stay_within_observed_values():
    for values in (NORMAL, RECTIFIED, -RECTIFIED, RECTIFIED + 1):
        limit = range_of(values)
        assert min(float(values.min()), 0) <= limit.low <= 0 <= limit.high <= max(float(values.max()), 0)
        assert 0 < limit.bound <= np.abs(values).max()


def test_a_value_that_is_always_zero_has_an_empty_range_and_a_scale_of_one():
    limit = range_of(np.zeros_like(NORMAL))
    assert limit == Range(low=0.0, high=0.0, bound=0.0)
    assert quantisation_parameters(limit, np.int8)[0] == quantisation_parameters(limit, np.uint8)[0] == 1


def test_images_are_shown_one_at_a_time_and_recorded_by_their_digest():
    shapes = list[tuple[int, ...]]()
    network = observe(NORMAL)

    def seen(batch: np.ndarray):
        shapes.append(batch.shape)
        return network(batch)

    ranges = calibrate(seen, IMAGES, ["x", INPUT])
    assert set(shapes) == {(1, 3, 8, 8)}
    assert ranges.images == tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in IMAGES)
    assert ranges.num_images == len(IMAGES)
    assert ranges.ranges[INPUT].high == float(IMAGES.max())  # the graph's input needs no output


def test_the_order_of_the_images_does_not_change_a_range():
    backwards = calibrate(observe(NORMAL), IMAGES[::-1], ["x"])
    assert backwards.ranges == calibrate(observe(NORMAL), IMAGES, ["x"]).ranges


def test_an_observed_graph_also_returns_the_values_and_leaves_the_original_alone():
    values = [ir.val(name, ir.DataType.FLOAT, [1, 3]) for name in (INPUT, "hidden", "logits")]
    nodes = [
        ir.node("Relu", values[:1], outputs=values[1:2], name="a"),
        ir.node("Neg", values[1:2], outputs=values[2:], name="b"),
    ]
    opsets = {"": 23}
    model = ir.Model(ir.Graph(values[:1], values[2:], nodes=nodes, opset_imports=opsets, name="g"), ir_version=10)
    observed = observed_graph(OnnxGraph(model=model), ["hidden", "logits", INPUT, "hidden"])
    assert [value.name for value in observed.model.graph.outputs] == ["logits", "hidden"]
    assert [value.name for value in model.graph.outputs] == ["logits"]


def broken(images: np.ndarray, value: float) -> np.ndarray:
    changed = images.copy()
    changed[2, 0, 0, 0] = value
    return changed


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (IMAGES[:3], UsageError, "3 different calibration images are too few"),
        (IMAGES[[0, 0, 0, 1, 1, 2]], UsageError, "3 different calibration images are too few"),
        (np.stack([np.full((3, 8, 8), n, np.float32) for n in range(6)]), InputError, "6 of 6 .* of one colour"),
        (broken(IMAGES, np.nan), InputError, "holds NaN"),
        (broken(IMAGES, np.inf), InputError, "holds NaN or infinity"),
    ],
)
def test_uninformative_images_are_refused(images, error, message):
    with pytest.raises(error, match=message) as raised:
        calibrate(lambda batch: {"x": batch}, images, ["x"])
    assert "\n" not in str(raised.value)


def test_a_network_that_is_not_finite_is_refused_by_the_name_of_the_value():
    with pytest.raises(InputError, match="x is not finite"):
        calibrate(observe(np.where(NORMAL > 4, np.inf, NORMAL)), IMAGES, ["x"])
    with pytest.raises(InputError, match="x is not finite"):
        calibrate(observe(np.where(NORMAL > 4, np.nan, NORMAL)), IMAGES, ["x"])


def test_another_network_than_the_one_to_quantise_is_refused():
    with pytest.raises(UsageError, match="no value 'y'"):
        calibrate(observe(NORMAL), IMAGES, ["y"])


def test_a_stale_range_costs_what_the_tolerance_of_mse_would_show():
    limit = range_of(NORMAL)
    stale = replace(limit, bound=limit.bound * 2)
    assert error_of(NORMAL, stale, np.int8) > 1.1 * error_of(NORMAL, limit, np.int8)
