"""Every network goes the whole way: trained on a real scan, built, verified, run, timed, and built as an engine."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from measured_here import SHORT
from tiny import write_block

import medseg_trt
from medseg_trt.bench import timings
from medseg_trt.bench.benchmark import Bench, bench
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.spec import BuildSpec, EngineSpec
from medseg_trt.train import runs
from medseg_trt.train.datasets.folder import open_folder
from medseg_trt.train.loop import train
from medseg_trt.train.models.presets import TINY
from medseg_trt.train.recipes.recipes import recipe

NETWORKS = [*TINY, *(f"llm-{name}" for name in TINY)]
ORDINARY = {"unet-tiny"}  # building the engines of the others takes minutes
SIZE = 64  # pixels; the smallest that all of them take


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in ORDINARY else pytest.mark.slow) for name in NETWORKS],
)
def test_every_architecture_is_trained_built_verified_run_and_timed(architecture, organs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "draw_curve", lambda history, path: None)
    monkeypatch.setattr(timings, "MIN_THROUGHPUT_S", 0.01)
    changes = (
        f"architecture={architecture}",
        f"preprocessing.image_size=[{SIZE}, {SIZE}]",
        "preprocessing.spacing_mm=6.0",
        "train.epochs=1",
        "train.slices_per_epoch=16",
        "train.warmup_steps=0",
    )
    block = write_block(tmp_path) if architecture.startswith("llm-") else None
    checkpoint = train(recipe("organs-demo", changes), open_folder(organs), tmp_path / "run", block=block)
    has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None
    engines = EngineSpec(library="tensorrt-rtx", targets=("sm86",), max_batch=2) if has_rtx else None
    spec = BuildSpec(precisions=("fp32", "int8"), backend="onnxruntime", engines=engines)
    bundle = medseg_trt.build(checkpoint, spec, tmp_path / "model.medseg", organs)

    variants = bundle.content.variants
    assert {"fp32", "int8"} <= set(variants)
    assert bundle.default.verification.agreement >= 0.9999
    assert bundle.content.model == load_bundle(bundle.folder).content.model
    assert bundle.content.model.architecture == architecture
    assert {engine.variant for engine in bundle.content.engines} == ({"fp32", "int8"} if has_rtx else set())
    scan = next(iter(sorted((organs / "images").iterdir())))
    (mask,) = medseg_trt.infer([scan], bundle, backend="onnxruntime")
    assert mask.labels.ndim == 3
    assert int(np.max(mask.labels)) < len(bundle.content.classes.names)
    paths = {"bundle": Path(bundle.folder), "checkpoint": checkpoint, "data": organs}
    timed = Bench(**paths, split="val", tier=SHORT, profile=False)
    report = bench(timed, tmp_path).report
    assert {row.backend for row in report.rows} >= {"pytorch", "onnxruntime"}
    assert not [row.failure for row in report.rows if row.failure is not None]
