"""A volume's mask lies in its image's voxels: an independent reader says where, a share of a voxel how exactly."""

import nibabel
import nrrd
import numpy as np
import pytest
from nibabel.affines import apply_affine

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.label_grid import MAX_SHARE
from medseg_trt.imaging.images import read_image, read_labels

SimpleITK = pytest.importorskip("SimpleITK", reason="SimpleITK, the oracle, is missing: pip install simpleitk")

SHAPE = (122, 101, 12)  # columns, rows, slices
SIDES_MM = (3.0, 3.0, 3.0)
AFFINE = np.diag([-3.0, -3.0, 3.0, 1.0]) + np.array([[0, 0, 0, 180.0], [0, 0, 0, 150], [0, 0, 0, -40], [0, 0, 0, 0]])


def save(path, values, affine):
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(values), affine), path)
    return path


def volume(folder, affine=AFFINE):
    return read_image(save(folder / "v.nii.gz", np.zeros(SHAPE, np.int16), affine))


def blob():
    values = np.zeros(SHAPE, np.uint8)
    values[30:50, 20:41, 3:8] = 1
    values[40:45, 25:30, 4:6] = 2
    return values


def rotated(angle):
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ AFFINE


def larger(factor):
    return AFFINE @ np.diag([factor, factor, factor, 1])


def moved(x_mm):
    affine = AFFINE.copy()
    affine[0, 3] += x_mm
    return affine


CASES = {  # the mask's affine, and whether it is the image's grid
    "4 µm beside": (moved(0.004), True),
    "turned by 2e-5": (rotated(2e-5), True),
    "just within 2 % of 3 mm": (moved(0.0599), True),
    "just beyond 2 %": (moved(0.0605), False),
    "0.05 % larger, 0.18 mm at the far end": (larger(1.0005), False),
    "turned by 1e-3": (rotated(1e-3), False),
    "one voxel beside": (moved(3), False),
    "the identity": (np.eye(4), False),
}


@pytest.mark.parametrize("case", CASES)
def test_mask_geometry_tolerance_is_a_fraction_of_the_voxel(tmp_path, case):
    affine, accepted = CASES[case]
    image, path = volume(tmp_path), save(tmp_path / "m.nii.gz", blob(), affine)
    indices = np.stack(np.meshgrid(*(np.arange(size) for size in SHAPE), indexing="ij"), axis=-1)
    itk = [SimpleITK.ReadImage(str(tmp_path / name)) for name in ("v.nii.gz", "m.nii.gz")]
    corners = [
        tuple(int(n) for n in corner)
        for corner in indices[:: SHAPE[0] - 1, :: SHAPE[1] - 1, :: SHAPE[2] - 1].reshape(-1, 3)
    ]
    apart = max(
        np.linalg.norm(np.subtract(*(grid.TransformIndexToPhysicalPoint(corner) for grid in itk))) for corner in corners
    )
    everywhere = np.linalg.norm(apply_affine(AFFINE, indices) - apply_affine(affine, indices), axis=-1).max()
    assert apart == pytest.approx(everywhere, abs=1e-4)  # float32 affines of up to 180 mm; no voxel beats the corners
    assert (apart <= MAX_SHARE * min(SIDES_MM)) == accepted
    if accepted:
        np.testing.assert_array_equal(read_labels(path, image, 3), blob().T)
    else:
        with pytest.raises(InputError, match=r"m\.nii\.gz has another geometry than its image .*mm \(2% of a voxel\)"):
            read_labels(path, image, 3)


def test_the_shortest_side_of_the_voxel_counts(tmp_path):
    affine = np.diag([0.5, 2, 5, 1.0])
    image = volume(tmp_path, affine)
    for beside_mm, accepted in ((0.009, True), (0.011, False)):
        other = affine.copy()
        other[2, 3] = beside_mm
        path = save(tmp_path / "m.nii.gz", blob(), other)
        if accepted:
            assert read_labels(path, image, 3).any()
        else:
            with pytest.raises(InputError, match="has another geometry than its image"):
                read_labels(path, image, 3)


def crop(folder, start, size, *, name="v.seg.nrrd", move=(0.0, 0.0, 0.0)):
    """Write a part of the blob with ITK, as 3D Slicer does: an NRRD file in LPS, cropped to its segments."""
    save(folder / "whole.nii.gz", blob(), AFFINE)
    whole = SimpleITK.ReadImage(str(folder / "whole.nii.gz"))
    part = SimpleITK.RegionOfInterest(whole, size, start)
    part.SetOrigin(tuple(np.add(part.GetOrigin(), move)))
    SimpleITK.WriteImage(part, str(folder / name), True)
    return folder / name


@pytest.mark.parametrize(
    ("start", "size"), [((28, 18, 2), (25, 25, 7)), ((30, 20, 3), (20, 21, 5)), ((0, 0, 0), SHAPE)]
)
def test_a_cropped_segmentation_is_put_where_itk_resamples_it_to(tmp_path, start, size, caplog):
    caplog.set_level("INFO", "medseg_trt")
    image, path = volume(tmp_path), crop(tmp_path, start, size)
    reference = SimpleITK.ReadImage(str(tmp_path / "v.nii.gz"))
    nearest = SimpleITK.sitkNearestNeighbor
    expected = SimpleITK.Resample(SimpleITK.ReadImage(str(path)), reference, SimpleITK.Transform(), nearest, 0.0)
    labels_read = read_labels(path, image, 3)
    np.testing.assert_array_equal(labels_read, SimpleITK.GetArrayFromImage(expected))
    np.testing.assert_array_equal(labels_read, blob().T)
    assert ("covers a part of its image" in caplog.text) == (size != SHAPE)


def test_cropped_segmentation_with_permuted_oblique_axes_is_placed_correctly(tmp_path):
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    image = volume(tmp_path, turn @ AFFINE)
    save(tmp_path / "whole.nii.gz", blob(), turn @ AFFINE)
    part = SimpleITK.RegionOfInterest(SimpleITK.ReadImage(str(tmp_path / "whole.nii.gz")), (25, 25, 7), (28, 18, 2))
    turned = SimpleITK.Flip(SimpleITK.PermuteAxes(part, [1, 2, 0]), [True, False, True])
    SimpleITK.WriteImage(turned, str(tmp_path / "m.nrrd"))
    np.testing.assert_array_equal(read_labels(tmp_path / "m.nrrd", image, 3), blob().T)


@pytest.mark.parametrize("move", [(0.5, 0, 0), (1.5, 1.5, 0), (300, 0, 0), (0, 0, -9)])
def test_a_crop_that_is_no_part_of_the_image_is_refused_with_what_to_do(tmp_path, move):
    path = crop(tmp_path, (28, 18, 2), (25, 25, 7), move=move)
    with pytest.raises(InputError, match=r"v\.seg\.nrrd is .*not a part of the image's; export it .*reference volume"):
        read_labels(path, volume(tmp_path), 3)


def test_a_smaller_nifti_mask_is_no_crop(tmp_path):
    path = save(tmp_path / "m.nii.gz", blob()[:, :, :8], AFFINE)
    with pytest.raises(InputError, match=r"m\.nii\.gz is \(8, 101, 122\) slices, rows and columns, but its image is"):
        read_labels(path, volume(tmp_path), 3)


def test_slicers_layers_are_named_with_the_way_to_export_them(tmp_path):
    header = {
        "space": "left-posterior-superior",
        "kinds": ["list", "domain", "domain", "domain"],
        "space directions": np.array([[np.nan] * 3, [3, 0, 0], [0, 3, 0], [0, 0, 3]]),
        "space origin": [0.0, 0, 0],
        "Segment0_Layer": "0",
        "Segment1_Layer": "1",
    }
    nrrd.write(str(tmp_path / "v.seg.nrrd"), np.zeros((2, *SHAPE), np.uint8), header)
    with pytest.raises(InputError, match=r"3D Slicer in 2 layers, because its segments overlap; export it"):
        read_labels(tmp_path / "v.seg.nrrd", volume(tmp_path), 3)
