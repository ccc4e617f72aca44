"""A bundle that came from an ONNX file, served: the bytes that ``infer`` writes."""

import json

import pytest
from foreign import write_onnx
from server_process import running_server

from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import build_onnx, infer
from medseg_trt.spec import BuildSpec

DESCRIPTION = {
    "preprocessing": {"image_size": [32, 32], "channel_order": "grey"},
    "classes": {"names": ["background", "disc", "bar"]},
}


@pytest.mark.usefixtures("in_process")
def test_a_network_from_an_onnx_file_is_served_with_the_bytes_of_infer(tmp_path, inputs):
    network, description = write_onnx(tmp_path / "net.onnx"), tmp_path / "net.json"
    description.write_text(json.dumps(DESCRIPTION))
    bundle = build_onnx(network, description, BuildSpec(backend="onnxruntime"), tmp_path / "net.medseg")
    image = inputs / "image0.png"
    written = MaskFolder(tmp_path / "masks")
    (mask,) = infer([image], bundle, backend="onnxruntime", threads=1, destination=written)
    assert len(set(mask.labels.ravel().tolist())) > 1
    with running_server([bundle.folder], tmp_path / "spool") as server:
        assert list(server.models) == ["net"]
        status, headers, body = server.post("/v1/segment", image.read_bytes())
        assert (status, headers["content-type"]) == (200, "image/png")
        assert body == (tmp_path / "masks" / "image0.png").read_bytes()
