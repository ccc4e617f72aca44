import json

import onnx
import pytest

from medseg_trt.errors import ArtefactError
from medseg_trt.files import sha256
from medseg_trt.inspection.describe import describe


def test_a_graph_is_described_without_its_weights(tiny_bundle, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes((tiny_bundle / "model.onnx").read_bytes())  # weights-fp32.bin is not beside it
    description = json.loads(json.dumps(describe(str(path), 256, 1).to_dict()))
    assert description["sha256"] == sha256(path)
    assert description["opsets"] == {"ai.onnx": 23, "medseg": 1}
    assert description["inputs"] == {"pixel_values": "float (batch, 3, 32, 32)"}
    assert description["outputs"] == {"logits": "float (batch, 3, 32, 32)"}
    assert description["external_weights"] == ["weights-fp32.bin"]
    model = onnx.load(tiny_bundle / "model.onnx")  # with the weights
    assert sum(description["operators"].values()) == len(model.graph.node)
    assert description["parameters"] == sum(onnx.numpy_helper.to_array(item).size for item in model.graph.initializer)


@pytest.mark.parametrize("content", [b"", b"no onnx", b"\x08\x07" * 1000])
def test_describe_refuses_a_file_that_is_not_onnx_in_one_line(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match="is no ONNX file") as caught:
        describe(str(path), 256, 1)
    assert "\n" not in str(caught.value)
