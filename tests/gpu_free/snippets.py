"""Short PTX kernels for the interpreter's own tests: a body between the same declarations, run on one or two arrays."""

import numpy as np
from gpu_free.machine import Argument, run_ptx
from gpu_free.report import Report

HEAD = """
.version 8.5
.target sm_80
.address_size 64
.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u64 kernel_param_1
)
{
	.reg .pred %p<9>;
	.reg .b16 %h<19>;
	.reg .b32 %r<29>;
	.reg .f32 %f<9>;
	.reg .b64 %d<19>;
	.shared .align 16 .b8 scratch[256];
	ld.param.u64 %d1, [kernel_param_0];
	ld.param.u64 %d2, [kernel_param_1];
	mov.u32 %r0, %tid.x;
	mul.wide.u32 %d3, %r0, 4;
	add.s64 %d4, %d1, %d3;
	add.s64 %d5, %d2, %d3;
	mov.u64 %d6, scratch;
	add.s64 %d7, %d6, %d3;
"""  # %d4, %d5: this thread's 4 bytes of the input and of the output; %d7: of shared memory


def run(
    body: str,
    source: np.ndarray,
    target: np.ndarray,
    *,
    threads: int = 64,
    blocks: int = 1,
    start: int = 0,
    lanes_at_once: int = 1 << 16,
) -> Report:
    """Run a body; ``target`` gets the result."""
    arguments = [Argument("source", source, start=start), Argument("target", target, is_output=True)]
    text = HEAD + body + "\n\tret;\n}\n"
    return run_ptx(text, "kernel", (blocks, 1, 1), (threads, 1, 1), arguments, lanes_at_once=lanes_at_once)
