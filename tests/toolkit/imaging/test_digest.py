"""The digest of an image, against hashlib over bytes that the test writes out itself."""

import hashlib
import struct

import numpy as np

from medseg_trt.imaging.digest import image_digest, image_digests


def test_the_digest_is_that_of_the_values_in_c_order():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(struct.pack("<6f", 0, 1, 2, 3, 4, 5)).hexdigest()
    assert image_digest(values) == expected
    assert image_digest(np.asfortranarray(values)) == expected
    assert image_digest(values.repeat(2, axis=1)[:, ::2]) == expected


def test_one_changed_value_changes_the_digest():
    values = np.zeros((2, 3), np.float32)
    changed = values.copy()
    changed[1, 2] = np.float32(2**-149)
    assert image_digest(values) != image_digest(changed)


def test_digests_run_along_the_first_axis():
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    assert image_digests(images) == (image_digest(images[0]), image_digest(images[1]))
