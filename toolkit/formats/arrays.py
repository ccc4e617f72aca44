"""Arrays with their labels in one file: NumPy's ``.npz`` and HDF5, as TransUNet and SSL4MIS prepare Synapse and ACDC.

Both hold ``image`` and ``label``, a slice (height, width) or a volume (slices, height, width). They lie as whoever made
the file laid them, since nothing in it says where the patient's left is. Neither is trusted: no pickle is loaded, sizes
are checked before anything is unpacked, and no link is followed out of an HDF5 file.
"""

import zipfile
from collections.abc import Collection
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError, require
from medseg_trt.formats.guard import check_size, naming, require_finite
from medseg_trt.images import Image

IMAGE, LABEL = "image", "label"
IGNORED = ("scribble",)  # WSL4MIS's weak labels, beside the full ones
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read(path: Path) -> Image:
    """Read the image of a file.

    Raises:
        InputError: it is damaged or too large, lacks the image or the label, or holds something else beside them.
    """
    return Image(path=path, pixels=_slices_first(path, IMAGE)[..., np.newaxis])


def read_labels(path: Path, like: Image) -> ndarray:
    """Read the labels of a file, slices first.

    Raises:
        InputError: it cannot be read, or the labels are not of the image's size.
    """
    labels = _slices_first(path, LABEL)
    if labels.shape != like.pixels.shape[:3]:
        raise InputError(f"{path}: the label is {labels.shape}, but the image is {like.pixels.shape[:3]}")
    return labels


def _slices_first(path: Path, key: str) -> ndarray:
    read_key = _from_npz if path.suffix.lower() == ".npz" else _from_hdf5
    with naming(path, KeyError, RuntimeError, SyntaxError, TokenError, zipfile.BadZipFile):
        values = read_key(path, key)
    require_finite(path, values)
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
    return np.ascontiguousarray(values if values.ndim == 3 else values[np.newaxis])


def _from_npz(path: Path, key: str) -> ndarray:
    with zipfile.ZipFile(path) as archive:
        _check_keys(path, [name.removesuffix(".npy") for name in archive.namelist()])
        with archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            if version not in NPY_HEADERS:
                raise InputError(f"{path}: {key} is of NumPy's format {version}; save it again with numpy.savez")
            shape, is_fortran, dtype = NPY_HEADERS[version](file)
            _check_array(path, key, shape, dtype)
            expected = prod(shape) * dtype.itemsize
            content = file.read(expected)
            file.read(1)  # at the end of a member its checksum is compared
            if len(content) < expected:
                raise InputError(f"{path} is cut short: {key} holds {len(content)} of {expected} bytes")
    values = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
    return values.astype(dtype.newbyteorder("="), copy=False)


def _from_hdf5(path: Path, key: str) -> ndarray:
    h5py: Any = require("h5py", "medical")
    with h5py.File(path, "r") as file:
        _check_keys(path, list(file))
        is_inside = isinstance(file.get(key, getlink=True), h5py.HardLink) and isinstance(file[key], h5py.Dataset)
        if not is_inside or file[key].external or file[key].is_virtual:
            raise InputError(f"{path}: {key} does not lie in the file itself; it is not to be trusted")
        _check_array(path, key, file[key].shape, file[key].dtype)
        values: ndarray = file[key][()]
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _check_keys(path: Path, keys: Collection[str]) -> None:
    missing = [key for key in (IMAGE, LABEL) if key not in keys]
    extra = sorted(set(keys) - {IMAGE, LABEL, *IGNORED})
    if missing or extra:
        wrong = [f"{' and '.join(missing)} missing"] * bool(missing) + [f"{', '.join(extra[:3])} unknown"] * bool(extra)
        raise InputError(f"{path} must hold the arrays 'image' and 'label' and no other: {'; '.join(wrong)}")


def _check_array(path: Path, key: str, shape: Any, dtype: Any) -> None:
    if shape is None or len(shape) not in (2, 3):
        raise InputError(f"{path}: {key} has the shape {shape}; a slice has two axes, a volume three, slices first")
    check_size(path, shape)
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise InputError(f"{path}: {key} holds {dtype}; integers and floats of up to 64 bits are possible")
