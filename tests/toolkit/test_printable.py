"""Names of any bytes become text that a terminal, a table and a reader of JSON can take."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg_trt.progress import printable, unicode_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Müller.png", "Müller.png"),
        ("M\udcfcller.png", r"M\xfcller.png"),  # Latin-1
        ("\udce6\udc89\udcab.png", "扫.png"),  # UTF-8 that an ASCII locale did not decode
        ("\ud800", r"\ud800"),  # no byte of a name
    ],
)
def test_names_become_valid_unicode(text, expected):
    assert unicode_text(text) == expected
    assert printable(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\nwarning: forged", r"a\nwarning: forged"),
        ("a\rb\tc\x7f\x9b", r"a\rb\tc\x7f\x9b"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
        ("a\u2028b", r"a\u2028b"),
        ("naïve 扫描 👩‍⚕️", "naïve 扫描 👩‍⚕️"),
    ],
)
def test_control_characters_are_written_out(text, expected):
    assert printable(text) == expected


@given(st.binary())
def test_whatever_the_bytes_the_text_is_one_printable_line(name):
    shown = printable(os.fsdecode(name))
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
    assert not any(ord(character) < 32 or 0x7F <= ord(character) < 0xA0 for character in shown)
