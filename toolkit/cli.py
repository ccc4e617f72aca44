"""The command line: the table of commands and the exit codes. Each command is a file in ``commands/``.

A command imports heavy packages only when it runs. Results go to stdout (with ``--json`` one JSON object and nothing
else), progress and messages to stderr. A ``MedsegError`` ends the command with one line and the exit code of
``errors.py``; ``-v`` also prints the traceback.
"""

import io
import logging
import signal
import sys
import traceback
from collections.abc import Mapping

import click

from medseg_trt import __version__
from medseg_trt.commands.ablate import ablate
from medseg_trt.commands.bench import bench
from medseg_trt.commands.block import block
from medseg_trt.commands.build import build
from medseg_trt.commands.compare import compare
from medseg_trt.commands.completion import completion
from medseg_trt.commands.data import data
from medseg_trt.commands.doctor import doctor
from medseg_trt.commands.evaluate import evaluate
from medseg_trt.commands.export import export
from medseg_trt.commands.help import SectionedGroup
from medseg_trt.commands.import_ import import_
from medseg_trt.commands.infer import infer
from medseg_trt.commands.inspect import inspect
from medseg_trt.commands.interrupts import interrupt_text
from medseg_trt.commands.kernels import kernels
from medseg_trt.commands.kit import kit
from medseg_trt.commands.reproduce import reproduce
from medseg_trt.commands.samples import samples
from medseg_trt.commands.serve import serve
from medseg_trt.commands.train import train
from medseg_trt.errors import MedsegError, MissingExtraError
from medseg_trt.progress import is_main_process, printable

SECTIONS: Mapping[str, tuple[click.Command, ...]] = {  # the headings of --help, in the order of work
    "Data": (samples, data),
    "Train": (block, import_, train, reproduce, ablate),
    "Export": (build, export, inspect, kernels),
    "Run": (infer, serve),
    "Measure": (evaluate, bench, compare),
    "Machine": (doctor, kit, completion),
}
INTERRUPTED, TERMINATED = 130, 143
EXTRAS = {  # packages that train and export import at module level -> the extra that installs them
    "torch": "train,export",
    "safetensors": "train",
    "scipy": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "ml_dtypes": "kernels",
}


def main() -> None:
    """Run the command line and exit with the code of its outcome."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    if isinstance(sys.stdout, io.TextIOWrapper):  # in an ASCII locale a file name would raise an error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(file=shown)
        click.echo("\n".join(map(printable, shown.getvalue().rstrip().split("\n"))), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        _print_error(interrupt_text(error))
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output, for example `head`, has closed it
        sys.exit(1)
    except MedsegError as error:
        _print_error(str(error))
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _print_error(f"{package} is not installed. Install it: pip install 'medseg-trt[{EXTRAS[package]}]'")
        sys.exit(MissingExtraError.exit_code)
    except OSError as error:
        _print_error(f"{error.filename or 'the system'}: {error.strerror or error}")
        sys.exit(1)


def _print_error(message: str) -> None:
    if logging.getLogger("medseg_trt").isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    click.echo(printable(f"medseg-trt: {' '.join(message.split())}"), err=True)


class _Messages(logging.Formatter):
    """One line per message; warnings and errors begin with their level."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        line = printable(prefix + record.getMessage())
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


@click.group(cls=SectionedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="medseg-trt")
def cli() -> None:
    """Train, export and run medical image segmentation with LLM-TransUNet.

    Every command has --json (one JSON object on stdout), -q and -v. 'medseg-trt COMMAND --help' shows examples.

    Exit codes: 0 success; 1 error, or some inputs could not be used; 2 wrong usage; 3 accuracy gate failed; 4 speed
    gate failed; 5 incompatible or damaged file; 6 missing package or device; 130 interrupted; 143 terminated.

    Research use only; not a medical device.
    """
    logger = logging.getLogger("medseg_trt")
    handler = logging.StreamHandler()
    handler.setFormatter(_Messages())
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)


for title, commands in SECTIONS.items():
    cli.add_section(title, commands)
