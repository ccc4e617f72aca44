"""The benchmark of the paper's networks: weights whose logits depend on the image, and what is compared with what."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_trt.train.models.model import build_model, model_spec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIDE = 64
TOOLS = {  # by row: milliseconds, SQNR in decibels
    "pytorch-eager-fp32": (400.0, np.inf),
    "openvino-fp32": (150.0, 100.0),
    "openvino-nncf-int8-fp32": (120.0, 12.0),
    "medseg-trt-openvino-int8-plain": (100.0, 13.0),
    "medseg-trt-onnxruntime-int8": (90.0, 11.0),
    "medseg-trt-openvino-fp32-plain": (80.0, 100.0),
}


@pytest.fixture(params=["unet-tiny", "swin-unet-tiny", "ds-transunet-tiny", "transunet-tiny"])
def model(request):
    torch.manual_seed(0)
    return build_model(model_spec(request.param, (SIDE, SIDE), 1))


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in [name for name in sys.modules if name.startswith("bench_") or name == "results_file"]:
        monkeypatch.delitem(sys.modules, name)
    return import_module


def scenes(count: int) -> torch.Tensor:
    """Return images (count, 3, SIDE, SIDE) of one bright disc each, somewhere else in every one."""
    rows, columns = np.indices((SIDE, SIDE))
    centres = np.random.default_rng(0).uniform(0.2, 0.8, (count, 2)) * SIDE
    discs = [(rows - row) ** 2 + (columns - column) ** 2 < (SIDE / 5) ** 2 for row, column in centres]
    return torch.from_numpy(np.stack(discs).astype(np.float32) - 0.3)[:, None].expand(-1, 3, -1, -1)


def test_logits_have_one_size_and_depend_on_the_image(model, scripts):
    images = scenes(6)
    scripts("bench_cpu_weights").initialise(model, images)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        logits = model(images)
    assert logits.std().item() == pytest.approx(1, rel=1e-3)
    assert 0.2 < (logits > 0).float().mean() < 0.8
    # The share of the variance that images make: 0.77 to 0.98; without statistics of images 0.66 (U-Net), 0.52 (Swin).
    assert logits.var(dim=0).mean() / logits.var() > 0.7


def measured(tools: dict[str, tuple[float, float]]) -> dict[str, object]:
    drifts = (1.0, 1.2, 0.9, 1.1, 1.0)
    return {
        "rounds": {name: [[drift * ms] * 3 for drift in drifts] for name, (ms, _) in tools.items()},
        "errors": {name: {"sqnr_db": sqnr, "max_abs_error": 0.0} for name, (_, sqnr) in tools.items()},
        "memory": {name: {"peak_resident_mb": 2.0, "anonymous_mb": 1.0} for name in tools},
    }


def variants(child, tools):
    return [
        child.Variant(
            name=name,
            group="ours" if name.startswith("medseg") else "peer",
            opener="openvino",
            path=Path(name),
            precision="int8" if "int8" in name else "fp32",
            reference="unet",
        )
        for name in tools
    ]


def answer_of(scripts, **changed):
    tools = TOOLS | changed
    rows = variants(scripts("bench_cpu_child"), tools)
    return scripts("bench_networks").answer("unet", rows, measured(tools))


def test_our_fastest_exact_int8_is_compared_with_the_fastest_other_tool(scripts):
    given = answer_of(scripts)
    assert (given.ours, given.peer) == ("medseg-trt-openvino-int8-plain", "openvino-nncf-int8-fp32")
    assert (given.ratio, given.lower_bound, given.pytorch_ratio) == pytest.approx((1.2, 1.2, 4.0))
    assert (given.sqnr_db, given.peer_sqnr_db) == (13.0, 12.0)
    assert "1.20 times as fast as openvino-nncf-int8-fp32" in given.sentence


def test_a_peer_in_float_that_is_faster_is_the_fastest_peer_and_we_are_called_slower(scripts):
    given = answer_of(scripts, **{"openvino-fp32": (70.0, 100.0)})
    assert given.peer == "openvino-fp32"
    assert given.ratio == pytest.approx(0.7)
    assert "is slower than openvino-fp32, 0.70 times its speed" in given.sentence


def test_fastest_own_variant_is_compared_with_both_sqnr_if_none_reaches_the_peer(scripts):
    given = answer_of(scripts, **{"openvino-nncf-int8-fp32": (120.0, 20.0)})
    assert given.ours == "medseg-trt-onnxruntime-int8"
    assert (given.sqnr_db, given.peer_sqnr_db) == (11.0, 20.0)


@pytest.mark.parametrize("byte_products", [True, False])
def test_markdown_mentions_saturation_only_without_byte_products(scripts, byte_products):
    networks, tools = scripts("bench_networks"), TOOLS
    rows = variants(scripts("bench_cpu_child"), tools)
    given, figures = networks.answer("unet", rows, measured(tools)), measured(tools)
    page = networks.to_markdown(
        {
            "rounds": 5,
            "byte_products": byte_products,
            "answers": [networks.asdict(given)],
            "networks": {"unet": [networks.row(variant, figures) for variant in rows]},
        }
    )
    assert given.sentence in page
    assert all(f"| {name} |" in page for name in tools)
    assert ("saturate at 16 bits" in page) is not byte_products
