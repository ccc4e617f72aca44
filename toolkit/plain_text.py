"""Turn text from outside, such as file names, into text that a terminal, a table or a JSON reader can take.

Python holds the bytes of a file name that are not valid in the file system's encoding as lone surrogates (PEP 383).
They cannot be encoded, and control characters move the cursor, colour the terminal or forge a line of a log.
"""

import re

# C0, DEL and C1 controls, line and paragraph separators, and what turns the direction of writing round
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def unicode_text(text: str) -> str:
    r"""Return valid Unicode: undecoded bytes are decoded as UTF-8, and written as ``\xfc`` where they are not UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str) -> str:
    r"""Return one line of valid Unicode, with control characters written as ``\n`` or ``\x1b``."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), unicode_text(text))
