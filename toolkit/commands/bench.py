"""``medseg-trt bench``: measure a bundle against its reference."""

import shlex
import sys
from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import (
    FILE,
    FOLDER,
    device_of,
    device_option,
    output_options,
    print_json,
    print_table,
    print_text,
    tta_option,
    verify_option,
)
from medseg_trt.errors import AccuracyGateError, MedsegError, UsageError


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt bench --bundle model.medseg --ckpt run/best.pt --data data/organs",
        "medseg-trt bench --bundle model.medseg --data images/ --backends openvino",
        "medseg-trt bench --bundle model.medseg --data data/organs --tta flips",
        "medseg-trt bench --tier quick --gate speed=1.2x,dice=-0.005 -o report",
    ),
)
@click.option(
    "--bundle", "bundle_folder", type=FOLDER, help="The bundle to measure.  [default: the only *.medseg folder here]"
)
@click.option(
    "--ckpt",
    "checkpoint",
    type=FILE,
    help="The checkpoint of the bundle, as reference.  [default: the bundle's own fp32 graph]",
)
@click.option(
    "--data", "data_folder", type=FOLDER, help="Images to compare on; masks are optional.  [default: generated noise]"
)
@click.option("--split", default="val", show_default=True, help="The split of --data: train, val or test.")
@click.option(
    "--backends",
    help="Back-ends, comma-separated; each runs every precision.  [default: the fastest for each precision]",
)
@click.option(
    "--tier",
    type=click.Choice(["quick", "report", "certify"]),
    default="report",
    show_default=True,
    help="Measuring time for each network and scope: at least 3 s; 10 s and 100 runs; 600 s and 662 runs.",
)
@click.option(
    "--warmup-ms", type=click.FloatRange(0), help="Warm-up for each network and scope, not counted.  [default: 200]"
)
@click.option(
    "--duration-s",
    type=click.FloatRange(0),
    help="Measuring time for each network and scope.  [default: that of the tier]",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Batch size for the latencies.")
@click.option(
    "--max-dice-drop",
    type=click.FloatRange(0, 1),
    help="Largest drop of the mean Dice, at the upper end of its interval.  [default: as in the build]",
)
@click.option("--gate", help="Limits, e.g. speed=1.2x,dice=-0.005; exit code 3 (dice) or 4 (speed) if one fails.")
@tta_option
@click.option("--profile/--no-profile", default=True, show_default=True, help="Also measure the layers.")
@click.option(
    "-o", "--output", type=FOLDER, default=Path("report"), show_default=True, help="The folder of the report."
)
@device_option
@verify_option
@output_options
def bench(
    bundle_folder: Path | None,
    checkpoint: Path | None,
    data_folder: Path | None,
    split: str,
    backends: str | None,
    tier: str,
    warmup_ms: float | None,
    duration_s: float | None,
    batch: int,
    max_dice_drop: float | None,
    gate: str | None,
    tta: str | None,
    profile: bool,
    device: str,
    output: Path,
    verify_key: Path | None,
    as_json: bool,
) -> None:
    """Compare a bundle with PyTorch: masks first, then speed.

    A network whose masks differ from the reference's is not timed; the exit code is then 3. The report folder gets
    index.html, report.md and report.json. index.html shows the slices with the lowest scores: it contains image data.
    """
    computes_on = device_of(device, pytorch=checkpoint is not None)
    from medseg_trt.bench import benchmark, measure
    from medseg_trt.bench.accuracy_schema import Verdict
    from medseg_trt.bench.limits import Gate, judge_report, parse_gate, require
    from medseg_trt.bench.report.write import HEADER, cells, write_report
    from medseg_trt.bundles.bundle import find_bundle
    from medseg_trt.files import made_folder
    from medseg_trt.spec import to_dict

    limits = parse_gate(gate) if gate is not None else Gate()
    names = tuple(name.strip() for name in backends.split(",")) if backends is not None else ()
    if len(set(names)) < len(names):
        raise UsageError(f"--backends {backends}: a name is given twice")
    asked = benchmark.Bench(
        bundle=find_bundle(bundle_folder),
        checkpoint=checkpoint,
        data=data_folder,
        split=split,
        tier=measure.tier(tier, warmup_ms=warmup_ms, duration_s=duration_s),
        backends=names,
        batch=batch,
        max_dice_drop=max_dice_drop,
        tta=tta,
        profile=profile,
        device=computes_on,
        verify_key=verify_key,
        commands=(shlex.join(["medseg-trt", *sys.argv[1:]]),),
    )
    with made_folder(output):
        measured = benchmark.bench(asked, output)
    report = measured.report
    if as_json:  # before the report is written, so that a full disk does not lose the figures
        print_json(to_dict(report))
    else:
        header, *rows = zip(HEADER, *cells(report), strict=True)  # one column per network
        title = f"{report.images.description}; batch {report.batch}, the network alone; times as fast: ratio of medians"
        print_table(title, header, rows)
        print_text(report.summary.headline)
        if report.augmentation is not None:
            print_text(str(report.augmentation))
    page = write_report(measured, output)
    if not as_json:
        print_text(f"report: {page}")
    if measured.ended_early:
        raise KeyboardInterrupt
    own_rows = [row for row in report.rows if row.role != "peer"]
    failed = [row for row in own_rows if row.failure is not None]
    wrong = [row for row in own_rows if isinstance(row.verdict, Verdict) and not row.verdict.holds]
    if wrong:
        raise AccuracyGateError(f"other masks than the reference's: {', '.join(row.name for row in wrong)}; see {page}")
    if failed:
        raise MedsegError(
            f"failed: {', '.join(f'{row.name} ({row.failure})' for row in failed)}; the rest is in {page}"
        )
    require(judge_report(report, limits))
