"""The commands as a user types them, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_pictures, write_volumes

TINY = ["--set", "architecture=unet-tiny", "--set", "preprocessing.image_size=[32,32]", "--set", "augmentation=[]"]


def medseg_trt(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medseg_trt", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_cli_workflow_from_images_to_masks_and_report(tmp_path):
    write_pictures(tmp_path / "data", count=8)
    trained = medseg_trt(
        "train",
        "--recipe",
        "folder",
        "--data",
        "data",
        "-o",
        "run",
        *TINY,
        "--set",
        "train.epochs=2",
        "--set",
        "train.batch_size=2",
        "--json",
        cwd=tmp_path,
    )
    assert trained.returncode == 0, trained.stderr
    checkpoint = json.loads(trained.stdout)["checkpoint"]
    built = medseg_trt("build", "--ckpt", checkpoint, "-o", "model.medseg", "--json", cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    best = json.loads(built.stdout)["manifest"]["executions"][0]
    assert best["verification"]["images"].startswith("2 real images")
    inferred = medseg_trt("infer", "data/images", "--overlay", "--json", cwd=tmp_path)  # the only bundle here
    assert inferred.returncode == 0, inferred.stderr
    assert len(json.loads(inferred.stdout)["masks"]) == len(list((tmp_path / "masks").glob("*.png"))) == 8
    evaluated = medseg_trt("evaluate", "--ckpt", checkpoint, "--bundle", "model.medseg", "--data", "data", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "lesion" in evaluated.stdout
    assert "Dice / IoU" in evaluated.stdout
    benched = medseg_trt("bench", "--ckpt", checkpoint, "--data", "data", "--duration-s", "0.1", "--json", cwd=tmp_path)
    assert benched.returncode == 0, benched.stderr
    assert [row["backend"] for row in json.loads(benched.stdout)["rows"]] == ["pytorch", best["backend"]]
    assert (tmp_path / "report" / "report.md").is_file()
    inspected = medseg_trt("inspect", "model.medseg", "--json", cwd=tmp_path)
    assert json.loads(inspected.stdout)["executions"][0] == best


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["infer", "images"], 2, "medseg-trt build --ckpt run/best.pt"),
        (["infer", "nowhere.png", "--bundle", "BUNDLE"], 1, "nowhere.png does not exist"),
        (["infer", "text.txt", "--bundle", "BUNDLE"], 1, "supported: .png"),
        (["infer", "images", "--bundle", "images"], 5, "is no bundle"),
        (["infer", "images", "--bundle", "BUNDLE", "--backend", "coreml"], 2, "auto, onnxruntime"),
        (["build", "--ckpt", "nowhere.pt"], 5, "Train a model first"),
        (["build", "--ckpt", "text.txt"], 5, "no checkpoint of medseg-trt"),
        (["evaluate", "--data", "."], 2, "--ckpt model.pt"),
        (["train", "--recipe", "organ-demo", "--data", "."], 2, "folder, organs-demo"),
        (["train", "--recipe", "folder", "--data", "nowhere"], 1, "does not exist"),
        (["inspect", "arch:vnet"], 2, "llm-transunet"),
        (["inspect", "arch:transunet", "--image-size", "250"], 2, "try 240 or 256"),
        (["samples", "get", "lungs"], 2, "organs"),
        (["block", "extract", "text.txt"], 5, "text.txt"),
    ],
)
def test_cli_error_is_one_line_with_the_exit_code_and_advice(arguments, code, message, tiny_bundle, tmp_path):
    write_pictures(tmp_path, count=1)
    (tmp_path / "text.txt").write_text("just text")
    ran = medseg_trt(*(str(tiny_bundle) if argument == "BUNDLE" else argument for argument in arguments), cwd=tmp_path)
    assert ran.returncode == code, ran.stderr
    lines = ran.stderr.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("medseg-trt: ")
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_a_bad_image_among_good_ones_is_named_and_the_exit_code_says_so(tiny_bundle, tmp_path):
    write_pictures(tmp_path, count=2)
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    ran = medseg_trt("infer", "images", "--bundle", tiny_bundle, "--json", cwd=tmp_path)
    assert ran.returncode == 1
    assert "broken.png" in ran.stderr
    result = json.loads(ran.stdout)
    assert list(result["failed"]) == ["images/broken.png"]
    assert len(result["masks"]) == 2


def test_verbose_shows_the_traceback_and_quiet_shows_no_progress(tiny_bundle, tmp_path):
    write_pictures(tmp_path, count=1)
    assert "Traceback" in medseg_trt("build", "--ckpt", "nowhere.pt", "-v", cwd=tmp_path).stderr
    quiet = medseg_trt("infer", "images", "--bundle", tiny_bundle, "-q", cwd=tmp_path)
    assert (quiet.returncode, quiet.stderr) == (0, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_leaves_with_its_code_and_can_go_on(tmp_path, number, code):
    write_volumes(tmp_path / "data")
    command = [
        sys.executable,
        "-m",
        "medseg_trt",
        "train",
        "--recipe",
        "folder",
        "--data",
        "data",
        "-o",
        "run",
        *TINY,
        "--set",
        "train.epochs=1000",
    ]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2"):
                break
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == code
    assert "Traceback" not in rest
    assert not list((tmp_path / "run").glob(".partial*"))
    epochs = len((tmp_path / "run" / "history.jsonl").read_text().splitlines())
    assert epochs >= 3
    assert not (tmp_path / "run" / "prepared").exists()


def test_closed_stdout_pipe_gives_no_traceback():
    command = f"{sys.executable} -m medseg_trt inspect arch:transunet | head -1"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in ran.stderr
    assert ran.stdout.count("\n") == 1
