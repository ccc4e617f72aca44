"""npz and HDF5 files give slices and volumes, and nothing in them is trusted."""

import io
import zipfile

import h5py
import numpy as np
import pytest

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.limits import MAX_PIXELS
from medseg_trt.imaging.images import Source, find_images, output_stem, read_image, read_labels

IMAGE = np.random.default_rng(0).random((3, 5, 4)).astype(np.float32)
LABEL = np.arange(60, dtype=np.uint8).reshape(3, 5, 4) % 4


def write(path, **arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    return path


@pytest.fixture(params=["case.npz", "case.h5", "case0001.npy.h5"])
def path(request, tmp_path):
    return tmp_path / request.param


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ">f4", np.int16, np.uint8])
def test_volumes_and_slices_are_read(path, dtype):
    values = (100 * IMAGE).astype(dtype)
    for part in (slice(None), 1):
        write(path, image=values[part], label=LABEL[part].astype(np.float32))
        image = read_image(path)
        np.testing.assert_array_equal(image.pixels[..., 0], np.atleast_3d(values)[part].reshape(-1, 5, 4))
        np.testing.assert_array_equal(read_labels(path, image, 4), LABEL[part].reshape(-1, 5, 4))
        assert image.pixels.dtype.isnative
        assert image.spacing_mm is None


def test_the_stem_is_the_cases_name(path, tmp_path):
    write(path, image=IMAGE, label=LABEL)
    assert output_stem(path) == path.name.split(".")[0]
    assert find_images([tmp_path]) == [Source(path=path, files=(path,), stem=output_stem(path))]


def test_additional_scribble_array_is_ignored(path):
    write(path, image=IMAGE, label=LABEL, scribble=LABEL)
    assert read_image(path).size == (5, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": IMAGE}, "label missing"),
        ({"label": LABEL}, "image missing"),
        ({"img": IMAGE, "label": LABEL}, "image missing; img unknown"),
        ({"image": IMAGE, "label": LABEL, "spacing": np.ones(3)}, "spacing unknown"),
        ({"image": IMAGE[0, 0], "label": LABEL}, r"shape \(4,\)"),
        ({"image": IMAGE[None], "label": LABEL}, r"shape \(1, 3, 5, 4\)"),
        ({"image": IMAGE.astype(complex), "label": LABEL}, "complex"),
        ({"image": np.full_like(IMAGE, np.nan), "label": LABEL}, "60 NaN or infinite"),
    ],
)
def test_invalid_npz_or_hdf5_arrays_are_refused_with_the_reason(path, arrays, message):
    write(path, **arrays)
    with pytest.raises(InputError, match=rf"{path.name}.*{message}"):
        read_image(path)


def test_labels_of_another_size_or_value_are_named(path):
    write(path, image=IMAGE, label=LABEL[:2])
    with pytest.raises(InputError, match=r"label is \(2, 5, 4\), but the image is \(3, 5, 4\)"):
        read_labels(path, read_image(path), 4)
    write(path, image=IMAGE, label=np.where(LABEL == 3, 255, LABEL))
    with pytest.raises(InputError, match=rf"{path.name} holds the values 255 .*labels range from 0 to 3"):
        read_labels(path, read_image(path), 4)


def test_damaged_files_are_named(path):
    content = write(path, image=IMAGE, label=LABEL).read_bytes()
    for damaged in (b"", content[: len(content) // 3], b"\0" * 300):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=path.name):
            read_image(path)


def test_a_flipped_byte_of_an_npz_is_found(tmp_path):
    path = write(tmp_path / "case.npz", image=IMAGE, label=LABEL)
    content = bytearray(path.read_bytes())
    content[content.index(IMAGE.tobytes()) + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="CRC"):
        read_image(path)


def test_no_pickle_is_loaded(tmp_path):
    path = write(tmp_path / "case.npz", image=np.array([[print, 1]], dtype=object), label=LABEL)
    with pytest.raises(InputError, match="image holds object"):
        read_image(path)


def npz_of_header(path, header):
    """Write an npz whose image is a header without anything after it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("image", "label"):
            file = io.BytesIO()
            np.lib.format.write_array_header_1_0(file, header)
            archive.writestr(f"{name}.npy", file.getvalue())
    return path


@pytest.mark.parametrize(
    ("shape", "message"), [((MAX_PIXELS, 2), "268435456 are possible"), ((0, 4), "possible"), ((100, 100), "cut short")]
)
def test_sizes_are_checked_before_anything_is_unpacked(tmp_path, shape, message):
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with pytest.raises(InputError, match=message):
        read_image(npz_of_header(tmp_path / "case.npz", header))


@pytest.mark.parametrize("header", [b"{'descr': '<f4', 'shape': (3\n", b"{'descr': 'a\n", b"{\x00}\n", b"\n"])
def test_malformed_npy_header_is_refused(tmp_path, header):
    padded = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "case.npz", "w") as archive:
        archive.writestr("image.npy", padded)
        archive.writestr("label.npy", padded)
    with pytest.raises(InputError, match=r"case\.npz cannot be read"):
        read_image(tmp_path / "case.npz")


@pytest.mark.parametrize("keys", [["image", "label", b"\xff\xfe"], ["image", b"l\xffbel"]])
def test_a_name_in_an_hdf5_file_that_is_no_text_is_unknown(keys, tmp_path):
    with h5py.File(tmp_path / "case.h5", "w") as file:
        for key in keys:
            file.create_dataset(key, data=IMAGE)
    with pytest.raises(InputError, match=r"xff.*unknown"):
        read_image(tmp_path / "case.h5")


def test_the_size_of_an_hdf5_array_is_checked_before_it_is_read(tmp_path):
    with h5py.File(tmp_path / "case.h5", "w") as file:
        for name in ("image", "label"):
            file.create_dataset(name, (2**20, 2**20), "u1", chunks=(1024, 1024))  # nothing of it is on the disk
    with pytest.raises(InputError, match="1048576 x 1048576 pixels"):
        read_image(tmp_path / "case.h5")


def test_no_link_leads_out_of_an_hdf5_file(tmp_path):
    write(tmp_path / "secret.h5", image=IMAGE, label=LABEL)
    (tmp_path / "raw.bin").write_bytes(IMAGE.tobytes())

    def external_link(file):
        file["image"] = h5py.ExternalLink("secret.h5", "/image")

    def soft_link(file):
        file["image"] = h5py.SoftLink("/label")

    def external_bytes(file):
        file.create_dataset("image", IMAGE.shape, "f4", external=[(str(tmp_path / "raw.bin"), 0, IMAGE.nbytes)])

    def virtual(file):
        layout = h5py.VirtualLayout(IMAGE.shape, "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "image", IMAGE.shape)
        file.create_virtual_dataset("image", layout)

    def group(file):
        file.create_group("image")

    for plant in (external_link, soft_link, external_bytes, virtual, group):
        with h5py.File(tmp_path / "case.h5", "w") as file:
            file["label"] = LABEL
            plant(file)
        with pytest.raises(InputError, match="is stored outside the file"):
            read_image(tmp_path / "case.h5")
