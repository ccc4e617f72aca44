"""``README.txt`` of a kit: what to type on the machine without a network."""

from medseg_trt.kit.parts import Manifest
from medseg_trt.kit.spec import KitSpec
from medseg_trt.progress import plural

TITLE = "medseg-trt {version} for Python {python} ({abi}), without a network"
TEXT = """{title}
{line}

Research use only. Not a medical device.

Copy this whole folder to the machine, and type there, in this folder:

    sh install.sh --check
    sh install.sh ~/medseg
    ~/medseg/bin/medseg-trt doctor

The first verifies the {count}, {megabytes} MB, and writes nothing. The second makes the virtual
environment ~/medseg, or installs into one that is there. Nothing is installed if a part is missing,
damaged or not of this kit. Both can be repeated; an interrupted installation begins anew.

Needed: Python {python}, a POSIX shell, the GNU coreutils, {megabytes} MB free in $TMPDIR (else /tmp) meanwhile, and
about four times as much for the environment. If Python {python} is not on PATH:

    sh install.sh ~/medseg --python /path/to/python
{sections}
components.cdx.json lists every package with its digest (CycloneDX 1.6), and LICENCES.txt the licences.
kit.manifest has the SHA-256 of every file. The digests detect damage; they do not say who made the kit.
"""
GIVEN = """
This kit does not contain {packages}: Python {python} of the machine has to have them.
A new environment uses the packages of that Python too.
"""
SAMPLES = """
Samples are in the user's cache after the installation. This writes them to a folder, without a network:

    ~/medseg/bin/medseg-trt samples get {names} -o data
"""
TESTS = """
Tests and benchmarks are in ~/medseg/project.
"""
GPU_CHECK = """
On a machine with an NVIDIA GPU, this runs the tests that need one:

    cd ~/medseg/project && ../bin/python benchmarks/gpu_check.py -o ~/gpu-check
"""


def readme_text(manifest: Manifest, spec: KitSpec) -> str:
    """Return the text for a kit."""
    sections = [
        GIVEN.format(packages=", ".join(manifest.given), python=manifest.python) if manifest.given else "",
        SAMPLES.format(names=" ".join(spec.samples)) if spec.samples else "",
        TESTS if spec.with_tests else "",
        GPU_CHECK if spec.with_tests and "kernels" in spec.extras else "",  # the check imports what kernels brings
    ]
    title = TITLE.format(version=manifest.version, python=manifest.python, abi=manifest.abi)
    return TEXT.format(
        title=title,
        line="=" * len(title),
        python=manifest.python,
        count=plural(len(manifest.parts), "part"),
        megabytes=round(sum(part.num_bytes for part in manifest.parts) / 1e6),
        sections="".join(sections),
    )
