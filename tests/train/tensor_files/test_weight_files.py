"""Files of weights from anywhere: what they claim is not believed, and what they ask for is not done."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg_trt.errors import ArtefactError
from medseg_trt.train.tensor_files.weight_files import is_finite, is_plain, load_pickled, open_pickled, read_json

CLAIMED_BYTES = 1 << 24


@pytest.fixture
def bomb(tmp_path) -> Path:
    """An archive of 20 kB that PyTorch unpacks to 16 MB of zeros."""
    torch.save({"a": torch.zeros(CLAIMED_BYTES // 4)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    return tmp_path / "bomb.pt"


@pytest.mark.parametrize("mapped", [False, True])
def test_an_archive_that_unpacks_to_more_than_it_holds_is_refused(mapped, bomb):
    assert bomb.stat().st_size < CLAIMED_BYTES / 500
    assert torch.load(bomb, weights_only=True)["a"].nbytes == CLAIMED_BYTES  # PyTorch would believe it
    with pytest.raises(ArtefactError, match=r"bomb\.pt is compressed, or claims more than it holds"):
        load_pickled(bomb, "model", mapped=mapped)


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_and_plain_data_come_back(mapped, tmp_path):
    content = {"a": torch.arange(6.0).reshape(2, 3), "b": [1, "x", None, 0.5]}
    torch.save(content, tmp_path / "a.pt")
    loaded = load_pickled(tmp_path / "a.pt", "model", mapped=mapped)
    assert torch.equal(loaded["a"], content["a"])
    assert loaded["b"] == content["b"]


def test_a_mapped_tensor_is_read_when_it_is_used(tmp_path):
    """Bytes that change after it was opened are found, so that nothing was read before."""
    torch.save({"a": torch.ones(1 << 16)}, tmp_path / "a.pt")
    mapped, read = (load_pickled(tmp_path / "a.pt", "model", mapped=mapped)["a"] for mapped in (True, False))
    content = (tmp_path / "a.pt").read_bytes()
    with (tmp_path / "a.pt").open("r+b") as file:
        file.write(content.replace(np.float32(1).tobytes(), np.float32(2).tobytes()))
    assert (mapped[1:-1] == 2).all()  # the ends may be cut otherwise where a neighbour ends with the same bytes
    assert (read == 1).all()


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {1: torch.ones(2)}])
def test_what_is_no_dictionary_of_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(ArtefactError, match=r"a\.bin holds no named tensors"):
        open_pickled(tmp_path / "a.bin")


def test_the_format_before_archives_is_refused_with_what_to_do(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ArtefactError, match=r"a\.bin is damaged or no file of named tensors: mmap can only .* save"):
        open_pickled(tmp_path / "a.bin")


@pytest.mark.parametrize("mapped", [False, True])
def test_code_is_refused_and_does_not_run(mapped, tmp_path):
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "touched"),)

    torch.save({"a": Trap()}, tmp_path / "a.pt")
    with pytest.raises(ArtefactError, match=r"a\.pt holds other things than tensors and plain data"):
        load_pickled(tmp_path / "a.pt", "model", mapped=mapped)
    assert not (tmp_path / "touched").exists()
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ArtefactError, match=r"b\.pt"):
        load_pickled(tmp_path / "b.pt", "model", mapped=mapped)
    assert not (tmp_path / "touched").exists()


def test_plain_tensors_have_every_value_in_their_storage():
    matrix = torch.ones(4, 6)
    assert is_plain(matrix)
    assert is_plain(matrix.T)
    assert is_plain(matrix[1:, ::2])
    assert is_plain(torch.nn.Parameter(matrix))
    assert not is_plain(torch.ones(1).expand(1 << 50))
    assert not is_plain(torch.ones(4).as_strided((4, 4), (1, 0)))
    assert not is_plain(matrix.to_sparse())
    assert not is_plain(matrix.to("meta"))
    assert not is_plain(matrix.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [0, 500, 999])
def test_is_finite_detects_one_nan_or_infinity(dtype, bad, index):
    values = torch.linspace(-60000, 60000, 1000).to(dtype)
    assert is_finite(values)
    values[index] = bad
    assert not is_finite(values)


def test_whole_numbers_are_finite():
    assert is_finite(torch.tensor(5))
    assert is_finite(torch.arange(3))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5])
def test_a_description_that_is_no_json_object_is_refused(text, tmp_path):
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"params\.json"):
        read_json(tmp_path / "params.json")


def test_read_json_refuses_a_huge_file(tmp_path):
    with (tmp_path / "params.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: no disk holds it, and no memory would
    with pytest.raises(ArtefactError, match=r"params\.json has more than 16777216 bytes"):
        read_json(tmp_path / "params.json")
