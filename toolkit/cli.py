"""The command line: one function per command, which turns arguments into a spec, calls one library function and prints.

Nothing heavy is imported before a command needs it. Results go to stdout (with ``--json`` one JSON object and nothing
else), progress and messages to stderr. Our own errors end in one line and the exit code of ``errors.py``; ``-v`` shows
the traceback.
"""

import json
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from medseg_trt import __version__
from medseg_trt.errors import InputError, MedsegError, MissingExtraError, UsageError

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
ANY = click.Path(path_type=Path)
INTERRUPTED, TERMINATED = 130, 143
EXTRAS = {  # what installs the packages that modules of train and export import without asking
    "torch": "train,export",
    "safetensors": "train",
    "scipy": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "ml_dtypes": "kernels",
}


def main() -> None:
    """Run the command line and leave with the right exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted; what was finished is kept: train --resume and infer --continue go on from there")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read us, `head` for one, has had enough
        sys.exit(1)
    except MedsegError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _complain(f"{package} is not installed. Install it: pip install 'medseg-trt[{EXTRAS[package]}]'")
        sys.exit(MissingExtraError.exit_code)
    except OSError as error:
        _complain(f"{error.filename or 'the system'}: {error.strerror or error}")
        sys.exit(1)


def _complain(message: str) -> None:
    if logging.getLogger("medseg_trt").isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    click.echo(f"medseg-trt: {' '.join(message.split())}", err=True)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--json``, ``-q`` and ``-v``."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_quieter, help="Show warnings only."),
        click.option(
            "-v", "--verbose", is_flag=True, expose_value=False, callback=_louder, help="Show details and tracebacks."
        ),
    ):
        command = option(command)
    return command


def _quieter(_context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        logging.getLogger("medseg_trt").setLevel(logging.WARNING)


def _louder(_context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        logging.getLogger("medseg_trt").setLevel(logging.DEBUG)


class _Messages(logging.Formatter):
    """A plain line; warnings say that they are."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="medseg-trt")
def cli() -> None:
    """Train, export and run medical image segmentation with a frozen LLaMA block inside.

    Research use only; not a medical device.
    """
    logger = logging.getLogger("medseg_trt")
    handler = logging.StreamHandler()
    handler.setFormatter(_Messages())
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


@cli.group()
def samples() -> None:
    """Real images, masks and weights to try things with."""


@samples.command("get")
@click.argument("names", nargs=-1, required=True)
@click.option("-o", "--output", type=FOLDER, default=Path("samples"), show_default=True, help="Where to put them.")
@output_options
def samples_get(names: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Fetch samples by NAME: organs, tumours, cells, llama-block."""
    from medseg_trt.samples import get

    folders = get(names, output)
    _print_result(as_json, {"folders": [str(folder) for folder in folders]}, "\n".join(map(str, folders)))


@cli.group()
def block() -> None:
    """The frozen LLaMA block."""


@block.command("extract")
@click.argument("source", type=ANY)
@click.option("--layer", help="Which layer: a number from 0, or last.  [default: last]")
@click.option("--layers", type=click.IntRange(1), help="Take this many layers, up to the last; for insert.num_layers.")
@click.option("--final-norm", is_flag=True, help="Also take the norm after the last layer; for insert.norm=pretrained.")
@click.option("-o", "--output", type=FILE, default=Path("block.safetensors"), show_default=True)
@output_options
def block_extract(
    source: Path, layer: str | None, layers: int | None, final_norm: bool, output: Path, as_json: bool
) -> None:  # fmt: skip
    """Take layers out of LLaMA-family weights: GGUF, Hugging Face, or Meta's consolidated.*.pth."""
    from medseg_trt.spec import to_dict
    from medseg_trt.train.blocks import extract, extract_last, provenance_of, save_block

    if layer is not None and layers is not None:
        raise UsageError("--layer takes one layer and --layers the last ones; give one of the two")
    if layer not in (None, "last") and not layer.isdecimal():
        raise UsageError(f"--layer {layer}: give a number from 0, or last")
    if layers is not None or layer in (None, "last"):
        taken = extract_last(source, layers or 1, final_norm=final_norm)
    else:
        taken = (extract(source, int(layer), final_norm=final_norm),)
    digest = save_block(taken, output)
    parameters = sum(each.num_parameters for each in taken)
    result = {
        "file": str(output), "sha256": digest, "parameters": parameters, "spec": to_dict(taken[0].spec),
        "provenance": provenance_of(taken),
    }  # fmt: skip
    _print_result(as_json, result, f"{output}: {parameters:,} parameters, sha256 {digest}")


@cli.command()
@click.option("--recipe", "recipe_name", required=True, help="A named recipe: folder, organs-demo, tumours-demo.")
@click.option("--data", "data_folder", type=FOLDER, required=True, help="A folder with images/ and masks/.")
@click.option("--block", "block_file", type=FILE, help="The frozen block, from 'medseg-trt block extract'.")
@click.option("-o", "--output", type=FOLDER, help="The run folder.  [default: runs/RECIPE]")
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a field of the recipe, e.g. train.epochs=5."
)
@click.option("--resume", is_flag=True, help="Go on with the run in the run folder.")
@output_options
def train(
    recipe_name: str, data_folder: Path, block_file: Path | None, output: Path | None, changes: tuple[str, ...],
    resume: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train a model on images and masks."""
    from medseg_trt.train.datasets.folder import open_folder
    from medseg_trt.train.loop import train as run_training
    from medseg_trt.train.recipes import recipe

    chosen = recipe(recipe_name, changes)
    out = output or Path("runs", recipe_name)
    best = run_training(chosen, open_folder(data_folder), out, block=block_file, resume=resume)
    last_row = json.loads((out / "history.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    result = {"checkpoint": str(best), "last": str(out / "last.pt"), "curve": str(out / "curve.png"), "final": last_row}
    _print_result(as_json, result, f"best checkpoint: {best}\ncurve: {out / 'curve.png'}")


@cli.command()
@click.option("--ckpt", "checkpoint", type=FILE, required=True, help="A checkpoint that 'train' wrote.")
@click.option("-o", "--output", type=FOLDER, help="The bundle's folder.  [default: the checkpoint's name with .medseg]")
@click.option(
    "--data", "data_folder", type=FOLDER,
    help="Images to verify, judge and calibrate on.  [default: the folder it was trained on]",
)  # fmt: skip
@click.option(
    "--precision", "precisions", multiple=True, default=("fp32",), show_default=True,
    help="fp32, bf16, fp16, int8, w8a16, w4a16, several with commas, or a mix such as vit=int8,block=w8a16.",
)  # fmt: skip
@click.option(
    "--max-dice-drop", type=click.FloatRange(0, 1), default=0.005, show_default=True,
    help="How much Dice may fall, at the upper end of its interval, where numbers are rounded.",
)  # fmt: skip
@click.option("--backend", default="auto", show_default=True, help="The only back-end to try; auto tries all.")
@click.option(
    "--outputs", type=click.Choice(["logits", "mask"]), default="logits", show_default=True,
    help="mask: the graphs also make masks of the images' own size.",
)  # fmt: skip
@output_options
def build(
    checkpoint: Path, output: Path | None, data_folder: Path | None, precisions: tuple[str, ...], max_dice_drop: float,
    backend: str, outputs: Literal["logits", "mask"], as_json: bool,
) -> None:  # fmt: skip
    """Turn a checkpoint into a bundle: folded, fused, in several precisions, each verified, the fastest first."""
    from medseg_trt import pipeline
    from medseg_trt.spec import BuildSpec, split_precisions

    try:
        spec = BuildSpec(
            precisions=split_precisions(precisions), max_dice_drop=max_dice_drop, backend=backend, outputs=outputs
        )
    except ValueError as error:
        raise UsageError(f"--precision {','.join(precisions)}: {error}") from error
    bundle = pipeline.build(checkpoint, spec, output, data_folder)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.folder), "manifest": bundle.manifest()}, indent=2))
        return
    _print_table(f"{bundle.folder}, the first row is what infer uses", *bundle.table())
    for line in bundle.content.dropped:
        click.echo(f"not used: {line}")


@cli.command()
@click.argument("inputs", nargs=-1, required=True, type=ANY)
@click.option("--bundle", "bundle_folder", type=FOLDER, help="The bundle to run.  [default: the only *.medseg here]")
@click.option("-o", "--output", type=FOLDER, default=Path("masks"), show_default=True, help="Where the masks go.")
@click.option("--backend", default="auto", show_default=True, help="What runs the network: onnxruntime, openvino.")
@click.option("--precision", help="One of the bundle's.  [default: the fastest]")
@click.option("--overlay", is_flag=True, help="Also draw the masks over the images, in overlays/.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Slices at once.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
@click.option("--continue", "resume", is_flag=True, help="Keep the masks that an earlier run finished.")
@output_options
def infer(
    inputs: tuple[Path, ...], bundle_folder: Path | None, output: Path, backend: str, precision: str | None,
    overlay: bool, batch: int, threads: int | None, resume: bool, as_json: bool,
) -> None:  # fmt: skip
    """Segment images and folders of images; write masks and a table of areas."""
    from medseg_trt.bundle import find_bundle
    from medseg_trt.mask_folder import infer_to_folder

    failed: dict[str, str] = {}

    def skip(path: Path, error: InputError) -> None:
        failed[str(path)] = str(error)
        click.echo(f"medseg-trt: {error}", err=True)

    written = infer_to_folder(
        inputs, find_bundle(bundle_folder), output,
        backend=backend, precision=precision, overlay=overlay, batch=batch, threads=threads, resume=resume,
        on_error=skip,
    )  # fmt: skip
    result = {
        "masks": [str(path) for path in written.masks],
        "areas": str(written.areas), "kept": written.kept, "failed": failed,
    }  # fmt: skip
    _print_result(as_json, result, f"{len(written.masks)} mask(s) in {output}, areas in {written.areas}")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(failed) + len(written.masks)} file(s) could not be used; they are named above"
        )


@cli.command()
@click.option("--ckpt", "checkpoints", type=FILE, multiple=True, help="A checkpoint; may be given several times.")
@click.option("--bundle", "bundles", type=FOLDER, multiple=True, help="A bundle; may be given several times.")
@click.option("--data", "data_folder", type=FOLDER, required=True, help="A folder with images/ and masks/.")
@click.option(
    "--split", "splits", multiple=True, default=("val",), show_default=True, help="May be given several times."
)
@click.option("--backend", default="auto", show_default=True, help="What runs the bundles.")
@click.option("--hd95", is_flag=True, help="Also the 95th percentile of the distance between the outlines.")
@output_options
def evaluate(
    checkpoints: tuple[Path, ...],
    bundles: tuple[Path, ...],
    data_folder: Path,
    splits: tuple[str, ...],
    backend: str,
    hd95: bool,
    as_json: bool,
) -> None:
    """Compare checkpoints and bundles with the masks: Dice, IoU and HD95 per class."""
    from medseg_trt import scoreboard

    if not checkpoints and not bundles:
        raise UsageError("nothing to evaluate; give --ckpt model.pt or --bundle model.medseg")
    boards = scoreboard.evaluate_all(checkpoints, bundles, data_folder, splits, backend, hd95)
    if as_json:
        click.echo(json.dumps({"splits": [board.to_dict() for board in boards]}, indent=2))
    else:
        for board in boards:
            _print_table(board.title, board.header(), board.cells())


@cli.command()
@click.option(
    "--bundle", "bundle_folder", type=FOLDER, help="The bundle to measure.  [default: the only *.medseg here]"
)
@click.option("--ckpt", "checkpoint", type=FILE, required=True, help="The checkpoint it was built from, the reference.")
@click.option("--data", "data_folder", type=FOLDER, required=True, help="Images to compare on.")
@click.option("--split", default="val", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--warmup-ms", type=click.FloatRange(0), default=200.0, show_default=True)
@click.option("--duration-s", type=click.FloatRange(0), default=10.0, show_default=True)
@click.option("-o", "--output", type=FOLDER, default=Path("report"), show_default=True, help="Where the report goes.")
@output_options
def bench(
    bundle_folder: Path | None, checkpoint: Path, data_folder: Path, split: str, batch: int, warmup_ms: float,
    duration_s: float, output: Path, as_json: bool,
) -> None:  # fmt: skip
    """Measure a bundle against PyTorch on the same images: agreement first, then speed."""
    from medseg_trt.benchmark import bench as run_bench
    from medseg_trt.bundle import find_bundle
    from medseg_trt.report import HEADER, bench_cells, write_report

    report = run_bench(
        find_bundle(bundle_folder), checkpoint, data_folder, split,
        batch=batch, warmup_ms=warmup_ms, duration_s=duration_s,
    )  # fmt: skip
    page = write_report(report, output)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        header, *rows = zip(
            HEADER, *bench_cells(report), strict=True
        )  # a column each: they are few, and figures are many
        _print_table(f"{report.images}, batch {report.batch}", header, rows)
        click.echo(f"report: {page}")


@cli.command()
@click.argument("what")
@click.option("--image-size", type=click.IntRange(1), default=256, show_default=True, help="Of arch:NAME, in pixels.")
@click.option("--classes", type=click.IntRange(1), default=1, show_default=True, help="Of arch:NAME.")
@output_options
def inspect(what: str, image_size: int, classes: int, as_json: bool) -> None:
    """Say what a checkpoint, bundle, ONNX file or architecture (arch:NAME) is."""
    from medseg_trt.inspection import describe

    found = describe(what, image_size, classes)
    _print_result(as_json, found, "\n".join(_lines(found)))


@cli.command()
@output_options
def doctor(as_json: bool) -> None:
    """Say what this machine can run, and what to type for the rest."""
    from dataclasses import asdict

    from medseg_trt.doctor import examine

    findings = examine()
    lines = [f"{'yes' if found.ready else 'no ':3}  {found.ability}: {found.detail}" for found in findings]
    _print_result(as_json, {"abilities": [asdict(found) for found in findings]}, "\n".join(lines))


@cli.group()
def kernels() -> None:
    """The CUDA kernels."""


@kernels.command("build")
@click.option(
    "--arch", "targets", metavar="SM,…", help="sm_80, sm_86, sm_87, sm_89, sm_90, sm_120, jetpack6.  [default: all]"
)
@click.option("-o", "--output", type=FOLDER, required=True, help="Where the PTX and manifest.json go.")
@output_options
def kernels_build(targets: str | None, output: Path, as_json: bool) -> None:
    """Compile the kernels to PTX; no GPU and no CUDA installation is needed.

    jetpack6 is sm_87 in PTX 8.5, which the driver of JetPack 6 understands.
    """
    from medseg_trt.errors import require

    require("ml_dtypes", "kernels")
    from medseg_trt.kernels.library import TARGETS
    from medseg_trt.kernels.manifest import build as build_kernels

    chosen = list(TARGETS) if targets is None else targets.split(",")
    manifest = build_kernels(output, chosen)
    text = f"{output}: {len(manifest['kernels'])} functions for {', '.join(chosen)}"
    _print_result(as_json, {"folder": str(output), "manifest": manifest}, text)


def _print_result(as_json: bool, result: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(result, indent=2) if as_json else text)


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")  # no figure is ever cut
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)


def _lines(found: dict[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {f'{value:,}' if isinstance(value, int) else value}")
    return lines
