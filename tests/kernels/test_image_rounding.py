"""The derived bound of ``image_to_tensor`` holds where sums are long and every rounding goes the same way.

Constant pictures are the worst inputs of sums that round at every step: all their terms push the same way. The kernel
is executed as the host's build of its own source, which gives the bits of the PTX, and once as the PTX itself.
"""

from dataclasses import replace

import numpy as np
import pytest
from gpu_free.execute import execute, ptx_of
from gpu_free.host.checks import same
from gpu_free.host.host import ORDERS, Builder, Case, missing, run, shared_builder

from medseg_trt.kernels import image_to_tensor
from medseg_trt.kernels.kernel import distance
from medseg_trt.spec import Preprocessing

KERNEL = image_to_tensor.KERNEL
FLOAT32 = KERNEL.entry("image_to_tensor_float32")
NAIVE_OF_BOUND = 1.5  # sums without their errors exceed the bound by this factor somewhere, so that it sees them
SIZES = [  # source, network's picture
    ((70, 29), (8, 3)),
    ((148, 51), (8, 10)),
    ((223, 145), (12, 10)),
    ((200, 3), (9, 21)),
    ((64, 64), (48, 80)),  # one axis is reduced, the other enlarged
    ((512, 3), (1, 2)),
    ((3, 1021), (2, 1)),
    ((331, 317), (1, 1)),
]
WINDOWS = [(0.0, 255.0), (30.3, 200.7), (254.0, 255.0)]  # whole numbers; every difference rounds; values of 0 and 1


def synthetic_images(size: tuple[int, int]) -> np.ndarray:
    """Return constants of every value, ramps along each axis, stripes, and noise: (pictures, height, width, 1)."""
    rows, columns = np.indices(size)
    noise = np.random.default_rng(0).integers(0, 256, (4, *size))
    patterns = [rows % 256, columns % 256, 255 - rows % 256, (rows + columns) % 2 * 255, columns % 3 * 127, *noise]
    constants = [np.full(size, value) for value in (*range(0, 256, 7), 1, 201, 255)]
    return np.stack([*constants, *patterns]).astype(np.uint8)[..., np.newaxis]


def case(size, canvas, window) -> Case:
    pixels = synthetic_images(size)
    preprocessing = Preprocessing(image_size=canvas, resize="linear_antialias", window=window)
    scalars = image_to_tensor.scalars(preprocessing, pixels.shape)
    return Case(inputs={"pixels": pixels.reshape(len(pixels), -1)}, scalars=scalars)


CASES = [case(*sizes, window) for sizes in SIZES for window in WINDOWS]


@pytest.fixture(scope="module")
def builder() -> Builder:
    if reason := missing():
        pytest.skip(reason)
    return shared_builder()


def excess(tensor: np.ndarray, launch: Case, entry=FLOAT32) -> float:
    """Return the largest error as a multiple of the bound."""
    expected = KERNEL.reference(entry, launch.inputs, launch.scalars)["tensor"]
    return float(KERNEL.tolerance[entry.dtype].excess(tensor, expected, entry.dtype).max())


@pytest.mark.parametrize("entry", KERNEL.entries, ids=lambda entry: entry.name)
def test_long_sums_stay_within_the_derived_bound(builder, entry):
    (outputs,) = run(builder.program(KERNEL, entry, "address"), KERNEL, entry, CASES, ORDERS[:1])
    excesses = [excess(one["tensor"], launch, entry) for one, launch in zip(outputs, CASES, strict=True)]
    assert max(excesses) <= 1, CASES[int(np.argmax(excesses))].scalars
    # A bound that no input comes near says nothing: of float16's, the last rounding is nearly everything.
    assert max(excesses) > {"float16": 0.99, "float32": 0.5}[entry.dtype]


def test_the_error_does_not_grow_with_the_number_of_weights(builder):
    (outputs,) = run(builder.program(KERNEL, FLOAT32, "address"), KERNEL, FLOAT32, CASES, ORDERS[:1])
    for one, launch in zip(outputs, CASES, strict=True):
        expected = KERNEL.reference(FLOAT32, launch.inputs, launch.scalars)["tensor"]
        error, ulp = distance(one["tensor"], expected, "float32", of="output")
        # The bias is 0 here, so that the result is the product: 7 roundings of up to 1 ulp each, and half of one.
        assert (error / ulp).max() <= 7.5


def test_sums_that_round_at_every_step_exceed_the_bound(builder, tmp_path):
    source = KERNEL.source.read_text()
    old = "error = __fadd_rn(__fsub_rn(rounded, __fsub_rn(next, added)), __fsub_rn(term, added));"
    assert source.count(old) == 1
    (tmp_path / KERNEL.source.name).write_text(source.replace(old, "error = 0.0f * added;"))
    naive = replace(KERNEL, source=tmp_path / KERNEL.source.name)
    (outputs,) = run(builder.program(naive, FLOAT32, "address"), naive, FLOAT32, CASES, ORDERS[:1])
    excesses = [excess(one["tensor"], launch) for one, launch in zip(outputs, CASES, strict=True)]
    assert max(excesses) > NAIVE_OF_BOUND


def test_the_ptx_gives_the_same_bits_of_a_long_sum(builder):
    short = [replace(launch, inputs=dict(launch.inputs)) for launch in CASES[3:5]]
    (outputs,) = run(builder.program(KERNEL, FLOAT32, "address"), KERNEL, FLOAT32, short, ORDERS[:1])
    ptx = ptx_of(KERNEL, FLOAT32)
    for launch, one in zip(short, outputs, strict=True):
        executed = execute(KERNEL, FLOAT32, launch.scalars, launch.inputs, ptx)
        assert not executed.report.findings
        assert same(one, executed.outputs)
