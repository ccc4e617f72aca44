"""A bundle: one folder that holds everything needed to segment images, and the proof of what is in it.

``manifest.json`` names every other file with its size and SHA-256, and nothing is opened before those agree. Digests
detect corruption; a signature over the manifest also detects tampering. No bundle holds a pixel of a training image:
its golden input is seeded noise. ``config.json`` and ``preprocessor_config.json`` repeat the manifest for Hugging Face.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.files import inside, parse_json, read_limited, sha256, write_json
from medseg_trt.graph_interface import require_interface, required_interface
from medseg_trt.imaging.preprocess import golden
from medseg_trt.signature import verify
from medseg_trt.spec import BuildSpec, Classes, EngineSpec, ModelSpec, Preprocessing, from_dict, to_dict

SCHEMA = 3
READABLE = (2, 3)  # a bundle of schema 2 has no engines
MANIFEST, GOLDEN = "manifest.json", "golden.npz"
DEFAULT_GRAPH = "model.onnx"  # one of the graphs once more, under the name that other tools look for
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
MAX_MANIFEST_BYTES, MAX_GOLDEN_BYTES = 4 << 20, 1 << 30
PREPROCESSING_TOLERANCE = 1e-6  # of values of order 1; a float32 rounds them by 6e-8, and there are a few additions


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """What a file of the bundle must be."""

    sha256: str
    bytes: int

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One graph of the bundle: the network in one precision and one flavour."""

    precision: str
    flavour: str  # a key of export.flavours.FLAVOURS
    graph: str  # file names in the bundle
    weights: str
    passes: Mapping[str, Any]  # what folding, fusing and quantising did, and why not more

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """One way to run a variant, and what came of it on the machine where the bundle was built."""

    variant: str  # a key of Manifest.variants
    backend: str  # a key of session.BACKENDS
    compute: str  # what its float parts are computed in: fp32 or bf16
    executed: bool  # False where the back-end was not installed: then the other figures are of the same graph elsewhere
    golden_error: float  # how far the logits of the golden input may be from those in GOLDEN
    verification: Mapping[str, Any]  # against PyTorch: how far, on which images, whether the gate holds
    median_ms: float | None = None  # of one image

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """An engine of the bundle, for GPUs; its fingerprint and the report of its layers lie beside it."""

    plan: str  # "engines/NAME.plan"
    variant: str  # a key of Manifest.variants: the graph that it was built from
    spec: EngineSpec
    executed: bool = False  # whether it ever ran; until then all that is known of its masks is that of the graph
    wall_s: float  # that the process which built it took, with everything
    processor_s: float  # that it used
    peak_resident_mb: float  # that it had at most; 0 where the system does not say
    unmet: tuple[str, ...] = ()  # what the report of its layers expected in vain

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What stands in ``manifest.json``."""

    schema: int = SCHEMA
    model: ModelSpec
    preprocessing: Preprocessing
    classes: Classes
    build: BuildSpec
    source: Mapping[str, Any]  # the checkpoint's name, digests, training data and recipe
    versions: Mapping[str, str]
    variants: Mapping[str, Variant]
    executions: tuple[Execution, ...]  # the best first: that is what ``infer`` uses where its back-end is installed
    engines: tuple[BuiltEngine, ...] = ()
    dropped: tuple[str, ...] = ()  # the executions that were tried and are not to be used, each with its reason
    files: Mapping[str, FileEntry] = field(default_factory=dict[str, FileEntry])  # filled in by seal

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.executions:
            raise ValueError("there is no way to run the bundle in it")
        for execution in self.executions:
            if execution.variant not in self.variants:
                raise ValueError(f"the variant {execution.variant!r} is not among {', '.join(self.variants)}")
        for engine in self.engines:
            if engine.variant not in self.variants:
                raise ValueError(f"the variant {engine.variant!r} is not among {', '.join(self.variants)}")


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
    write_json(folder / CONFIG, _config(manifest))
    write_json(folder / PROCESSOR, _preprocessor_config(manifest.preprocessing))
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


def _config(manifest: Manifest) -> dict[str, Any]:
    """Return ``config.json``; a binary network has one logit and two labels."""
    names = manifest.classes.names
    height, width = manifest.model.image_size
    return {
        "model_type": "medseg-trt",
        "architectures": [manifest.model.architecture],
        "image_size": [height, width],
        "num_channels": 3,
        "num_logits": manifest.model.num_classes,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _preprocessor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return ``preprocessor_config.json``; Hugging Face has no word for the windows, spacing_mm and channel_order."""
    height, width = preprocessing.image_size
    return {
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resize": preprocessing.resize,
        "do_rescale": True,
        "window": list(preprocessing.window),
        "own_window": preprocessing.own_window,
        "spacing_mm": preprocessing.spacing_mm,
        "channel_order": preprocessing.channel_order,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
