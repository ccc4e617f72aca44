"""A bundle that version 0.1.0 wrote, for tests that change it; it needs no PyTorch and no build."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx

from medseg_trt.bundles.bundle import MANIFEST
from medseg_trt.files import sha256

ARCHIVE = Path(__file__).parent / "fixtures" / "bundle-schema-3.zip"
GRAPH, PLAIN_GRAPH, WEIGHTS = "fp32.onnx", "fp32-plain.onnx", "weights-fp32.bin"  # for ONNX Runtime, for OpenVINO


def stored_bundle(folder: Path) -> Path:
    """Unpack the bundle into a folder and return it."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest as whoever may write to the bundle can."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def rehash(folder: Path) -> None:
    """Write the true sizes and digests of all files into the manifest."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(MANIFEST)]
    digests = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files
    }
    edit_manifest(folder, lambda manifest: manifest.update(files=digests))


def edit_graphs(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change every graph, and the digests with it."""
    for path in folder.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())
    rehash(folder)
