"""A file of ``torch.save`` is judged before PyTorch allocates anything that it asks for; a child shows the memory."""

import io
import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch

from medseg_trt.errors import ArtefactError
from medseg_trt.train.tensor_files.pickle_judge import (
    MAX_DEPTH,
    MAX_INSTRUCTIONS,
    MAX_OBJECTS,
    ExcessError,
    ForeignObjectError,
    MalformedError,
)
from medseg_trt.train.tensor_files.pickle_limits import require_tensors_and_data
from medseg_trt.train.tensor_files.weight_files import load_pickled

GIBIBYTE = 1 << 30
LIMITED = """
import resource, sys
from pathlib import Path
from medseg_trt.errors import ArtefactError
from medseg_trt.train.tensor_files.weight_files import load_pickled
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + (1 << 29)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    try:
        load_pickled(Path(path), "checkpoint")
        print("opened")
    except ArtefactError as error:
        print(error)
"""


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """Write an archive as ``torch.save`` does, around a pickle of our own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        for name, content in (storages or {}).items():
            file.writestr(f"archive/data/{name}", content)
        file.writestr("archive/version", "3\n")
    return path


def call(name: str, arguments: bytes) -> bytes:
    """Return the pickle of one call: of a global, with the argument that the instructions push."""
    module, _, function = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{function}\n".encode() + arguments + b"\x85R."


def long(number: int) -> bytes:
    content = pickle.encode_long(number)
    return b"\x8a" + bytes([len(content)]) + content


EIGHT_GIB = long(8 * GIBIBYTE)
NESTED = b"cbuiltins\nbytearray\n" + EIGHT_GIB + b"\x85R"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ"


def tensor(items: int, size: int, stride: int = 1, offset: int = 0) -> bytes:
    """Return the pickle of a tensor of one axis, whose storage claims ``items`` float32 values."""
    numbers = long(offset) + long(size) + b"\x85" + long(stride) + b"\x85"
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % long(items) + numbers + b"\x89" + hooks + b"tR."


BOMBS = {
    "Counter of 8 GiB": (call("collections.Counter", NESTED), "other things than tensors and plain data"),
    "bytearray of 8 GiB": (call("builtins.bytearray", EIGHT_GIB), "other things than tensors and plain data"),
    "set of a list": (call("builtins.set", b"]"), "other things"),
    "storage of 8 GiB": (tensor(2 * GIBIBYTE, 4), "claims|has a storage of 8589934592 bytes"),
    "tensor of 8 GiB over 16 bytes": (tensor(4, 2 * GIBIBYTE), "values that are not in the file"),
    "tensor far behind its storage": (tensor(4, 1, 1, 2 * GIBIBYTE), "values that are not in the file"),
    "tensor with a long stride": (tensor(4, 2, 2 * GIBIBYTE), "values that are not in the file"),
}


def test_what_would_be_allocated_is_refused_within_half_a_gibibyte_more(tmp_path):
    paths = [
        archive(tmp_path / f"{number}.pt", pickled, {"0": bytes(16)})
        for number, (pickled, _) in enumerate(BOMBS.values())
    ]
    assert all(path.stat().st_size < 2000 for path in paths)
    command = [sys.executable, "-c", LIMITED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for line, path, (_, message) in zip(lines, paths, BOMBS.values(), strict=True):
        assert line.startswith(str(path))
        assert any(part in line for part in message.split("|")), line


def test_the_same_tensor_within_its_storage_is_opened(tmp_path):
    content = load_pickled(
        archive(tmp_path / "a.pt", tensor(4, 2, 2, 1), {"0": torch.arange(4.0).numpy().tobytes()}), "x"
    )
    assert content.tolist() == [1, 3]


def judge(path: Path) -> None:
    with path.open("rb") as file:
        require_tensors_and_data(file)


@pytest.mark.parametrize(
    ("pickled", "kind", "message"),
    [
        (b"\x80\x02]" + b"\x85" * (MAX_DEPTH + 1) + b".", ExcessError, "nests more than"),
        (b"\x80\x02" + b"(" * 1000 + b".", ExcessError, "nests more than"),
        (b"\x80\x02" + b"]" * (MAX_OBJECTS + 1) + b".", ExcessError, "holds more than"),
        (b"\x80\x02" + b"N" * (MAX_INSTRUCTIONS + 1) + b".", ExcessError, "instructions"),
        (b"\x80\x02]q\x00h\x00a.", MalformedError, "inside itself"),
        (b"\x80\x02]q\x00h\x00\x85a.", MalformedError, "complete"),
        (b"\x80\x02]q\x01]h\x01a0h\x01Na.", ForeignObjectError, "POP"),
        (b"\x80\x02}" + long(1 << 70) + b"Ns.", ForeignObjectError, "small numbers"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", ForeignObjectError, "made of something else"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", ForeignObjectError, "no storage"),
        (b"\x80\x02ctorch\nFloatStorage\nK\x05\x85R.", ForeignObjectError, "a call of torch.FloatStorage"),
        (b"\x80\x02K\x05a.", MalformedError, "not well formed"),
        (b"\x80\x02", MalformedError, "not well formed"),
        (b"\x80\x04\x8c\x01a.", ForeignObjectError, "SHORT_BINUNICODE"),
    ],
)
def test_instructions_that_no_checkpoint_needs_are_refused(tmp_path, pickled, kind, message):
    with pytest.raises(kind, match=message):
        judge(archive(tmp_path / "a.pt", pickled))


def test_an_attribute_dictionary_may_not_be_copied_without_end(tmp_path):
    """Each copy costs six bytes of the file and a thousand entries of memory."""
    entries = b"".join(b"X\x04\x00\x00\x00" + f"{number:04}".encode() + b"N" for number in range(1000))
    state = b"}q\x00(" + entries + b"u"
    copies = b"ccollections\nOrderedDict\nq\x01" + b"h\x01)Rh\x00b" * 2000
    with pytest.raises(ExcessError, match="copies more than"):
        judge(archive(tmp_path / "a.pt", b"\x80\x02]" + b"(" + state + copies + b"e."))


def test_the_format_before_archives_is_judged_too(tmp_path):
    for number, (content, kind) in enumerate(
        (
            ({"a": Counter("ab")}, ForeignObjectError),
            ({"a": torch.ones(4).as_strided((2,), (1,))}, None),
        )
    ):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=False)
        if kind is None:
            judge(path)
        else:
            with pytest.raises(kind):
                judge(path)
    whole = path.read_bytes()
    large = whole.replace(
        b"cpu" + b"q" + whole[whole.index(b"cpuq") + 4 : whole.index(b"cpuq") + 5] + b"K\x04", b"cpuJ\xff\xff\xff\x7f"
    )
    assert large != whole
    (tmp_path / "claims.pth").write_bytes(large)
    with pytest.raises(ExcessError, match="claim more bytes than the file"):
        judge(tmp_path / "claims.pth")


def test_what_networks_and_optimisers_save_is_opened(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1, 5, 5)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "epoch": 3,
        "name": "ä",
        "optimizer": optimizer.state_dict(),
        "half": torch.ones(2).half(),
        "kind": torch.float16,
        "none": [None, (), {}],
        "order": OrderedDict(a=1, b=[1.5, True]),
        "transposed": torch.arange(6).reshape(2, 3).T,
        "empty": torch.empty(0, 3),
    }
    for is_archive in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_archive)
        loaded = load_pickled(tmp_path / "a.pt", "checkpoint")
        assert loaded.keys() == content.keys()
        assert torch.equal(loaded["transposed"], content["transposed"])
        assert loaded["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]
        assert loaded["state_dict"]._metadata == content["state_dict"]._metadata


def test_an_archive_that_two_readers_may_read_differently_is_refused(tmp_path):
    good = archive(tmp_path / "a.pt", pickle.dumps({"a": 1}, 2)).read_bytes()
    judge(tmp_path / "a.pt")
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Counter("a"), 2))
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("archive/data.pkl", pickle.dumps({"a": 1}, 2))
    for content in (good + b"end", other.getvalue()):
        (tmp_path / "b.pt").write_bytes(content)
        with pytest.raises(MalformedError, match="more than one way"):
            judge(tmp_path / "b.pt")


def test_a_whole_model_is_refused_with_the_line_to_type(tmp_path):
    torch.save(torch.nn.Conv2d(3, 3, 1), tmp_path / "whole.pth")
    with pytest.raises(ArtefactError) as caught:
        load_pickled(tmp_path / "whole.pth", "checkpoint")
    assert "(torch.nn.modules.conv.Conv2d)" in str(caught.value)
    assert 'torch.save(model.state_dict(), "FILE")' in str(caught.value)
    assert "\n" not in str(caught.value)
