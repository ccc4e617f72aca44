"""Readers in several threads: warnings of a decoder stay quiet, and the filters are what they were at the end."""

import warnings
from pathlib import Path
from threading import Event, Thread

import pytest

from medseg_trt.imaging.formats.limits import convert_decoder_errors


def test_decoder_warnings_stay_suppressed_while_another_thread_leaves_its_reader():
    first_is_in, second_is_in, first_is_out = Event(), Event(), Event()
    before = list(warnings.filters)
    failed = list[BaseException]()

    def first():
        with convert_decoder_errors(Path("a")):
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    def second():
        first_is_in.wait(10)
        try:
            with convert_decoder_errors(Path("b")):
                second_is_in.set()
                first_is_out.wait(10)
                warnings.warn("John Doe", stacklevel=1)
        except BaseException as error:
            failed.append(error)

    threads = [Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="seen again"):
        warnings.warn("seen again", stacklevel=1)
