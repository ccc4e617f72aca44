import ast
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from medseg_trt.bench.layer_times import profile
from medseg_trt.bench.schema import Profile
from medseg_trt.bench.timed_session import MeasuredSession
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.files import sha256
from medseg_trt.processes import STATUS, ChildProcess, Progress, process_memory
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.sessions.subprocess_session import ChildSession

ROOT = Path(__file__).parents[2]
PACKAGES = ("toolkit", "export", "train", "kernels")
PROTOCOL = "toolkit/processes.py"
# What else may name the interpreter: a message to a person, and a process that replaces itself with its own arguments.
OTHER_USES = {"toolkit/samples/catalogue.py": 1, "toolkit/engines/child.py": 1}
PLANTED = "raise SystemExit('a module of the current folder was imported')\n"

CHILD = """
import os, signal, sys
from medseg_trt.errors import InputError
from medseg_trt.processes import parent

class FolderError(InputError):
    pass

with parent() as (request, connection):
    print("noise of a library", flush=True)
    kind = request["kind"]
    if kind == "progress":
        for done in range(3):
            connection.send_progress("outer", done, 3)
        connection.send({"reply": 7})
    elif kind == "error":
        raise FolderError("no folder")
    elif kind == "exception":
        raise RuntimeError("kernel failed")
    elif kind == "signal":
        os.kill(os.getpid(), request["signal"])
    elif kind == "sleep":
        connection.receive()
    elif kind == "truncated":
        connection.receive()
        connection.send({"shape": [1000], "dtype": "float32"})
    else:
        while (call := connection.receive()) is not None:
            connection.send({}, 2 * connection.receive_array(**call))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "child.py"
    path.write_text(CHILD, encoding="utf-8")
    return path


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with modules that must not be imported."""
    for name in ("jaxtyping", "numpy", "onnxruntime", "pip", "medseg_trt"):
        (tmp_path / f"{name}.py").write_text(PLANTED, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def default_graph(folder: Path) -> Path:
    bundle = load_bundle(folder)
    return bundle.folder / bundle.variant(bundle.default).graph


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((0, 3), np.int64)])
def test_child_process_round_trips_arrays(script, array):
    with ChildProcess(script, {"kind": "double"}, "the child") as child:
        for _ in range(2):
            doubled = child.call_for_array({}, array)
            assert doubled.dtype == array.dtype
            np.testing.assert_array_equal(doubled, 2 * array)


def test_progress_comes_before_the_reply(script):
    with ChildProcess(script, {"kind": "progress"}, "the child") as child:
        assert list(child.progress()) == [Progress(phase="outer", done=done, total=3) for done in range(3)]
        assert child.receive() == {"reply": 7}
        child.finish()


def test_an_error_keeps_the_kind_that_the_parent_knows(script):
    with ChildProcess(script, {"kind": "error"}, "the child") as child, pytest.raises(InputError, match=r"^no folder$"):
        child.receive()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGSEGV, "the child was killed by signal 11 (SIGSEGV); it is not used"),
        (
            signal.SIGKILL,
            "the child was killed by signal 9 (SIGKILL); the machine may have run out of memory; it is not used",
        ),
    ],
)
def test_a_death_names_the_signal(script, number, message):
    with ChildProcess(script, {"kind": "signal", "signal": number}, "the child") as child:
        with pytest.raises(ArtefactError) as raised:
            child.receive()
        assert str(raised.value) == message


def test_an_exception_of_a_library_is_named(script):
    with ChildProcess(script, {"kind": "exception"}, "the child", consequence="no file was written") as child:
        with pytest.raises(ArtefactError) as raised:
            child.receive()
        assert str(raised.value) == (
            "the child ended with exit code 1 (RuntimeError: kernel failed); no file was written"
        )


def test_a_child_that_takes_too_long_is_killed(script):
    process = ChildProcess(script, {"kind": "sleep"}, "the child", timeout_s=0.5)
    with process as child, pytest.raises(ArtefactError, match=r"^the child took more than 0\.5 s; it is not used$"):
        child.receive()


def test_truncated_array_from_a_child_process_is_an_error(script):
    process = ChildProcess(script, {"kind": "truncated"}, "the child")
    with process as child, pytest.raises(ArtefactError, match="ended with exit code 0"):
        child.call_for_array({}, np.zeros(1, np.float32))


def test_the_child_is_gone_after_it_is_closed(script):
    with ChildProcess(script, {"kind": "sleep"}, "the child") as child:
        os.kill(child.process_id, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child.process_id, 0)


@pytest.mark.skipif(not STATUS.is_file(), reason="there is no /proc")
def test_memory_is_that_of_this_process():
    before = process_memory()
    array = np.ones(25_000_000)  # 200 MB
    after = process_memory()
    assert 195 < after["anonymous_mb"] - before["anonymous_mb"] < 205
    assert after["peak_resident_mb"] >= after["resident_mb"] > after["anonymous_mb"] > array.nbytes / 1e6
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    resident_pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    assert abs(after["resident_mb"] - resident_pages * page_bytes / 1e6) < 5


# The current folder


@pytest.mark.parametrize("session_class", [ChildSession, MeasuredSession])
def test_a_session_imports_nothing_from_the_current_folder(planted, tiny_bundle, session_class):
    graph = default_graph(tiny_bundle)
    request = SessionRequest(backend="onnxruntime", path=graph, precision="fp32", compute_dtype="fp32", threads=1)
    with session_class(request) as session:
        assert session.run(np.zeros((1, 3, 32, 32), np.float32)).shape[0] == 1


def test_a_profile_imports_nothing_from_the_current_folder(planted, tiny_bundle):
    image = np.zeros((1, 3, 32, 32), np.float32)
    profiled = profile(default_graph(tiny_bundle), "onnxruntime", "fp32", "fp32", image, [])
    assert isinstance(profiled, Profile)
    assert profiled.layers


def test_a_script_imports_nothing_from_the_current_folder(planted, script):
    with ChildProcess(script, {"kind": "progress"}, "the child") as child:
        assert len(list(child.progress())) == 3


def test_pip_is_not_imported_from_the_current_folder(planted):
    from medseg_trt.samples.catalogue import run_pip

    log = planted / "pip.log"
    run_pip(["hash", str(planted / "numpy.py"), "--log", str(log)], "nothing", None)
    assert sha256(planted / "numpy.py") in log.read_text(encoding="utf-8")


def interpreter_uses(source: str) -> int:
    """Count what names the running interpreter, or starts Python in another way."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return names.count("sys.executable") + sum(name.partition(".")[0] == "multiprocessing" for name in modules)


def test_python_is_started_by_the_protocol_alone():
    uses = {
        path.relative_to(ROOT).as_posix(): count
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if (count := interpreter_uses(path.read_text(encoding="utf-8")))
    }
    assert uses == {PROTOCOL: 1, **OTHER_USES}


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'pip'])",
        "from multiprocessing import get_context",
        "import multiprocessing.pool",
    ],
)
def test_a_planted_start_of_python_is_caught(source):
    assert interpreter_uses(source) == 1
