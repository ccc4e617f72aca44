"""On a GPU: what the driver, PyTorch and nvidia-smi say of it is the same card."""

import pytest

from medseg_trt.bench.gpu_clocks import read_clock
from medseg_trt.errors import DeviceError
from medseg_trt.gpu import find_gpu
from medseg_trt.kernels.device import Device, open_device

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> Device:
    try:
        return open_device()
    except DeviceError as error:
        pytest.skip(str(error))


def test_device_name_and_capability_equal_find_gpu(device):
    gpu = find_gpu()
    assert gpu is not None
    assert (device.name, f"sm{device.capability}") == (gpu.name, gpu.sm)
    assert device.free_bytes() > 1 << 28


def test_pytorch_names_the_card_as_sessions_do(device):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} finds no GPU")
    from medseg_trt.train.torch_device import device_name

    assert device_name(torch.device("cuda", 0)) == f"GPU {device.name}"


def test_read_clock_returns_a_plausible_sm_clock():
    clock = read_clock()
    if clock is None:
        pytest.skip("nvidia-smi does not tell the clock")
    assert 100 < clock.sm_mhz < 5000


def test_events_take_the_time_of_an_empty_stream(device):
    stream = device.new_stream()
    events = [device.new_event(), device.new_event()]
    for event in events:
        device.record_event(event, stream)
    device.wait_event(events[1])
    assert 0 <= device.elapsed_ms(*events) < 10
    for event in events:
        device.free_event(event)
    device.free_stream(stream)
