"""Files and slices are divided so that nothing is lost or in both parts, and the same seed divides the same way."""

from itertools import chain

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from medseg_trt.errors import InputError
from medseg_trt.train.datasets.splits import (
    GAP_SLICES,
    group_split,
    paper_split,
    split_files,
    split_seeds,
    split_volume,
)


@given(count=st.integers(2, 400), seed=st.integers(0, 2**32 - 1))
def test_every_file_is_in_one_part_and_a_fifth_is_for_validation(count, seed):
    train, val = split_files(range(count), seed)
    assert sorted(train + val) == list(range(count))
    assert len(val) == -(-count // 5)  # a fifth, rounded up
    assert train


def test_split_files_is_deterministic_per_seed():
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


# The first indices that scikit-learn's train_test_split gives with seed 41, for the sizes of the paper's data sets.
VECTORS = {  # cases: sizes of train, val and test, first of test, first of val
    647: ((413, 104, 130), [225, 638, 310, 308, 631], [133, 46, 335, 311, 228]),  # BUSI
    780: ((499, 125, 156), None, None),  # BUSI with its normals
    612: ((391, 98, 123), [398, 549, 173, 577, 410], [463, 1, 466, 359, 491]),  # CVC-ClinicDB
    380: ((243, 61, 76), [354, 25, 323, 322, 234], [163, 201, 103, 74, 15]),  # CVC-ColonDB
    300: ((192, 48, 60), None, None),  # CVC-ColonDB, the CVC's own
}


@pytest.mark.parametrize("count", VECTORS)
def test_the_papers_splits_are_those_of_its_seed(count):
    sizes, first_of_test, first_of_val = VECTORS[count]
    splits = paper_split(range(count))
    assert tuple(len(splits[split]) for split in ("train", "val", "test")) == sizes
    assert sorted(chain.from_iterable(splits.values())) == list(range(count))
    if first_of_test is not None:
        assert list(splits["test"][:5]) == first_of_test
    if first_of_val is not None:
        assert list(splits["val"][:5]) == first_of_val


@given(count=st.integers(4, 1000), seed=st.integers(0, 2**32 - 1))
def test_splits_are_scikit_learns_with_their_order(count, seed):
    rest, test = train_test_split(list(range(count)), test_size=0.2, random_state=seed)
    train, val = train_test_split(rest, test_size=0.2, random_state=seed)
    assert paper_split(range(count), seed) == {"train": tuple(train), "val": tuple(val), "test": tuple(test)}


@given(groups=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60), seed=st.integers(0, 2**32 - 1))
def test_group_splits_are_scikit_learns(groups, seed):
    assume(len(set(groups)) > 1)
    (expected,) = GroupShuffleSplit(n_splits=1, test_size=0.2, random_state=seed).split(groups, groups=groups)
    split = group_split(groups, 0.2, seed)
    assert [split[0], split[1]] == [part.tolist() for part in expected]


@given(groups=st.lists(st.integers(0, 40).map(str), min_size=12, max_size=200), seed=st.integers(0, 1000))
def test_no_group_is_in_two_splits(groups, seed):
    assume(len(set(groups)) >= 4)
    splits = paper_split(range(len(groups)), seed, groups)
    assert sorted(chain.from_iterable(splits.values())) == list(range(len(groups)))
    groups_of_split = [{groups[index] for index in part} for part in splits.values()]
    assert all(groups_of_split)
    assert sum(map(len, groups_of_split)) == len(set(groups))


def test_a_split_by_case_would_share_groups():  # so that the test above can fail
    groups = [str(index // 4) for index in range(40)]
    groups_of_split = [{groups[index] for index in part} for part in paper_split(range(40)).values()]
    assert sum(map(len, groups_of_split)) > 10


def test_the_seeds_of_several_splits_begin_with_the_papers():
    assert split_seeds(3) == (41, 42, 43)
    assert len({paper_split(range(50), seed)["test"] for seed in split_seeds(5)}) == 5


@pytest.mark.parametrize("groups", [None, ["a"] * 6, ["a"] * 3 + ["b"] * 3])
def test_paper_split_refuses_too_few_cases_or_groups(groups):
    with pytest.raises(InputError, match="cannot be divided"):
        paper_split(range(2 if groups is None else 6), groups=groups)
