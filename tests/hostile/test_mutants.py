"""Two thousand damaged files: each is read, or refused in one line, and none takes long."""

import gzip
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import make_checkpoint, picture, write_nifti, write_pictures

from medseg_trt.bundles.bundle import MANIFEST, load_bundle
from medseg_trt.errors import MedsegError
from medseg_trt.files import sha256
from medseg_trt.imaging.images import read_image
from medseg_trt.inspection.onnx_file import describe_onnx
from medseg_trt.train.block.blocks import load_block
from medseg_trt.train.checkpoint import load_checkpoint

MUTANTS_A_KIND = 286  # of seven kinds: 2,002 in all
LONGEST_S = 2.0


def flip_bits(content: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 9))):
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))


def flip_bits_of_the_header(content: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 4))):
        content[rng.integers(min(400, len(content)))] ^= 1 << int(rng.integers(8))


def cut(content: bytearray, rng: np.random.Generator) -> None:
    del content[int(rng.integers(len(content))) :]


def overwrite_with_extremes(content: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(content)))
    content[start : start + 8] = rng.choice([b"\xff", b"\0", b"\x7f"]) * 8


def drop_a_part(content: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(content)))
    del content[start : start + int(rng.integers(1, 64))]


MUTATIONS = (flip_bits, flip_bits_of_the_header, cut, overwrite_with_extremes, drop_a_part)


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tiny_bundle) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    volume = np.stack([picture(seed, (20, 24))[0] for seed in range(3)]).transpose(2, 1, 0)
    packed = write_nifti(folder / "packed.nii.gz", volume)
    (folder / "plain.nii").write_bytes(gzip.decompress(packed.read_bytes()))
    checkpoint = make_checkpoint(folder / "model")
    return {
        "png": write_pictures(folder, count=1) / "images" / "case0.png",
        "nifti": folder / "plain.nii",
        "nifti, packed": packed,
        "checkpoint": checkpoint,
        "block": checkpoint.parent / "block.safetensors",
        "onnx": tiny_bundle / "model.onnx",
        "manifest": tiny_bundle / MANIFEST,
    }


def read_in_a_bundle(path: Path, bundle: Path) -> object:
    """Read a manifest beside the files it speaks of."""
    shutil.copy(path, bundle / MANIFEST)
    return load_bundle(bundle)


@pytest.mark.parametrize("kind", ["png", "nifti", "nifti, packed", "checkpoint", "block", "onnx", "manifest"])
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, originals, tiny_bundle, tmp_path, caplog):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "copy.medseg")
    readers: dict[str, Callable[[Path], object]] = {
        "png": read_image,
        "nifti": read_image,
        "nifti, packed": read_image,
        "checkpoint": lambda path: load_checkpoint(path).model(),
        "block": load_block,
        "onnx": describe_onnx,
        "manifest": lambda path: read_in_a_bundle(path, bundle),
    }
    original = originals[kind].read_bytes()
    shutil.copy(originals["block"].with_name(next(originals["block"].parent.glob("block-*")).name), tmp_path)
    rng = np.random.default_rng(list(kind.encode()))
    outcomes: Counter[str] = Counter()
    messages: list[str] = []
    slowest_s = 0.0
    for index in range(MUTANTS_A_KIND):
        content = bytearray(original)
        MUTATIONS[index % len(MUTATIONS)](content, rng)
        path = tmp_path / f"mutant{''.join(originals[kind].suffixes)}"
        path.write_bytes(content)
        began = time.process_time()
        try:
            readers[kind](path)
            outcomes["read"] += 1
        except MedsegError as error:
            outcomes["refused"] += 1
            messages.append(str(error))
        slowest_s = max(slowest_s, time.process_time() - began)
    print(f"{kind}: {dict(outcomes)}, slowest {slowest_s:.2f} s of processor time")
    assert outcomes.total() == MUTANTS_A_KIND
    assert all(message.strip() and "\n" not in message for message in messages)
    assert outcomes["refused"] > MUTANTS_A_KIND // 10  # the cut ones at the least, as far as anything was cut
    assert slowest_s < LONGEST_S


def test_no_mutant_of_a_bundle_is_ever_taken_for_the_bundle(tiny_bundle, tmp_path):
    """What is read in spite of a damaged manifest has the graph and the weights of the original, byte by byte."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "copy.medseg")
    original = (tiny_bundle / MANIFEST).read_bytes()
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(100):
        content = bytearray(original)
        flip_bits(content, rng)
        (bundle / MANIFEST).write_bytes(content)
        try:
            loaded = load_bundle(bundle)
        except MedsegError:
            continue
        read += 1
        variant = loaded.variant(loaded.default)
        for name in (variant.graph, variant.weights):
            assert sha256(bundle / name) == json.loads(original)["files"][name]["sha256"]
    assert read < 100
