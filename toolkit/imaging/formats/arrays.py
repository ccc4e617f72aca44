"""Arrays with their labels in one file: NumPy's ``.npz`` and HDF5, as TransUNet and SSL4MIS prepare Synapse and ACDC.

Both hold ``image`` and ``label``, a slice (height, width) or a volume (slices, height, width). The axes are kept as
stored, because the file does not state the patient's orientation. Files are untrusted: no pickle is loaded, sizes are
checked before decompression, and no link is followed out of an HDF5 file.
"""

import io
import zipfile
import zlib
from collections.abc import Collection
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError, require
from medseg_trt.imaging.formats.limits import (
    MAX_HEADER_BYTES,
    check_size,
    convert_decoder_errors,
    read_values,
    require_finite,
)
from medseg_trt.imaging.images import Image
from medseg_trt.imaging.signatures import require_kind

IMAGE, LABEL = "image", "label"
IGNORED = ("scribble",)  # WSL4MIS's weak labels, beside the full ones
NPY_START_BYTES = np.lib.format.MAGIC_LEN
NPY_HEADERS = {  # version -> size of the length field in bytes, and the reader of the header
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}
CHECKSUM_BYTES = 4  # of HDF5's fletcher32
MIN_CHUNK_VALUES = 2**20  # h5py's chunks of small resizable arrays are larger than the arrays


def read(path: Path) -> Image:
    """Read the image of a file.

    Raises:
        InputError: it is damaged or too large, lacks the image or the label, or holds other arrays.
    """
    return Image(path=path, pixels=_slices_first(path, IMAGE)[..., np.newaxis])


def read_labels(path: Path, like: Image) -> ndarray:
    """Read the labels of a file, slices first.

    Raises:
        InputError: it cannot be read, or the labels differ from the image in size.
    """
    labels = _slices_first(path, LABEL)
    if labels.shape != like.pixels.shape[:3]:
        raise InputError(f"{path}: the label is {labels.shape}, but the image is {like.pixels.shape[:3]}")
    return labels


def _slices_first(path: Path, key: str) -> ndarray:
    read_key = {".npz": _from_npz, ".h5": _from_hdf5}[str(require_kind(path, ".npz", ".h5").suffix)]
    with convert_decoder_errors(
        path, KeyError, RuntimeError, SyntaxError, TokenError, zipfile.BadZipFile, NotImplementedError
    ):
        values = read_key(path, key)
    require_finite(path, values)
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
    return np.ascontiguousarray(values if values.ndim == 3 else values[np.newaxis])


def _from_npz(path: Path, key: str) -> ndarray:
    with zipfile.ZipFile(path) as archive:
        _check_keys(path, [name.removesuffix(".npy") for name in archive.namelist()])
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):  # only these can be inflated in steps
            raise InputError(f"{path}: {key} uses a compression that NumPy does not; save it with numpy.savez")
        with archive.open(member) as file:
            start = file.read(NPY_START_BYTES)
            version = np.lib.format.read_magic(io.BytesIO(start))
            if version not in NPY_HEADERS:
                raise InputError(
                    f"{path}: {key} has the unsupported NumPy format {version}; save it again with numpy.savez"
                )
            length_bytes, read_header = NPY_HEADERS[version]
            length = file.read(length_bytes)
            if int.from_bytes(length, "little") > MAX_HEADER_BYTES:
                raise InputError(f"{path}: {key} has a header of more than {MAX_HEADER_BYTES} bytes")
            header = length + file.read(int.from_bytes(length, "little"))
            shape, is_fortran, dtype = read_header(io.BytesIO(header))
            _check_array(path, key, shape, dtype)
            values = read_values(path, file, prod(shape), dtype)
    return values.reshape(shape, order="F" if is_fortran else "C")


def _from_hdf5(path: Path, key: str) -> ndarray:
    h5py: Any = require("h5py", "medical")
    with h5py.File(path, "r") as file:
        _check_keys(path, [key if isinstance(key, str) else repr(key) for key in file])  # bytes: no valid UTF-8
        is_stored_here = isinstance(file.get(key, getlink=True), h5py.HardLink) and isinstance(file[key], h5py.Dataset)
        if not is_stored_here or file[key].external or file[key].is_virtual:
            raise InputError(
                f"{path}: {key} is stored outside the file, which is not allowed; save both arrays in one file"
            )
        _check_array(path, key, file[key].shape, file[key].dtype)
        if file[key].chunks is not None:
            _check_chunks(path, key, file[key])
        values: ndarray = file[key][()]
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _check_chunks(path: Path, key: str, dataset: Any) -> None:
    """Inflate every compressed chunk with a limit and refuse one that exceeds the chunk size; HDF5 would allocate it.

    Raises:
        InputError: a chunk is too large, or its compression cannot be checked.
    """
    h5z: Any = require("h5py.h5z", "medical")
    if prod(dataset.chunks) > max(prod(dataset.shape), MIN_CHUNK_VALUES):
        raise InputError(f"{path}: {key} is stored in chunks of {dataset.chunks}, larger than it is; save it again")
    settings = dataset.id.get_create_plist()
    filters = [settings.get_filter(index)[0] for index in range(settings.get_nfilters())]
    known = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32, h5z.FILTER_LZF}
    packers = [code for code in filters if code in (h5z.FILTER_DEFLATE, h5z.FILTER_LZF)]
    if not set(filters) <= known or len(packers) > 1:
        raise InputError(f"{path}: {key} uses HDF5 filters other than gzip, lzf, shuffle or fletcher32; save it again")
    if not packers:
        return
    chunk_bytes = prod(dataset.chunks) * dataset.dtype.itemsize + CHECKSUM_BYTES
    for index in range(dataset.id.get_num_chunks()):
        chunk = dataset.id.get_chunk_info(index)
        if chunk.size > 2 * chunk_bytes + MIN_CHUNK_VALUES:
            raise InputError(f"{path}: a chunk of {key} is longer than its pixels; save it again")
        _, packed = dataset.id.read_direct_chunk(chunk.chunk_offset)
        is_deflated = packers[0] == h5z.FILTER_DEFLATE and not chunk.filter_mask & 1 << filters.index(packers[0])
        if is_deflated and len(zlib.decompressobj().decompress(packed, chunk_bytes + 1)) > chunk_bytes:
            raise InputError(f"{path}: a chunk of {key} inflates to more than its pixels; save it again")


def _check_keys(path: Path, keys: Collection[str]) -> None:
    missing = [key for key in (IMAGE, LABEL) if key not in keys]
    extra = sorted(set(keys) - {IMAGE, LABEL, *IGNORED})
    if missing or extra:
        wrong = [f"{' and '.join(missing)} missing"] * bool(missing) + [f"{', '.join(extra[:3])} unknown"] * bool(extra)
        raise InputError(f"{path} must hold the arrays 'image' and 'label' and no other: {'; '.join(wrong)}")


def _check_array(path: Path, key: str, shape: Any, dtype: Any) -> None:
    if shape is None or len(shape) not in (2, 3):
        raise InputError(
            f"{path}: {key} has the shape {shape}; expected two axes for a slice, or three for a volume, slices first"
        )
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise InputError(f"{path}: {key} holds {dtype}; integers and floats of up to 64 bits are supported")
    check_size(path, shape, slices=shape[0] if len(shape) == 3 else 1, dtype=dtype)
