"""The table of the paper's data sets, and the steps from a folder on disk to cases in splits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import InputError, UsageError
from medseg_trt.progress import LOG
from medseg_trt.train.datasets import acdc, busi, clinicdb, colondb, isic2017, synapse
from medseg_trt.train.datasets.folder import Case, DataFolder, open_folder
from medseg_trt.train.datasets.layout import ALL, Dataset, DatasetScan, Layout
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.datasets.pairs import PARTS
from medseg_trt.train.datasets.split_manifest import (
    read_order,
    read_split_manifest,
    with_recorded_splits,
)
from medseg_trt.train.datasets.splits import paper_split

DATASETS: Mapping[str, Dataset] = {
    "isic2017": isic2017.DATASET,
    "busi": busi.DATASET,
    "clinicdb": clinicdb.DATASET,
    "colondb": colondb.DATASET,
    "synapse": synapse.DATASET,
    "acdc": acdc.DATASET,
}
FOLDER = "folder"  # the user's own data, see datasets.folder
CHOICES = ("order", "split_seed", "group_by", "masks", "normals", "organs")  # which apply to some data sets only
MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedDataset:
    """A data set in a layout that was recognised, with the contents of its folder."""

    name: str  # a key of DATASETS
    layout: Layout
    scan: DatasetScan

    @property
    def dataset(self) -> Dataset:
        """The data set's row in ``DATASETS``."""
        return DATASETS[self.name]


def open_dataset(name: str | None, root: Path, options: DataOptions | None = None) -> DataFolder:
    """Find the cases of a labelled data set, and divide them as its paper or ``dataset.json`` defines.

    Args:
        name: a key of ``DATASETS``, "folder", or None to detect it from its layout; a ``dataset.json`` overrides both.
        root: the folder that the archives were unzipped into, or a folder above it.
        options: how the data set is read and divided; if ``name`` is None, they may name the data set.

    Raises:
        InputError: the folder holds no known data set, or is incomplete; the message lists the first problems.
        UsageError: no data set has this name, or an option does not apply to it.
    """
    root, options = Path(root), options or DataOptions()
    resolved = resolve_dataset(name, root, options)
    if resolved is None:
        data = open_folder(root)
        for remark in data.remarks:
            LOG.warning("%s: %s", root, remark)
    else:
        if problems := [*resolved.scan.problems, *wrong_counts(resolved, options)]:
            more = f" (and {len(problems) - MAX_NAMED} more)" if len(problems) > MAX_NAMED else ""
            raise InputError(f"{root}, read as {resolved.dataset.title}: {'; '.join(problems[:MAX_NAMED])}{more}")
        data = split_dataset(resolved, root, options)
        for remark in resolved.scan.remarks:
            LOG.info("%s", remark)
    if options.manifest is not None and options.order != "manifest":
        data = with_recorded_splits(data, read_split_manifest(Path(options.manifest)), options.manifest)
    return data


def is_labelled(root: Path) -> bool:
    """Return whether a folder has masks, in any known layout."""
    return any((root / masks).exists() for _, masks in PARTS) or (
        root.is_dir() and bool(_matches(root, list(DATASETS), only_identifying=True))
    )


def resolve_dataset(name: str | None, root: Path, options: DataOptions) -> ResolvedDataset | None:
    """Detect the data set in a folder and scan its contents without checking them; None: it is the user's own data.

    Raises:
        InputError: the folder holds no known data set, or several.
        UsageError: no data set has this name, or an option does not apply to it.
    """
    if not root.is_dir():
        raise InputError(f"{root} does not exist, or is no folder; give the folder that the archive was unzipped into")
    name = name or options.dataset
    if name not in (None, FOLDER, *DATASETS):
        raise UsageError(f"no data set is called {name!r}; choose one of: {FOLDER}, {', '.join(DATASETS)}")
    is_own = name is None and any((root / images).is_dir() for images, _ in PARTS)
    if is_own or name == FOLDER or (root / "dataset.json").is_file():
        _reject_unused_options(options, (), f"{root}, which dataset.json divides")
        return None
    candidates = [name] if name is not None else list(DATASETS)
    matches = _matches(root, candidates, only_identifying=name is None)
    if not matches:
        raise InputError(_unknown_layout(root, candidates))
    if len(matches) > 1:
        raise InputError(f"{root} holds several data sets, {', '.join(matches)}; give the folder of one of them")
    ((detected_name, (layout, base)),) = matches.items()
    dataset = DATASETS[detected_name]
    _reject_unused_options(options, ("order", "split_seed", "group_by", *dataset.choices), dataset.title)
    LOG.info("%s is read as %s: %s", base, dataset.title, layout.description)
    return ResolvedDataset(name=detected_name, layout=layout, scan=layout.read(base, options))


def _matches(root: Path, names: Sequence[str], *, only_identifying: bool) -> dict[str, tuple[Layout, Path]]:
    """Return, by data set, the first layout that matches ``root``, and the folder to read."""
    matches: dict[str, tuple[Layout, Path]] = {}
    for name in names:
        for layout in DATASETS[name].layouts:
            if (layout.identifies_dataset or not only_identifying) and (base := layout.locate(root)) is not None:
                matches[name] = layout, base
                break
    return matches


def wrong_counts(resolved: ResolvedDataset, options: DataOptions) -> list[str]:
    """Return a problem for every case count that differs from ``options.count``."""
    parts, official = resolved.scan.parts, resolved.scan.official
    total = sum(map(len, parts.values()))
    if not parts.get(ALL) and not parts.get("train"):
        return ["there is no case to train on; if the archive was unzipped incompletely, unzip it again"]
    if options.count == "any":
        return []
    if isinstance(options.count, int):
        return [f"there are {total} cases, not {options.count}"] * (total != options.count)
    known = resolved.dataset.other_counts.get(total)
    if known is not None:
        return [f"there are {total} cases, which is {known}; to use them: --set data.count={total}"]
    return [
        f"there are {len(parts[part])} {'' if part == ALL else f'{part} '}cases, but {number} in the official archive; "
        "unzip the rest, or to use them as they are: --set data.count=any"
        for part, number in official.items()
        if len(parts[part]) != number
    ]


def split_dataset(resolved: ResolvedDataset, root: Path, options: DataOptions) -> DataFolder:
    """Sort the cases and divide them into splits.

    Raises:
        InputError: there are too few cases, their groups are unknown, or the order file does not list them.
        UsageError: the options ask for another split of a data set that comes divided.
    """
    scan, dataset = resolved.scan, resolved.dataset
    _check_unique(scan)
    choices = {name: getattr(options, name) for name in dataset.choices}
    how: dict[str, object] = {"dataset": resolved.name, "order": options.order, **choices}
    if ALL in scan.parts:
        cases = _in_order(scan.parts[ALL], options)
        splits = paper_split(cases, options.split_seed, _groups(resolved, cases, options))
        how |= {"split_seed": options.split_seed, "group_by": options.group_by}
    else:
        if options.split_seed != DataOptions().split_seed or options.group_by not in ("none", dataset.groups):
            raise UsageError(f"{dataset.title} comes divided, so data.split_seed and data.group_by cannot change it")
        splits = {part: _in_order(cases, options) for part, cases in scan.parts.items() if cases}
    LOG.info("%s: %s", dataset.title, ", ".join(f"{len(cases)} {split}" for split, cases in splits.items()))
    return DataFolder(
        root=root,
        name=dataset.title,
        classes=scan.classes,
        splits=splits,
        window=scan.window,
        modality=dataset.modality,
        layout=resolved.layout.description,
        how=how,
    )


def _in_order(cases: Sequence[Case], options: DataOptions) -> tuple[Case, ...]:
    if options.order == "lexicographic":
        return tuple(sorted(cases, key=lambda case: case.name))
    if options.order == "natural":
        return tuple(cases)  # every reader returns natural order
    assert options.manifest is not None  # DataOptions checks this
    position = {name: index for index, name in enumerate(read_order(Path(options.manifest)))}
    if unlisted := [case.name for case in cases if case.name not in position]:
        raise InputError(f"{options.manifest} does not name {unlisted[0]} ({len(unlisted)} such case(s))")
    return tuple(sorted(cases, key=lambda case: position[case.name]))


def _groups(resolved: ResolvedDataset, cases: Sequence[Case], options: DataOptions) -> list[str] | None:
    if options.group_by == "none":
        return None
    if resolved.dataset.groups != options.group_by:
        raise UsageError(f"no {options.group_by} is known of {resolved.dataset.title}; leave data.group_by out")
    ungrouped = [case.name for case in cases if case.group is None]
    if ungrouped:
        raise InputError(
            f"data.group_by={options.group_by} needs the {options.group_by} of every case, and that of {ungrouped[0]} "
            f"is unknown ({len(ungrouped)} in all); add metadata.csv with the columns frame_id and sequence_id"
        )
    return [str(case.group) for case in cases]


def _check_unique(scan: DatasetScan) -> None:
    counts = Counter(case.name for cases in scan.parts.values() for case in cases)
    duplicates = [name for name, count in counts.items() if count > 1]
    if duplicates:
        raise InputError(f"two cases are called {duplicates[0]} ({len(duplicates)} such name(s)); rename one")


def _reject_unused_options(options: DataOptions, known: Sequence[str], title: str) -> None:
    """Reject options that would silently have no effect.

    Raises:
        UsageError: an option differs from its default and is not in ``known``.
    """
    default = DataOptions()
    for name in CHOICES:
        if name not in known and getattr(options, name) != getattr(default, name):
            raise UsageError(f"data.{name} has no effect on {title}; leave it out")


def _unknown_layout(root: Path, candidates: Sequence[str]) -> str:
    layouts = {name: [layout.description for layout in DATASETS[name].layouts] for name in candidates}
    known = "; ".join(f"{name}: {' or '.join(descriptions)}" for name, descriptions in layouts.items())
    return f"{root} holds no known data set. Known are images/ with masks/ and dataset.json; {known}"
