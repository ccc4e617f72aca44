"""Options for what data sets and papers leave open; each default is most likely the paper's choice."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.spec import from_dict

Order = Literal["natural", "lexicographic", "manifest"]
GroupBy = Literal["none", "sequence", "patient"]
MaskPolicy = Literal["or", "first"]
Normals = Literal["exclude", "include"]
OrganOrder = Literal["transunet", "emcad"]
Count = Literal["official", "any"] | int


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """The data set of a folder, and how it is read and divided: ``--set data.FIELD=VALUE``.

    ``dataset`` is a key of ``official.DATASETS``, or "folder" for ``images/`` and ``masks/`` with ``dataset.json``;
    None detects it from the layout. ``count`` is the required number of cases: the official number, any, or a number;
    of ColonDB 300 and 380 are in use.

    ``order`` is the order of the files before the split of ``split_seed``: numbers in names count as numbers, or
    letter by letter, or as the lines of ``manifest`` say. The authors' order, that of their disk, is unknown.
    ``group_by`` keeps the frames of one sequence, or all of one patient, in one split. ``manifest`` without
    ``order=manifest`` is the ``data.json`` of another run, whose splits are used.

    ``masks`` merges several masks of a BUSI image, or uses only the first; ``normals`` adds BUSI's images without a
    lesion. ``organs`` is the order in which Synapse's eight organs are numbered.
    """

    dataset: str | None = None
    count: Count = "official"
    order: Order = "natural"
    split_seed: int = 41
    group_by: GroupBy = "none"
    manifest: str | None = None  # a path
    masks: MaskPolicy = "or"
    normals: Normals = "exclude"
    organs: OrganOrder = "transunet"

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed is {self.split_seed}; it must be 0 … 2**32 - 1")
        if isinstance(self.count, int) and self.count < 1:
            raise ValueError(f"count is {self.count}; it must be 1 or more, or 'official' or 'any'")
        if self.order == "manifest" and self.manifest is None:
            raise ValueError("order=manifest needs the file that holds the order: manifest=FILE")


def with_changes(options: DataOptions, changes: Sequence[str]) -> DataOptions:
    """Return the options with some changed.

    Args:
        options: the options before.
        changes: ``data.field=value``; a value is JSON, or plain text where it is not JSON.

    Raises:
        UsageError: no such field, or a value that it cannot take.
    """
    values = asdict(options)
    for change in changes:
        path, equals, text = change.partition("=")
        name = path.removeprefix("data.")
        if not equals or name not in values:
            raise UsageError(f"--set {change}: write it as data.field=value; the fields are: {', '.join(values)}")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    try:
        return from_dict(DataOptions, values, "--set " + " ".join(changes))
    except ArtefactError as error:
        raise UsageError(str(error)) from error
