import json
from dataclasses import replace
from pathlib import Path

import pytest

from medseg_trt.engines.fingerprint import (
    EngineFingerprint,
    RuntimeEnvironment,
    metadata_path,
    mismatches,
    read_fingerprint,
    rebuild_hint,
    write_fingerprint,
)
from medseg_trt.errors import ArtefactError
from medseg_trt.spec import to_dict

BUILT = EngineFingerprint(
    plan="fp16-sm86.plan",
    sha256="5" * 64,
    bytes=7,
    library="tensorrt-rtx",
    version="1.7.1.116",
    targets=("sm86", "sm89"),
    cuda="13",
    precision="fp16",
    dialect="canonical",
    graph="fp16.onnx",
    graph_sha256="a" * 64,
    weights_sha256="b" * 64,
    plugins={"RMSNorm": "c" * 64},
    batch=(1, 1, 8),
    options={"level": 3},
)
MACHINE = RuntimeEnvironment(
    library="tensorrt-rtx",
    version="1.7.1.116",
    sm="sm86",
    gpu="NVIDIA A10",
    driver="580.65",
    cuda="13.0",
    graph_sha256="a" * 64,
    weights_sha256="b" * 64,
    plugins={"RMSNorm": "c" * 64, "SwiGLU": "d" * 64},
)


def test_a_fingerprint_is_read_as_it_was_written(tmp_path: Path):
    path = write_fingerprint(BUILT, tmp_path)
    assert path == metadata_path(tmp_path / BUILT.plan)
    assert read_fingerprint(path) == read_fingerprint(tmp_path / BUILT.plan) == BUILT


def test_an_engine_fits_where_everything_is_as_it_was_built():
    assert mismatches(BUILT, MACHINE) == []
    unknown = RuntimeEnvironment(library="tensorrt-rtx", version="1.7.1.116", plugins=MACHINE.plugins)
    assert mismatches(BUILT, unknown) == []  # what is not known is no mismatch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"library": "tensorrt"}, ["TensorRT-RTX", "cannot read"]),
        ({"version": None}, ["1.7.1.116", "not installed"]),
        ({"version": "1.6.0"}, ["built by TensorRT-RTX 1.7.1.116", "1.6.0 is installed"]),
        ({"sm": "sm120"}, ["built for sm86, sm89", "NVIDIA A10", "sm120"]),
        ({"cuda": "12.4"}, ["needs CUDA 13", "driver 580.65", "12.4"]),
        ({"graph_sha256": "e" * 64}, ["another fp16.onnx"]),
        ({"weights_sha256": "e" * 64}, ["another fp16.onnx"]),
        ({"plugins": {"RMSNorm": "e" * 64}}, ["other kernels", "RMSNorm"]),
        ({"plugins": {}}, ["RMSNorm"]),
    ],
)
def test_each_engine_mismatch_is_described_in_one_sentence(changes, words):
    (sentence,) = mismatches(BUILT, replace(MACHINE, **changes))
    assert all(word in sentence for word in [BUILT.plan, *words])
    assert sentence.endswith(".")


def test_all_engine_mismatches_are_listed():
    assert len(mismatches(BUILT, replace(MACHINE, version="1.6", sm="sm75", cuda="12.4", plugins={}))) == 4


def test_compatibility_that_was_asked_for_is_no_mismatch():
    portable = replace(BUILT, version_compatible=True, hardware="ampere_plus")
    assert mismatches(portable, replace(MACHINE, version="1.8.0", sm="sm120")) == []
    assert len(mismatches(portable, replace(MACHINE, version="2.0", sm="sm75"))) == 2


def test_a_tuned_engine_does_not_run_on_another_gpu_of_its_kind():
    tuned = replace(BUILT, library="tensorrt", gpu="NVIDIA GeForce RTX 3090")
    machine = replace(MACHINE, library="tensorrt")
    assert "RTX 3090" in mismatches(tuned, machine)[0]
    assert mismatches(replace(tuned, hardware="same_compute_capability"), machine) == []


def test_the_hint_names_a_command():
    assert "medseg-trt infer --rebuild --bundle model.medseg" in rebuild_hint(Path("model.medseg"))


def test_a_metadata_file_of_schema_1_is_read_under_todays_names(tmp_path):
    fields = to_dict(BUILT)
    older = {"flavour" if name == "dialect" else name: value for name, value in fields.items()} | {"schema": 1}
    path = tmp_path / "fp16-sm86.json"
    path.write_text(json.dumps(older), encoding="utf-8")
    assert read_fingerprint(path) == BUILT


@pytest.mark.parametrize(
    "fault",
    [
        {"plan": "../fp16-sm86.plan"},
        {"plan": ""},
        {"graph": "/etc/passwd"},
        {"library": "cudnn"},
        {"schema": 3},
        {"batch": [2, 1, 8]},
        {"batch": [0, 1, 8]},
        {"cuda": "new"},
        {"unknown": 1},
        {"plan": "other.plan"},
        {"hardware": "all"},
        {"schema": []},
    ],
)
def test_a_hostile_metadata_file_is_refused(tmp_path, fault):
    path = tmp_path / "fp16-sm86.json"
    path.write_text(json.dumps(to_dict(BUILT) | fault), encoding="utf-8")
    with pytest.raises(ArtefactError):
        read_fingerprint(path)


@pytest.mark.parametrize("content", [None, "", "[]", "[" * 100_000, "{}", " " * (2 << 20)])
def test_a_missing_or_malformed_metadata_file_is_refused(tmp_path, content):
    path = tmp_path / "fp16-sm86.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ArtefactError):
        read_fingerprint(path)
