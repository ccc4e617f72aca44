"""Generated archives of the paper's data sets: folders and files named as in the official ones, pictures tiny.

Nothing in them is a photograph, a scan or a patient. Every writer takes the folder to write below and returns what a
user would give as ``--data``; all shapes are drawn by ``tiny.picture`` from a seed. There are fewer cases than in the
real archives, so that they are read with ``data.count=any``.
"""

from collections.abc import Sequence
from pathlib import Path

import h5py
import nibabel
import numpy as np
import PIL.Image
from tiny import picture

SIZE = (32, 40)  # rows, columns
ANY_COUNT = "data.count=any"
HEADER_LABELS = 14  # of BTCV's raw labels, background included


def write_isic2017(root: Path, train: int = 6, val: int = 3, test: int = 3, size: tuple[int, int] = SIZE) -> Path:
    """Write the six archives of ISIC 2017's first task, superpixels and the capital of the test masks included."""
    first = 0
    for count, archive, suffix in (
        (train, "Training", "_segmentation.png"),
        (val, "Validation", "_segmentation.png"),
        (test, "Test_v2", "_Segmentation.png"),
    ):
        data = _folder(root / f"ISIC-2017_{archive}_Data")
        truth = _folder(root / f"ISIC-2017_{archive}_Part1_GroundTruth")
        for number in range(first, first + count):
            colours, mask = colour_picture(number, size)
            name = f"ISIC_{number:07d}"
            PIL.Image.fromarray(colours).save(data / f"{name}.jpg", quality=95)
            PIL.Image.fromarray(mask).save(truth / f"{name}{suffix}")
            if archive == "Training":
                PIL.Image.fromarray(colours[::-1]).save(data / f"{name}_superpixels.png")
        first += count
    return root


def write_busi(root: Path, benign: int = 12, malignant: int = 6, normal: int = 3, size: tuple[int, int] = SIZE) -> Path:
    """Write ``Dataset_BUSI_with_GT``; ``benign (1)`` has two masks, ``malignant (1)`` three; modes of masks vary."""
    base = root / "Dataset_BUSI_with_GT"
    several = {"benign (1)": 2, "malignant (1)": 3}
    modes = ("1", "L", "RGB", "RGBA")
    seed = 0
    for kind, count in (("benign", benign), ("malignant", malignant), ("normal", normal)):
        folder = _folder(base / kind)
        for number in range(1, count + 1):
            name = f"{kind} ({number})"
            grey, labels = picture(seed, size)
            PIL.Image.fromarray(np.stack([grey] * 3, axis=-1)).save(folder / f"{name}.png")
            for index in range(several.get(name, 1)):
                lesion = np.roll(labels == 1, 12 * index, axis=1) & (kind != "normal")
                mask = PIL.Image.fromarray((255 * lesion).astype(np.uint8)).convert(modes[seed % len(modes)])
                mask.save(folder / (f"{name}_mask.png" if index == 0 else f"{name}_mask_{index}.png"))
            seed += 1
    return base


def write_clinicdb(
    root: Path, count: int = 12, *, kaggle: bool = False, frames_of_sequence: int = 3, size: tuple[int, int] = SIZE
) -> Path:
    """Write CVC-ClinicDB as the challenge gives it, or as Kaggle does, with ``metadata.csv``."""
    base = root / ("CVC-ClinicDB-Kaggle" if kaggle else "CVC-ClinicDB")
    kinds = (("PNG", "png"), ("TIF", "tif")) if kaggle else ((".", "tif"),)
    for folder, suffix in kinds:
        original, truth = _folder(base / folder / "Original"), _folder(base / folder / "Ground Truth")
        for number in range(1, count + 1):
            colours, mask = colour_picture(number, size)
            PIL.Image.fromarray(colours).save(original / f"{number}.{suffix}")
            PIL.Image.fromarray(mask).save(truth / f"{number}.{suffix}")
    if kaggle:
        rows = [
            f"{number},{1 + (number - 1) // frames_of_sequence},PNG/Original/{number}.png,"
            f"PNG/Ground Truth/{number}.png,TIF/Original/{number}.tif,TIF/Ground Truth/{number}.tif"
            for number in range(1, count + 1)
        ]
        header = "frame_id,sequence_id,png_image_path,png_mask_path,tif_image_path,tif_mask_path"
        (base / "metadata.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return base


def write_colondb(root: Path, count: int = 12, *, community: bool = False, size: tuple[int, int] = SIZE) -> Path:
    """Write CVC-ColonDB as the CVC gives it, contours and specular lights included, or as the community does."""
    base = root / "CVC-ColonDB"
    for number in range(1, count + 1):
        colours, mask = colour_picture(1000 + number, size)
        if community:
            PIL.Image.fromarray(colours).save(_folder(base / "images") / f"{number}.png")
            PIL.Image.fromarray(mask).save(_folder(base / "masks") / f"{number}.png")
        else:
            PIL.Image.fromarray(colours).save(_folder(base) / f"{number}.bmp")
            for prefix in "pcs":
                PIL.Image.fromarray(mask if prefix == "p" else 255 - mask).save(base / f"{prefix}{number}.bmp")
    return base


def write_synapse(
    root: Path,
    train: Sequence[str] = ("0005", "0006", "0007"),
    test: Sequence[str] = ("0008", "0022"),
    *,
    prepared: bool = False,
    slices: int = 3,
    size: tuple[int, int] = SIZE,
) -> Path:
    """Write BTCV's raw volumes, or TransUNet's slices, volumes and lists, of the cases that are named.

    Raw volumes hold the 13 labels in stripes, in Hounsfield units; prepared ones the labels 0 to 8 and values 0 … 1.
    """
    if prepared:
        return _write_transunet(root, train, test, slices, size)
    training = root / "RawData" / "Training"
    for name in sorted((*train, *test)):
        values, labels = _scan(int(name), slices, size, HEADER_LABELS)
        hounsfield = (values * 3.0 - 250).astype(np.int16)
        for part, stored in (("img", hounsfield), ("label", labels)):
            save_nifti(_folder(training / part) / f"{part}{name}.nii.gz", stored, (3.0, 0.8, 0.8))
    _folder(root / "RawData" / "Testing" / "img")
    return root / "RawData"


def write_acdc(
    root: Path,
    patients: Sequence[int] = (1, 2, 21, 22, 31, 32, 33),
    *,
    prepared: bool = False,
    slices: int = 3,
    size: tuple[int, int] = SIZE,
) -> Path:
    """Write ACDC's ``database/training``, or SSL4MIS's slices and volumes, of the patients that are numbered."""
    for patient in patients:
        name = f"patient{patient:03d}"
        for frame in (1, 8 + patient % 5):
            values, labels = _scan(1000 * patient + frame, slices, size, 4)
            stem = f"{name}_frame{frame:02d}"
            if prepared:
                _write_h5(root / "ACDC_training_volumes" / f"{stem}.h5", values / 255, labels)
                for index in range(slices):
                    path = root / "ACDC_training_slices" / f"{stem}_slice_{index}.h5"
                    _write_h5(path, values[index] / 255, labels[index])
                continue
            folder = _folder(root / "database" / "training" / name)
            save_nifti(folder / f"{stem}.nii.gz", values.astype(np.int16), (10.0, 1.5, 1.5))
            save_nifti(folder / f"{stem}_gt.nii.gz", labels, (10.0, 1.5, 1.5))
        if not prepared:
            folder = root / "database" / "training" / name
            info = f"ED: 1\nES: {8 + patient % 5}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
            (folder / "Info.cfg").write_text(info, encoding="utf-8")
            film = np.zeros((*reversed(size), slices, 2), np.int16)
            nibabel.save(nibabel.Nifti1Image(film, np.diag([1.5, 1.5, 10, 1])), folder / f"{name}_4d.nii.gz")
    return root if prepared else root / "database"


def colour_picture(seed: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Return a reddish picture (height, width, 3) uint8 with a bright disc, and its mask of 0 and 255."""
    grey, labels = picture(seed, size)
    colours = np.stack([grey, grey // 2 + 20, grey // 3 + 10], axis=-1)
    return colours.astype(np.uint8), (255 * (labels == 1)).astype(np.uint8)


def save_nifti(
    path: Path, slices_first: np.ndarray, spacing_mm: Sequence[float], affine: np.ndarray | None = None
) -> None:
    """Write slices from the feet up, rows from front to back, columns from right to left (LPS), as NIfTI."""
    between_slices, between_rows, between_columns = spacing_mm
    lps = np.diag([-between_columns, -between_rows, between_slices, 1.0])
    volume = nibabel.Nifti1Image(
        np.ascontiguousarray(slices_first.transpose(2, 1, 0)), lps if affine is None else affine
    )
    nibabel.save(volume, path)


def load_nifti(path: Path) -> nibabel.Nifti1Image:
    """Open a volume that was written here."""
    volume = nibabel.load(path)
    assert isinstance(volume, nibabel.Nifti1Image)
    return volume


def _write_transunet(root: Path, train: Sequence[str], test: Sequence[str], slices: int, size: tuple[int, int]) -> Path:
    data, lists = root / "data" / "Synapse", _folder(root / "lists" / "lists_Synapse")
    names: list[str] = []
    for case in train:
        values, labels = _scan(int(case), slices, size, 9)
        for index in range(slices):
            name = f"case{case}_slice{index:03d}"
            path = _folder(data / "train_npz") / f"{name}.npz"
            np.savez(path, image=(values[index] / 255).astype(np.float32), label=labels[index].astype(np.float32))
            names.append(name)
    for case in test:
        values, labels = _scan(int(case), slices, size, 9)
        _write_h5(data / "test_vol_h5" / f"case{case}.npy.h5", values / 255, labels)
    (lists / "train.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (lists / "test_vol.txt").write_text("\n".join(f"case{case}" for case in test) + "\n", encoding="utf-8")
    return data


def _scan(seed: int, slices: int, size: tuple[int, int], num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return values 0 … 255 and labels (slices, rows, columns): a stripe for every label, over half of the rows."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((slices, *size), np.uint8)
    stripes = np.minimum(np.arange(size[1]) * num_labels // size[1], num_labels - 1)
    labels[:, size[0] // 4 : 3 * size[0] // 4] = stripes
    values = 60 + 180 * labels / num_labels + rng.normal(0, 6, labels.shape) + rng.uniform(-10, 10)
    return values.clip(0, 255), labels


def _write_h5(path: Path, image: np.ndarray, label: np.ndarray) -> None:
    _folder(path.parent)
    with h5py.File(path, "w") as file:
        file["image"] = image.astype(np.float32)
        file["label"] = label.astype(np.uint8)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
