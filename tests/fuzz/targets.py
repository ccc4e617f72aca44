"""What is fuzzed: the readers of images, and ``load_bundle``. A case is a number; it always makes the same mutant."""

import io
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel
import numpy as np
import PIL.Image
import tifffile
from dicoms import dataset, save
from fuzz.mutations import mutate, mutate_json
from pydicom.uid import JPEG2000Lossless, RLELossless
from stored_bundle import GRAPH, PLAIN_GRAPH, WEIGHTS, rehash, stored_bundle

from medseg_trt.bundles.bundle import GOLDEN, MANIFEST, load_bundle
from medseg_trt.imaging.images import read_image

VOLUME = np.arange(3 * 20 * 24, dtype=np.int16).reshape(3, 20, 24)
REHASHED = 0.8  # share of the mutants of a bundle whose digests are right


@dataclass(frozen=True)
class Target:
    """A reader and the mutants that it gets."""

    name: str
    run: Callable[[int], object]  # makes and reads the mutant of a case; a ``MedsegError`` refuses it
    kinds: tuple[str, ...]  # of files that are mutated


def readers(folder: Path) -> Target:
    """Return the readers of images; files are written into ``folder``."""
    seeds = _image_files(folder / "seeds")
    names = tuple(seeds)

    def run(case: int) -> object:
        rng = random.Random(case)
        name = rng.choice(names)
        path = folder / f"mutant{name[name.index('.') :]}"
        path.write_bytes(mutate(seeds[name], rng))
        return read_image(path)

    return Target(name="readers", run=run, kinds=names)


def bundles(folder: Path) -> Target:
    """Return ``load_bundle``; a copy of the stored bundle in ``folder`` is changed and restored for each case."""
    original = stored_bundle(folder / "original")
    mutant = shutil.copytree(original, folder / "mutant")
    kinds = (MANIFEST, MANIFEST, MANIFEST, GRAPH, GRAPH, PLAIN_GRAPH, WEIGHTS, GOLDEN, "config.json")

    def run(case: int) -> object:
        rng = random.Random(case)
        name = rng.choice(kinds)
        content = (original / name).read_bytes()
        try:
            if name == MANIFEST and rng.random() < REHASHED:
                manifest = mutate_json(json.loads(content), rng)
                (mutant / name).write_text(json.dumps(manifest), encoding="utf-8")
            else:
                (mutant / name).write_bytes(mutate(content, rng))
                if name != MANIFEST and rng.random() < REHASHED:
                    rehash(mutant)
            return load_bundle(mutant)
        finally:
            for changed in (name, MANIFEST):
                shutil.copyfile(original / changed, mutant / changed)

    return Target(name="bundles", run=run, kinds=tuple(dict.fromkeys(kinds)))


TARGETS: Mapping[str, Callable[[Path], Target]] = {"readers": readers, "bundles": bundles}


def _image_files(folder: Path) -> dict[str, bytes]:
    """Return small valid files of every format that is read, by name."""
    folder.mkdir(parents=True)
    grey = (VOLUME[0] % 256).astype(np.uint8)
    colour = np.stack([grey, grey[::-1], grey[:, ::-1]], -1)
    for name, pixels in {"a.png": grey, "b.png": VOLUME[0].astype(np.uint16), "c.jpg": colour, "d.bmp": colour}.items():
        PIL.Image.fromarray(pixels).save(folder / name)
    PIL.Image.fromarray(grey).quantize(16).save(folder / "e.png")
    tifffile.imwrite(folder / "f.tif", VOLUME, photometric="minisblack")
    tifffile.imwrite(
        folder / "g.tif",
        VOLUME.astype(np.uint16),
        compression="zlib",
        photometric="minisblack",
        metadata={"axes": "ZYX"},
    )
    for name in ("h.nii", "i.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(VOLUME.T, np.diag([2.0, 1.5, 3.0, 1.0])), folder / name)
    (folder / "j.nrrd").write_bytes(_nrrd("raw", VOLUME.tobytes()))
    (folder / "k.dcm").write_bytes(save(folder / "dicom", dataset(VOLUME[0])).read_bytes())
    for name, syntax in (("l.dcm", RLELossless), ("m.dcm", JPEG2000Lossless)):
        save(folder / name, dataset(np.tile(VOLUME[0].astype(np.uint16), (4, 4))), syntax)
    save(folder / "n.dcm", dataset(VOLUME))
    packed = io.BytesIO()
    np.savez_compressed(packed, image=VOLUME[0].astype(np.float32), label=grey)
    (folder / "o.npz").write_bytes(packed.getvalue())
    with h5py.File(folder / "p.h5", "w") as file:
        file.create_dataset("image", data=VOLUME.astype(np.float32), chunks=(1, 20, 24), compression="gzip")
        file.create_dataset("label", data=(VOLUME > 9).astype(np.uint8))
    (folder / "dicom").unlink()
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _nrrd(encoding: str, data: bytes) -> bytes:
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 24 20 3\n"
        "space directions: (2,0,0) (0,1.5,0) (0,0,3)\nkinds: domain domain domain\nendian: little\n"
        f"encoding: {encoding}\nspace origin: (0,0,0)\n\n"
    )
    return header.encode() + data
