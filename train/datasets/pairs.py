"""Pair the images of a folder with the masks of another by name; omitted files are reported."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import READERS, Source, natural_key, output_stem
from medseg_trt.imaging.listing import sources_in
from medseg_trt.progress import plural

PARTS = (
    ("images", "masks"),
    ("imagesTr", "labelsTr"),
)  # the second is nnU-Net's and the Medical Segmentation Decathlon's
IMAGE_ENDINGS = ("", "_0000", "_image", "_img")  # of stems; _0000 is nnU-Net's first channel
MASK_ENDINGS = (
    "",
    "_segmentation",
    "_seg",
    "-seg",
    "_mask",
    "_masks",
    "_label",
    "_labels",
    "-label",
    "_labelmap",
    "_gt",
    "_groundtruth",
    "_annotation",
)
SECOND_CHANNEL = "_0001"
SEGMENTATION = ".seg"  # 3D Slicer's second suffix: v0.seg.nrrd
SEGMENTATION_SUFFIXES = (".seg.nrrd", ".seg.nhdr")
JUNK = ("thumbs.db", "desktop.ini")  # written by file managers
JUNK_FOLDERS = ("__MACOSX",)
HEADER_ALONE = ".nhdr"  # its voxels are in a separate file
MAX_NAMED = 3
MAX_ALONE = 10  # files without a partner, in one message


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """An image and its mask."""

    name: str  # of the image, with the sub-folders that it lies in, without the common ending
    image: Source
    mask: Source


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedFolder:
    """All pairs of a data folder, and facts about how they were found."""

    pairs: Mapping[str, Pair]  # by name
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tree:
    """The contents of a folder and its sub-folders."""

    folder: Path
    sources: Mapping[str, Source]  # by name with sub-folders
    others: tuple[Path, ...]  # of unsupported kinds


def find_pairs(root: Path) -> PairedFolder:
    """Find every image below ``images/`` and its mask below ``masks/``, or below ``imagesTr/`` and ``labelsTr/``.

    Relative paths must match except for the suffix and one common ending of all masks, such as ``_mask``.

    Raises:
        InputError: a folder is missing or cannot be listed, an image or a mask has no partner or shares its name with
            another, or a link is broken.
    """
    images, masks = (_tree(folder) for folder in _parts(root))
    endings = _endings(images, masks, root)
    by_name = [
        {name.removesuffix(ending): source for name, source in tree.sources.items()}
        for tree, ending in zip((images, masks), endings, strict=True)
    ]
    pairs = {name: Pair(name=name, image=image, mask=by_name[1][name]) for name, image in by_name[0].items()}
    return PairedFolder(pairs=pairs, remarks=tuple(_remarks(root, images, masks, pairs, endings)))


def first_few(names: list[str]) -> str:
    """Return the first few names, and whether there are more."""
    return ", ".join(names[:MAX_NAMED]) + (", …" if len(names) > MAX_NAMED else "")


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, list[Path]]]:
    """Yield a folder and those below it, each with its files; hidden files and files of file managers are omitted.

    Raises:
        InputError: a folder cannot be listed, or a link is broken or leads to a parent folder.
    """
    own_folder = folder.resolve()
    if own_folder in above:
        raise InputError(f"{folder} is a link that leads back to a folder above it; remove it")
    try:
        inside = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
        visible = [path for path in inside if not path.name.startswith(".") and path.name.lower() not in JUNK]
        lost = next((path for path in visible if not path.exists()), None)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}; grant access, or move it elsewhere") from error
    if lost is not None:
        raise InputError(f"{lost} is a link to {lost.readlink()}, which does not exist; fetch it or remove the link")
    folders = [path for path in visible if path.is_dir() and path.name not in JUNK_FOLDERS]
    yield folder, [path for path in visible if not path.is_dir()]
    for path in folders:
        yield from files_below(path, (*above, own_folder))


def _parts(root: Path) -> tuple[Path, Path]:
    """Return the folders of the images and of the masks.

    Raises:
        InputError: a folder is missing, or both layouts are present.
    """
    complete = [parts for parts in PARTS if all((root / part).is_dir() for part in parts)]
    if len(complete) > 1:
        raise InputError(
            f"{root} holds {' and '.join('/'.join(parts) for parts in complete)}; keep one pair of folders"
        )
    begun = next((parts for parts in PARTS if any((root / part).is_dir() for part in parts)), PARTS[0])
    for part in (complete or [begun])[0]:
        if not (root / part).is_dir():
            raise InputError(
                f"{root / part} does not exist; a data folder holds images/ and masks/ (or imagesTr/ and labelsTr/) "
                "with the same file names"
            )
    images, masks = (complete or [begun])[0]
    return root / images, root / masks


def _tree(root: Path) -> _Tree:
    sources: dict[str, Source] = {}
    others: list[Path] = []
    for folder, files in files_below(root):
        inside = sources_in(folder) if files else []
        for source in inside:
            name = _name(source, root)
            if (other := sources.setdefault(name, source)) is not source:
                raise InputError(
                    f"{other.path} and {source.path} have the same name but for the suffix; rename one, with its mask"
                )
        read = {file for source in inside for file in source.files}
        headers = tuple(output_stem(file) for file in read if file.name.lower().endswith(HEADER_ALONE))
        others += [file for file in files if file not in read and not (headers and file.name.startswith(headers))]
    if not sources:
        raise InputError(
            f"{root} holds no image that can be read" + (f", only {first_few(_names(others))}" if others else "")
        )
    return _Tree(folder=root, sources=sources, others=tuple(others))


def _name(source: Source, root: Path) -> str:
    stem = source.stem
    if source.path.name.lower().endswith(SEGMENTATION_SUFFIXES):
        stem = stem[: -len(SEGMENTATION)]
    below = source.path.parent if source.path != root else root
    return (below.relative_to(root) / stem).as_posix()


def _endings(images: _Tree, masks: _Tree, root: Path) -> tuple[str, str]:
    """Return the common ending of all image names and of all mask names.

    Raises:
        InputError: no ending pairs all of them.
    """
    fitting = [
        (of_images, of_masks)
        for of_images in IMAGE_ENDINGS
        for of_masks in MASK_ENDINGS
        if _without(images, of_images) == _without(masks, of_masks) is not None
    ]
    if fitting[:1] == [("", "")] or len(fitting) == 1:
        return fitting[0]
    channels = {name[: -len(SECOND_CHANNEL)] for name in images.sources if name.endswith(SECOND_CHANNEL)}
    if channels and channels <= masks.sources.keys():
        raise InputError(
            f"{images.folder} holds several channels of {plural(len(channels), 'image')}, as nnU-Net has them "
            f"({min(channels)}_0000, _0001 …); an image here is one of them: keep the files of one channel"
        )
    raise InputError(_unpaired(images, masks, root))


def _without(tree: _Tree, ending: str) -> frozenset[str] | None:
    """Return the names without an ending; None if a name lacks the ending."""
    if not all(name.endswith(ending) and name != ending for name in tree.sources):
        return None
    return frozenset(name.removesuffix(ending) for name in tree.sources)


def _unpaired(images: _Tree, masks: _Tree, root: Path) -> str:
    """Name a file without a partner, and the most similar name."""
    alone = sorted(images.sources.keys() ^ masks.sources.keys(), key=natural_key)
    name = alone[0]
    has, lacks, other = ("image", "mask", masks) if name in images.sources else ("mask", "image", images)
    if unread := [path for path in other.others if path.with_suffix("").name == Path(name).name]:
        near = f"{unread[0]} is of a kind that cannot be read"
    elif close := difflib.get_close_matches(name, [key for key in other.sources if key in alone], 1, 0.0):
        near = f"the nearest name is {close[0]}"
    else:
        near = f"all other {lacks}s have their {has}"
    pairs = len(images.sources.keys() & masks.sources.keys())
    lonely = [plural(len(tree.sources) - pairs, kind) for kind, tree in (("image", images), ("mask", masks))]
    listed = ", ".join(alone[:MAX_ALONE]) + (", …" if len(alone) > MAX_ALONE else "")
    without = f"; these are without a partner: {listed}" if len(alone) > 1 else ""
    return (
        f"{root}: {name} has no {lacks}: there is no file of that name under {other.folder.name}/; {near} "
        f"({plural(pairs, 'pair')}; without a partner: {' and '.join(lonely)}){without}. "
        f"Names must match but for the suffix, or but for one ending of all masks: {', '.join(MASK_ENDINGS[1:])}. "
        f"After a change: medseg-trt data check {root}"
    )


def _remarks(
    root: Path, images: _Tree, masks: _Tree, pairs: Mapping[str, Pair], endings: tuple[str, str]
) -> Iterator[str]:
    for kind, ending in zip(("images", "masks"), endings, strict=True):
        if ending:
            yield f"{plural(len(pairs), 'pair')}: the names of all {kind} end with {ending}, which pairs them"
    if nested := [name for name in pairs if "/" in name]:
        yield (
            f"{len(nested)} of {plural(len(pairs), 'pair')} lie in sub-folders, such as {nested[0]}, and are read too; "
            "where a sub-folder is a patient, name the splits in dataset.json so that none is in two of them"
        )
    for tree in (images, masks):
        if tree.others:
            yield (
                f"{tree.folder.name}/ holds {plural(len(tree.others), 'file')} of other kinds, which are left out: "
                f"{first_few(_names(list(tree.others)))}"
            )
    if beside := _not_read(root, images, masks):
        yield (
            f"only {images.folder.name}/ and {masks.folder.name}/ are read; beside them lie, and are left out: "
            f"{first_few(beside)}"
        )


def _not_read(root: Path, images: _Tree, masks: _Tree) -> list[str]:
    """Return the names of the other visible folders in a data folder, and of images."""
    names = sorted(f"{path.name}{'/' * path.is_dir()}" for path in root.iterdir() if not path.name.startswith("."))
    known = {f"{folder}/" for folder in (images.folder.name, masks.folder.name, *JUNK_FOLDERS)}
    return [name for name in names if name not in known and name.lower().endswith(("/", *READERS))]


def _names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]
