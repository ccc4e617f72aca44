"""Read the memory of a GPU that a process uses, as nvidia-smi reports it."""

import subprocess

from medseg_trt.bench.missing import Missing

MB_PER_MIB = 1.048576
COMMAND = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")


def used_memory_mb(process_id: int) -> float | Missing:
    """Return a process's memory of the GPU, its CUDA context included, in 10^6 bytes."""
    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return Missing(reason=f"nvidia-smi failed: {error}")
    return used_mb(done.stdout, process_id)


def used_mb(table: str, process_id: int) -> float | Missing:
    """Read a process's 10^6 bytes from nvidia-smi's table of process ids and MiB."""
    for line in table.splitlines():
        number, _, mebibytes = line.partition(",")
        if number.strip() == str(process_id) and mebibytes.strip().isdigit():
            return int(mebibytes) * MB_PER_MIB
    return Missing(reason="nvidia-smi does not list the process; inside a container it often cannot")
