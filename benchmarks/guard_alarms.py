"""How often does the guard name images that are unlike the training images, and how often others?

The guard of the sample ``organs`` is learnt as ``build`` learns it: from the training slices of one CT scan, with its
limit from held-out slices of the same scan. Then every slice of the held-out block, of another CT scan and of an MR
scan is judged, as it is and with each corruption, and so are the photographs in scikit-learn.

    medseg-trt samples get organs -o data
    python benchmarks/guard_alarms.py --data data/organs
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from results_file import options, publish, table
from sklearn.datasets import load_sample_image

from medseg_trt.guard.guard import Guard, unusual
from medseg_trt.guard.learn import learn_guard
from medseg_trt.imaging.images import Image, read_image
from medseg_trt.spec import Preprocessing
from medseg_trt.train.datasets.folder import open_folder, read_case_image

PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # of scikit-learn
LUNG = (-1350.0, 150.0)  # a window for lungs


def _windowed(low: float, high: float) -> Callable[[ndarray], ndarray]:
    return lambda pixels: (255 * (pixels.clip(low, high) - low) / (high - low)).astype(np.uint8)


def _striped(pixels: ndarray, axis: int, period: int, value: float) -> ndarray:
    striped = pixels.copy()
    striped[(*(slice(None),) * axis, slice(None, None, period))] = value
    return striped


def corruptions(window: tuple[float, float]) -> Mapping[str, Callable[[ndarray], ndarray]]:
    """Return what is done to the values of a volume, by name."""
    return {
        "as it is": lambda pixels: pixels,
        "inverted: the negative of every value": lambda pixels: -pixels,
        "inverted within its range": lambda pixels: pixels.max() + pixels.min() - pixels,
        "8-bit picture of the right window": _windowed(*window),
        "8-bit picture of a lung window": _windowed(*LUNG),
        "rescale intercept left out (+1024)": lambda pixels: pixels + 1024,
        "every slice upside down": lambda pixels: pixels[:, ::-1],
        "left and right exchanged": lambda pixels: pixels[:, :, ::-1],
        "every 4th row at the lowest value": lambda pixels: _striped(pixels, 1, 4, pixels.min()),
        "every 16th column at the highest value": lambda pixels: _striped(pixels, 2, 16, pixels.max()),
        "slices in reverse order": lambda pixels: pixels[::-1],
    }


def judged(name: str, corruption: str, image: Image, guard: Guard, preprocessing: Preprocessing) -> dict[str, Any]:
    """Judge every slice alone and the image as a whole."""
    alone = [replace(image, pixels=image.pixels[number : number + 1]) for number in range(image.num_slices)]
    return {
        "image": name,
        "corruption": corruption,
        "slices": image.num_slices,
        "named_slices": sum(unusual(guard, slice_, preprocessing) is not None for slice_ in alone),
        "reason": unusual(guard, image, preprocessing),
    }


def rows_of(data: Path) -> Iterator[tuple[Guard, dict[str, Any]]]:
    """Yield the guard and every row of the table."""
    folder = open_folder(data)
    window = folder.window or (0.0, 255.0)
    preprocessing = Preprocessing(image_size=(128, 128), window=window)
    held_out = [read_case_image(case) for case in folder.cases("val")]
    guard = learn_guard(map(read_case_image, folder.cases("train")), held_out, preprocessing)
    assert guard is not None
    images = {
        "CT, held-out slices of the training scan": held_out[0],
        "CT of another patient, with contrast agent": read_case_image(folder.cases("test")[0]),
    }
    for name, image in images.items():
        values = image.pixels.astype(np.float32)
        for corruption, change in corruptions(window).items():
            yield guard, judged(name, corruption, replace(image, pixels=change(values)), guard, preprocessing)
    magnetic = read_image(data / "images" / "mr_C.nii.gz")
    yield guard, judged("MR", "another modality", magnetic, guard, preprocessing)
    for file in PHOTOGRAPHS:
        photograph = Image(path=Path(file), pixels=load_sample_image(file)[np.newaxis])
        yield guard, judged(f"photograph {file}", "RGB picture", photograph, guard, preprocessing)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the table and what it does not show."""
    header = ("image", "corruption", "slices named", "image named", "reason")
    rows = [
        (
            row["image"],
            row["corruption"],
            f"{row['named_slices']} of {row['slices']}",
            "yes" if row["reason"] else "no",
            row["reason"] or "",
        )
        for row in result["rows"]
    ]
    return "\n".join(
        [
            "# Images unlike the training images",
            "",
            f"The guard: {result['guard']}. The limit is {result['limit']:.2f} spreads. A volume is named where more "
            "than half of its compared slices are far outside.",
            "",
            *table(header, rows),
            "",
            "One training scan: the rates are by slice, neighbouring slices are alike, and one other CT scan passing "
            "is no rate for scanners. The least spreads of the features were chosen with these scans in view, so that "
            "the other CT scan is no independent test of false alarms. Slices in reverse order are the same slices to "
            "a network that sees one at a time.",
            "",
        ]
    )


def main() -> None:
    """Judge all images and write the results."""
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the sample organs")
    chosen = parser.parse_args()
    pairs = list(rows_of(chosen.data))
    guard = pairs[0][0]
    result = {"guard": guard.text(), "limit": guard.limit, "rows": [row for _, row in pairs]}
    publish("guard_alarms", result, to_markdown, chosen)


if __name__ == "__main__":
    main()
