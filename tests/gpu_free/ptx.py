"""Read PTX text into instructions: declarations, labels, nested scopes, operands; meaning is left to the machine.

Source: NVIDIA, "Parallel Thread Execution ISA", chapters 4 (syntax) and 5 (state spaces).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

SPECIAL = re.compile(r"%(?:n?tid|n?ctaid)\.[xyz]$|%laneid$")
REGISTER_BITS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64}
NAME = r"[A-Za-z_$%][\w$]*"
NUMBER = re.compile(r"0[fF][0-9A-Fa-f]{8}$|0[dD][0-9A-Fa-f]{16}$|-?(?:0[xX][0-9A-Fa-f]+|\d+)U?$")
FUNCTION = re.compile(r"\.(entry|func)\b\s*(?:\(([^)]*)\)\s*)?(" + NAME + r")\s*\(([^)]*)\)([^;{]*)([;{])")
VARIABLE = re.compile(
    r"\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?\.([bus]\d+|f\d+)\s+"
    r"(" + NAME + r")\s*(?:\[(\d*)\])?\s*(?:=\s*(?:\{([^}]*)\}|([^;]+)))?;"
)
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.([busf]\d+)\s+(?:\.ptr\s+(?:\.global\s+)?(?:\.align\s+\d+\s+)?)?("
    + NAME
    + r")(?:\[(\d+)\])?"
)


class PtxError(Exception):
    """PTX that this interpreter does not know: it stops rather than guess."""


@dataclass(frozen=True, slots=True)
class Register:
    name: str
    bits: int  # 1 for a predicate
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Special:
    name: str  # "%tid.x", "%laneid", …


@dataclass(frozen=True, slots=True)
class Immediate:
    value: int  # as written: an integer, or the bits of 0f… and 0d…


@dataclass(frozen=True, slots=True)
class Symbol:
    name: str  # a variable, a parameter or a label


@dataclass(frozen=True, slots=True)
class Vector:
    parts: tuple["Operand", ...]


@dataclass(frozen=True, slots=True)
class Address:
    base: "Register | Symbol"
    offset: int  # bytes


@dataclass(frozen=True, slots=True)
class Discard:
    """``_``: a result that nobody wants."""


Operand = Register | Special | Immediate | Symbol | Vector | Address | Discard


@dataclass(frozen=True, slots=True)
class Instruction:
    opcode: str  # with all modifiers: "ld.global.nc.v4.u32"
    operands: tuple[Operand, ...]
    guard: Register | None  # executed by the threads in which it is true
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Variable:
    space: str  # "global", "const", "shared", "local"
    name: str
    align: int
    size: int | None  # bytes; None for dynamic shared memory
    content: bytes = b""


@dataclass(slots=True)
class Function:
    name: str
    is_entry: bool
    parameters: dict[str, int]  # name -> bytes, in order
    max_threads: int | None
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index into code
    variables: dict[str, Variable] = field(default_factory=dict)


@dataclass(slots=True)
class Module:
    version: str
    target: str
    functions: dict[str, Function]
    variables: dict[str, Variable]


@lru_cache(maxsize=32)
def parse(text: str) -> Module:
    """Return what a PTX text declares; nothing changes it later.

    Raises:
        PtxError: a statement has an unknown form.
    """
    text = re.sub(r"/\*.*?\*/", lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    version, target = re.search(r"\.version\s+(\S+)", text), re.search(r"\.target\s+(\w+)", text)
    if version is None or target is None:
        raise PtxError("this is no PTX: .version or .target is missing")
    functions, outside, position = {}, [], 0
    while head := FUNCTION.search(text, position):
        outside.append(text[position : head.start()])
        position = head.end()
        if head[6] == "{":
            end = _closing(text, head.end())
            function = _function(head, text[head.end() : end], text.count("\n", 0, head.end()) + 1)
            functions[function.name] = function
            position = end + 1
    outside.append(text[position:])
    variables = {variable.name: variable for part in outside for variable in map(_variable, VARIABLE.finditer(part))}
    for function in functions.values():
        _check_names(function, variables)
    return Module(version[1], target[1], functions, variables)


def _closing(text: str, start: int) -> int:
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return start + match.start()
    raise PtxError("a function's body does not end")


def _variable(match: re.Match[str]) -> Variable:
    space, align, kind, name, count, values, value = match.groups()
    width = int(kind[1:]) // 8
    numbers = [_number(number.strip()) for number in (values or value or "").split(",") if number.strip()]
    content = b"".join((number % (1 << 8 * width)).to_bytes(width, "little") for number in numbers)
    size = None if count == "" else width * int(count or 1)
    return Variable(space, name, int(align or width), size, content)


def _number(text: str) -> int:
    """Return an integer as written, or the bits of a float."""
    if text[1:2] in tuple("fFdD") and not text.startswith("0x"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0)


def _function(head: re.Match[str], body: str, first_line: int) -> Function:
    kind, _, name, parameters, attributes, _ = head.groups()
    sizes = {
        parameter[2]: int(parameter[1][1:]) // 8 * int(parameter[3] or 1)
        for parameter in PARAMETER.finditer(parameters)
    }
    limit = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", attributes)
    threads = int(limit[1]) * int(limit[2] or 1) * int(limit[3] or 1) if limit else None
    function = Function(name, kind == "entry", sizes, threads)
    _read_body(function, body, first_line)
    return function


def _read_body(function: Function, body: str, first_line: int) -> None:
    scopes: list[dict[str, tuple[str, int]]] = [{}]  # name or prefix -> the name's own form, bits
    opened, line, seen = 0, first_line, 0
    for position, statement in _statements(body):
        line += body.count("\n", seen, position)
        seen = position
        if statement == "{":
            opened += 1
            scopes.append({"": (f"@{opened}", 0)})
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            function.labels[statement[:-1]] = len(function.code)
        elif statement.startswith(".reg"):
            _declare(scopes[-1], statement)
        elif statement.startswith((".shared", ".local")):
            match = VARIABLE.match(statement + ";")
            if match is None:
                raise PtxError(f"line {line}: unknown declaration: {statement}")
            function.variables[match[4]] = _variable(match)
        elif statement.startswith(".pragma"):  # advice to the assembler
            continue
        elif statement.startswith("."):
            raise PtxError(f"line {line}: unknown directive: {statement}")
        else:
            function.code.append(_instruction(statement, line, scopes))


def _statements(body: str) -> Iterator[tuple[int, str]]:
    """Yield scopes' braces, labels with their colon, and statements without their semicolon, with their positions."""
    pattern = re.compile(r"\s*(?:([{}])|(" + NAME + r":)(?!:)|([^;]+);)")
    position, end = 0, len(body.rstrip())
    while position < end:
        match = pattern.match(body, position)
        if match is None:
            raise PtxError(f"no statement: {body[position : position + 60].strip()!r}")
        group = match.lastindex or 0
        yield match.start(group), " ".join(match[group].split())
        position = match.end()


def _declare(scope: dict[str, tuple[str, int]], statement: str) -> None:
    kind, _, names = statement.removeprefix(".reg").strip().partition(" ")
    bits = REGISTER_BITS.get(kind.lstrip(".").lstrip("busf") if kind != ".pred" else "pred")
    if bits is None:
        raise PtxError(f"unknown register type: {statement}")
    suffix = scope.get("", ("", 0))[0]
    for name in (name.strip() for name in names.split(",")):
        prefix = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
        for register in (f"{prefix[1]}{number}" for number in range(int(prefix[2]))) if prefix else (name,):
            scope[register] = register + suffix, bits


def _instruction(statement: str, line: int, scopes: list[dict[str, tuple[str, int]]]) -> Instruction:
    match = re.match(r"(?:@(!?)(\S+)\s+)?(\S+)\s*(.*)", statement, flags=re.DOTALL)
    if match is None:
        raise PtxError(f"line {line}: no instruction: {statement}")
    guard = None
    if match[2]:
        operand = _operand(match[2], scopes, line)
        if not isinstance(operand, Register):
            raise PtxError(f"line {line}: no predicate guards {statement}")
        guard = Register(operand.name, operand.bits, negated=bool(match[1]))
    operands: list[Operand] = []
    for part in _split(match[4]):
        if "|" in part:  # two results of one instruction: d|p
            operands.extend(_operand(word.strip(), scopes, line) for word in part.split("|"))
        else:
            operands.append(_operand(part, scopes, line))
    return Instruction(match[3], tuple(operands), guard, line, statement)


def _split(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,])+", text) if part.strip()]


def _operand(text: str, scopes: list[dict[str, tuple[str, int]]], line: int) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(part, scopes, line) for part in _split(text[1:-1])))
    if text.startswith("["):
        match = re.fullmatch(r"\[\s*(" + NAME + r")\s*(?:\+\s*(-?\w+))?\s*\]", text)
        base = _operand(match[1], scopes, line) if match else None
        if match is None or not isinstance(base, Register | Symbol):
            raise PtxError(f"line {line}: unknown address: {text}")
        return Address(base, int(match[2] or "0", 0))
    if text == "_":
        return Discard()
    if NUMBER.match(text):
        return Immediate(_number(text))
    if SPECIAL.match(text):
        return Special(text)
    negated, name = text.startswith("!"), text.lstrip("!")
    for scope in reversed(scopes):
        if name in scope:
            return Register(*scope[name], negated=negated)
    if re.fullmatch(NAME, name) and not name.startswith("%") and not negated:
        return Symbol(name)
    raise PtxError(f"line {line}: unknown operand: {text}")


def _check_names(function: Function, variables: Mapping[str, Variable]) -> None:
    """Refuse a name that is no variable, parameter or label."""
    known = function.labels.keys() | function.variables.keys() | function.parameters.keys() | variables.keys()
    for instruction in function.code:
        for operand in instruction.operands:
            symbol = operand.base if isinstance(operand, Address) else operand
            if isinstance(symbol, Symbol) and symbol.name not in known:
                raise PtxError(f"line {instruction.line}: {symbol.name} is declared nowhere: {instruction.text}")
