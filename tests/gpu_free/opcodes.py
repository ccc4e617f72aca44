"""The table of every opcode that only computes: its full spelling -> its types and its function.

An opcode or a modifier that is not here (nor among the machine's own) stops the interpreter with its name.
"""

from collections.abc import Mapping

from gpu_free.conversions import CONVERSIONS
from gpu_free.floats import FLOATS
from gpu_free.integers import INTEGERS
from gpu_free.values import Operation

OPCODES: Mapping[str, Operation] = {**FLOATS, **INTEGERS, **CONVERSIONS}
