"""What the adapters ask the CUDA driver for, argument by argument: the real packages against a driver of ours."""

import importlib.metadata
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
from gpu_free import driver as fake
from gpu_free.execute import ptx_of

from medseg_trt.kernels import load
from medseg_trt.kernels.launch import DRIVERS, pack

MODULES = {"cuda-bindings": "cuda.bindings", "pycuda": "pycuda"}
ARRAYS = {
    "swiglu_float16": {"gate_up": 2**20, "y": 2**40},
    "rotary_float16_half_table": {"qkv": 2**20, "cos": 2**21, "sin": 2**22, "q": 2**40, "k": 2**41, "v": 2**42},
}
SCALARS = {
    "swiglu_float16": {"rows": 3, "width": 8},
    "rotary_float16_half_table": {
        "batch": 2,
        "tokens": 5,
        "first_position": 7,
        "num_heads": 3,
        "num_kv_heads": 1,
        "head_dim": 16,
        "copy_values": 1,
    },
}
LAUNCH = """
import json, sys
from pathlib import Path
from medseg_trt.kernels import load
from medseg_trt.kernels.launch import Launcher, open_driver

name, folder, calls = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
driver = open_driver(name)
assert (driver.capability, driver.cuda) == (86, (13, 0))
launcher = Launcher(driver, lambda kernel, entry, *_: (folder / entry.name).read_text(), wait=True)
for entry, (arrays, scalars) in calls.items():
    kernel = load(entry.split("_float")[0])
    launcher.launch(kernel, kernel.entry(entry), arrays, scalars)
"""


@pytest.mark.skipif(fake.compiler() is None, reason="needs a C compiler: apt install gcc")
@pytest.mark.parametrize("name", DRIVERS)
def test_an_adapter_asks_the_driver_for_the_launch_that_is_declared(name, tmp_path):
    try:
        importlib.metadata.version(name)  # a stand-in that another test imported is in no list of packages
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed; kernels/README.md says how to build it without a GPU")
    spec = importlib.util.find_spec(MODULES[name])
    assert spec is not None
    for entry_name in ARRAYS:
        kernel = load(entry_name.split("_float")[0])
        (tmp_path / entry_name).write_text(ptx_of(kernel, kernel.entry(entry_name)))
    calls = json.dumps({entry: (ARRAYS[entry], SCALARS[entry]) for entry in ARRAYS})
    launches = fake.python(fake.build(tmp_path, functions_of(spec.origin, name)), LAUNCH, name, tmp_path, calls)
    for launched, entry_name in zip(launches, ARRAYS, strict=True):
        kernel = load(entry_name.split("_float")[0])
        entry = kernel.entry(entry_name)
        assert launched == fake.Launched(
            entry.symbol,
            kernel.grid(SCALARS[entry_name]),
            kernel.block,
            kernel.shared_bytes,
            0,
            pack(kernel, entry, ARRAYS[entry_name], SCALARS[entry_name]),
        )


def functions_of(origin: str | None, name: str) -> list[str]:
    """Return the driver's functions that pycuda's own library cannot be loaded without."""
    if name != "pycuda" or origin is None:
        return []
    (library,) = Path(origin).parent.glob("_driver*.so")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    return [symbol for line in listed.splitlines() if (symbol := line.split()[-1]).startswith("cu")]
