"""``medseg-trt bench``: measure a bundle."""

import shlex
import sys
from pathlib import Path

import click

from medseg_trt.commands.options import FILE, FOLDER, output_options, print_json, print_table, verify_option
from medseg_trt.errors import AccuracyGateError, MedsegError, UsageError


@click.command()
@click.option(
    "--bundle", "bundle_folder", type=FOLDER, help="The bundle to measure.  [default: the only *.medseg here]"
)
@click.option(
    "--ckpt", "checkpoint", type=FILE,
    help="The checkpoint it was built from, the reference.  [default: the bundle's own fp32]",
)  # fmt: skip
@click.option(
    "--data", "data_folder", type=FOLDER, help="Images to compare on, with or without masks.  [default: noise]"
)
@click.option("--split", default="val", show_default=True)
@click.option(
    "--backends", help="Every precision on each of these, with commas.  [default: the fastest of each precision]"
)
@click.option(
    "--tier", type=click.Choice(["quick", "report", "certify"]), default="report", show_default=True,
    help="3 s a row and scope; 10 s and 100 runs; 600 s.",
)  # fmt: skip
@click.option("--warmup-ms", type=click.FloatRange(0), help="Uncounted, of every row and scope.  [default: 200]")
@click.option("--duration-s", type=click.FloatRange(0), help="Of every row and scope.  [default: the tier's]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Of the latencies.")
@click.option(
    "--max-dice-drop", type=click.FloatRange(0, 1),
    help="How much Dice may fall, at the upper end of its interval.  [default: as at the build]",
)  # fmt: skip
@click.option("--gate", help="Limits that must hold, e.g. speed=1.2x,dice=-0.005; exit code 3 or 4 where not.")
@click.option("--profile/--no-profile", default=True, show_default=True, help="Look into the layers, too.")
@click.option("-o", "--output", type=FOLDER, default=Path("report"), show_default=True, help="Where the report goes.")
@verify_option
@output_options
def bench(
    bundle_folder: Path | None, checkpoint: Path | None, data_folder: Path | None, split: str, backends: str | None,
    tier: str, warmup_ms: float | None, duration_s: float | None, batch: int, max_dice_drop: float | None,
    gate: str | None, profile: bool, output: Path, verify_key: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure a bundle against PyTorch on the same images: masks first, then speed; write a page of it."""
    from medseg_trt.bench import benchmark, measure
    from medseg_trt.bench.limits import Gate, judge_report, parse_gate, require
    from medseg_trt.bundle import find_bundle
    from medseg_trt.report.schema import Verdict
    from medseg_trt.report.write import HEADER, cells, write_report
    from medseg_trt.spec import to_dict

    limits = parse_gate(gate) if gate is not None else Gate()
    names = tuple(name.strip() for name in backends.split(",")) if backends is not None else ()
    if len(set(names)) < len(names):
        raise UsageError(f"--backends {backends}: a name stands there twice")
    output.mkdir(parents=True, exist_ok=True)
    measured = benchmark.bench(
        benchmark.Bench(
            bundle=find_bundle(bundle_folder), checkpoint=checkpoint, data=data_folder, split=split,
            tier=measure.tier(tier, warmup_ms=warmup_ms, duration_s=duration_s), backends=names, batch=batch,
            max_dice_drop=max_dice_drop, profile=profile, verify_key=verify_key,
            commands=(shlex.join(["medseg-trt", *sys.argv[1:]]),),
        ),
        output,
    )  # fmt: skip
    report = measured.report
    if as_json:  # before anything is written: a full disk does not take the figures along
        print_json(to_dict(report))
    else:
        header, *rows = zip(HEADER, *cells(report), strict=True)  # a column each: they are few, and figures are many
        title = f"{report.images.description}; batch {report.batch}, the network alone; times as fast: ratio of medians"
        print_table(title, header, rows)
        click.echo(report.summary.headline)
    page = write_report(measured, output)
    if not as_json:
        click.echo(f"report: {page}")
    if measured.ended_early:
        raise KeyboardInterrupt
    failed = [row for row in report.rows if row.failure is not None]
    wrong = [row for row in report.rows if isinstance(row.verdict, Verdict) and not row.verdict.holds]
    if wrong:
        raise AccuracyGateError(f"other masks than the reference's: {', '.join(row.name for row in wrong)}; see {page}")
    if failed:
        raise MedsegError(
            f"failed: {', '.join(f'{row.name} ({row.failure})' for row in failed)}; the rest is in {page}"
        )
    require(judge_report(report, limits))
