"""Files and slices are divided so that nothing is lost or in both parts, and the same seed divides the same way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg_trt.errors import InputError
from medseg_trt.train.splits import GAP_SLICES, split_files, split_volume


@given(count=st.integers(2, 400), seed=st.integers(0, 2**32 - 1))
def test_every_file_is_in_one_part_and_a_fifth_is_for_validation(count, seed):
    train, val = split_files(range(count), seed)
    assert sorted(train + val) == list(range(count))
    assert len(val) == -(-count // 5)  # a fifth, rounded up
    assert train


def test_the_seed_decides():
    assert split_files(range(50), 1) == split_files(range(50), 1)
    assert split_files(range(50), 1) != split_files(range(50), 2)


def test_files_are_mixed_before_they_are_divided():
    # The files of one hospital often follow one another by name: the last tenth alone would be no fair sample.
    _, val = split_files(range(100), seed=0)
    assert val != tuple(range(80, 100))
    assert val != tuple(range(20))


@given(num_slices=st.integers(5, 2000))
def test_the_blocks_of_a_volume_have_a_gap_and_reach_to_its_ends(num_slices):
    (start, end), (val_start, val_end) = split_volume(num_slices)
    assert (start, val_end) == (0, num_slices)
    assert val_start - end == GAP_SLICES
    assert end - start >= 1
    assert val_end - val_start == -(-num_slices // 5)


@pytest.mark.parametrize("num_slices", [1, 2, 4])
def test_a_volume_that_is_too_thin_is_refused(num_slices):
    with pytest.raises(InputError, match=rf"{num_slices} slice.*give two files"):
        split_volume(num_slices)


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_file_is_refused(count):
    with pytest.raises(InputError, match=f"{count} file.*at least two"):
        split_files(range(count), 0)
