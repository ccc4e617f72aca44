"""A bundle: one folder that holds everything needed to segment images, and the proof of what is in it.

``manifest.json`` names every other file with its size and SHA-256, and nothing is opened before those agree. Digests
detect corruption; a signature over the manifest also detects tampering. No bundle holds a pixel of a training image:
its golden input is seeded noise. ``config.json`` and ``preprocessor_config.json`` repeat the manifest for Hugging Face.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.bundles.hugging_face import model_config, preprocessor_config
from medseg_trt.bundles.manifest import BuiltEngine, Execution, FileEntry, Manifest, Variant
from medseg_trt.bundles.signature import verify
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.export.graph.interface import require_interface, required_interface
from medseg_trt.files import inside, parse_json, read_limited, sha256, write_json
from medseg_trt.imaging.preprocess import golden
from medseg_trt.spec import Classes, Preprocessing, from_dict, to_dict

READABLE = (2, 3)  # a bundle of schema 2 has no engines
MANIFEST, GOLDEN = "manifest.json", "golden.npz"
DEFAULT_GRAPH = "model.onnx"  # one of the graphs once more, under the name that other tools look for
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
MAX_MANIFEST_BYTES, MAX_GOLDEN_BYTES = 4 << 20, 1 << 30
PREPROCESSING_TOLERANCE = 1e-6  # of values of order 1; a float32 rounds them by 6e-8, and there are a few additions


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A bundle on disk whose files are what its manifest says."""

    folder: Path
    content: Manifest
    signed_by: str | None = None  # fingerprint of the key that its signature was verified with

    @property
    def preprocessing(self) -> Preprocessing:
        """How decoded pixels become the network's input."""
        return self.content.preprocessing

    @property
    def classes(self) -> Classes:
        """The names and colours of the labels."""
        return self.content.classes

    @property
    def default(self) -> Execution:
        """What ``infer`` uses where its back-end is installed."""
        return self.content.executions[0]

    def variant(self, execution: Execution) -> Variant:
        """Return the graph of an execution."""
        return self.content.variants[execution.variant]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return what can be run, as a header and rows of text."""
        header = ["precision", "back-end", "floats", "ms", "equal px", "Dice", "drop <", "MB"]
        return header, [self._row(execution) for execution in self.content.executions]

    def _row(self, execution: Execution) -> list[str]:
        variant, found = self.variant(execution), execution.verification
        gate = found.get("gate")
        size = sum((self.folder / name).stat().st_size for name in (variant.graph, variant.weights))
        return [
            variant.precision + (f" ({variant.flavour})" if variant.flavour != "canonical" else ""),
            execution.backend if execution.executed else f"{execution.backend} (not installed here)",
            execution.compute,
            "–" if execution.median_ms is None else f"{execution.median_ms:.2f}",
            f"{100 * found['agreement']:.2f} %",
            f"{gate['candidate']:.4f}" if gate else "same",
            f"{gate['high']:.4f}" if gate else "–",
            f"{size / 1e6:.1f}",
        ]

    def engine_table(self) -> tuple[list[str], list[list[str]]]:
        """Return the engines, as a header and rows of text."""
        header = ["engine", "library", "GPUs", "executed", "MB", "build s", "build MB", "unmet expectations"]
        return header, [self._engine_row(engine) for engine in self.content.engines]

    def _engine_row(self, engine: BuiltEngine) -> list[str]:
        precision = self.content.variants[engine.variant].precision
        return [
            precision + (" (plugins)" if engine.spec.plugins else ""),
            engine.spec.library,
            ", ".join(engine.spec.targets),
            "yes" if engine.executed else "no",
            f"{(self.folder / engine.plan).stat().st_size / 1e6:.1f}",
            f"{engine.wall_s:.1f}",
            f"{engine.peak_resident_mb:.0f}",
            str(len(engine.unmet)),
        ]

    def manifest(self) -> dict[str, Any]:
        """Return the manifest as plain data that JSON can hold."""
        return to_dict(self.content)

    def golden(self) -> tuple[Float32[ndarray, "1 3 height width"], Float32[ndarray, "1 classes height width"]]:
        """Return the golden input and PyTorch's logits for it."""
        return _read_golden(self.folder / GOLDEN)


def find_bundle(folder: Path | None) -> Path:
    """Return ``folder``, or without one the only ``*.medseg`` in the current folder.

    Raises:
        UsageError: there is none, or there are several.
    """
    if folder is not None:
        return folder
    found = sorted(path for path in Path().glob("*.medseg") if path.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            "there is no *.medseg folder here. Build one: medseg-trt build --ckpt model.pt, or name it: --bundle DIR"
        )
    raise UsageError(f"there are several bundles here; choose one: {', '.join(f'--bundle {path}' for path in found)}")


def load_bundle(folder: Path | str, verify_key: Path | None = None) -> Bundle:
    """Open a bundle after checking every file in it.

    Args:
        folder: the bundle.
        verify_key: a file with the public key of who built it: then the manifest must be signed with its private key.

    Raises:
        ArtefactError: it is no bundle, its signature is missing or wrong, a file is missing or changed, or this version
            prepares images in another way.
        UsageError: ``verify_key`` is none.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(f"{folder} is no bundle: it has no {MANIFEST}. Build one: medseg-trt build --ckpt model.pt")
    written = read_limited(path, MAX_MANIFEST_BYTES)
    signed_by = verify(path, written, verify_key) if verify_key is not None else None
    content = _read_manifest(path, written)
    named = {name for variant in content.variants.values() for name in (variant.graph, variant.weights)}
    named |= {name for engine in content.engines for name in (engine.plan, f"{engine.plan.removesuffix('.plan')}.json")}
    named |= {GOLDEN, *(name for name in (DEFAULT_GRAPH, CONFIG, PROCESSOR) if (folder / name).exists())}
    if unlisted := sorted(named - content.files.keys()):
        raise ArtefactError(f"{path} gives no digest of {', '.join(unlisted)}; the bundle is not to be trusted")
    for name, entry in content.files.items():
        _check_file(inside(folder, name), entry, folder)
    bundle = Bundle(folder=folder, content=content, signed_by=signed_by)
    _check_graphs(folder, content)
    _check_preprocessing(bundle)
    return bundle


def seal(folder: Path, manifest: Manifest, golden_logits: ndarray, default_graph: str | None) -> None:
    """Complete a folder that holds the graphs: golden data, configs, and last the manifest with all digests.

    Args:
        folder: with the graphs.
        manifest: without digests.
        golden_logits: PyTorch's, of ``golden_input``.
        default_graph: the file that other tools open as ``model.onnx``; None: the bundle has none.

    Raises:
        ArtefactError: a graph takes or gives something else than the manifest says.
    """
    np.savez(folder / GOLDEN, pixel_values=golden_input(manifest.preprocessing), logits=golden_logits)
    if default_graph is not None:
        (folder / DEFAULT_GRAPH).write_bytes((folder / default_graph).read_bytes())
    _check_graphs(folder, manifest)
    write_json(folder / CONFIG, model_config(manifest))
    write_json(folder / PROCESSOR, preprocessor_config(manifest.preprocessing))
    files = {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, to_dict(replace(manifest, files=files)))


def golden_input(preprocessing: Preprocessing) -> Float32[ndarray, "1 3 height width"]:
    """Return the golden input: seeded noise after this version's preprocessing, which it thereby pins."""
    _, prepared = golden(preprocessing)
    return prepared[np.newaxis]


def _read_manifest(path: Path, written: bytes) -> Manifest:
    """Make a manifest of the very bytes whose signature was verified."""
    data = parse_json(path, written)
    fields = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    if fields.get("schema") not in READABLE:
        raise ArtefactError(
            f"{path} has schema {fields.get('schema')!r}; this version reads {' and '.join(map(str, READABLE))}. "
            "Build the bundle again"
        )
    return from_dict(Manifest, fields, str(path))


def _check_file(path: Path, entry: FileEntry, folder: Path) -> None:
    rebuild = "copy the bundle again, or rebuild it: medseg-trt build --ckpt model.pt"
    if not path.is_file():
        raise ArtefactError(f"{folder} is not complete: {path.name} is missing; {rebuild}")
    if path.stat().st_size != entry.bytes or sha256(path) != entry.sha256:
        raise ArtefactError(f"{path} is not what {MANIFEST} says it is; {rebuild}")


def _check_graphs(folder: Path, manifest: Manifest) -> None:
    required = required_interface(manifest.model, manifest.preprocessing, manifest.build.outputs)
    graphs = {variant.graph for variant in manifest.variants.values()}
    for name in sorted(graphs | ({DEFAULT_GRAPH} if (folder / DEFAULT_GRAPH).is_file() else set())):
        require_interface(folder / name, required)


def _check_preprocessing(bundle: Bundle) -> None:
    stored, _ = bundle.golden()
    computed = golden_input(bundle.preprocessing)
    if stored.shape != computed.shape or not np.abs(stored - computed).max() <= PREPROCESSING_TOLERANCE:
        raise ArtefactError(
            f"{bundle.folder} was built by a version that prepares images in another way; build it again: "
            "medseg-trt build --ckpt model.pt"
        )


def _read_golden(path: Path) -> tuple[ndarray, ndarray]:
    if path.stat().st_size > MAX_GOLDEN_BYTES:
        raise ArtefactError(f"{path} is larger than {MAX_GOLDEN_BYTES >> 30} GiB; it is not to be trusted")
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["pixel_values"], file["logits"]
    except (ValueError, KeyError, OSError) as error:
        raise ArtefactError(f"{path} holds no golden input and logits: {error}") from error
