"""What becomes of a finished DICOM job: files for the destinations and, on request, for a folder."""

from collections.abc import Sequence
from pathlib import Path

from medseg_trt.errors import require
from medseg_trt.files import atomic_file
from medseg_trt.imaging.preprocess import for_image
from medseg_trt.serve.jobs import RESULT_FILES, RESULTS, WORK
from medseg_trt.serve.result_formats import DICOM, Segmentation, encode
from medseg_trt.serve.secondary_capture import write_secondary_capture
from medseg_trt.serve.settings import DicomSettings
from medseg_trt.serve.spool import Job

CAPTURE = "overlay.dcm"


class Delivery:
    """Prepares the files of a job; called before the job is noted as done, and again if that was interrupted."""

    def __init__(self, settings: DicomSettings, spool_folder: Path) -> None:
        self._settings, self._spool_folder = settings, spool_folder

    def __call__(self, job: Job, result: Segmentation, folder: Path) -> Sequence[tuple[str, str]]:
        """Write what is missing and return pairs of destination and file.

        Raises:
            ProtocolError: the series cannot have a DICOM segmentation.
        """
        segmentation = folder / RESULTS / RESULT_FILES[DICOM]
        if not segmentation.is_file():
            encode(DICOM, result, folder / WORK)  # raises the reason
        files = [segmentation]
        if self._settings.secondary_capture:
            window = for_image(result.model.bundle.preprocessing, result.image.pixels).window
            capture = folder / RESULTS / CAPTURE
            write_secondary_capture(result.image, result.mask, window, segmentation, capture, folder / WORK)
            files.append(capture)
        if self._settings.output is not None:
            for path in files:
                with atomic_file(self._settings.output / f"{_uid(path)}.dcm") as temporary:
                    temporary.write_bytes(path.read_bytes())
        names = [path.relative_to(self._spool_folder).as_posix() for path in files]
        return [(destination.name, name) for destination in self._settings.send_to for name in names]


def _uid(path: Path) -> str:
    pydicom = require("pydicom", "medical")
    return str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"]).SOPInstanceUID)
