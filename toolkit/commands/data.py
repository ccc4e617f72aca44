"""``medseg-trt data``: check a data set."""

from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import FOLDER, output_options, print_json, print_table, print_text
from medseg_trt.errors import InputError
from medseg_trt.progress import plural


@click.group()
def data() -> None:
    """Check a labelled data set before training."""


@data.command(
    "check",
    cls=ExampleCommand,
    examples=(
        "medseg-trt data check mydata",
        "medseg-trt data check Dataset_BUSI_with_GT --set data.normals=include",
    ),
)
@click.argument("folder", type=FOLDER)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change how the data is read, e.g. data.dataset=busi or data.normals=include.",
)
@output_options
def data_check(folder: Path, changes: tuple[str, ...], as_json: bool) -> None:
    """Check all images and masks of a data set.

    FOLDER is an unpacked archive, or a folder with images/ and masks/. The report lists counts, classes, sizes,
    duplicates and leaks between splits. The exit code is 1 if there is a problem.
    """
    from medseg_trt.train.datasets.check import check_data
    from medseg_trt.train.datasets.options import DataOptions, with_changes

    report = check_data(folder, with_changes(DataOptions(), changes))
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(report.title(), *report.table())
        print_table("pixels of each class", *report.class_table())
        for kind, lines in (("wrong", report.problems), ("note", report.remarks)):
            for line in lines:
                print_text(f"{kind}: {line}")
        if not report.problems:
            print_text("nothing is wrong with this data set")
    if report.problems:
        count = len(report.problems)
        raise InputError(f"{plural(count, 'problem')} in {folder}; {'it is' if count == 1 else 'they are'} named above")
