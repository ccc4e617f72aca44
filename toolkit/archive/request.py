"""What a run over an archive is asked for: the inputs, the names of the masks, the conditions and the part."""

import re
from dataclasses import dataclass
from typing import Literal

from medseg_trt.errors import UsageError

Names = Literal["tree", "dicom"]
CONDITION = re.compile(r"\s*(?P<keyword>[A-Za-z0-9]+)\s*(?P<relation>[=~])(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """A condition on one DICOM attribute."""

    keyword: str  # of DICOM's dictionary, such as ``Modality``
    relation: Literal["=", "~"]  # equals; contains, in any case
    value: str

    def __str__(self) -> str:
        return f"{self.keyword}{self.relation}{self.value}"

    def holds(self, actual: str) -> bool:
        """Return whether an attribute's value meets the condition."""
        if self.relation == "=":
            return actual == self.value
        return self.value.casefold() in actual.casefold()

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Parse ``Modality=CT`` or ``SeriesDescription~venous``.

        Raises:
            UsageError: it has another form, or DICOM has no such attribute.
            MissingExtraError: pydicom is not installed.
        """
        matched = CONDITION.fullmatch(text)
        if matched is None:
            raise UsageError(f"--where {text!r} is no condition; write Modality=CT, or SeriesDescription~venous")
        from medseg_trt.archive.dicom_attributes import require_keyword

        require_keyword(matched["keyword"])
        relation: Literal["=", "~"] = "=" if matched["relation"] == "=" else "~"
        return cls(keyword=matched["keyword"], relation=relation, value=matched["value"].strip())


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One of several parts of a run, for example of a job array."""

    number: int  # from 1
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def holds(self, position: int) -> bool:
        """Return whether the part has the image at a position, from 0, in the order of all images."""
        return position % self.of == self.number - 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Parse ``3/8``.

        Raises:
            UsageError: it has another form, or there is no such part.
        """
        matched = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip(), re.ASCII)
        number, of = (int(matched[1]), int(matched[2])) if matched else (0, 0)
        if not 1 <= number <= of:
            raise UsageError(f"--part {text} is no part; write 1/8 for the first of eight, up to 8/8")
        return cls(number=number, of=of)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveRequest:
    """Which images are wanted, and how their masks are named."""

    list_file: str | None = None  # a file with one input per line; ``-`` is standard input
    names: Names = "tree"  # masks mirror the folders, or are named by patient, study and series
    where: tuple[Condition, ...] = ()  # all must hold
