"""Engines of a build are verified and timed on a GPU and a TensorRT-RTX that are not there."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from fakes.bundles import FakeMachine, add_engine, rehash, with_engine
from fakes.trt import FakeTrt
from session_here import SessionHere

from medseg_trt.building import engine_trials, executions
from medseg_trt.building.contract import Contract
from medseg_trt.building.deployment import Deployment
from medseg_trt.building.engine_trials import try_engines
from medseg_trt.building.executions import ExecutionTrials
from medseg_trt.building.reference import Reference
from medseg_trt.building.reference_images import JudgedImages, ReferenceImages
from medseg_trt.bundles.bundle import MANIFEST, load_bundle
from medseg_trt.bundles.manifest import ENGINES_FOLDER
from medseg_trt.devices import ComputeDevice
from medseg_trt.engines import choice
from medseg_trt.engines.build import Engines
from medseg_trt.engines.fingerprint import read_fingerprint
from medseg_trt.errors import AccuracyGateError, ArtefactError
from medseg_trt.files import sha256
from medseg_trt.gpu import Gpu, listed_gpus
from medseg_trt.sessions.subprocess_session import ChildSession
from medseg_trt.spec import BuildSpec

GPU = Gpu(name="Fake GPU", sm="sm89", cuda="13.0", driver=None)
EXACT, ROUNDED = f"{ENGINES_FOLDER}/fp32-rtx.plan", f"{ENGINES_FOLDER}/fp16-rtx.plan"
Network = Callable[[np.ndarray], np.ndarray]


def turned(logits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(logits[:, ::-1])


def nearly(logits: np.ndarray) -> np.ndarray:
    """Return logits that are off by more than a float32 computation in another order, and make the same masks."""
    return np.float32(1.01) * logits


@dataclass
class Site:
    """A sealed bundle with an engine of fp32 and one of fp16, and what its engines do."""

    machine: FakeMachine
    folder: Path
    network: Network  # of the bundle
    answers: dict[str, Network] = field(default_factory=dict)  # by plan, what becomes of its logits
    dies: set[str] = field(default_factory=set)  # plans whose process dies while it is timed
    second: bool = False  # whether a second split judges, with masks that no execution draws

    def trials(self) -> tuple[ExecutionTrials, Engines]:
        bundle = load_bundle(self.folder)
        content = bundle.content
        golden = bundle.golden()
        images = np.random.default_rng(0).random((6, 3, *bundle.preprocessing.image_size), dtype=np.float32)
        size = bundle.preprocessing.image_size
        judged = JudgedImages(
            inputs=images, sizes=(size,) * 6, spacings=(None,) * 6, cases=tuple("abcdef"), truths=None
        )
        reference = Reference(
            network=self.network,
            contract=Contract(model=content.model, preprocessing=bundle.preprocessing, classes=bundle.classes),
            images=ReferenceImages(verified=images, description="generated noise", judged=judged, calibration=None),
            spec=BuildSpec(),
            device=ComputeDevice("cuda", 0),
        )
        other = replace(reference, network=lambda batch: turned(self.network(batch)))
        deployed = Deployment(
            variants=content.variants,
            tried=ExecutionTrials(executions=content.executions, rejected=()),
            golden=golden,
            block=None,
            reference=reference,
            second=other if self.second else None,
        )
        return try_engines(bundle, deployed, Engines(built=content.engines, rejected=()))

    def plans(self) -> set[str]:
        return {f"{ENGINES_FOLDER}/{path.name}" for path in (self.folder / ENGINES_FOLDER).glob("*.plan")}


@pytest.fixture
def site(machine, tiny_bundle, tmp_path, monkeypatch) -> Site:
    folder = with_engine(tiny_bundle, tmp_path / "model.medseg")
    add_rounded(folder)
    site = Site(machine=machine, folder=folder, network=machine.trt.network)

    def answer(images: np.ndarray) -> np.ndarray:
        digests = {(folder / plan).read_bytes(): plan for plan in (EXACT, ROUNDED)}
        plan = digests[machine.trt.plans[-1]]
        return site.answers.get(plan, lambda logits: logits)(site.network(images))

    machine.trt.network = answer

    class Child(SessionHere):
        def time(self, batch: np.ndarray, duration_s: float, min_runs: int) -> list[float]:
            if self.backend != "tensorrt-rtx":
                return [5.0]
            plan = EXACT if machine.trt.plans[-1] == (folder / EXACT).read_bytes() else ROUNDED
            if plan in site.dies:
                raise ArtefactError("it was killed by signal 11")
            return [2.0 if plan == EXACT else 1.0]

    monkeypatch.setattr(executions, "ChildSession", Child)
    monkeypatch.setattr(engine_trials, "find_gpu", lambda number: GPU)
    for module in (engine_trials, choice):
        monkeypatch.setattr(module, "installed_version", lambda _: FakeTrt.__version__)
    return site


def add_rounded(folder: Path) -> None:
    """Add the float32 graph once more under the name fp16, an execution of it, and its engine."""
    manifest = json.loads((folder / MANIFEST).read_text())
    shutil.copy(folder / "fp32.onnx", folder / "fp16.onnx")
    manifest["variants"]["fp16"] = {**manifest["variants"]["fp32"], "precision": "fp16", "graph": "fp16.onnx"}
    exact = next(item for item in manifest["executions"] if item["variant"] == "fp32")
    manifest["executions"].append({**exact, "variant": "fp16"})
    (folder / MANIFEST).write_text(json.dumps(manifest))
    rehash(folder)
    plan = folder / ROUNDED
    plan.write_bytes(b"the rounded plan")
    exact_engine = read_fingerprint(folder / EXACT)
    changes = {"plan": plan.name, "sha256": sha256(plan), "bytes": plan.stat().st_size}
    add_engine(folder, replace(exact_engine, **changes, precision="fp16", graph="fp16.onnx"), "fp16")


def test_engines_that_fit_are_verified_timed_beside_the_others_and_ranked(site):
    tried, engines = site.trials()
    first, second, *others = tried.executions
    assert [(item.variant, item.backend, item.median_ms) for item in (first, second)] == [
        ("fp16", "tensorrt-rtx", 1.0),
        ("fp32", "tensorrt-rtx", 2.0),
    ]
    assert first.executed
    assert first.verification.by.startswith("TensorRT-RTX 1.7.1.116 fp16")
    assert first.verification.gate is not None  # fp16 is judged by its masks, fp32 by its logits
    assert second.verification.gate is None
    assert second.verification.max_abs_error <= 1e-4
    assert {item.median_ms for item in others} == {5.0}  # timed anew, in the same rounds
    assert [engine.executed for engine in engines.built] == [True, True]
    assert (tried.rejected, engines.rejected) == ((), ())
    assert site.machine.gpu.is_clean()


@pytest.mark.parametrize(
    ("plan", "answer", "words"),
    [
        (EXACT, turned, "logits differ"),
        (EXACT, nearly, "logits differ"),
        (ROUNDED, turned, "draws other masks"),
        (ROUNDED, lambda logits: np.full_like(logits, np.nan), "not finite"),
    ],
)
def test_an_engine_with_other_masks_is_removed_by_name_and_the_rest_stays(site, plan, answer, words, caplog):
    site.answers[plan] = answer
    refused_by_name(site, plan, words)
    assert f"the engine is not used: {plan}: " in caplog.text


def refused_by_name(site: Site, plan: str, words: str) -> None:
    tried, engines = site.trials()
    (kept,) = {EXACT, ROUNDED} - {plan}
    assert [(engine.plan, engine.executed) for engine in engines.built] == [(kept, True)]
    assert site.plans() == {kept}
    assert not (site.folder / plan).with_suffix(".json").exists()
    assert [item.backend for item in tried.executions].count("tensorrt-rtx") == 1
    (line,) = engines.rejected
    assert line.startswith(f"{plan}: ")
    assert words in line
    assert str(site.folder) not in line


def test_logits_off_by_a_hundredth_are_no_fault_of_a_rounded_engine(site):
    site.answers[ROUNDED] = nearly
    _, engines = site.trials()
    assert len(engines.built) == 2


def test_a_rounded_engine_is_judged_on_the_second_split_too(site):
    site.second = True
    tried, engines = site.trials()
    assert [engine.plan for engine in engines.built] == [EXACT]  # float32 was compared by its logits
    assert "other masks on the second split" in engines.rejected[0]
    assert ("fp16", "tensorrt-rtx") not in {(item.variant, item.backend) for item in tried.executions}


def test_a_build_none_of_whose_engines_holds_fails_as_one_of_a_graph_does(site):
    site.answers = {EXACT: turned, ROUNDED: turned}
    with pytest.raises(AccuracyGateError, match="logits differ") as caught:
        site.trials()
    assert caught.value.exit_code == 3


def test_an_engine_that_this_gpu_has_no_memory_for_stays_unverified_and_the_rest_is_verified(site):
    site.machine.trt.refuses = "CUDA error 2: out of memory"
    site.machine.trt.refused = {"deserialize_cuda_engine"}
    tried, engines = site.trials()
    assert [(engine.plan, engine.executed) for engine in engines.built] == [(EXACT, False), (ROUNDED, False)]
    assert all("the GPU has not enough memory" in line for line in engines.rejected)
    assert "tensorrt-rtx" not in {item.backend for item in tried.executions}


def test_a_real_process_opens_the_sealed_folder_and_says_that_there_is_no_device(site, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'medseg-trt[tensorrt-rtx]'")
    monkeypatch.setattr(executions, "ChildSession", ChildSession)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # also where there is one
    _, engines = site.trials()
    assert [(engine.plan, engine.executed) for engine in engines.built] == [(EXACT, False), (ROUNDED, False)]
    assert len(engines.rejected) == 2
    assert all("there is no GPU cuda:0" in line for line in engines.rejected)


def test_a_plan_that_the_library_refuses_is_removed(site):
    site.machine.trt.refuses, site.machine.trt.refused = "another version tag", {"deserialize_cuda_engine"}
    with pytest.raises(ArtefactError, match="cannot load the plan: another version tag"):
        site.trials()


def test_an_engine_that_dies_while_it_is_timed_is_removed_by_name(site):
    site.dies = {ROUNDED}
    tried, engines = site.trials()
    assert [(engine.plan, engine.executed) for engine in engines.built] == [(EXACT, True)]
    assert site.plans() == {EXACT}
    assert tried.rejected == (f"{ROUNDED}: it was killed by signal 11",)
    assert tried.executions[0].median_ms == 2.0


@pytest.mark.parametrize(
    ("gpu", "words"), [(replace(GPU, sm="sm90"), "was built for sm89"), (None, listed_gpus().words)]
)
def test_an_engine_that_does_not_fit_is_not_opened_and_the_build_says_so(site, gpu, words, monkeypatch, caplog):
    monkeypatch.setattr(engine_trials, "find_gpu", lambda number: gpu)
    with caplog.at_level("INFO", "medseg_trt"):
        tried, engines = site.trials()
    assert [engine.executed for engine in engines.built] == [False, False]
    assert site.machine.trt.plans == []
    for plan in (EXACT, ROUNDED):
        assert f"{plan} was not verified: " in caplog.text
    assert words in caplog.text
    assert "tensorrt-rtx" not in {item.backend for item in tried.executions}


# --- faults on purpose ---------------------------------------------------------------------------------------------


def verifies_nothing(monkeypatch):
    figures = {"images": "none", "num_images": 0, "max_abs_error": 0.0, "agreement": 1.0}
    monkeypatch.setattr(executions, "verify_session", lambda *_: figures)


def keeps_what_it_refuses(monkeypatch):
    monkeypatch.setattr(engine_trials, "engine_files", lambda *_: ())


@pytest.mark.parametrize("fault", [verifies_nothing, keeps_what_it_refuses], ids=lambda fault: fault.__name__)
def test_engine_trials_fault_fails_the_refusal_test(site, fault, monkeypatch):
    fault(monkeypatch)
    site.answers[ROUNDED] = turned
    with pytest.raises(AssertionError):
        refused_by_name(site, ROUNDED, "draws other masks")
