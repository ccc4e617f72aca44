import importlib
import importlib.metadata
import json
import os
import shutil
import site
import subprocess
import sys
import tomllib
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from medseg_trt.bundles.bundle import DEFAULT_GRAPH, MANIFEST, Bundle, load_bundle, seal
from medseg_trt.errors import MissingExtraError
from medseg_trt.pipeline import build
from medseg_trt.samples.catalogue import NO_NETWORK
from medseg_trt.sessions.open import open_session
from medseg_trt.spec import BuildSpec

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
PINNED = {  # with what they need in other versions than the tests' environment has; the rest is taken from there
    "optimum-onnx": "0.1.0",
    "optimum": "2.1.0",
    "transformers": "4.57.6",
    "tokenizers": "0.22.2",
    "huggingface_hub": "0.36.2",
}
# Logits of order 1 from ONNX Runtime both times: the same bits from the same graph, and 1.3e-6 apart between dialects.
SAME_LOGITS = 1e-5
PROGRAM = """
import json, sys
import numpy as np, torch
from transformers import AutoConfig

hub_outcomes, folder = {}, sys.argv[1]

def refusal(action, *arguments, **options):
    try:
        action(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

hub_outcomes["before"] = refusal(AutoConfig.from_pretrained, f"{folder}/canonical.medseg")

import medseg_trt.bundles.optimum
from optimum.onnxruntime import ORTModelForSemanticSegmentation

def load(name, **options):
    return ORTModelForSemanticSegmentation.from_pretrained(f"{folder}/{name}", **options)

batch = np.load(f"{folder}/batch.npy")
for name in ("canonical.medseg", "plain.medseg"):
    model = load(name)
    np.save(f"{folder}/{name}.npy", model(pixel_values=torch.from_numpy(batch)).logits.numpy())
hub_outcomes["config"] = model.config.to_dict()
hub_outcomes["opened"] = str(model.session._model_path)
model.save_pretrained(f"{folder}/saved")
for name in ("damaged.medseg", "mask.medseg", "none.medseg", "saved"):
    hub_outcomes[name] = refusal(load, name)
hub_outcomes["hub"] = refusal(medseg_trt.bundles.optimum.MedsegConfig.from_dict, {}, name_or_path="someone/model")
json.dump(hub_outcomes, open(f"{folder}/hub_outcomes.json", "w"))
"""


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"optimum-onnx": "0.1.0", "transformers": "5.23.0"}, r"needs transformers 4\.57, and here it is 5\.23\.0\."),
        ({"optimum-onnx": "0.1.0", "transformers": "4.56.2"}, r"needs transformers 4\.57, and here it is 4\.56\.2\."),
        ({"optimum-onnx": "0.1.0"}, r"needs transformers 4\.57, and here it is missing\."),
        ({"transformers": "4.57.6"}, r"needs optimum-onnx 0\.1, and here it is missing\."),
    ],
)
def test_incompatible_optimum_versions_are_refused_with_the_pip_command(monkeypatch, installed, message):
    def version(package):
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.delitem(sys.modules, "medseg_trt.bundles.optimum", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(MissingExtraError, match=message) as caught:
        importlib.import_module("medseg_trt.bundles.optimum")
    assert str(caught.value).endswith("pip install 'medseg-trt[cpu,optimum]'")
    assert "\n" not in str(caught.value)


def test_the_pinned_versions_are_ones_that_the_extra_installs():
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for requirement in map(Requirement, extras["optimum"]):
        assert requirement.specifier.contains(PINNED[requirement.name])


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An environment with Optimum before everything that the tests' own environment has."""
    folder = tmp_path_factory.mktemp("optimum") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            *(f"{name}=={version}" for name, version in PINNED.items()),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and any(words in done.stderr for words in NO_NETWORK):
        pytest.skip("needs the package index, which pip cannot reach")
    assert done.returncode == 0, done.stderr
    own = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[-1])"], capture_output=True, text=True, check=True
    )
    further = "; ".join(f"site.addsitedir({path!r})" for path in site.getsitepackages())
    (Path(own.stdout.strip()) / "further.pth").write_text(f"import site; {further}\n")
    return python


@pytest.fixture(scope="module")
def bundles(tiny_bundle, tmp_path_factory) -> Path:
    """Bundles of the same network: either dialect the best one, one that says it makes masks, one damaged."""
    folder = tmp_path_factory.mktemp("bundles")
    for dialect in ("canonical", "plain"):
        bundle = load_bundle(tiny_bundle)
        first = sorted(bundle.content.executions, key=lambda candidate: bundle.variant(candidate).dialect != dialect)
        graph = bundle.variant(first[0]).graph
        _seal_again(bundle, folder / f"{dialect}.medseg", graph, executions=tuple(first))
    _seal_again(load_bundle(tiny_bundle), folder / "none.medseg", None)
    build(tiny_bundle.parent / "model" / "model.pt", BuildSpec(outputs="mask"), folder / "mask.medseg")
    damaged = shutil.copytree(tiny_bundle, folder / "damaged.medseg") / "weights-fp32.bin"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    np.save(folder / "batch.npy", np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32))
    return folder


def _seal_again(bundle: Bundle, folder: Path, graph: str | None, **changes: object) -> None:
    """Copy a bundle with another manifest, whose digests are right."""
    shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns(MANIFEST, DEFAULT_GRAPH))
    seal(folder, replace(bundle.content, **changes), bundle.golden()[1], graph)


@pytest.fixture(scope="module")
def hub_outcomes(python, bundles) -> dict[str, Any]:
    """What ``PROGRAM`` reports; it writes the logits beside the bundles."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", PROGRAM, bundles],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((bundles / "hub_outcomes.json").read_text())


@pytest.mark.network
@pytest.mark.parametrize("name", ["canonical.medseg", "plain.medseg"])
def test_optimum_logits_equal_onnxruntime_session_logits(hub_outcomes, bundles, name):
    assert Path(hub_outcomes["opened"]).name == "model.onnx"
    bundle = load_bundle(bundles / name)
    assert bundle.variant(bundle.default).dialect == name.removesuffix(".medseg")
    with open_session(bundle, "onnxruntime") as session:
        ours = session.run(np.load(bundles / "batch.npy"))
    theirs = np.load(bundles / f"{name}.npy")
    assert np.abs(ours).max() > 0.1  # so that the tolerance says something
    assert np.abs(theirs - ours).max() <= SAME_LOGITS
    assert np.abs(theirs[::-1] - ours).max() > 100 * SAME_LOGITS  # another image's logits would be seen


@pytest.mark.network
def test_the_config_is_known_only_after_the_import_and_has_our_labels(hub_outcomes):
    assert "medseg-trt" in hub_outcomes["before"]
    assert "does not recognize" in hub_outcomes["before"]
    config = hub_outcomes["config"]
    assert config["id2label"] == {"0": "background", "1": "disc", "2": "bar"}
    assert (config["image_size"], config["num_channels"], config["num_logits"]) == ([32, 32], 3, 3)


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("damaged.medseg", "weights-fp32.bin is not what manifest.json says"),
        ("mask.medseg", "was built with --outputs mask"),
        ("none.medseg", "has no model.onnx"),
        ("saved", "has no manifest.json"),
        ("hub", "someone/model is no folder on this machine"),
    ],
)
def test_optimum_refuses_unsafe_bundles_in_one_line(hub_outcomes, name, message):
    assert hub_outcomes[name].startswith("ArtefactError: ")
    assert message in hub_outcomes[name]
    assert "\n" not in hub_outcomes[name]
