"""Check a whole data set: report its contents, its faults, and limits of its figures."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import Source, read_labels
from medseg_trt.imaging.label_values import pixels_per_label
from medseg_trt.progress import plural, track
from medseg_trt.train.datasets.data_report import CaseFacts, DataReport
from medseg_trt.train.datasets.duplicates import ImageHash, find_duplicates, hash_image
from medseg_trt.train.datasets.folder import Case, DataFolder, manifest_sha256, open_folder, read_case, shared_slices
from medseg_trt.train.datasets.layout import ALL
from medseg_trt.train.datasets.official import resolve_dataset, split_dataset, wrong_counts
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.datasets.pairs import first_few
from medseg_trt.train.datasets.split_manifest import read_split_manifest, with_recorded_splits

NIFTI = (".nii", ".nii.gz")
MAX_NAMED = 3
TWO_SPLITS = "in two splits"
REMEDY = (
    "Put all images of a patient into one split, or remove the copies; the splits of your own images are in "
    'dataset.json: {"splits": {"train": [{"image": "scan1"}, {"image": "scan2"}], "val": [{"image": "scan3"}]}}'
)
NOTHING_TO_LEARN = "all masks of the training split are empty, so that nothing can be learnt; give masks with labels"


def check_data(root: Path, options: DataOptions | None = None) -> DataReport:
    """Read every image and mask of a data set, and report all problems, not only the first one.

    Raises:
        InputError: the folder holds no known data set.
        UsageError: an option does not apply to the data set.
    """
    options = options or DataOptions()
    data, problems, remarks = _open(root, options)
    facts: list[CaseFacts] = []
    hashes: list[ImageHash] = []
    cases = [(split, case) for split, cases in data.splits.items() for case in cases]
    for split, case in track(cases, "read images and masks"):
        try:
            case_facts, image_hash = _facts(split, case, data)
        except InputError as error:
            problems.append(str(error))
            continue
        facts.append(case_facts)
        hashes.append(image_hash)
    problems += [f"the splits share slices: {overlap}" for overlap in shared_slices(data.splits)]
    problems += orientation_problems(data)
    for problem, pairs in _copies(facts, hashes).items():
        text = f"{plural(len(pairs), 'pair')} {problem}: {first_few(pairs)}"
        if problem.endswith(TWO_SPLITS):
            problems.append(f"{text}. {REMEDY}")
        else:
            remarks.append(text)
    problems += _shared_groups(facts, data) + _nothing_to_learn(facts)
    remarks += _remarks(facts, data)
    digest = manifest_sha256(data.manifest()) if not problems else None
    return DataReport(
        name=data.name,
        layout=data.layout,
        root=str(root),
        classes=data.classes,
        how=data.how,
        cases=tuple(facts),
        digest=digest,
        problems=tuple(problems),
        remarks=tuple(remarks),
    )


def require_usable(data: DataFolder) -> None:
    """Check, before training, the cases of all splits other than the training split.

    Raises:
        InputError: one of them cannot be used, only some volumes state their orientation, or no mask of the training
            split holds a label.
    """
    if problems := orientation_problems(data):
        raise InputError(problems[0])
    training = data.splits.get("train", ())
    if not any(read_case(case, len(data.classes.names))[1].any() for case in training):
        raise InputError(f"{data.root}: {NOTHING_TO_LEARN}")
    others = [case for split, cases in data.splits.items() if split != "train" for case in cases]
    for case in track(others, "check the images and masks that are not trained on"):
        read_case(case, len(data.classes.names))


def orientation_problems(data: DataFolder) -> list[str]:
    """Report volumes without an orientation among volumes with one: left and right may be swapped in them.

    Volumes with an orientation are all reoriented to LPS, however they are stored.
    """
    axes = _stored_axes(data)
    unoriented, oriented = [path for path in axes if not axes[path]], [path for path in axes if axes[path]]
    if not unoriented or not oriented:
        return []
    return [
        f"{unoriented[0]} does not say how it lies ({len(unoriented)} such volume(s)), but {oriented[0]} does, "
        "so they cannot be turned alike; repair its sform or qform"
    ]


def _stored_axes(data: DataFolder) -> dict[Path, str]:
    """Return the axis directions of every NIfTI volume; empty: the volume has no orientation."""
    from medseg_trt.imaging.formats.nifti import stored_axes

    axes: dict[Path, str] = {}
    for case in chain.from_iterable(data.splits.values()):
        path = case.image.path if isinstance(case.image, Source) else case.image
        if path.name.lower().endswith(NIFTI):
            try:
                axes[path] = stored_axes(path)
            except InputError:  # reading the volume reports it
                continue
    return axes


def _open(root: Path, options: DataOptions) -> tuple[DataFolder, list[str], list[str]]:
    """Open a data set and collect its faults; a data set that cannot be divided is opened undivided."""
    resolved = resolve_dataset(None, root, options)
    if resolved is None:
        data, problems = open_folder(root), []
        remarks = list(data.remarks)
    else:
        scan = resolved.scan
        problems, remarks = [*scan.problems, *wrong_counts(resolved, options)], list(scan.remarks)
        try:
            data = split_dataset(resolved, root, options)
        except InputError as error:
            problems.append(str(error))
            data = DataFolder(root=root, name=resolved.dataset.title, classes=scan.classes, splits=scan.parts)
    if options.manifest is not None and options.order != "manifest":
        data = with_recorded_splits(data, read_split_manifest(Path(options.manifest)), options.manifest)
    return data, problems, remarks


def _facts(split: str, case: Case, data: DataFolder) -> tuple[CaseFacts, ImageHash]:
    image, labels = read_case(case, len(data.classes.names))
    values = image.pixels
    counts = pixels_per_label(labels, len(data.classes.names))
    facts = CaseFacts(
        name=case.name,
        split=split,
        group=case.group,
        size=image.size,
        slices=image.num_slices,
        channels=values.shape[3],
        numbers=str(values.dtype),
        low=float(values.min()),
        high=float(values.max()),
        spacing_mm=image.spacing_mm,
        pixels_of_label=tuple(counts.tolist()),
        empty_slices=int((labels.reshape(len(labels), -1).max(axis=1) == 0).sum()),
        is_grey_mask=case.is_binary and len(np.unique(read_labels(case.mask, image, None))) > 2,
    )
    return facts, hash_image(values, data.window)


def _copies(facts: Sequence[CaseFacts], hashes: Sequence[ImageHash]) -> Mapping[str, list[str]]:
    """Return the pairs of duplicate images, by the kind of problem."""
    pairs_of: defaultdict[str, list[str]] = defaultdict(list)
    for pair in find_duplicates(hashes, [case.group for case in facts]):
        first, second = facts[pair.first], facts[pair.second]
        where = "in one split" if first.split == second.split else TWO_SPLITS
        kind = "of images hold the same pixels" if pair.is_exact else "of images look alike"
        pairs_of[f"{kind}, {where}"].append(f"{first.name} ({first.split}) and {second.name} ({second.split})")
    return pairs_of


def _shared_groups(facts: Sequence[CaseFacts], data: DataFolder) -> list[str]:
    splits_of: defaultdict[str, set[str]] = defaultdict(set)
    for case in facts:
        if case.group is not None:
            splits_of[case.group].add(case.split)
    shared = [f"{group} ({' and '.join(sorted(splits))})" for group, splits in splits_of.items() if len(splits) > 1]
    remedy = "; to keep them together: --set data.group_by=sequence" if "group_by" in data.how else ""
    return [_named("patients or sequences are in two splits", shared) + remedy] * bool(shared)


def _nothing_to_learn(facts: Sequence[CaseFacts]) -> list[str]:
    training = [case for case in facts if case.split in ("train", ALL)]
    return [NOTHING_TO_LEARN] * bool(training and not any(any(case.pixels_of_label[1:]) for case in training))


def _remarks(facts: Sequence[CaseFacts], data: DataFolder) -> list[str]:
    """Return facts that are not faults but limit the meaning of the figures."""
    labelled = np.sum([case.pixels_of_label for case in facts], axis=0) if facts else np.zeros(0)
    spacings = {case.spacing_mm is None for case in facts}
    axes = [f"{axes or 'not said'} {count}" for axes, count in Counter(_stored_axes(data).values()).items()]
    names_of = {
        "masks are empty": [case.name for case in facts if case.empty_slices == case.slices],
        "masks hold greys between black and white; brighter than half counts as the lesion": [
            case.name for case in facts if case.is_grey_mask
        ],
        "images are of one value": [case.name for case in facts if case.low == case.high],
        "classes occur in no mask": [
            name for name, count in zip(data.classes.names, labelled, strict=False) if not count
        ],
        "ways of storing the axes are mixed; all volumes are turned to LPS": axes if len(axes) > 1 else [],
    }
    remarks = [_named(fact, names) for fact, names in names_of.items() if names]
    if len(spacings) > 1:
        remarks.append("some images have a spacing and some have none, so that HD95 has no common unit")
    return remarks


def _named(fact: str, names: Sequence[str]) -> str:
    return f"{len(names)} {fact}: {', '.join(names[:MAX_NAMED])}{', …' if len(names) > MAX_NAMED else ''}"
