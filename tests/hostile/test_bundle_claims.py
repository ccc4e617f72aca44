"""What a bundle claims is compared before anything of that size is made; every refusal is one line of exit code 5.

The attacks are those that took gigabytes, minutes or a traceback before.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from stored_bundle import ARCHIVE, GRAPH, PLAIN_GRAPH, WEIGHTS, edit_graphs, edit_manifest, rehash, stored_bundle

from medseg_trt.bundles.bundle import GOLDEN, MANIFEST, MAX_GOLDEN_BYTES, golden_shapes, load_bundle
from medseg_trt.bundles.golden_file import max_golden_bytes
from medseg_trt.bundles.manifest import COMPUTE_DTYPES
from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.open import open_session

IMAGE_FILE = ARCHIVE.with_name("image.png")
MAX_MESSAGE = 600  # characters: one line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return stored_bundle(tmp_path / "model.medseg")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ArtefactError, match=match) as raised:
        load_bundle(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < MAX_MESSAGE


def npy(shape: tuple[int, ...], dtype: str = "<f4", values: bytes = b"") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue() + values


def golden_file(folder: Path, arrays: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(folder / GOLDEN, "w", compression) as archive:
        for name, content in arrays.items():
            archive.writestr(name, content)
    rehash(folder)


IMAGE = npy((1, 3, 32, 32), values=bytes(4 * 3 * 32 * 32))


@pytest.mark.parametrize(
    ("arrays", "compression", "match"),
    [
        # 8 MiB of zeros deflate to 8 KB; the same trick made 8 GiB
        ({"pixel_values.npy": npy((1, 3, 32, 32)) + bytes(8 << 20)}, zipfile.ZIP_DEFLATED, "is compressed"),
        ({"pixel_values.npy": npy((1, 3, 2**20, 2**20)), "logits.npy": IMAGE}, zipfile.ZIP_STORED, "not float32"),
        ({"pixel_values.npy": npy((2**40,)), "logits.npy": IMAGE}, zipfile.ZIP_STORED, "not float32"),
        ({"pixel_values.npy": npy((1, 3, 32, 32), "<f8"), "logits.npy": IMAGE}, zipfile.ZIP_STORED, "float64"),
        ({"pixel_values.npy": npy((1, 3, 32, 32)), "logits.npy": IMAGE}, zipfile.ZIP_STORED, "golden input"),
        ({"pixel_values.npy": npy((1, 3, 32, 32), "|O"), "logits.npy": IMAGE}, zipfile.ZIP_STORED, "object"),
        ({"pixel_values.npy": b"no array", "logits.npy": IMAGE}, zipfile.ZIP_STORED, "magic string"),
        ({"logits.npy": IMAGE}, zipfile.ZIP_STORED, "pixel_values"),
        # NumPy lets an error of Python's tokenizer through: found by fuzzing
        ({"pixel_values.npy": IMAGE.replace(b"32, 32), }", b"32, 32\0\0\0\0"), "logits.npy": IMAGE}, 0, "golden input"),
    ],
)
def test_golden_data_of_other_shapes_are_refused_from_their_headers(folder, arrays, compression, match):
    golden_file(folder, arrays, compression)
    refused(folder, match)


def test_golden_data_with_nan_are_refused(folder):
    values = np.full((1, 3, 32, 32), np.nan, np.float32).tobytes()
    golden_file(folder, {"pixel_values.npy": IMAGE, "logits.npy": npy((1, 3, 32, 32), values=values)})
    refused(folder, "not finite")


def test_a_golden_file_larger_than_its_arrays_is_not_read(folder):
    limit = max_golden_bytes(golden_shapes(load_bundle(folder).content))
    with (folder / GOLDEN).open("r+b") as file:
        file.truncate(limit + 1)
    rehash(folder)
    refused(folder, "is larger than")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: (
            manifest["model"].update(image_size=[2**13] * 2),
            manifest["preprocessing"].update(image_size=[2**13] * 2),
        ),
        lambda manifest: manifest["model"].update(num_classes=2**40),
    ],
)
def test_a_network_that_is_too_large_is_refused_before_its_input_is_made(folder, change, monkeypatch):
    edit_manifest(folder, change)
    monkeypatch.setattr("medseg_trt.bundles.bundle.golden_input", lambda *_: pytest.fail("it was made"))
    refused(folder, f"exceed {MAX_GOLDEN_BYTES >> 20} MiB")


def test_more_pixels_than_any_network_takes_are_refused(folder):
    edit_manifest(folder, lambda manifest: manifest["model"].update(image_size=[2**17, 2**17]))
    refused(folder, "too many for a network")


def test_preprocessing_of_another_size_than_the_networks_is_refused(folder):
    edit_manifest(folder, lambda manifest: manifest["preprocessing"].update(image_size=[2**17, 2**17]))
    refused(folder, "another size than its network")


@pytest.mark.parametrize("written", ["Infinity", "NaN", "-1.0", "1e999"])
def test_a_golden_error_without_a_limit_is_refused(folder, written):
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"golden_error": 0.001', f'"golden_error": {written}'))
    refused(folder, "golden_error")


@pytest.mark.parametrize(
    "change",
    [
        lambda execution: execution.update(backend="cuda-of-tomorrow"),
        lambda execution: execution.update(backend="tensorrt-rtx"),  # of which no engine was executed
        lambda execution: execution.update(compute="fp8"),
        lambda execution: execution.update(variant="fp64"),
    ],
)
def test_an_execution_that_nothing_can_run_is_refused(folder, change):
    edit_manifest(folder, lambda manifest: change(manifest["executions"][0]))
    refused(folder, "manifest.json")


def test_compute_dtypes_of_backends_equal_those_of_the_manifest():
    assert {name: known.compute_dtypes for name, known in BACKENDS.items()} == COMPUTE_DTYPES


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("graph", "model.xml"),
        ("graph", "../fp32.onnx"),
        ("graph", "a/b.onnx"),
        ("graph", "fp32.onnx\n"),
        ("weights", "fp32.onnx"),
        ("weights", "../weights.bin"),
        ("weights", "/dev/zero"),
        ("weights", ""),
    ],
)
def test_a_graph_is_an_onnx_file_and_weights_are_a_file_beside_it(folder, field, name):
    edit_manifest(folder, lambda manifest: manifest["variants"]["fp32"].update({field: name}))
    refused(folder, "file name|is an .onnx file")


def special(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize("name", [MANIFEST, GOLDEN, WEIGHTS, GRAPH, "config.json", "model.onnx"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_a_fifo_a_device_and_a_folder_are_no_files(folder, name, make):
    special(folder / name, make)
    refused(folder, "cannot be read|leads out|is no bundle|gives no digest|missing")


def test_a_default_graph_that_is_none_of_the_graphs_is_refused(folder):
    (folder / "model.onnx").write_bytes((folder / GRAPH).read_bytes() + b"\x52\x00")  # an empty field of text
    rehash(folder)
    refused(folder, r"model\.onnx is none of the bundle's graphs")


def test_xml_under_the_name_of_a_graph_is_refused(folder):
    """OpenVINO would read its own format whatever the name is."""
    (folder / PLAIN_GRAPH).write_text('<?xml version="1.0"?><net name="a" version="11"><layers/><edges/></net>')
    rehash(folder)
    refused(folder, "is no ONNX file")


def test_weights_that_are_cut_short_are_one_line(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    rehash(folder)
    refused(folder, "beyond the end of 'weights-fp32.bin'")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_that_no_library_takes_is_exit_code_5_without_a_traceback(folder, tmp_path, backend):
    def unconnected(model):
        next(node for node in model.graph.node if node.op_type == "Relu").input[0] = "nobody gives this"

    edit_graphs(folder, unconnected)
    ran = CliRunner().invoke(
        cli, ["infer", str(IMAGE_FILE), "--bundle", str(folder), "-o", str(tmp_path / "masks"), "--backend", backend]
    )
    assert isinstance(ran.exception, ArtefactError), ran.output
    with pytest.raises(ArtefactError, match="refuses"):
        open_session(load_bundle(folder), backend, threads=1)


def test_a_manifest_of_deep_nesting_or_huge_numbers_is_one_line(folder):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["source"] = "deep"
    path.write_text(json.dumps(manifest).replace('"deep"', "[" * 5000 + "]" * 5000))
    refused(folder, "manifest")
    path.write_text(json.dumps(manifest).replace('"deep"', '{"n": ' + "9" * 5000 + "}"))
    refused(folder, "manifest")
