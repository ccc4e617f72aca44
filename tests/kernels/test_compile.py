"""Compiling: the same sources give the same bytes, the cache is never believed too much, the manifest tells the truth.

Every test has a cache folder of its own, so that what is shown does not depend on what was compiled before.
"""

import ctypes
import dataclasses
import errno
import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError, DeviceError, MedsegError, MissingExtraError, UsageError
from medseg_trt.kernels import assemble, compile, load, manifest
from medseg_trt.kernels.kernel import Entry, Kernel, pointer, scalar
from medseg_trt.kernels.library import TARGETS, compile_here, open_library

SOURCE = """
#include <cuda_fp16.h>
#include "double.cuh"
extern "C" __global__ void ENTRY(const SCALAR* x, int count, SCALAR* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = static_cast<SCALAR>(twice(static_cast<float>(x[i])) * 0.3f + 0.1f);
}
"""
HEADER = "__device__ float twice(float x) { return 2.0f * x; }\n"
ENTRY = Entry(
    name="small_float32",
    dtype="float32",
    defines={"ENTRY": "medseg_small_float32", "SCALAR": "float"},
    parameters=(pointer("x", "float32"), scalar("count"), pointer("y", "float32", "out")),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "medseg-trt" / "kernels"


@pytest.fixture
def small(tmp_path) -> Kernel:
    """A kernel of our own: compiled in milliseconds, and free to be changed."""
    (tmp_path / "double.cuh").write_text(HEADER)
    source = tmp_path / "small.cu"
    source.write_text(SOURCE)
    return dataclasses.replace(load("logits_to_mask"), name="small", source=source, entries=(ENTRY,))


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """Count how often the compiler really runs."""
    seen: list[str] = []
    really = compile._compile

    def count(kernel, entry, options, toolchain):
        seen.append(entry.name)
        return really(kernel, entry, options, toolchain)

    monkeypatch.setattr(compile, "_compile", count)
    return seen


def test_ptx_has_the_function_the_version_and_no_contraction(small):
    ptx = compile.compile_ptx(small, ENTRY)
    assert ".version 9.0" in ptx
    assert ".target sm_80" in ptx
    assert manifest.ptx_parameters(ptx, "medseg_small_float32") == ["pointer", "int32", "pointer"]
    assert "mul.rn.f32" in ptx
    assert "fma" not in ptx


def test_the_older_compiler_works_in_the_same_process(small):
    ptx = compile.compile_ptx(small, ENTRY, "compute_87", "12.6")
    assert ".version 8.5" in ptx
    assert ".target sm_87" in ptx
    assert ".version 9.0" in compile.compile_ptx(small, ENTRY, "compute_87")
    assert compile.compiler_version("12.6").startswith("NVRTC 12.6 (12.6.")
    assert compile.compiler_version("13.0").startswith("NVRTC 13.0 (13.0.")


def test_compiled_ptx_is_cached(small, compilations):
    assert compile.compile_ptx(small, ENTRY) == compile.compile_ptx(small, ENTRY)
    assert len(compilations) == 1


@pytest.mark.parametrize("file", ["small.cu", "double.cuh"])
def test_a_change_of_the_source_or_of_a_header_compiles_again(file, small, compilations):
    before = compile.compile_ptx(small, ENTRY)
    path = small.source.parent / file
    path.write_text(path.read_text().replace("2.0f", "4.0f").replace("0.3f", "0.6f"))
    assert compile.compile_ptx(small, ENTRY) != before
    assert len(compilations) == 2


def test_defines_architectures_and_compilers_are_kept_apart(small, compilations):
    half = dataclasses.replace(ENTRY, defines={**ENTRY.defines, "SCALAR": "__half"})
    texts = {
        compile.compile_ptx(small, ENTRY),
        compile.compile_ptx(small, half),
        compile.compile_ptx(small, ENTRY, "compute_90"),
        compile.compile_ptx(small, ENTRY, "compute_80", "12.6"),
    }
    assert len(texts) == len(compilations) == 4


@pytest.mark.parametrize("content", ["", "half a f", "{other}", "\udcff"], ids=["empty", "short", "edited", "bytes"])
def test_a_damaged_cache_entry_is_compiled_again(content, small, cache, compilations):
    ptx = compile.compile_ptx(small, ENTRY)
    (cache_file,) = cache.iterdir()
    other = cache_file.read_text().replace("0f3DCCCCCD", "0f3E4CCCCD")
    assert other != cache_file.read_text()
    cache_file.write_text(content.format(other=other), errors="surrogateescape")
    assert compile.compile_ptx(small, ENTRY) == ptx
    assert compile.compile_ptx(small, ENTRY) == ptx
    assert len(compilations) == 2


def test_a_compilation_that_dies_leaves_nothing_behind(small, cache, monkeypatch):
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "the disk is full")))
    with pytest.raises(OSError, match="full"):
        compile.compile_ptx(small, ENTRY)
    assert list(cache.iterdir()) == []


def test_an_error_in_the_source_is_one_line_and_the_log_a_note(small):
    small.source.write_text(SOURCE.replace("int count", "int cuont"))
    with pytest.raises(
        MedsegError, match=r'^small\.cu does not compile as small_float32: .*identifier "count"'
    ) as caught:
        compile.compile_ptx(small, ENTRY)
    assert "\n" not in str(caught.value)
    assert "1 error detected" in caught.value.__notes__[0]


def test_a_missing_wheel_says_what_to_install(small, monkeypatch):
    tools = dataclasses.replace(compile.TOOLCHAINS["13.0"], compiler=("nvidia-no-such-compiler", "libnvrtc.so"))
    monkeypatch.setattr(compile, "TOOLCHAINS", {"none": tools})
    with pytest.raises(MissingExtraError, match=r"pip install 'medseg-trt\[kernels\]'"):
        compile.wheel_file(*tools.compiler, tools.extra)


def test_compiler_loads_libraries_from_site_packages_only(small, monkeypatch):
    opened: list[str] = []
    really = ctypes.CDLL

    def note(name, *rest, **options):
        opened.append(str(name))
        return really(name, *rest, **options)

    compile._nvrtc.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", note)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    ptx = compile.compile_ptx(small, ENTRY)
    assert assemble.usage(ptx, "sm_80").registers > 0
    assert opened
    assert all("site-packages" in Path(name).parts for name in opened)


def test_ptxas_and_the_disassembler_agree_with_the_source(small):
    ptx = compile.compile_ptx(small, ENTRY)
    opcode_counts = assemble.opcodes(ptx, "sm_86")
    assert assemble.count(opcode_counts, "LDG") == assemble.count(opcode_counts, "STG") == 1
    assert assemble.count(opcode_counts, "LDG", "128") == 0
    assert assemble.count(opcode_counts, "FFMA") == 0
    used = assemble.usage(ptx, "sm_86")
    assert 4 < used.registers < 32
    assert (used.spill_bytes, used.stack_bytes, used.shared_bytes) == (0, 0, 0)


def test_ptxas_refuses_an_older_device_in_one_line(small):
    with pytest.raises(MedsegError, match=r"^ptxas failed: .*higher than default SM version[^\n]*$"):
        assemble.usage(compile.compile_ptx(small, ENTRY, "compute_90"), "sm_80")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_builds_are_identical_byte_for_byte(tmp_path, monkeypatch):
    for name in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{name}"))  # the second one compiles everything too
        manifest.build(tmp_path / name, ["sm_89", "jetpack6"], ["logits_to_mask"])
    one = contents(tmp_path / "one")
    assert len(one) == 7
    assert one == contents(tmp_path / "two")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A build of three targets; of rmsnorm two functions only, to save time."""
    folder = tmp_path_factory.mktemp("built") / "kernels"
    norm = load("rmsnorm")
    norm = dataclasses.replace(norm, entries=(norm.entry("rmsnorm_float16"), norm.entry("rmsnorm_float16_fp8")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "load", {"rmsnorm": norm, "logits_to_mask": load("logits_to_mask")}.__getitem__)
        manifest.build(folder, ["sm_80", "sm_89", "jetpack6"], ["logits_to_mask", "rmsnorm"])
    return folder


def test_the_manifest_has_every_field_and_the_digests_are_true(built):
    rows = json.loads((built / "manifest.json").read_text())["kernels"]
    assert all(hashlib.sha256((built / row["ptx"]).read_bytes()).hexdigest() == row["sha256"] for row in rows)
    row_of = {(row["target"], row["entry"]): row for row in rows}
    row = row_of["jetpack6", "medseg_logits_to_mask_float16"]
    assert row.keys() == {
        "name",
        "entry",
        "dtype",
        "target",
        "arch",
        "ptx",
        "ptx_version",
        "cuda",
        "sha256",
        "parameters",
        "block",
        "grid",
        "shared_bytes",
        "static_shared_bytes",
        "registers",
        "spills",
        "max_width",
    }
    assert all(parameter.keys() == {"name", "kind", "dtype", "direction"} for parameter in row["parameters"])
    assert {key: row[key] for key in ("name", "dtype", "arch", "ptx_version", "cuda", "block", "spills")} == {
        "name": "logits_to_mask",
        "dtype": "float16",
        "arch": "sm_87",
        "ptx_version": "8.5",
        "cuda": "12.6",
        "block": [128, 1, 1],
        "spills": 0,
    }
    assert row["parameters"][0] == {"name": "logits", "kind": "pointer", "dtype": "float16", "direction": "in"}
    assert row["parameters"][-1] == {"name": "mask", "kind": "pointer", "dtype": "uint8", "direction": "out"}
    assert row["grid"] == load("logits_to_mask").grid_rule
    assert row["max_width"] == 16384
    assert row_of["sm_80", "medseg_rmsnorm_float16"]["static_shared_bytes"] > 0
    assert all(16 <= row["registers"] <= 255 for row in rows)


def test_functions_that_need_a_newer_device_are_left_out(built):
    rows = json.loads((built / "manifest.json").read_text())["kernels"]
    fp8 = {row["target"] for row in rows if row["entry"].endswith("fp8")}
    assert fp8 == {"sm_89"}


@pytest.mark.parametrize(
    ("capability", "cuda", "target"),
    [(80, (13, 0), "sm_80"), (86, (13, 1), "sm_80"), (120, (13, 0), "sm_89"), (87, (12, 6), "jetpack6")],
)
def test_a_library_gives_the_newest_that_device_and_driver_understand(capability, cuda, target, built):
    kernel = load("logits_to_mask")
    ptx = open_library(built)(kernel, kernel.entries[0], capability, cuda)
    assert ptx == (built / target / f"{kernel.entries[0].name}.ptx").read_text()


@pytest.mark.parametrize(("capability", "cuda"), [(70, (13, 0)), (80, (12, 6)), (87, (12, 5))])
def test_a_library_refuses_what_is_too_old(capability, cuda, built):
    kernel = load("logits_to_mask")
    for find in (open_library(built), compile_here):
        with pytest.raises(DeviceError, match=f"sm_{capability} with a driver for CUDA {cuda[0]}.{cuda[1]}"):
            find(kernel, kernel.entries[0], capability, cuda)


def test_compile_here_chooses_target_and_ptx_version_for_device_and_driver(small):
    assert ".target sm_87" in compile_here(small, ENTRY, 88, (13, 0))
    assert ".version 8.5" in compile_here(small, ENTRY, 88, (12, 8))


def test_a_library_refuses_damage_and_other_arguments(built, tmp_path):
    kernel = load("logits_to_mask")
    entry = kernel.entries[0]
    folder = tmp_path / "copy"
    for name, content in contents(built).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    find = open_library(folder)
    other = dataclasses.replace(entry, parameters=entry.parameters[::-1])
    with pytest.raises(ArtefactError, match="another version of logits_to_mask"):
        find(kernel, other, 80, (13, 0))
    path = folder / "sm_80" / f"{entry.name}.ptx"
    path.write_text(path.read_text().replace("st.global", "ld.global", 1))
    with pytest.raises(ArtefactError, match="is damaged"):
        find(kernel, entry, 80, (13, 0))
    path.unlink()
    with pytest.raises(ArtefactError, match="is damaged"):
        find(kernel, entry, 80, (13, 0))


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"schema": 99, "kernels": []}', '{"schema": 1}', '{"schema": 1, "kernels": [{}]}']
)
def test_a_folder_without_a_readable_manifest_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtefactError, match="medseg-trt kernels build"):
        open_library(tmp_path)


def test_a_declaration_that_differs_from_the_source_is_not_built(small, monkeypatch, tmp_path):
    entry = dataclasses.replace(ENTRY, parameters=(*ENTRY.parameters[:2], scalar("more"), ENTRY.parameters[2]))
    monkeypatch.setattr(manifest, "load", lambda _: dataclasses.replace(small, entries=(entry,)))
    with pytest.raises(MedsegError, match=r"small\.cu: the PTX of small_float32 has other arguments"):
        manifest.build(tmp_path / "out", ["sm_80"], ["small"])
    assert not (tmp_path / "out").exists()


def test_only_a_folder_of_kernels_is_replaced(small, monkeypatch, tmp_path):
    monkeypatch.setattr(manifest, "load", lambda _: small)
    out = tmp_path / "out"
    manifest.build(out, ["sm_80", "sm_86"], ["small"])
    manifest.build(out, ["sm_86"], ["small"])
    assert sorted(contents(out)) == ["manifest.json", "sm_86/small_float32.ptx"]
    (out / "manifest.json").unlink()
    with pytest.raises(UsageError, match="holds other files"):
        manifest.build(out, ["sm_86"], ["small"])
    assert (out / "sm_86" / "small_float32.ptx").exists()


def test_the_command_builds_and_prints_json(small, monkeypatch, tmp_path):
    monkeypatch.setattr(manifest, "load", lambda _: small)
    monkeypatch.setattr(manifest, "build", lambda folder, targets: REALLY_BUILD(folder, targets, ["small"]))
    done = CliRunner().invoke(cli, ["kernels", "build", "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert {row["target"] for row in result["manifest"]["kernels"]} == set(TARGETS) - {"sm_75"}  # it needs sm_80
    done = CliRunner().invoke(cli, ["kernels", "build", "--arch", "sm_80,sm_1", "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, UsageError)
    assert "no architecture sm_1; choose from: sm_80" in str(done.exception)


REALLY_BUILD = manifest.build
