"""Networks of other packages and of one's own code: built by name, and refused in one line where they do not fit."""

import sys
from dataclasses import replace

import pytest
import torch

from medseg_trt.errors import ArtefactError, MissingExtraError, UsageError
from medseg_trt.spec import InsertSpec
from medseg_trt.train.models import network_budget
from medseg_trt.train.models.cost import cost
from medseg_trt.train.models.external import allow_own_code, parse_external
from medseg_trt.train.models.model import build_model, model_spec

SWIN = "monai:SwinUNETR(feature_size=12,depths=(1,1,1,1),num_heads=(1,1,2,2))"
UNET = "monai:UNet(channels=(4,8),strides=(2,))"
OWN = """
from torch import nn
from pathlib import Path
Path("was_run").touch()

def net(num_classes, image_size, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, num_classes, 1))

def labels(num_classes, image_size):
    return nn.Sequential(nn.Conv2d(3, 1, 3, padding=1, stride=2))

not_a_function = 1
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the current folder, which nobody has named."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "ownnets.py").write_text(OWN, encoding="utf-8")
    yield tmp_path / "here"
    sys.modules.pop("ownnets", None)


@pytest.mark.parametrize(("architecture", "classes"), [(SWIN, 3), (UNET, 1)])
def test_a_network_of_monai_gives_logits_of_every_pixel(architecture, classes):
    spec = model_spec(architecture, (64, 64), classes)
    assert spec.architecture == architecture
    model = build_model(spec).eval()
    with torch.inference_mode():
        logits = model(torch.rand(2, 1, 64, 64))
    assert logits.shape == (2, classes, 64, 64)
    assert cost(spec).parameters["total"] == sum(weight.numel() for weight in model.parameters())


def test_the_seed_decides_the_weights():
    spec, weights = model_spec(UNET, (32, 32), 1), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(next(build_model(spec).parameters()).detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("monai:BasicUNot", "monai.networks.nets has no network 'BasicUNot'; the nearest are: BasicUNet, "),
        ("monai:Zzzzzz", "monai.networks.nets has no network 'Zzzzzz'; it has: .*, VNet"),
        ("monai:UNet", "cannot be built .*channels.*give its arguments in brackets"),
        ("monai:UNet(channels=(4,8),strides=(2,),wrong=1)", "cannot be built .*wrong"),
        ("monai:SwinUNETR(feature_size=12)", "refuses images of 48 x 48 pixels"),
        ("monai:BasicUNetPlusPlus(features=(4,4,4,4,4,4))", "gives a list, not one tensor of logits"),
        (
            "monai:UNet(channels=(4,8),strides=(2,),out_channels=5)",
            r"gives \(5, 48, 48\) for an image of 48 x 48 pixels",
        ),
        ("monai:UNet(channels=(4,100000),strides=(2,))", "100000 is more than 65536, larger than any network"),
        ("monai:UNet(channels=(4,8),strides=(2,),act={'a':[-1e9]})", "is more than 65536"),
        ("monai:UNet(channels=(30000,60000),strides=(2,))", "has more than 1074 million parameters; choose smaller"),
        ("monai:FlexibleUNet(pretrained=True)", "pretrained would fetch weights"),
        ("monai:UNet(__import__('os'))", "must be name=value with plain values"),
        ("monai:UNet(channels=open('x'))", "must be name=value with plain values"),
        ("monai:UNet(strides=(2,))(channels=(4,8))", "must be name=value with plain values"),
        ("monai:UNet(**{'strides': (2,)})", "must be name=value with plain values"),
        ("monai:", "names no network; write it as monai:SwinUNETR"),
        ("llm-monai:UNet", "has no token map that this version knows"),
        ("smp:Unet", "names no encoder; write smp:Unet/resnet34"),
        ("nosuchmodule:net", "there is no module nosuchmodule"),
    ],
)
def test_invalid_external_architecture_is_refused_in_one_line(architecture, message):
    with pytest.raises(UsageError, match=message) as caught:
        model_spec(architecture, (48, 48), 1)
    assert "\n" not in str(caught.value)


def test_a_network_that_fetches_weights_by_default_is_told_not_to(monkeypatch):
    """MONAI's EfficientNetBN and ResNetFeatures do."""
    nets = pytest.importorskip("monai.networks.nets")
    taken = []

    class Fetching(nets.BasicUNet):
        def __init__(self, pretrained: bool = True) -> None:
            taken.append(pretrained)
            super().__init__(spatial_dims=2, in_channels=3, out_channels=1, features=(4, 4, 4, 4, 4, 4))

    monkeypatch.setattr(nets, "Fetching", Fetching, raising=False)
    model_spec("monai:Fetching", (32, 32), 1)
    assert taken == [False]


def test_a_language_block_has_no_place_in_it():
    with pytest.raises(UsageError, match="no token map that this version knows, so it can have no language block"):
        model_spec(UNET, (32, 32), 1, InsertSpec(residual="in"))


def test_smp_names_its_extra_where_it_is_not_installed():
    pytest.importorskip("monai")
    if "segmentation_models_pytorch" in sys.modules:
        pytest.skip("it is installed here")
    with pytest.raises(MissingExtraError, match=r"medseg-trt\[smp\]"):
        model_spec("smp:Unet/resnet18", (32, 32), 1)


def test_options_are_read_as_plain_values():
    name = parse_external("smp:Unet/resnet34(decoder_channels=[64,32],activation=None)")
    assert (name.source, name.name, name.options) == (
        "smp",
        "Unet/resnet34",
        {"decoder_channels": [64, 32], "activation": None},
    )


def test_own_code_runs_only_once_its_name_was_typed(own):
    with pytest.raises(ArtefactError, match=r"only if you have named it here.* medseg-trt inspect arch:ownnets:net"):
        model_spec("ownnets:net", (32, 32), 2)
    assert not (own / "was_run").exists()
    allow_own_code("ownnets:net(width=8)")
    assert not (own / "was_run").exists()
    spec = model_spec("ownnets:net(width=8)", (32, 32), 2)
    assert (own / "was_run").exists()
    assert build_model(spec)(torch.rand(1, 3, 32, 32)).shape == (1, 2, 32, 32)
    with pytest.raises(ArtefactError, match="runs only if you have named it"):
        model_spec("ownnets:labels", (32, 32), 2)


def test_another_file_of_the_same_name_does_not_run(own, tmp_path, monkeypatch):
    allow_own_code("ownnets:net")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    (tmp_path / "there" / "ownnets.py").write_text(OWN, encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"there/ownnets\.py, which runs only if you have named it here"):
        model_spec("ownnets:net", (32, 32), 2)
    assert not (tmp_path / "there" / "was_run").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "has no function 'nothing'"),
        ("not_a_function", "has no function"),
        ("labels", r"gives \(1, 16, 16\)"),
    ],
)
def test_a_function_that_makes_no_network_is_named(own, function, message):
    allow_own_code(f"ownnets:{function}")
    with pytest.raises(UsageError, match=message):
        model_spec(f"ownnets:{function}", (32, 32), 2)


def test_a_module_without_a_file_is_refused():
    with pytest.raises(UsageError, match="there is no module __main__"):
        allow_own_code("__main__:network")


def test_memory_for_an_image_is_bounded_before_any_is_taken():
    with pytest.raises(
        UsageError, match=r"would need 8 GiB for one tensor of one image, more than 4 GiB; choose"
    ) as it:
        model_spec("monai:UNet(channels=(512,8),strides=(2,))", (4096, 4096), 1)
    assert "\n" not in str(it.value)


def test_a_checkpoint_that_names_a_huge_network_allocates_nothing():
    spec = replace(model_spec(UNET, (32, 32), 1), architecture="monai:UNet(channels=(30000,60000),strides=(2,))")
    with pytest.raises(UsageError, match="has more than 1074 million parameters"):
        build_model(spec)


def test_the_number_of_modules_is_bounded(monkeypatch):
    monkeypatch.setattr(network_budget, "MAX_MODULES", 100)  # thousands take seconds to make
    with pytest.raises(UsageError, match="has more than 100 modules; choose smaller"):
        model_spec("monai:UNet(channels=(4,8),strides=(2,),num_res_units=60000)", (48, 48), 1)
    assert model_spec(UNET, (48, 48), 1)
