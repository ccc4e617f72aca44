"""The references of the image kernels are ``preprocess.prepare`` and ``restore``, and their tolerances catch faults.

The kernels themselves are compared with the references where their PTX is executed.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medseg_trt.imaging.preprocess import prepare, restore
from medseg_trt.kernels import image_to_tensor, logits_to_mask
from medseg_trt.kernels.kernel import DTYPES, float_bits, rounded
from medseg_trt.spec import Preprocessing

IMAGE_TO_TENSOR, LOGITS_TO_MASK = image_to_tensor.KERNEL, logits_to_mask.KERNEL
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NEAR_PREPARE = 1e-5  # prepare itself rounds every product and sum to float32: 1e-6 was the worst measured here
SIZES = [(64, 48), (33, 70), (200, 161), (1, 5)]
CANVASES = [(64, 48), (32, 32), (97, 40)]
SPACINGS = [None, (0.7, 1.3), (2.0, 0.4)]  # stretched; one axis padded and one cropped; and the other way round


def contract(canvas, spacing, **changes) -> Preprocessing:
    return Preprocessing(image_size=canvas, spacing_mm=None if spacing is None else 1.0, **{**IMAGENET, **changes})


def random_images(size, channels) -> np.ndarray:
    """Return generated noise."""
    return np.random.default_rng(7).integers(0, 256, (2, *size, channels), dtype=np.uint8)


def expected_tensor(pixels, scalars):
    return IMAGE_TO_TENSOR.reference(IMAGE_TO_TENSOR.entries[1], {"pixels": pixels}, scalars)["tensor"]


def expected_mask(logits, scalars):
    return LOGITS_TO_MASK.reference(LOGITS_TO_MASK.entries[2], {"logits": logits}, scalars)["mask"]


@pytest.mark.parametrize("method", ["linear", "linear_antialias"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("window", [(0.0, 255.0), (30.0, 200.5)])
def test_a_tensor_is_what_prepare_makes(method, channels, window):
    for size, canvas, spacing in itertools.product(SIZES, CANVASES, SPACINGS):
        p = contract(canvas, spacing, resize=method, window=window)
        pixels = random_images(size, channels)
        tensor = expected_tensor(pixels, image_to_tensor.scalars(p, pixels.shape, spacing)).value
        expected = np.stack([prepare(image, p, spacing) for image in pixels])
        assert np.abs(tensor - expected).max() < NEAR_PREPARE


@pytest.mark.parametrize("antialias", [False, True])
def test_image_to_tensor_reference_equals_pytorch_interpolate(antialias):
    p = Preprocessing(image_size=(50, 90), resize="linear_antialias" if antialias else "linear")
    pixels = random_images((120, 61), 3)
    tensor = expected_tensor(pixels, image_to_tensor.scalars(p, pixels.shape)).value
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    expected = F.interpolate(planes, (50, 90), mode="bilinear", antialias=antialias)
    np.testing.assert_allclose(tensor, expected.numpy(), atol=1e-6)  # the scalars are float32


def test_strides_reach_a_crop_of_a_padded_frame():
    frame = random_images((70, 64), 4)
    crop = frame[:, 10:50, 8:44, :3]
    p = contract((48, 64), None)
    strides = (frame[0].size, 64 * 4, 4)
    buffer = frame.reshape(-1)[10 * 64 * 4 + 8 * 4 :]
    buffer = np.concatenate([buffer, np.zeros(2 * frame[0].size - buffer.size, np.uint8)]).reshape(2, -1)
    tensor = expected_tensor(buffer, image_to_tensor.scalars(p, crop.shape, strides=strides)).value
    assert np.abs(tensor - np.stack([prepare(image, p, None) for image in crop])).max() < NEAR_PREPARE


@pytest.mark.parametrize("classes", [1, 2, 9])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_mask_is_what_restore_makes(classes, spacing):
    rng = np.random.default_rng(classes)
    for size, canvas in itertools.product([*SIZES, (130, 97)], CANVASES):
        p = contract(canvas, spacing)
        logits = rng.normal(size=(2, classes, *canvas)).astype(np.float32)
        logits[:, :, :10] = logits[:, :1, :10]  # equal logits: the lower label
        expected = expected_mask(logits, logits_to_mask.scalars(p, 2, classes, size, spacing))
        restored = np.stack([restore(image_logits, size, p, spacing) for image_logits in logits])
        differs = expected.value != restored
        assert np.all(expected.slack[differs] > 0)  # only where logits are all but equal
        assert differs.mean() < 1e-3


def test_slack_is_only_where_logits_are_all_but_equal():
    p = Preprocessing(image_size=(1, 4))
    logits = np.array([[1.0, 1.0, 1.0, 1e3], [0.9, 1 + 5e-6, 1 + 2e-5, 1e3 + 5e-3], [0.0, 0.0, 1.0, 0.0]])
    expected = expected_mask(logits.astype(np.float32)[None, :, None], logits_to_mask.scalars(p, 1, 3, (1, 4)))
    assert expected.value.ravel().tolist() == [0, 1, 1, 1]
    assert expected.slack.ravel().tolist() == [0, 1, 0, 1]


# --- faults that the tolerances catch -------------------------------------------------------------------------------


def twice_rounded(value):
    """Round to bfloat16 on the way, as a kernel does that keeps intermediate values in 16 bits."""
    return rounded(value.astype(DTYPES["bfloat16"]).astype(np.float64), "float16")


def corner_centres(pixels, p):
    """Resize with positions at the pixels' corners."""
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
    moved = F.interpolate(planes, p.image_size, mode="bilinear", align_corners=True).numpy()
    scale = np.array([1 / (255 * std) for std in p.std]).reshape(3, 1, 1)
    return moved * scale - np.array(p.mean).reshape(3, 1, 1) / np.array(p.std).reshape(3, 1, 1)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_tolerance_passes_rounding_and_catches_faults(dtype):
    p = contract((48, 64), None, resize="linear")
    pixels = random_images((90, 61), 3)
    scalars = image_to_tensor.scalars(p, pixels.shape)
    expected = expected_tensor(pixels, scalars)
    tolerance = IMAGE_TO_TENSOR.tolerance[dtype]

    def excess(value):
        return tolerance.excess(rounded(value, dtype), expected, dtype).max()

    assert excess(expected.value) <= 1
    other_method = expected_tensor(pixels, {**scalars, "antialias": 1}).value
    other_mean = expected_tensor(pixels, {**scalars, "bias1_bits": scalars["bias0_bits"]}).value
    other_window = expected_tensor(pixels, {**scalars, "high_bits": float_bits(254.0)}).value
    for fault in (other_method, other_mean, other_window, corner_centres(pixels, p), expected.value[:, ::-1]):
        assert excess(fault) > 1
    assert tolerance.excess(twice_rounded(expected.value).astype(DTYPES[dtype]), expected, dtype).max() > 1


def test_a_fault_in_a_mask_is_caught():
    p = contract((48, 64), (0.7, 1.3))
    logits = np.random.default_rng(3).normal(size=(1, 5, 48, 64)).astype(np.float32)
    scalars = logits_to_mask.scalars(p, 1, 5, (90, 61), (0.7, 1.3))
    expected = expected_mask(logits, scalars)
    tolerance = LOGITS_TO_MASK.tolerance["uint8"]

    def excess(mask):
        return tolerance.excess(mask.astype(np.uint8), expected, "uint8").max()

    assert excess(expected.value) <= 1
    shifted = expected_mask(np.roll(logits, 1, axis=3), scalars).value
    inside = expected.value.copy()
    inside[0, -1] += 1  # one label wrong in the last row
    nearest = restore_nearest(logits, (90, 61))
    for fault in (shifted, inside, nearest):
        assert excess(fault) > 1


def restore_nearest(logits, size):
    """Take labels first and resize them afterwards."""
    rows, columns = (np.arange(n) * have // n for n, have in zip(size, logits.shape[2:], strict=True))
    return logits.argmax(axis=1)[:, rows[:, None], columns]


# --- what the kernels cannot do is said before ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({}, (1, 8, 8, 2), "2 channels; 1 or 3"),
        ({"resize": "nearest"}, (1, 8, 8, 3), "not with nearest"),
        ({"resize": "spline3"}, (1, 8, 8, 3), "not with spline3"),
        ({"channel_order": "bgr"}, (1, 8, 8, 3), "bgr is not supported"),
        ({}, (1, 16385, 8, 3), "16385 x 8 pixels"),
        ({}, (1, 0, 8, 3), "0 x 8 pixels"),
    ],
)
def test_pictures_that_cannot_be_resized_are_refused(changes, shape, message):
    with pytest.raises(ValueError, match=message):
        image_to_tensor.scalars(contract((8, 8), None, **changes), shape)


@pytest.mark.parametrize(
    ("classes", "size", "message"), [(0, (8, 8), "0 classes"), (257, (8, 8), "257 classes"), (2, (8, 16385), "16385")]
)
def test_masks_that_cannot_be_numbered_are_refused(classes, size, message):
    with pytest.raises(ValueError, match=message):
        logits_to_mask.scalars(contract((8, 8), None), 1, classes, size)


def test_labels_that_are_resized_with_a_spline_are_refused():
    with pytest.raises(ValueError, match="resize=spline3 resizes labels"):
        logits_to_mask.scalars(contract((8, 8), None, resize="spline3"), 1, 2, (8, 8))


def test_bytes_moved_of_image_kernels_equals_the_minimum_traffic():
    p = Preprocessing(image_size=(256, 256))
    half, single = IMAGE_TO_TENSOR.entries
    scalars = image_to_tensor.scalars(p, (1, 256, 256, 3))
    assert IMAGE_TO_TENSOR.bytes_moved(scalars, half) == 9 * 256 * 256
    assert IMAGE_TO_TENSOR.bytes_moved(scalars, single) == 15 * 256 * 256
    padded = image_to_tensor.scalars(p, (1, 256, 256, 3), strides=(256 * 2048, 2048, 4))  # gaps need not be read
    assert IMAGE_TO_TENSOR.bytes_moved(padded, half) == 9 * 256 * 256
    masks = logits_to_mask.scalars(p, 2, 9, (256, 256))
    assert LOGITS_TO_MASK.bytes_moved(masks, LOGITS_TO_MASK.entries[0]) == 2 * (2 * 9 + 1) * 256 * 256


@pytest.mark.parametrize("kernel", [IMAGE_TO_TENSOR, LOGITS_TO_MASK], ids=lambda kernel: kernel.name)
def test_the_grid_reaches_every_pixel_and_no_block_is_empty(kernel):
    for size in ((32, 64), (1, 2048), (16, 2064), (256, 256)):
        for source, pixels_of_thread in ((size, 16), ((size[0] + 1, size[1]), 1)):
            p = Preprocessing(image_size=size if kernel is IMAGE_TO_TENSOR else source)
            if kernel is IMAGE_TO_TENSOR:
                scalars = image_to_tensor.scalars(p, (3, *source, 1))
            else:
                scalars = logits_to_mask.scalars(p, 3, 9, size)
            blocks, images, one = kernel.grid(scalars)
            assert (images, one) == (3, 1)
            assert 0 <= blocks * kernel.block[0] * pixels_of_thread - size[0] * size[1] < 128 * pixels_of_thread


def test_a_picture_whose_rows_are_not_aligned_is_gathered_by_a_thread_per_pixel():
    p = Preprocessing(image_size=(256, 256))
    assert IMAGE_TO_TENSOR.grid(image_to_tensor.scalars(p, (1, 256, 256, 3))) == (32, 1, 1)
    for strides in ((256 * 770, 770, 3), (256 * 1024, 1024, 4)):
        assert IMAGE_TO_TENSOR.grid(image_to_tensor.scalars(p, (1, 256, 256, 3), strides=strides)) == (512, 1, 1)
