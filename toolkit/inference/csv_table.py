"""CSV tables that spreadsheets open and that runs extend: no cell is a formula, and none holds control characters."""

import csv
import os
import re
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from medseg_trt.errors import UsageError
from medseg_trt.files import open_regular
from medseg_trt.progress import printable

MAX_LINE = 1 << 20  # characters; a name has at most 255, four times as many when escaped
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # spreadsheets accept the full-width forms, too

Row = tuple[str, ...]


def stored_rows(path: Path, header: Row, max_bytes: int, older_header: Row = ()) -> Iterator[Row]:
    """Yield the rows of a table with a header, one at a time; none if the file does not exist.

    Rows under the header of an earlier version, which lacks the last column, get an empty cell there. Control
    characters, which earlier versions wrote as they are, are escaped.

    Raises:
        UsageError: the file is not such a table, or larger than ``max_bytes``.
    """
    remedy = "move it away, or choose another folder with -o"
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path} cannot be read as a table of areas ({error.strerror}); {remedy}") from error
    with TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            if os.fstat(file.fileno()).st_size > max_bytes:
                raise ValueError
            rows = csv.reader(_short_lines(text))
            stored_header = tuple(map(_active, next(rows, [])))
            if not stored_header or stored_header not in (header, older_header):
                raise ValueError
            for row in rows:
                if len(row) != len(stored_header):
                    raise ValueError
                cells = (printable(_active(cell)) for cell in row)
                yield (*cells, *[""] * (len(header) - len(row)))
        except OSError as error:
            raise UsageError(f"{path} cannot be read as a table of areas ({error.strerror}); {remedy}") from error
        except (ValueError, csv.Error) as error:
            raise UsageError(f"{path} is not a table of areas, so it is not replaced; {remedy}") from error


def require_table(path: Path, header: Row, max_bytes: int, older_header: Row = ()) -> None:
    """Refuse to replace a file that is not a table with this header; it need not exist.

    Raises:
        UsageError: as ``stored_rows`` says.
    """
    for _ in stored_rows(path, header, max_bytes, older_header):
        pass


def inert_row(row: Row) -> list[str]:
    """Return the cells of a row without control characters, with an apostrophe before what would be a formula."""
    return [_inert(printable(cell)) for cell in row]


def _short_lines(text: TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError
        yield line


def _inert(cell: str) -> str:
    """Prefix with an apostrophe what a spreadsheet would read as a formula."""
    return f"'{cell}" if FORMULA.match(cell) else cell


def _active(cell: str) -> str:
    """Undo ``_inert``."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
