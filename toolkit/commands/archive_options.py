"""The options of ``infer`` for whole archives."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg_trt.errors import UsageError

if TYPE_CHECKING:
    from medseg_trt.archive.request import ArchiveRequest, Part


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveOptions:
    """What was asked for; ``request`` is None where the inputs are images and flat folders."""

    request: "ArchiveRequest | None"
    part: "Part | None"
    join: bool
    ray_address: str | None


def archive_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for archives to a command, which takes them as one argument, ``archive``."""

    @wraps(command)
    def run(*, inputs: tuple[Path, ...], **arguments: Any) -> Any:
        asked = {name: arguments.pop(name) for name in _NAMES}
        return command(inputs=inputs, archive=_parsed(inputs, **asked), **arguments)

    with_options: Callable[..., Any] = run
    for option in reversed(_OPTIONS):
        with_options = option(with_options)
    return with_options


_OPTIONS = (
    click.option("--tree", is_flag=True, help="Search folders to any depth; masks mirror them."),
    click.option("--list", "list_file", metavar="FILE", help="Also take the inputs that a file lists; - is stdin."),
    click.option(
        "--names",
        type=click.Choice(["tree", "dicom"]),
        default="tree",
        show_default=True,
        help="Name masks after the folders, or after patient, study and series.",
    ),
    click.option(
        "--where", multiple=True, metavar="CONDITION", help="DICOM only: Modality=CT, or SeriesDescription~venous."
    ),
    click.option("--part", metavar="I/N", help="Segment one of N parts, as jobs of an array do."),
    click.option("--num-parts", type=click.IntRange(1), help="With --part-id, as in nnU-Net."),
    click.option("--part-id", type=click.IntRange(0), help="The part, from 0."),
    click.option(
        "--ray",
        "ray_address",
        is_flag=False,
        flag_value="auto",
        metavar="[ADDRESS]",
        help="Run on this Ray cluster, or on the one that this machine belongs to.",
    ),
    click.option("--join", is_flag=True, help="Only write the tables of parts that have ended."),
)
_NAMES = ("tree", "list_file", "names", "where", "part", "num_parts", "part_id", "join", "ray_address")


def _parsed(
    inputs: tuple[Path, ...],
    *,
    tree: bool,
    list_file: str | None,
    names: Any,
    where: tuple[str, ...],
    part: str | None,
    num_parts: int | None,
    part_id: int | None,
    join: bool,
    ray_address: str | None,
) -> ArchiveOptions:
    if not inputs and list_file is None:
        raise click.UsageError("Missing argument 'INPUTS...': name an image or a folder, or give --list FILE")
    chosen = _part(part, num_parts, part_id)
    if join and chosen is not None:
        raise UsageError("--join takes all parts; leave out --part, --num-parts and --part-id")
    if ray_address is not None and (join or chosen is not None):
        raise UsageError("--ray divides the images itself; leave out --part, --num-parts, --part-id and --join")
    is_asked = tree or names != "tree" or join or any((list_file, where, chosen, ray_address))
    if not (is_asked or _is_archive(inputs)):
        return ArchiveOptions(request=None, part=None, join=False, ray_address=None)
    from medseg_trt.archive.request import ArchiveRequest, Condition

    request = ArchiveRequest(list_file=list_file, names=names, where=tuple(map(Condition.parse, where)))
    return ArchiveOptions(request=request, part=chosen, join=join, ray_address=ray_address)


def _is_archive(inputs: tuple[Path, ...]) -> bool:
    """Return whether an input is an archive file, a DICOMDIR or a pattern."""
    from medseg_trt.archive.entries import needs_archive

    return any(map(needs_archive, inputs))


def _part(part: str | None, num_parts: int | None, part_id: int | None) -> "Part | None":
    if (num_parts is None) != (part_id is None):
        raise UsageError("--num-parts and --part-id need each other; or write --part 1/8")
    if part is not None and num_parts is not None:
        raise UsageError("--part and --num-parts say the same; give one of them")
    if part is None and (num_parts is None or part_id is None):
        return None
    from medseg_trt.archive.request import Part

    return Part.parse(part if part is not None else f"{(part_id or 0) + 1}/{num_parts}")
