"""Equal logits go to the lowest class, and a single logit of 0 to the background, on every way to a mask.

Logits are small whole numbers, so that most pixels are ties, of any classes. Sizes are doubled or kept: weights of 1/4
and 3/4 are exact in every format, no way rounds, and each must give exactly what the definition says.
"""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from gpu_free.execute import execute, ptx_of
from gpu_free.host.host import ORDERS, Case, missing, run, shared_builder
from onnx_text import graph_of, outputs_of

from medseg_trt.export import verify
from medseg_trt.export.graph.interface import INPUT, OUTPUT
from medseg_trt.export.graph.masks import with_masks
from medseg_trt.imaging.preprocess import labels_of, restore
from medseg_trt.kernels import logits_to_mask
from medseg_trt.kernels.kernel import DTYPES
from medseg_trt.spec import Preprocessing

KERNEL = logits_to_mask.KERNEL
CLASSES = (1, 2, 3, 9)
SIZES = [((8, 16), (8, 16)), ((5, 9), (5, 9)), ((8, 16), (16, 32)), ((5, 9), (10, 9))]  # network's, picture's


def tied(classes: int, size: tuple[int, int]) -> np.ndarray:
    """Return pictures of -1, 0 and 1, some of the zeros negative, and one of nothing but each number."""
    rng = np.random.default_rng(classes)
    random = rng.integers(-1, 2, (2, classes, *size)).astype(np.float32)
    random[random == 0] *= rng.choice([-1.0, 1.0], (random == 0).sum())
    uniform = [np.full((classes, *size), value, np.float32) for value in (-1.0, 0.0, 1.0)]
    return np.concatenate([random, np.stack(uniform)])


def doubled(values: np.ndarray, axis: int) -> np.ndarray:
    """Return an axis with twice as many pixels: 3/4 of the nearer one, 1/4 of the next, which at the edge is itself."""
    before = np.take(values, np.maximum(np.arange(values.shape[axis]) - 1, 0), axis)
    after = np.take(values, np.minimum(np.arange(values.shape[axis]) + 1, values.shape[axis] - 1), axis)
    both = np.stack([0.75 * values + 0.25 * before, 0.75 * values + 0.25 * after], axis=axis + 1)
    shape = [*values.shape]
    shape[axis] *= 2
    return both.reshape(shape)


def expected_labels(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the labels by definition, one pixel at a time: the first class that no other exceeds."""
    exact = logits.astype(np.float64)
    for axis in (2, 3):
        exact = doubled(exact, axis) if size[axis - 2] != exact.shape[axis] else exact
    labels = np.empty((len(exact), *size), np.uint8)
    for index in np.ndindex(*labels.shape):
        scores = exact[index[0], :, *index[1:]].tolist()
        labels[index] = scores.index(max(scores)) if len(scores) > 1 else int(scores[0] > 0)
    return labels


def by_numpy(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    preprocessing = Preprocessing(image_size=(logits.shape[2], logits.shape[3]))
    return np.stack([restore(one, size, preprocessing, None) for one in logits])


def by_graph(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    shape = ",".join(map(str, logits.shape))
    graph = graph_of(f"g (float[{shape}] {INPUT}) => (float[{shape}] {OUTPUT}) {{ {OUTPUT} = Identity ({INPUT}) }}", {})
    masked = with_masks(graph, Preprocessing(image_size=(logits.shape[2], logits.shape[3])))
    return outputs_of(masked, {INPUT: logits, "source_size": np.array(size)})["mask"]


def launch_of(logits: np.ndarray, size: tuple[int, int], dtype: str) -> Case:
    preprocessing = Preprocessing(image_size=(logits.shape[2], logits.shape[3]))
    scalars = logits_to_mask.scalars(preprocessing, len(logits), logits.shape[1], size)
    return Case(inputs={"logits": logits.astype(DTYPES[dtype])}, scalars=scalars)


WAYS: Mapping[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]] = {"NumPy": by_numpy, "graph": by_graph}


@pytest.mark.parametrize("labels_of", WAYS)
@pytest.mark.parametrize("classes", CLASSES)
def test_numpy_and_the_graph_take_the_lowest_of_equal_classes(labels_of, classes):
    for canvas, size in SIZES:
        logits = tied(classes, canvas)
        np.testing.assert_array_equal(WAYS[labels_of](logits, size), expected_labels(logits, size))


@pytest.mark.parametrize("classes", CLASSES)
def test_labels_are_those_of_argmax_and_comparisons_take_the_same(classes):
    logits = tied(classes, (8, 16))
    expected = expected_labels(logits, (8, 16))
    np.testing.assert_array_equal(np.stack([labels_of(one) for one in logits]), expected)
    np.testing.assert_array_equal(verify.labels_of(logits), expected)
    if classes > 1:
        np.testing.assert_array_equal(logits.argmax(1), expected)


@pytest.mark.parametrize("entry", KERNEL.entries, ids=lambda entry: entry.name)
def test_the_kernel_takes_the_lowest_of_equal_classes(entry):
    """As the host's build of its source, every type, and as PTX; 16 pixels at a time, one at a time, and resized."""
    if reason := missing():
        pytest.skip(reason)
    cases = [(tied(classes, canvas), size) for classes in CLASSES for canvas, size in SIZES]
    launches = [launch_of(logits, size, entry.dtype) for logits, size in cases]
    program, ptx = shared_builder().program(KERNEL, entry, "address"), ptx_of(KERNEL, entry)
    (outputs,) = run(program, KERNEL, entry, launches, ORDERS[:1])
    for (logits, size), launch, output in zip(cases, launches, outputs, strict=True):
        np.testing.assert_array_equal(output["mask"], expected_labels(logits, size))
        executed = execute(KERNEL, entry, launch.scalars, launch.inputs, ptx)
        np.testing.assert_array_equal(executed.outputs["mask"], output["mask"])
