"""No file makes a reader take more memory than its header says, or more than the limits; each case runs in a child."""

import bz2
import io
import lzma
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import PIL.Image
import pytest
import tifffile
from tiny import write_nifti

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats import limits
from medseg_trt.imaging.images import read_image

BOMB_BYTES = 2**28
ALLOWED_MIB = 64  # above what the libraries take; a bomb takes 256 MiB or more
ADDRESS_BYTES = 2**33  # a child that goes on all the same ends here

CHILD = """
import sys
from pathlib import Path
import h5py, nibabel, PIL.Image, scipy, tifffile
import nrrd as _
from medseg_trt.imaging.formats import arrays, nifti, nrrd, tiff
from medseg_trt.errors import InputError
from medseg_trt.imaging.images import read_image
def peak_kib():  # of this program alone; getrusage would begin with the peak of the process that started it
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
before = peak_kib()
try:
    print("READ", *read_image(Path(sys.argv[1])).pixels.shape)
except InputError as error:
    print(error)
print((peak_kib() - before) >> 10)
"""


def read_in_child(path: Path) -> tuple[str, int]:
    """Return what a reader says of a file, and by how many MiB its peak memory grew."""
    limit = (ADDRESS_BYTES, ADDRESS_BYTES)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )
    message, grown_mib = done.stdout.splitlines()
    return message, int(grown_mib)


def packed(start: bytes, window_bits: int, size: int = BOMB_BYTES) -> bytes:
    """Return ``start`` and ``size`` zeros, deflated."""
    packer = zlib.compressobj(1, zlib.DEFLATED, window_bits)
    return b"".join(
        [packer.compress(start), *(packer.compress(bytes(2**22)) for _ in range(size >> 22)), packer.flush()]
    )


ZLIB, GZIP = 15, 31
LONG_NPY_HEADER = b"\x93NUMPY\2\0" + BOMB_BYTES.to_bytes(4, "little")


def tiff(path: Path, bits: int, compression: int, strip: bytes, tile: int | None = None) -> None:
    """Write a TIFF of 16 x 16 pixels with one strip or tile of any content."""
    sides = [(322, 4, tile), (323, 4, tile), (324, 4, 0), (325, 4, len(strip))] if tile else []
    strips = [] if tile else [(273, 4, 0), (278, 4, 16), (279, 4, len(strip))]
    entries = [(256, 4, 16), (257, 4, 16), (258, 3, bits), (259, 3, compression), (262, 3, 1), *sides, *strips]
    start = 8 + 2 + 12 * len(entries) + 4
    packed_entries = b"".join(
        struct.pack("<HHII", tag, kind, 1, start if tag in (273, 324) else value) for tag, kind, value in entries
    )
    path.write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + packed_entries + bytes(4) + strip)


def nifti(path: Path, shape: tuple[int, ...], size: int) -> None:
    header = nibabel.Nifti2Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.uint8)
    header.set_sform(np.eye(4), 1)
    header["vox_offset"] = 544
    path.write_bytes(packed(header.binaryblock + bytes(4), GZIP, size))


def nrrd_file(path: Path, *lines: str) -> None:
    head = ["NRRD0004", "type: uchar", "dimension: 3", "sizes: 4 4 4", "encoding: gzip", *lines, "", ""]
    path.write_bytes("\n".join(head).encode() + packed(b"", GZIP))


def npz(path: Path, start: bytes, compression: int = zipfile.ZIP_DEFLATED, size: int = BOMB_BYTES) -> None:
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name in ("image", "label"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(start)
                for _ in range(size >> 22):
                    file.write(bytes(2**22))


def npy_header() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (4, 4)})
    return file.getvalue()


def hdf5(path: Path, chunks: tuple[int, int] = (16, 16), chunk: bytes | None = None) -> None:
    with h5py.File(path, "w") as file:
        for name in ("image", "label"):
            dataset = file.create_dataset(
                name, (16, 16), "u1", chunks=chunks, maxshape=(None, None), compression="gzip"
            )
            if chunk is None:
                dataset[0, 0] = 1
            else:
                dataset.id.write_direct_chunk((0, 0), chunk)


CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a strip for Pillow": (".tif", lambda path: tiff(path, 8, 8, packed(b"", ZLIB)), "inflate to more"),
    "a strip for tifffile": (".tif", lambda path: tiff(path, 32, 8, packed(b"", ZLIB)), "inflate to more"),
    "a small strip": (".tif", lambda path: tiff(path, 32, 8, packed(b"", ZLIB, 2**22)), "inflate to more"),
    "lzma": (".tif", lambda path: tiff(path, 32, 34925, lzma.compress(bytes(2**24)) * 8), "inflate to more"),
    "packbits": (".tif", lambda path: tiff(path, 32, 32773, b"\x81\0" * 2**20), "inflate to more"),
    "a tile": (".tif", lambda path: tiff(path, 8, 8, zlib.compress(bytes(256)), tile=65520), "stored in tiles of"),
    "NIfTI, more than it says": (".nii.gz", lambda path: nifti(path, (4, 4, 4), BOMB_BYTES), "holds more pixels"),
    "NIfTI, a long side": (".nii.gz", lambda path: nifti(path, (2**28, 1, 1), 2**22), "at most 65536 a side"),
    "NIfTI, many slices": (".nii.gz", lambda path: nifti(path, (1, 1, 2**16), 2**22), "4096 slices"),
    "NIfTI, less than the header says": (".nii.gz", lambda path: nifti(path, (2**13, 2**13, 4), 2**22), "cut short"),
    "NRRD": (".nrrd", nrrd_file, "holds more pixels"),
    "NRRD, with a skip": (".nrrd", lambda path: nrrd_file(path, "byte skip: 134217728"), "holds more pixels"),
    "npz": (".npz", lambda path: npz(path, npy_header()), "holds more pixels"),
    "npz, a long header": (".npz", lambda path: npz(path, LONG_NPY_HEADER), "a header of"),
    "npz, in bzip2": (".npz", lambda path: npz(path, npy_header(), zipfile.ZIP_BZIP2, 2**26), "does not; save it"),
    "HDF5, a chunk": (".h5", lambda path: hdf5(path, chunk=packed(b"", ZLIB, 2**27)), "chunk of image"),
    "HDF5, a small chunk": (".h5", lambda path: hdf5(path, chunk=packed(b"", ZLIB, 2**24)), "inflates to more"),
    "HDF5, large chunks": (".h5", lambda path: hdf5(path, (2**13, 2**13)), "larger than it is"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_decompression_bomb_is_refused_within_the_memory_limit(case, tmp_path):
    suffix, write, expected = CASES[case]
    path = tmp_path / f"bomb{suffix}"
    write(path)
    message, grown_mib = read_in_child(path)
    assert message.startswith(str(path))
    assert expected in message
    assert grown_mib < ALLOWED_MIB


def test_reading_takes_at_most_a_stated_multiple_of_the_pixels(tmp_path):
    shape = (512, 512, 64)  # 16 Mi voxels, of 64 bits in the file
    volume = nibabel.Nifti1Image(np.zeros(shape, np.float64), np.eye(4))
    nibabel.save(volume, tmp_path / "a.nii.gz")
    PIL.Image.fromarray(np.zeros((4096, 4096, 3), np.uint8)).save(tmp_path / "a.png")
    for name in ("a.nii.gz", "a.png"):
        message, grown_mib = read_in_child(tmp_path / name)
        assert message.startswith("READ")
        assert grown_mib < limits.WORKING_BYTES_PER_PIXEL * 16 + ALLOWED_MIB, name


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_pictures_above_pillows_limit_are_read_and_its_limit_stays_as_it_is(suffix, tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)
    PIL.Image.fromarray(values).save(tmp_path / f"a{suffix}")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 500)  # an error from 1000 pixels; there are 2400
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}").pixels[0, ..., 0], values)
    assert PIL.Image.MAX_IMAGE_PIXELS == 500


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".jpg"])
def test_max_pixels_limit_is_enforced_with_advice(suffix, tmp_path, monkeypatch):
    PIL.Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / f"a{suffix}")
    monkeypatch.setattr(limits, "MAX_PIXELS", 2399)
    with pytest.raises(
        InputError, match=r"60 pixels|60 x 40 pixels.*2399 are possible.*: reduce it, or cut it into parts"
    ):
        read_image(tmp_path / f"a{suffix}")


def test_one_limit_is_for_all_formats(tmp_path, monkeypatch):
    values = np.zeros((5, 4, 3), np.float64)
    write_nifti(tmp_path / "a.nii", values)
    np.savez(tmp_path / "a.npz", image=values, label=values)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = file["label"] = values
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
    for name, limit in (("MAX_PIXELS", 59), ("MAX_SIDE", 4), ("MAX_SLICES", 2), ("MAX_BYTES", 479)):
        with monkeypatch.context() as patch:
            for path in sorted(tmp_path.iterdir()):
                assert read_image(path).pixels.size == 60
            patch.setattr(limits, name, limit)
            for path in sorted(tmp_path.iterdir()):
                with pytest.raises(InputError, match=rf"{path.name} says it has .* pixels; 1 to"):
                    read_image(path)


def test_bzip2_of_an_nrrd_file_is_inflated_as_far_as_its_header_says(tmp_path):
    head = "\n".join(["NRRD0004", "type: uchar", "dimension: 3", "sizes: 4 4 4", "encoding: bzip2", "", ""])
    (tmp_path / "a.nrrd").write_bytes(head.encode() + bz2.compress(bytes(2**28)))
    message, grown_mib = read_in_child(tmp_path / "a.nrrd")
    assert "holds more pixels" in message
    assert grown_mib < ALLOWED_MIB
