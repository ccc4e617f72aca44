"""The labels of a NIfTI mask at the positions of a DICOM slice's pixels."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import apply_affine


def labels_at(nifti: Path, dataset: Any) -> np.ndarray:
    """Return the labels (rows, columns) of a slice, found by the two geometries alone."""
    volume: Any = nibabel.load(nifti)
    along_row, along_column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    between_rows, between_columns = map(float, dataset.PixelSpacing)
    rows, columns = np.indices((dataset.Rows, dataset.Columns))
    lps = (
        np.array(dataset.ImagePositionPatient, float)
        + columns[..., None] * between_columns * along_row
        + rows[..., None] * between_rows * along_column
    )
    index = np.rint(apply_affine(np.linalg.inv(volume.affine), lps * (-1, -1, 1))).astype(int)
    return np.asarray(volume.dataobj)[index[..., 0], index[..., 1], index[..., 2]]
