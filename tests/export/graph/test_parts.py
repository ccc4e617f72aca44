import pytest

from medseg_trt.errors import MedsegError
from medseg_trt.export.graph.parts import part_of

OURS = "medseg_trt.train.models.transunet"
ROOT = f": {OURS}.TransUNet"
CONV, LINEAR = "torch.nn.modules.conv.Conv2d", "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (f"resnet: {OURS}.ResNetStem/resnet.root.0: {CONV}/conv2d: aten.conv2d.default", "resnet"),
        (f"patch_embedding: {CONV}/conv2d_13: aten.conv2d.default", "vit"),
        (f"layers.11: {OURS}.EncoderLayer/layers.11.fc1: {LINEAR}/gelu: aten.gelu.default", "vit"),
        ("view: aten.view.default", "vit"),
        (f"insert: medseg_trt.export.fold.layers.FoldedInsert/insert.mapper2: {LINEAR}/mm: aten.mm.default", "block"),
        (f"decoder.3: {OURS}.DecoderStage/cat_2: aten.cat.default", "decoder"),
        (f"head: {CONV}/conv2d_23: aten.conv2d.default", "decoder"),
    ],
)
def test_the_first_module_determines_the_part(path, part):
    assert part_of(f"{ROOT}/{path}") == part


@pytest.mark.parametrize("namespace", ["", ROOT, f"{ROOT}/tail: {CONV}/conv2d: aten.conv2d.default"])
def test_a_module_outside_the_network_is_refused(namespace):
    with pytest.raises(MedsegError, match="no part of a network"):
        part_of(namespace)
