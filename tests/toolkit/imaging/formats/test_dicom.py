"""DICOM files and series, generated with pydicom; each voxel's place is checked by the formula of the standard."""

import struct
import zlib
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from dicoms import (
    AXIAL,
    CORNER_MM,
    CORONAL,
    ENHANCED_CT,
    OBLIQUE,
    PATIENT,
    SAGITTAL,
    SERIES,
    SPACING_MM,
    corners,
    dataset,
    numbers,
    placed,
    save,
    save_series,
)
from itk import require_seen_alike
from nibabel.affines import apply_affine
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)
from tiny import TWO_ORGANS

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats import dicom_file
from medseg_trt.imaging.images import Image, Mask, find_images, output_stem, read_image, read_labels, write_mask

RNG = np.random.default_rng(0)


def places_mm(image: Image) -> dict[int, np.ndarray]:
    """Return where each voxel lies (right, anterior, superior) by its value, which is its number."""
    slices, rows, columns = np.indices(image.pixels.shape[:3]).reshape(3, -1)
    assert image.geometry is not None
    where = apply_affine(image.geometry.affine_mm, np.stack([columns, rows, slices], axis=1))
    return dict(zip(image.pixels.ravel().tolist(), where, strict=True))


def standard_places_mm(shape, orientation, step_mm=3.0) -> np.ndarray:
    """Return where the standard puts each pixel (left, posterior, superior), equation C.7.6.2.1-1."""
    slices, rows, columns = np.indices(shape).reshape(3, -1)
    along_row, along_column = np.array(orientation[:3]), np.array(orientation[3:])
    return (
        corners(shape[0], orientation, step_mm)[slices]
        + columns[:, np.newaxis] * SPACING_MM[1] * along_row
        + rows[:, np.newaxis] * SPACING_MM[0] * along_column
    )


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, CORONAL, OBLIQUE], ids=["ax", "sag", "cor", "oblique"])
def test_every_voxel_of_a_series_and_of_its_mask_lies_where_the_standard_says(orientation, tmp_path):
    pixels = numbers()
    (source,) = find_images([save_series(tmp_path / "scan", pixels, orientation)])
    image = read_image(source)
    expected = standard_places_mm(pixels.shape, orientation) * (-1, -1, 1)
    positions_mm = places_mm(image)
    # Positions are written with six decimals and directions with nine; neighbours are 1.5 mm apart.
    np.testing.assert_allclose([positions_mm[number] for number in range(pixels.size)], expected, atol=1e-4)
    mask = Mask.of(image, (image.pixels[..., 0] % 3).astype(np.uint8), TWO_ORGANS)
    written: Any = nibabel.load(write_mask(mask, tmp_path / "masks"))
    stored = np.asanyarray(written.dataobj)
    np.testing.assert_array_equal(stored.transpose(2, 1, 0), pixels % 3)  # in the series' own order
    indices = np.indices(stored.shape).reshape(3, -1).T
    by_nibabel = apply_affine(written.affine, indices).reshape(*stored.shape, 3).transpose(2, 1, 0, 3).reshape(-1, 3)
    np.testing.assert_allclose(by_nibabel, expected, atol=1e-4)
    require_seen_alike(tmp_path / "masks" / "scan.nii.gz")


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE], ids=["ax", "sag", "oblique"])
def test_simpleitk_reads_the_series_alike_and_puts_the_mask_in_its_place(orientation, tmp_path):
    folder = save_series(tmp_path / "scan", numbers(), orientation)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    theirs = reader.Execute()
    image = read_image(folder)
    mask = Mask.of(image, (image.pixels[..., 0] % 3).astype(np.uint8), TWO_ORGANS)
    written = SimpleITK.ReadImage(str(write_mask(mask, tmp_path / "masks")))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(written), SimpleITK.GetArrayFromImage(theirs) % 3)
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(written, get)(), getattr(theirs, get)(), atol=1e-4, err_msg=get)


def test_the_distance_of_slices_comes_from_their_positions_and_not_from_slicethickness(tmp_path):
    image = read_image(save_series(tmp_path / "scan", numbers(), SliceThickness=5.0, SpacingBetweenSlices=4.0))
    assert image.spacing_mm == pytest.approx((3.0, 1.5, 2.0), rel=1e-6)


def test_neither_names_nor_instance_numbers_put_slices_in_order(tmp_path):
    pixels = numbers()
    orders = [[3, 1, 0, 2], [0, 1, 2, 3], [3, 2, 1, 0]]
    images = [read_image(save_series(tmp_path / f"{index}", pixels, order=order)) for index, order in enumerate(orders)]
    for image in images:
        np.testing.assert_array_equal(image.pixels[..., 0], pixels)


@pytest.mark.parametrize(
    ("shifts_mm", "outcome"),
    [
        ({1: 0.005}, "silent"),
        ({1: 0.2}, "differ by up to 0.2"),
        ({1: 1.0}, "not evenly spaced"),
        ({2: 3.0, 3: 3.0}, r"1 slice\(s\) may be missing"),
        ({1: -3.0}, "lie at the same place"),
    ],
)
def test_uneven_slices_are_warned_of_or_refused(shifts_mm, outcome, tmp_path, caplog):
    for index, corner in enumerate(corners(4)):
        where = placed(corner=corner + np.array([0, 0, shifts_mm.get(index, 0.0)]))
        save(tmp_path / "scan" / f"{index}.dcm", dataset(numbers()[index], **where))
    if outcome == "silent" or outcome.startswith("differ"):
        assert read_image(tmp_path / "scan").num_slices == 4
        assert ("differ by up to" in caplog.text) == (outcome != "silent")
    else:
        with pytest.raises(InputError, match=outcome) as caught:
            read_image(tmp_path / "scan")
        assert str(tmp_path / "scan") in str(caught.value)


@pytest.mark.parametrize(("aside_mm", "refused"), [(0.5, False), (2.0, True)])  # half a pixel is 0.75 mm
def test_slices_that_do_not_lie_on_a_line_are_refused(aside_mm, refused, tmp_path):
    for index, corner in enumerate(corners(4)):
        where = placed(corner=corner + np.array([aside_mm * (index == 2), 0, 0]))
        save(tmp_path / "scan" / f"{index}.dcm", dataset(numbers()[index], **where))
    if refused:
        with pytest.raises(InputError, match="up to 2 mm off a straight line"):
            read_image(tmp_path / "scan")
    else:
        assert read_image(tmp_path / "scan").num_slices == 4


def test_tilted_slices_keep_their_shear(tmp_path, caplog):
    pixels = numbers()
    shifts = np.arange(4)[:, np.newaxis] * np.array([0.0, 1.0, 3.0])
    for index in range(4):
        where = placed(corner=np.array(CORNER_MM) + shifts[index])
        save(tmp_path / "scan" / f"{index}.dcm", dataset(pixels[index], **where))
    image = read_image(tmp_path / "scan")
    assert "tilted" in caplog.text
    slices, rows, columns = np.indices(pixels.shape).reshape(3, -1)
    expected = np.array(CORNER_MM) + shifts[slices] + np.stack([columns * 2.0, rows * 1.5, 0 * rows], axis=1)
    positions_mm = places_mm(image)
    np.testing.assert_allclose([positions_mm[value] for value in range(pixels.size)], expected * (-1, -1, 1), atol=1e-6)
    mask = Mask.of(image, (image.pixels[..., 0] % 2).astype(np.uint8), TWO_ORGANS)
    written: Any = nibabel.load(write_mask(mask, tmp_path / "masks"))
    np.testing.assert_allclose(written.affine[:3, 2], [0, -1, 3], atol=1e-6)
    # The outer slices lie 1.5 mm beside the middle; the nearest rotation leaves less than half a voxel of it.
    require_seen_alike(tmp_path / "masks" / "scan.nii.gz", within_mm=0.75)
    np.testing.assert_array_equal(read_labels(tmp_path / "masks" / "scan.nii.gz", image, 3), mask.labels)


def test_two_series_of_a_folder_are_two_images_with_names_that_hold_no_uid(tmp_path):
    folder = tmp_path / "exam"
    save_series(folder, numbers(), SeriesNumber=2)
    for index, corner in enumerate(corners(3)):
        described = dataset(numbers()[index] + np.int16(100), SeriesNumber=7, **placed(corner=corner))
        described.SeriesInstanceUID = SERIES + ".9"
        save(folder / f"other{index}.ima", described)
    sources = find_images([folder])
    assert [(source.stem, len(source.files)) for source in sources] == [("exam-series2", 4), ("exam-series7", 3)]
    images = [read_image(source) for source in sources]
    assert [image.pixels.min() for image in images] == [0, 100]
    paths = [
        write_mask(Mask.of(image, np.zeros(image.pixels.shape[:3], np.uint8), TWO_ORGANS), tmp_path) for image in images
    ]
    assert [path.name for path in paths] == ["exam-series2.nii.gz", "exam-series7.nii.gz"]
    with pytest.raises(InputError, match=r"exam holds 2 images \(exam-series2, exam-series7"):
        read_image(folder)


def test_a_scout_view_of_another_direction_in_the_same_series_is_an_image_of_its_own(tmp_path):
    save_series(tmp_path / "scan", numbers(), SeriesNumber=3)
    save(tmp_path / "scan" / "scout", dataset(numbers()[0], SeriesNumber=3, **placed(SAGITTAL)))
    sources = find_images([tmp_path / "scan"])
    assert [(source.stem, len(source.files)) for source in sources] == [("scan-series3-1", 4), ("scan-series3-2", 1)]


def test_series_in_folders_below_are_found_and_named_after_them(tmp_path):
    save_series(tmp_path / "images" / "scan10", numbers())
    save_series(tmp_path / "images" / "scan2", numbers())
    assert [source.stem for source in find_images([tmp_path / "images"])] == ["scan2", "scan10"]


def test_a_file_named_like_a_uid_keeps_its_whole_name(tmp_path):
    paths = [save(tmp_path / f"CT.1.2.{index}", dataset(numbers()[0], **placed())) for index in (3, 4)]
    assert [output_stem(read_image(path)) for path in paths] == ["CT.1.2.3", "CT.1.2.4"]


def test_a_single_sagittal_slice_stays_one_slice(tmp_path):
    pixels = numbers()[0]
    image = read_image(save(tmp_path / "a.dcm", dataset(pixels, SliceThickness=4.0, **placed(SAGITTAL))))
    np.testing.assert_array_equal(image.pixels[0, ..., 0], pixels)
    assert image.spacing_mm == pytest.approx((4.0, 1.5, 2.0))
    mask = Mask.of(image, (image.pixels[..., 0] % 2).astype(np.uint8), TWO_ORGANS)
    path = write_mask(mask, tmp_path / "masks")
    np.testing.assert_array_equal(read_labels(path, image, 3), mask.labels)


def test_a_picture_without_a_place_gets_a_png(tmp_path):
    image = read_image(save(tmp_path / "xray.dcm", dataset(numbers()[0], ImagerPixelSpacing=[0.2, 0.1])))
    assert (image.geometry, image.spacing_in_plane) == (None, (0.2, 0.1))
    path = write_mask(Mask.of(image, np.ones((1, 3, 5), np.uint8), TWO_ORGANS), tmp_path / "masks")
    assert path.name == "xray.png"


def test_dicom_frames_without_positions_get_a_multipage_tiff_mask(tmp_path, caplog):
    image = read_image(save(tmp_path / "cine.dcm", dataset(numbers())))
    assert "gives no positions of its frames" in caplog.text
    np.testing.assert_array_equal(image.pixels[..., 0], numbers())
    labels = RNG.integers(0, 3, (4, 3, 5), dtype=np.uint8)
    path = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    assert path.name == "cine.tif"
    np.testing.assert_array_equal(read_labels(path, image, 3), labels)


def enhanced(order: list[int], slopes: list[float]) -> Dataset:
    described = dataset(numbers()[order])
    described.SOPClassUID = ENHANCED_CT
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = list(AXIAL)
    measures.PixelSpacing, measures.SliceThickness = list(SPACING_MM), 9.0
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
    described.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for index, slope in zip(order, slopes, strict=True):
        frame, position, scale = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [float(coordinate) for coordinate in corners(4)[index]]
        scale.RescaleSlope, scale.RescaleIntercept = slope, -1000.0
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Sequence([position]), Sequence([scale])
        frames.append(frame)
    described.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return described


def test_frames_of_an_enhanced_file_are_ordered_and_scaled_one_by_one(tmp_path):
    order, slopes = [2, 0, 3, 1], [1.0, 2.0, 1.0, 3.0]
    image = read_image(save(tmp_path / "multi.dcm", enhanced(order, slopes)))
    slopes_by_position = np.array(slopes)[np.argsort(order)][:, np.newaxis, np.newaxis]
    np.testing.assert_array_equal(image.pixels[..., 0], numbers() * slopes_by_position - 1000)
    assert image.spacing_mm == pytest.approx((3.0, 1.5, 2.0))


def test_the_scale_of_each_slice_of_a_series_is_its_own(tmp_path):
    pixels = numbers()
    for index, corner in enumerate(corners(4)):
        scale = {"RescaleSlope": 0.5 * (index + 1), "RescaleIntercept": -10.0}
        save(tmp_path / "pet" / f"{index}", dataset(pixels[index], **placed(corner=corner), **scale))
    rescaled = read_image(tmp_path / "pet").pixels
    assert rescaled.dtype == np.float32
    factors = 0.5 * np.arange(1, 5)[:, np.newaxis, np.newaxis]
    np.testing.assert_array_equal(rescaled[..., 0], (pixels * factors - 10).astype(np.float32))


def test_whole_hounsfield_numbers_stay_integers(tmp_path):
    pixels = RNG.integers(0, 4096, (3, 5), dtype=np.uint16)
    path = save(tmp_path / "a.dcm", dataset(pixels, RescaleSlope=1, RescaleIntercept=-1024, **placed()))
    decoded = read_image(path).pixels
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded[0, ..., 0], pixels.astype(int) - 1024)


@pytest.mark.parametrize(("modality", "inverted"), [("DX", True), ("CT", False)])
def test_monochrome1_is_inverted_unless_the_numbers_mean_something(modality, inverted, tmp_path):
    pixels = RNG.integers(0, 4096, (3, 5), dtype=np.uint16)
    described = dataset(pixels, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11, Modality=modality)
    decoded = read_image(save(tmp_path / "a.dcm", described)).pixels[0, ..., 0]
    np.testing.assert_array_equal(decoded, 4095 - pixels if inverted else pixels)


def test_colours_and_palettes_become_rgb(tmp_path):
    colours = RNG.integers(0, 256, (3, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_image(save(tmp_path / "rgb.dcm", dataset(colours))).pixels[0], colours)
    table = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    indices = RNG.integers(0, 256, (3, 5), dtype=np.uint8)
    described = dataset(indices, PhotometricInterpretation="PALETTE COLOR")
    for channel, name in enumerate(("Red", "Green", "Blue")):
        setattr(described, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        entries = (table[:, channel].astype("<u2") * 257).tobytes()
        setattr(described, f"{name}PaletteColorLookupTableData", entries)
    decoded = read_image(save(tmp_path / "palette.dcm", described)).pixels
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded[0], table[indices])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, DeflatedExplicitVRLittleEndian])
def test_every_storage_gives_the_same_numbers(syntax, tmp_path):
    pixels = RNG.integers(-500, 500, (3, 5), dtype=np.int16)
    path = save(tmp_path / "a.dcm", dataset(pixels, **placed()), syntax)
    np.testing.assert_array_equal(read_image(path).pixels[0, ..., 0], pixels)


def test_a_missing_decoder_is_named_with_what_installs_it(tmp_path):
    described = dataset(numbers()[0])
    described.PixelData = encapsulate([b"\xff\xd8\xff\xc3" + b"\0" * 40])
    described["PixelData"].VR = "OB"
    described["PixelData"].is_undefined_length = True
    with pytest.raises(InputError, match=r"a\.dcm is compressed as JPEG Lossless.*pip install pylibjpeg-libjpeg"):
        read_image(save(tmp_path / "a.dcm", described, JPEGLosslessSV1))


# --- files that are not to be trusted


def test_a_jpeg_2000_stream_that_is_larger_than_its_header_says_is_not_decoded(tmp_path):
    sizes = struct.pack(">IIII", 60_000, 60_000, 0, 0)
    stream = b"\xff\x4f\xff\x51\x00\x29\x00\x00" + sizes + b"\0" * 40
    described = dataset(numbers()[0])
    described.PixelData = encapsulate([stream])
    described["PixelData"].VR = "OB"
    described["PixelData"].is_undefined_length = True
    path = tmp_path / "a.dcm"
    file = FileDataset(path, described, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    file.file_meta.TransferSyntaxUID = JPEG2000Lossless
    file.save_as(path, enforce_file_format=True)
    with pytest.raises(InputError, match=r"a\.dcm holds a JPEG 2000 image of 60000 x 60000 .* 5 x 3"):
        read_image(path)


def test_a_deflated_bomb_is_refused_before_it_is_inflated_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_file, "MAX_INFLATED_BYTES", 2**16)
    path = save(tmp_path / "a.dcm", dataset(numbers()[0], **placed()), DeflatedExplicitVRLittleEndian)
    assert read_image(path).num_slices == 1
    content = path.read_bytes()
    meta_end = 128 + 4 + 12 + struct.unpack_from("<I", content, 128 + 4 + 8)[0]
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflater.compress(b"\0" * 2**24) + deflater.flush()
    path.write_bytes(content[:meta_end] + bomb)
    with pytest.raises(InputError, match=r"a\.dcm cannot be read: it inflates to more than"):
        read_image(path)


@pytest.mark.parametrize("elements", [{"Rows": 60_000, "Columns": 60_000}, {"NumberOfFrames": 2**31 - 1}, {"Rows": 0}])
def test_an_impossible_size_is_refused_by_the_header(elements, tmp_path, monkeypatch):
    monkeypatch.setattr("pydicom.pixels.pixel_array", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"a\.dcm says it has .* pixels"):
        read_image(save(tmp_path / "a.dcm", dataset(numbers()[0], **elements)))


def test_a_header_that_does_not_end_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.dcm", dataset(numbers()[0], **placed()))
    monkeypatch.setattr(dicom_file, "MAX_HEADER_BYTES", 200)
    with pytest.raises(InputError, match="its header is too long"):
        read_image(path)


def test_a_damaged_slice_of_a_folder_is_reported_and_never_dropped_in_silence(tmp_path):
    folder = save_series(tmp_path / "scan", numbers())
    victim = folder / "IM0001"
    victim.write_bytes(victim.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"IM0001 cannot be read"):
        read_image(folder)


def test_objects_without_pictures_are_left_out_of_a_folder_and_refused_alone(tmp_path):
    folder = save_series(tmp_path / "scan", numbers())
    report = dataset(numbers()[0], PixelData=None, Rows=None, Columns=None)
    path = save(folder / "report.dcm", report)
    assert read_image(folder).num_slices == 4
    with pytest.raises(InputError, match=r"report\.dcm holds no pixels"):
        read_image(path)


def test_every_truncation_ends_in_an_image_or_in_one_line(tmp_path):
    whole = save(tmp_path / "a.dcm", dataset(numbers()[0], **placed())).read_bytes()
    path = tmp_path / "cut.dcm"
    outcomes = set()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.dcm") as caught:
            read_image(path)
        outcomes.add("\n" in str(caught.value))
    assert outcomes == {False}


def test_no_name_and_no_uid_of_the_patient_is_written(tmp_path):
    folder = save_series(tmp_path / "scan", numbers())
    image = read_image(folder)
    path = write_mask(Mask.of(image, np.zeros(image.pixels.shape[:3], np.uint8), TWO_ORGANS), tmp_path / "masks")
    written: Any = nibabel.load(path)
    content = written.to_bytes()
    assert any(PATIENT.encode() in file.read_bytes() for file in folder.iterdir())
    assert all(secret not in content for secret in (b"Doe", b"4711", SERIES.encode()))


def test_dicom_is_no_mask(tmp_path):
    path = save(tmp_path / "a.dcm", dataset(numbers()[0], **placed()))
    with pytest.raises(InputError, match=r"a\.dcm is DICOM; give the mask of .* as NIfTI or NRRD"):
        read_labels(path, read_image(path), 2)
