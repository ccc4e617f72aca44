"""Make an offline kit: collect wheels and samples, cut them into parts, and say what is in them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from medseg_trt.errors import InputError, UsageError
from medseg_trt.files import PARTIAL, atomic_folder, write_json
from medseg_trt.kit.components import Contents, cyclonedx, licence_list
from medseg_trt.kit.interpreter import Interpreter, find_interpreter
from medseg_trt.kit.parts import MANIFEST, PART_NAME, Manifest, Part, files_beside, write_parts
from medseg_trt.kit.project import NAME, Project, copy_tracked, read_project
from medseg_trt.kit.readme import readme_text
from medseg_trt.kit.spec import KitSpec, parse_given
from medseg_trt.kit.wheel_file import Wheel
from medseg_trt.kit.wheels import WheelRequest, build_wheel, collect_wheels
from medseg_trt.progress import LOG
from medseg_trt.samples.catalogue import SAMPLES, copy_package

INSTALLER = Path(__file__).with_name("install.sh")
COMPONENTS, LICENCES, README = "components.cdx.json", "LICENCES.txt", "README.txt"
BESIDE = (MANIFEST, COMPONENTS, LICENCES, README, INSTALLER.name)  # the files of a kit beside its parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Kit:
    """A kit that has been made."""

    folder: Path
    python: str
    parts: tuple[Part, ...]
    wheels: tuple[Wheel, ...]

    @property
    def num_bytes(self) -> int:
        """The size of all parts."""
        return sum(part.num_bytes for part in self.parts)


def make_kit(spec: KitSpec, output: Path) -> Kit:
    """Make a kit; an older kit at ``output`` is replaced once the new one is complete.

    Raises:
        UsageError: an extra, a sample or the Python does not exist, or pip chose a PyTorch with CUDA.
        InputError: the source is no clone, or ``output`` holds other files.
        NetworkError, DownloadError, ArtefactError: pip could not fetch a package, or it is not the pinned one.
    """
    project = read_project(spec.source)
    _check_names("--extras", "extra", spec.extras, project.extras)
    _check_names("--samples", "sample", spec.samples, tuple(SAMPLES))
    for package in spec.given:
        parse_given(package)
    _check_output(output)
    interpreter = find_interpreter(spec.python)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=PARTIAL, dir=output.parent) as content, atomic_folder(output) as folder:
        wheels = _collect(spec, project, interpreter, Path(content))
        LOG.info("%d wheels are collected; writing the parts", len(wheels))
        parts, total_sha256 = write_parts(Path(content), folder, spec.part_bytes)
        contents = Contents(version=project.version, wheels=wheels, samples=spec.samples)
        write_json(folder / COMPONENTS, cyclonedx(contents, total_sha256))
        (folder / LICENCES).write_text(licence_list(contents), encoding="utf-8")
        manifest = Manifest(
            project=NAME,
            version=project.version,
            python=interpreter.minor,
            abi=interpreter.abi,
            given=spec.given,
            parts=parts,
            total_sha256=total_sha256,
        )
        (folder / README).write_text(readme_text(manifest, spec), encoding="utf-8")
        shutil.copyfile(INSTALLER, folder / INSTALLER.name)
        beside = files_beside(folder, BESIDE[1:])
        manifest.write(folder / MANIFEST, beside)
    return Kit(folder=output, python=interpreter.minor, parts=parts, wheels=wheels)


def _collect(spec: KitSpec, project: Project, interpreter: Interpreter, content: Path) -> tuple[Wheel, ...]:
    """Write what the parts hold to ``content``: wheels, requirements, samples, and the project with its tests."""
    with TemporaryDirectory(prefix="medseg-trt-") as private:
        LOG.info("building the wheel of %s %s with Python %s", NAME, project.version, interpreter.minor)
        copy_tracked(project, Path(private, "project"))
        own = build_wheel(interpreter, Path(private, "project"), Path(private))
        wanted = f"{{}}[{','.join(spec.extras)}]" if spec.extras else "{}"
        others = ("pip", *(project.test_requirements if spec.with_tests else ()))
        request = WheelRequest(
            interpreter=interpreter,
            requirements=(wanted.format(own), *others),
            constraints=project.constraints,
            given=spec.given,
            cuda_torch=spec.cuda_torch,
        )
        LOG.info("collecting the packages for %s", interpreter.abi)
        wheels = collect_wheels(request, content / "wheels")
        if spec.with_tests:
            copy_tracked(project, content / "project")
    requirements = (f"{wanted.format(NAME)}=={project.version}", *others)
    (content / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    for name in spec.samples:
        copy_package(name, content / "samples")
    return wheels


def _check_output(output: Path) -> None:
    """Refuse a folder that holds anything but an older kit, which is replaced as a whole.

    Raises:
        InputError: it does.
    """
    if not output.exists():
        return
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    if not output.is_dir() or (names and MANIFEST not in names):
        raise InputError(f"{output} exists and is no kit. Remove it, or choose another folder: -o DIR")
    others = sorted(name for name in names if name not in BESIDE and not PART_NAME.fullmatch(name))
    if others:
        raise InputError(
            f"{output} holds {others[0]!r} beside an older kit, which is to be replaced. Move it, or choose another "
            "folder: -o DIR"
        )


def _check_names(option: str, noun: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise a UsageError for a name that is not known."""
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{option}: there is no {noun} {', '.join(unknown)}. Choose from: {', '.join(known)}")
