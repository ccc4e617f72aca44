"""``python -m medseg_trt`` is the command line."""

from medseg_trt.cli import main

main()
