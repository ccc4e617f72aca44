"""``--device`` reaches the training process, and a GPU is not waited for at every micro-batch."""

import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_recipe, write_volumes

from medseg_trt.cli import cli
from medseg_trt.devices import CPU, ComputeDevice
from medseg_trt.errors import DeviceError
from medseg_trt.train import loop
from medseg_trt.train.datasets.folder import open_folder
from medseg_trt.train.training_process import TrainingProcess


def test_training_process_uses_the_requested_cpu():
    assert TrainingProcess("no", CPU).device == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: None)
    with pytest.raises(DeviceError, match="there is no GPU cuda:1: "):
        TrainingProcess("no", ComputeDevice("cuda", 1))
    out = tmp_path / "run"
    data = open_folder(write_volumes(tmp_path / "data", count=2))
    with pytest.raises(DeviceError):
        loop.train(tiny_recipe(), data, out, device=ComputeDevice("cuda"))
    assert not out.exists()


@pytest.mark.parametrize(
    "command",
    [
        ["build", "--ckpt", "model.pt"],
        ["train", "--recipe", "folder", "--data", "x"],
        ["evaluate", "--ckpt", "model.pt", "--data", "x"],
        ["infer", "x", "--bundle", "model.medseg"],
        ["bench", "--bundle", "model.medseg"],
    ],
    ids=lambda command: command[0],
)
def test_a_device_that_cannot_be_read_is_refused_by_every_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.medseg").mkdir()
    ran = CliRunner().invoke(cli, [*command, "--device", "gpu"])
    assert "write auto, cpu, cuda or cuda:1" in str(ran.exception), ran.output


def test_the_loss_is_read_once_a_batch(monkeypatch):
    """Reading a number from a GPU waits for everything that it has been given."""
    reads = []
    real = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(1) or real(tensor))
    process = TrainingProcess("no", CPU)
    model = torch.nn.Conv2d(3, 2, 1)
    shards = process.shards(4, 4)
    assert len(shards) == 4
    fed = iter([(torch.ones(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long))] * 4)
    monkeypatch.setattr(loop, "assign_shard", lambda *_: None)
    loss = loop._loss_and_gradients(model, fed, shards, process, tiny_recipe().train)
    assert isinstance(loss, float)
    assert len(reads) == 1


def test_too_little_memory_for_training_is_one_line_that_says_what_helps(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has little. More.\nMore.")

    monkeypatch.setattr(loop, "begin", refuse)
    data = open_folder(write_volumes(tmp_path / "data", count=2))
    with pytest.raises(DeviceError, match=r"^training: the GPU has not enough memory .*--set train\.accumulate=4$"):
        loop.train(tiny_recipe(), data, tmp_path / "run", device=CPU)
