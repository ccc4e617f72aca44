"""Check a file of ``torch.save``, archive or not, before PyTorch opens it: all claimed data must be in the file."""

import io
import mmap
import struct
import zipfile
from typing import BinaryIO

from medseg_trt.train.tensor_files.pickle_judge import ExcessError, MalformedError, PickleJudge

MAX_PICKLE_BYTES = 1 << 26  # of data.pkl; a run on 13,000 cases takes 4 MB
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER, of the format before PyTorch 1.6
ZIP_START, ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
ZIP_END_BYTES = 22  # of the end of an archive without a comment


def require_tensors_and_data(file: BinaryIO) -> None:
    """Check that a file of ``torch.save``, archive or not, contains only tensors and plain data within its own size.

    Raises:
        ForeignObjectError: it names other objects.
        ExcessError: it claims more than it contains, or is compressed.
        MalformedError: it is damaged or of another kind.
    """
    try:
        if file.read(len(ZIP_START)) == ZIP_START:
            _judge_archive(file)
        else:
            _judge_legacy(file)
    except zipfile.BadZipFile as error:
        raise MalformedError(str(error)) from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise MalformedError(f"its pickle is not well formed ({type(error).__name__})") from error
    except (EOFError, OSError, struct.error) as error:
        raise MalformedError("it is cut short") from error


def _judge_archive(file: BinaryIO) -> None:
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        file.seek(max(size - ZIP_END_BYTES, 0))
        if file.read(len(ZIP_END)) != ZIP_END or len({entry.filename for entry in entries}) < len(entries):
            raise MalformedError("its archive can be read in more than one way")
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > size:
            raise ExcessError("is compressed, or claims more than it holds")
        pickles = [entry for entry in entries if entry.filename.partition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise MalformedError("it is an archive of another kind")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ExcessError(f"has a pickle of more than {MAX_PICKLE_BYTES >> 20} MiB")
        prefix = pickles[0].filename.removesuffix("data.pkl") + "data/"
        bytes_of = {
            entry.filename.removeprefix(prefix): entry.file_size
            for entry in entries
            if entry.filename.startswith(prefix)
        }
        content = archive.read(pickles[0])
    PickleJudge(bytes_of).run(io.BytesIO(content))


def _judge_legacy(file: BinaryIO) -> None:
    """Check the pickles of the format before PyTorch 1.6: a magic number, versions, the content, and its storages."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if PickleJudge({}).run(content) != LEGACY_MAGIC:
            raise MalformedError("it does not begin as torch.save does")
        for _ in ("protocol", "system"):
            PickleJudge({}).run(content)
        judge = PickleJudge(None)
        judge.run(content)
        if sum(judge.claimed.values()) > len(content):
            raise ExcessError("has tensors that claim more bytes than the file has")
        PickleJudge({}).run(content)
