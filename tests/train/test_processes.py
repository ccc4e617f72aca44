"""Two processes that share every batch are one process but for rounding; a run of theirs is killed and goes on."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny import tiny_changes, tiny_recipe, write_block, write_volumes

from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.datasets.folder import open_folder
from medseg_trt.train.loop import train

CHILD = Path(__file__).with_name("processes_child.py")
TESTS = str(Path(__file__).parents[1])
CASES = ("several classes", "one class", "uneven shares", "accumulated")
FAULTS = ("own_statistics", "own_dice", "own_masks", "own_gradients")
# Sums of some thousand float32 values in another order differ by 1e-7 of them; two or three steps of SGD carry that on.
# Measured on three processors: 3e-8 of a loss and 6e-5 of a weight at most; the faults change the loss by 6e-4 or more,
# a weight by 6e-4.
LOSS, WEIGHT = 1e-6, 1e-4
HANGS_S = 600  # processes that wait for each other do so for ever; on a busy machine they take minutes


def environment(**changes: object) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # other numbers of threads give other last bits
    paths = os.pathsep.join(filter(None, (TESTS, os.environ.get("PYTHONPATH"))))
    return os.environ | threads | {"PYTHONPATH": paths} | {name: str(value) for name, value in changes.items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def steps_of_processes(tmp_path_factory) -> Mapping[int, Mapping[str, dict]]:
    """Return what one process found and what two found."""
    folder, results = tmp_path_factory.mktemp("found"), {}
    for count in (1, 2):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        ranks = [{}] if count == 1 else [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(2)]
        command = [sys.executable, str(CHILD), str(folder / str(count))]
        children = [subprocess.Popen(command, env=environment(**rank)) for rank in ranks]
        try:
            assert [child.wait(timeout=HANGS_S) for child in children] == [0] * count
        finally:
            for child in children:
                child.kill()
        results[count] = torch.load(folder / str(count))
    return results


def differences(one: dict, two: dict) -> tuple[float, float]:
    """Return by how much the losses and the weights differ."""
    assert one["weights"].keys() == two["weights"].keys()
    weights = ((one["weights"][name] - two["weights"][name]).abs().max().item() for name in one["weights"])
    return abs(one["loss"] - two["loss"]), max(weights)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_but_for_rounding(steps_of_processes, case):
    loss, weight = differences(steps_of_processes[1][case], steps_of_processes[2][case])
    assert loss < LOSS
    assert weight < WEIGHT


@pytest.mark.parametrize("fault", FAULTS)
def test_the_limits_catch_a_process_that_looks_at_its_own_rows_alone(steps_of_processes, fault):
    loss, weight = differences(steps_of_processes[1]["several classes"], steps_of_processes[2][fault])
    assert loss > 10 * LOSS
    assert weight > 5 * WEIGHT


# The first process dies once in the middle of the second epoch; then the same command is given again.
PROGRAM = """
import os, signal
from pathlib import Path
from medseg_trt.cli import main
from medseg_trt.train import loop, runs

died = Path(__file__).with_name("died")

def loss(*arguments, real=loop.segmentation_loss, steps=iter(range(6))):
    if next(steps, None) is None and os.environ["RANK"] == "0" and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

loop.segmentation_loss = loss
main()
"""
CHANGES = tiny_changes("train.epochs=2", "train.optimizer=sgd", "train.save_every_steps=1")


def torchrun(target: list[str], data: Path, out: Path, block: Path) -> subprocess.CompletedProcess[str]:
    """Let two processes train, on volumes of three classes with dropout and augmentation."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    changes = [part for change in CHANGES for part in ("--set", change)]
    arguments = ["--recipe", "folder", "--data", str(data), "--block", str(block), "-o", str(out), *changes, "--json"]
    command = [*launcher, *target, "train", *arguments, "--resume"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=HANGS_S)


def history_of(out: Path) -> list[dict]:
    lines = (out / "history.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def test_torchrun_trains_as_one_process_does_and_a_kill_in_the_middle_of_an_epoch_changes_no_bit(tmp_path, no_curve):
    root, block = write_volumes(tmp_path / "data", 3, 4), write_block(tmp_path)  # four steps of two slices an epoch
    done = torchrun(["-m", "medseg_trt"], root, tmp_path / "whole", block)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["final"]["epoch"] == 2  # one JSON object: of the first process alone
    assert done.stderr.count("epoch 2 of 2: loss") == 1

    train(tiny_recipe(*CHANGES), open_folder(root), tmp_path / "alone", block=block)
    alone, whole = (history_of(tmp_path / name) for name in ("alone", "whole"))
    assert [row["loss"] for row in whole[1:]] == pytest.approx([row["loss"] for row in alone[1:]], abs=LOSS)
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "whole").iterdir()} == names | {"curve.png"}

    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    assert torchrun([str(program)], root, tmp_path / "run", block).returncode != 0
    assert (tmp_path / "died").exists()
    done = torchrun([str(program)], root, tmp_path / "run", block)
    assert done.returncode == 0, done.stderr
    assert "resume after epoch 1, step 2 of the next" in done.stderr
    ours, theirs = (load_checkpoint(tmp_path / name / "last.pt").weights for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert history_of(tmp_path / "run") == whole
    assert not list((tmp_path / "run").glob(".*"))
