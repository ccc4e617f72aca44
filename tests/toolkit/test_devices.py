import pytest

from medseg_trt.devices import AUTO, CPU, ComputeDevice, parse_device
from medseg_trt.errors import UsageError


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("auto", AUTO),
        ("cpu", CPU),
        ("cuda", ComputeDevice("cuda")),
        ("cuda:0", ComputeDevice("cuda")),
        (" CUDA:12 ", ComputeDevice("cuda", 12)),
    ],
)
def test_parse_device_and_str_round_trip(text, device):
    assert parse_device(text) == device
    assert parse_device(str(device)) == device
    assert device.gpu_allowed is (device != CPU)


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:1", "cuda:1000", "cuda:1,2"])
def test_parse_device_refuses_invalid_names(text):
    with pytest.raises(UsageError, match="write auto, cpu, cuda or cuda:1"):
        parse_device(text)
