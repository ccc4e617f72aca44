import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import TWO_ORGANS, make_checkpoint

from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError, InputError, MedsegError, UsageError
from medseg_trt.files import sha256
from medseg_trt.inspection.describe import describe

LLAMA_7B_LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096  # attention, feed-forward, two norms


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to see the peak of memory")
def test_the_published_architecture_is_counted_without_its_memory():
    code = (
        "import json, pathlib\n"
        "from medseg_trt.inspection.describe import describe\n"
        "found = describe('arch:llm-transunet', 256, 1).to_dict()\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"  # getrusage would count the parent's memory too
        "print(json.dumps([found, int(status.partition('VmHWM:')[2].split()[0])]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    description, peak_kib = json.loads(done.stdout)
    assert description["parameters"] == {"total": 314_000_913, "trainable": 111_613_457, "frozen": 202_387_456}
    assert description["parameters"]["frozen"] == LLAMA_7B_LAYER + 4096  # and LLaMA's final norm
    assert description["spec"]["image_size"] == [256, 256]
    # The weights alone would take 1.26 GB; PyTorch itself takes about 0.3.
    assert peak_kib * 1024 < 1e9


@pytest.mark.parametrize(("architecture", "classes"), [("transunet", 1), ("transunet", 9), ("transunet-tiny", 3)])
def test_an_architecture_without_a_block_has_nothing_frozen(architecture, classes):
    description = describe(f"arch:{architecture}", 224, classes).to_dict()
    assert description["parameters"]["frozen"] == 0
    assert description["parameters"]["trainable"] == description["parameters"]["total"]
    assert description["spec"]["num_classes"] == classes
    assert description["spec"]["block"] is None


def test_a_class_more_is_a_filter_more():
    (two, three) = (describe("arch:transunet-tiny", 32, classes).to_dict()["parameters"]["total"] for classes in (2, 3))
    assert three - two == 3 * 3 * 16 + 1


def test_a_checkpoint_is_described_as_plain_data(tmp_path):
    path = make_checkpoint(tmp_path, provenance={"recipe": {"name": "generated"}})
    description = json.loads(json.dumps(describe(str(path), 256, 1).to_dict()))
    assert description["classes"]["names"] == list(TWO_ORGANS.names)
    assert description["spec"]["architecture"] == "llm-transunet-tiny"
    assert description["spec"]["image_size"] == [32, 32]  # its own, not the option's
    assert description["provenance"] == {"recipe": {"name": "generated"}}
    assert description["block"]["sha256"] == sha256(Path(description["block"]["file"]))
    counts = description["parameters"]
    assert counts["frozen"] > 0
    assert counts["total"] == counts["trainable"] + counts["frozen"]


def test_a_bundle_is_described_by_its_manifest(tiny_bundle):
    description = describe(str(tiny_bundle), 256, 1).to_dict()
    written = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(description)) == written
    assert description["model"]["architecture"] == "llm-transunet-tiny"


def test_json_on_stdout_is_one_object_and_text_says_the_same():
    options = ["inspect", "arch:transunet-tiny", "--image-size", "32", "--classes", "3"]
    as_json, as_text = (CliRunner().invoke(cli, arguments) for arguments in ([*options, "--json"], options))
    assert (as_json.exit_code, as_json.stderr) == (0, "")
    assert f"total: {json.loads(as_json.stdout)['parameters']['total']:,}\n" in as_text.stdout


@pytest.mark.parametrize("name", ["bundle", "checkpoint"])
def test_inspect_prints_a_summary_and_details_only_with_verbose(tiny_bundle, tmp_path, name):
    target = str(tiny_bundle if name == "bundle" else make_checkpoint(tmp_path))
    short, long = (CliRunner().invoke(cli, ["inspect", target, *more]) for more in ([], ["-v"]))
    assert (short.exit_code, long.exit_code) == (0, 0)
    assert 10 < len(short.stdout.splitlines()) < 40 < len(long.stdout.splitlines())
    for label in ("network: llm-transunet-tiny", "classes: ", "image size: ", "window: ", "language block: 1 frozen"):
        assert label in short.stdout
    for odd in ("None", "()", ": \n", "True", "seed: 1,"):
        assert odd not in short.stdout


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ("missing.pt", InputError, "missing.pt does not exist; give a checkpoint"),
        ("notes.txt", InputError, ".pt, .medseg, .onnx, .plan and arch:NAME"),
        ("arch:vnet", UsageError, "'vnet'.*llm-transunet"),
        ("damaged.pt", ArtefactError, "damaged.pt"),
        ("folder.pt", ArtefactError, "folder.pt"),
        ("empty.medseg", ArtefactError, "is no bundle"),
        ("file.medseg", ArtefactError, "is no bundle"),
    ],
)
def test_describe_refuses_unusable_targets_in_one_line(tmp_path, monkeypatch, target, error, words):
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "damaged.pt", "file.medseg"):
        (tmp_path / name).write_text("this is neither", encoding="utf-8")
    for name in ("folder.pt", "empty.medseg"):
        (tmp_path / name).mkdir()
    with pytest.raises(MedsegError, match=words) as raised:
        describe(target, 256, 1)
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)


def test_invalid_image_size_error_names_the_nearest_valid_sizes():
    with pytest.raises(UsageError, match=r"250.*multiple of 16.*240 or 256"):
        describe("arch:transunet-tiny", 250, 1)


def test_the_command_line_shows_the_line_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "medseg_trt", "inspect", "missing.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("medseg-trt: missing.pt does not exist")
    assert done.stderr.count("\n") == 1
