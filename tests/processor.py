"""What the processor of the tests can do."""

from pathlib import Path

EXACT_BYTE_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}
NO_EXACT_BYTE_PRODUCTS = (
    "this processor has AVX2 but neither VNNI nor AMX: sums of two 8-bit products saturate at 16 bits, and the "
    "signal-to-noise ratio of INT8 graphs drops"
)


def saturates_byte_products() -> bool:
    """Return whether products of uint8 and int8 are summed in pairs with saturation at 16 bits (``vpmaddubsw``)."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    flags = {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
    return "avx2" in flags and not flags & EXACT_BYTE_PRODUCTS
