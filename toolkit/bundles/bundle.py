"""A bundle: one folder that holds everything needed to segment images, and the proof of what is in it.

``manifest.json`` lists every other file with its size and SHA-256. Files are compared with it when the bundle is
loaded, and once more when they are used: a session runs the bytes that the manifest describes, whatever happens to the
folder meanwhile. Digests detect corruption; a signature over the manifest also detects tampering. No bundle holds a
pixel of a training image: its golden input is seeded noise, and its guard keeps the mean of many slices at 8 x 8
pixels. ``config.json`` and ``preprocessor_config.json`` repeat the manifest for Hugging Face.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.bundles.block_report import EXACT
from medseg_trt.bundles.golden_file import LOGITS, PIXEL_VALUES, Shape, max_golden_bytes, parse_golden
from medseg_trt.bundles.graph_check import Weights, check_graph
from medseg_trt.bundles.hugging_face import differing_fields, model_config, preprocessor_config
from medseg_trt.bundles.manifest import SCHEMA, Execution, FileEntry, Manifest, Variant
from medseg_trt.bundles.older_manifests import OLDER, current_fields
from medseg_trt.bundles.signature import signature_of, verify
from medseg_trt.bundles.verified_files import check_file, private_copy, read_file
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.export.graph.interface import MAX_GRAPH_BYTES, required_interface
from medseg_trt.files import parse_json, read_limited, sha256, size_text, write_json
from medseg_trt.guard.guard import unusual
from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import golden
from medseg_trt.imaging.segment import Finish
from medseg_trt.postprocess.apply import finisher
from medseg_trt.postprocess.steps import Postprocessing
from medseg_trt.spec import Classes, Preprocessing, from_dict, to_dict
from medseg_trt.tiling.windows import Tiles, is_as_recorded, recorded_tiles

MANIFEST, GOLDEN = "manifest.json", "golden.npz"
DEFAULT_GRAPH = "model.onnx"  # one of the graphs once more, under the name that other tools look for
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_GOLDEN_BYTES = 1 << 28  # 64 times that of a network of 512 x 512 pixels and nine classes
PREPROCESSING_TOLERANCE = 1e-6  # of values of order 1; a float32 rounds them by 6e-8, and there are a few additions


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A bundle on disk whose files are what its manifest says."""

    folder: Path
    content: Manifest
    manifest_sha256: str  # of the bytes that ``content`` was read from
    signed_by: str | None = None  # fingerprint of the key that its signature was verified with
    raw_masks: bool = False  # leave masks as the network makes them, whatever post-processing the manifest has
    tiles: Tiles | None = None  # segment images window by window, as ``load_bundle`` reads it; None: slices as a whole

    @property
    def preprocessing(self) -> Preprocessing:
        """How decoded pixels become the network's input."""
        return self.content.preprocessing

    @property
    def classes(self) -> Classes:
        """The names and colours of the labels."""
        return self.content.classes

    @property
    def postprocessing(self) -> Postprocessing | None:
        """The steps that correct masks; None: masks stay as the network makes them.

        Steps were learnt on masks that are made as the preprocessing records, so masks of other windows stay raw.
        """
        as_learnt = is_as_recorded(self.tiles, self.preprocessing)
        return self.content.postprocessing if as_learnt and not self.raw_masks else None

    @property
    def finish(self) -> Finish:
        """What corrects the labels of a whole image."""
        return finisher(self.postprocessing, self.classes, self.trained_side)

    @property
    def trained_side(self) -> float | None:
        """How large the largest training images were, where that matters to post-processing: see ``unsuited``."""
        guard = self.content.guard
        return None if guard is None or self.tiles is None else guard.largest_side

    def unusual(self, image: Image) -> str | None:
        """Say in which way an image is far outside of the training images; None: it is not, or nothing is known."""
        guard = self.content.guard
        return None if guard is None else unusual(guard, image, self.preprocessing)

    @property
    def mask_key(self) -> str:
        """What masks depend on: the digest of the manifest, whether they stay raw, and the windows."""
        left_out = self.postprocessing is None and self.content.postprocessing is not None
        windows = "" if self.tiles is None else f", {self.tiles}"
        return self.manifest_sha256 + (", raw masks" if left_out else "") + windows

    @property
    def default(self) -> Execution:
        """What ``infer`` uses where its back-end is installed."""
        return self.content.executions[0]

    def variant(self, execution: Execution) -> Variant:
        """Return the graph of an execution."""
        return self.content.variants[execution.variant]

    @property
    def block(self) -> str:
        """The rung of the language block in the graphs; empty where the network has none.

        Bundles from before there were rungs hold the exact block.
        """
        if self.content.block is not None:
            return self.content.block.rung
        model = self.content.model
        return EXACT if model.block is not None and not model.insert.train_only else ""

    @property
    def is_block_replaced(self) -> bool:
        """Whether the graphs compute something cheaper than the checkpoint's language block."""
        return self.block not in ("", EXACT)

    def manifest(self) -> dict[str, Any]:
        """Return the manifest as plain data that JSON can hold."""
        return to_dict(self.content)

    def golden(self) -> tuple[Float32[ndarray, "1 3 height width"], Float32[ndarray, "1 classes height width"]]:
        """Return the golden input and PyTorch's logits for it.

        Raises:
            ArtefactError: the file is not what the manifest says, or holds something else.
        """
        return parse_golden(self.folder / GOLDEN, self.read(GOLDEN), golden_shapes(self.content))

    def read(self, name: str) -> bytes:
        """Return the bytes of a file, which are those that the manifest describes.

        Raises:
            ArtefactError: the manifest does not list it, or it has changed.
        """
        return read_file(self.folder, name, self._entry(name))

    @contextmanager
    def private_copy(self, names: Iterable[str]) -> Generator[Path, None, None]:
        """Yield a folder that only this user may enter, with these files as the manifest describes them.

        Raises:
            ArtefactError: the manifest does not list one of them, or it has changed, or the disk is full.
        """
        entries = {name: self._entry(name) for name in names}
        with private_copy(self.folder, entries, entries) as folder:
            yield folder

    def _entry(self, name: str) -> FileEntry:
        if name not in self.content.files:
            raise ArtefactError(f"{self.folder / MANIFEST} gives no digest of {name}; it is not used")
        return self.content.files[name]


def is_signed(bundle: Bundle) -> bool:
    """Say whether a bundle comes with a signature, which may be anyone's."""
    return signature_of(bundle.folder / MANIFEST).is_file()


def find_bundle(folder: Path | None) -> Path:
    """Return ``folder``, or without one the only ``*.medseg`` in the current folder.

    Raises:
        UsageError: there is none, or there are several.
    """
    if folder is not None:
        return folder
    bundles = sorted(path for path in Path().glob("*.medseg") if path.is_dir())
    if len(bundles) == 1:
        return bundles[0]
    if not bundles:
        raise UsageError(
            "there is no *.medseg folder here. Build one: medseg-trt build --ckpt run/best.pt, or name it: --bundle DIR"
        )
    raise UsageError(f"there are several bundles here; choose one: {', '.join(f'--bundle {path}' for path in bundles)}")


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
        raise ArtefactError(
            f"{folder} is no bundle: it has no {MANIFEST}. Build one: medseg-trt build --ckpt run/best.pt"
        )
    written = read_limited(path, MAX_MANIFEST_BYTES)
    signed_by = verify(path, written, verify_key) if verify_key is not None else None
    content = _read_manifest(path, written)
    _require_listed(folder, content)
    bundle = Bundle(
        folder=folder,
        content=content,
        manifest_sha256=hashlib.sha256(written).hexdigest(),
        signed_by=signed_by,
        tiles=recorded_tiles(content.preprocessing),
    )
    _require_small(bundle)
    read_here = {GOLDEN, *(variant.graph for variant in content.variants.values())}
    for name, entry in content.files.items():
        if name not in read_here:
            check_file(folder, name, entry)
    _check_graphs(folder, content, bundle.read)
    _check_preprocessing(bundle)
    _check_configs(bundle)
    return bundle


def seal(folder: Path, manifest: Manifest, golden_logits: ndarray, default_graph: str | None) -> None:
    """Complete a folder that holds the graphs: golden data, configs, and last the manifest with all digests.

    It may have been sealed before; the new manifest takes the old one's place.

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
    write_json(folder / CONFIG, model_config(manifest))
    write_json(folder / PROCESSOR, preprocessor_config(manifest.preprocessing))
    files = {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    sealed = replace(manifest, files=files)
    _check_graphs(folder, sealed, lambda name: read_file(folder, name, files[name]))
    write_json(folder / MANIFEST, to_dict(sealed))


def golden_input(preprocessing: Preprocessing) -> Float32[ndarray, "1 3 height width"]:
    """Return the golden input: seeded noise after this version's preprocessing, which it thereby pins."""
    _, prepared = golden(preprocessing)
    return prepared[np.newaxis]


def golden_shapes(manifest: Manifest) -> Mapping[str, Shape]:
    """Return the shapes of the golden input and of PyTorch's logits for it."""
    model = manifest.model
    return {PIXEL_VALUES: (1, 3, *model.image_size), LOGITS: (1, model.num_classes, *model.image_size)}


def _read_manifest(path: Path, written: bytes) -> Manifest:
    """Make a manifest of the very bytes whose signature was verified."""
    data = parse_json(path, written)
    fields = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    schema = fields.get("schema")
    if schema in OLDER:
        fields = current_fields(fields)
    elif schema != SCHEMA:
        raise ArtefactError(
            f"{path} has schema {schema!r}; this version reads {', '.join(map(str, OLDER))} and {SCHEMA}. "
            "Build the bundle again"
        )
    return from_dict(Manifest, fields, str(path))


def _require_listed(folder: Path, content: Manifest) -> None:
    """Refuse a bundle with a file in use that the manifest gives no digest of."""
    used = {name for variant in content.variants.values() for name in (variant.graph, variant.weights)}
    used |= {name for engine in content.engines for name in (engine.plan, f"{engine.plan.removesuffix('.plan')}.json")}
    used |= {GOLDEN, *(name for name in (DEFAULT_GRAPH, CONFIG, PROCESSOR) if (folder / name).exists())}
    if unlisted := sorted(used - content.files.keys()):
        raise ArtefactError(
            f"{folder / MANIFEST} gives no digest of {', '.join(unlisted)}; the bundle is not to be trusted"
        )


def _require_small(bundle: Bundle) -> None:
    """Refuse sizes that no network of ours has, before anything of these sizes is read or made."""
    content, model = bundle.content, bundle.content.model
    if bundle.preprocessing.image_size != model.image_size:
        raise ArtefactError(f"{bundle.folder} prepares images of another size than its network takes; build it again")
    expected = max_golden_bytes(golden_shapes(content))
    if expected > MAX_GOLDEN_BYTES:
        height, width = model.image_size
        raise ArtefactError(
            f"{bundle.folder / MANIFEST} describes a network of {height} x {width} pixels and {model.num_classes} "
            f"classes, whose golden data exceed {size_text(MAX_GOLDEN_BYTES)}; it is not to be trusted"
        )
    limits = {GOLDEN: expected, **{variant.graph: MAX_GRAPH_BYTES for variant in content.variants.values()}}
    for name, limit in limits.items():
        if content.files[name].bytes > limit:
            raise ArtefactError(f"{bundle.folder / name} is larger than {size_text(limit)}; it is not to be trusted")


def _check_graphs(folder: Path, manifest: Manifest, read: Callable[[str], bytes]) -> None:
    required = required_interface(manifest.model, manifest.preprocessing, manifest.build.outputs)
    files = manifest.files
    for variant in manifest.variants.values():
        weights = Weights(name=variant.weights, num_bytes=files[variant.weights].bytes)
        check_graph(folder / variant.graph, read(variant.graph), required, weights)
    digests = {files[variant.graph].sha256 for variant in manifest.variants.values()}
    if DEFAULT_GRAPH in files and files[DEFAULT_GRAPH].sha256 not in digests:
        raise ArtefactError(f"{folder / DEFAULT_GRAPH} is none of the bundle's graphs; it is not to be trusted")


def _check_configs(bundle: Bundle) -> None:
    """Refuse a manifest that was edited: the files for Hugging Face hold the same window, sizes and class names."""
    expected = {CONFIG: model_config(bundle.content), PROCESSOR: preprocessor_config(bundle.preprocessing)}
    for name, fields in expected.items():
        if name in bundle.content.files:
            stored = parse_json(bundle.folder / name, bundle.read(name))
            if differing := differing_fields(stored, fields):
                raise ArtefactError(
                    f"{bundle.folder / MANIFEST} and {name} differ in {', '.join(differing)}; one was edited. "
                    "Build the bundle again: medseg-trt build --ckpt run/best.pt"
                )


def _check_preprocessing(bundle: Bundle) -> None:
    stored, _ = bundle.golden()
    computed = golden_input(bundle.preprocessing)
    if not np.abs(stored - computed).max() <= PREPROCESSING_TOLERANCE:
        raise ArtefactError(
            f"{bundle.folder} was built by a version that prepares images in another way; build it again: "
            "medseg-trt build --ckpt run/best.pt"
        )
