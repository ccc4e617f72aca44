"""Check the instructions of a pickle of ``torch.save`` before PyTorch executes them.

``weights_only`` does not execute foreign code, but it calls constructors such as ``Counter`` and ``bytearray`` with
arbitrary arguments from the file, and resizes storages to the size that a tensor claims. This module interprets the
pickle symbolically and builds no objects. An accepted pickle contains only tensors and plain data. Each instruction
then needs memory in proportion to its own bytes (at most about 100 bytes per byte), and every tensor lies within the
bytes of the file.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

MAX_INSTRUCTIONS = 1 << 21  # a network of 400 tensors with its optimiser takes 5e4; each may cost a memo entry, 100 B
MAX_OBJECTS = 1 << 18  # containers and tensors, of up to 500 B each
MAX_DEPTH = 64  # of containers in containers; PyTorch's and Lightning's stay below 12
MAX_AXES = 64  # as in PyTorch
MAX_KEY = 1 << 31  # of an integer key; larger ones can be chosen so that all of them collide

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("torch.ByteStorage", "torch.CharStorage", "torch.BoolStorage"), 1),
    **dict.fromkeys(("torch.HalfStorage", "torch.BFloat16Storage", "torch.ShortStorage"), 2),
    **dict.fromkeys(("torch.FloatStorage", "torch.IntStorage"), 4),
    **dict.fromkeys(("torch.DoubleStorage", "torch.LongStorage", "torch.ComplexFloatStorage"), 8),
    "torch.ComplexDoubleStorage": 16,
}
DTYPES = tuple(
    f"torch.{name}"
    for name in ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
)
ORDERED_DICT = "collections.OrderedDict"
TENSOR, OLD_TENSOR = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"
PARAMETER = "torch._utils._rebuild_parameter"
ALLOWED_GLOBALS = frozenset({*ITEM_BYTES, *DTYPES, ORDERED_DICT, TENSOR, OLD_TENSOR, PARAMETER})


class ForeignObjectError(Exception):
    """The pickle names an object that is neither a tensor nor plain data; the message is its name."""


class ExcessError(Exception):
    """The file claims more than it contains, or more than any checkpoint needs; the message follows the file's name."""


class MalformedError(Exception):
    """The file is not what ``torch.save`` writes."""


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(eq=False, slots=True)
class _Container:
    kind: str  # list, dict or OrderedDict
    size: int = 0
    depth: int = 1
    is_placed: bool = False  # inside another container; nothing that pickle writes changes afterwards


@dataclass(frozen=True, slots=True)
class _Tuple:
    items: tuple["_Value", ...]
    depth: int


@dataclass(frozen=True, slots=True)
class _Storage:
    items: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    pass


_Value: TypeAlias = _Global | _Container | _Tuple | _Storage | _Tensor | str | int | float | bool | None


@dataclass(slots=True)
class PickleJudge:
    """A symbolic pickle machine."""

    bytes_of: Mapping[str, int] | None  # of each storage in the archive; None: ``claimed`` is checked at the end
    claimed: dict[str, int] = field(default_factory=dict)  # bytes of each storage
    stack: list[_Value] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, _Value] = field(default_factory=dict)
    objects: int = 0
    copied: int = 0  # entries of containers that are copied

    def run(self, pickled: Any) -> _Value:
        """Read one pickle to its end and return the symbol of its content."""
        for number, (instruction, argument, _) in enumerate(pickletools.genops(pickled)):
            if number > MAX_INSTRUCTIONS:
                raise ExcessError(f"has a pickle of more than {MAX_INSTRUCTIONS} instructions")
            if instruction.name in CONSTANTS:
                self.stack.append(argument)
            elif instruction.name in VALUES:
                self.stack.append(VALUES[instruction.name])
            elif instruction.name in INSTRUCTIONS:
                INSTRUCTIONS[instruction.name](self, argument)
            elif instruction.name not in ("PROTO", "STOP"):
                raise ForeignObjectError(f"pickle's {instruction.name}")
        return self.stack.pop()

    def new(self, kind: str) -> None:
        """Push an empty container."""
        self._count()
        self.stack.append(_Container(kind))

    def mark(self) -> None:
        """Push a mark."""
        if len(self.marks) > 2 * MAX_DEPTH:
            raise ExcessError(f"nests more than {MAX_DEPTH} containers")
        self.marks.append(len(self.stack))

    def name(self, argument: str) -> None:
        """Push a global if tensors or plain data need it."""
        name = argument.replace(" ", ".", 1)
        if name not in ALLOWED_GLOBALS:
            raise ForeignObjectError(name)
        self.stack.append(_Global(name))

    def put(self, index: int) -> None:
        """Store the top of the stack in the memo."""
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        """Push a value of the memo."""
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int | None) -> None:
        """Push a tuple of the last ``count`` values; None: of all since the mark."""
        items = self.take(count)
        self._count()
        self.stack.append(_Tuple(tuple(items), 1 + max(map(_placed, items), default=0)))
        _require_shallow(self.stack[-1])

    def take(self, count: int | None) -> list[_Value]:
        """Pop the last ``count`` values; None: all since the mark."""
        floor = self.marks[-1] if self.marks else 0
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < floor:
            raise MalformedError("it takes values that are not there")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def append(self, items: list[_Value]) -> None:
        """Add values to the list on the stack."""
        self._grow(("list",), items, len(items))

    def set_items(self, items: list[_Value]) -> None:
        """Add pairs of key and value to the dictionary on the stack."""
        keys = items[::2]
        if len(items) % 2 or not all(_is_key(key) for key in keys):
            raise ForeignObjectError("a dictionary with keys that are neither words nor small numbers")
        self._grow(("dict", ORDERED_DICT), items, len(keys))

    def build(self) -> None:
        """Set the attributes of an ordered dictionary, such as ``_metadata`` of a state dict."""
        state, target = self.stack.pop(), self.stack[-1]
        if not (isinstance(state, _Container) and state.kind == "dict" and _is_open(target, (ORDERED_DICT,))):
            raise ForeignObjectError("an object with a state of its own")
        self._copy(state.size)
        self._grow((ORDERED_DICT,), [state], 0)

    def call(self) -> None:
        """Push the result of a global for the arguments on the stack."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, _Tuple) or not isinstance(function, _Global) or function.name not in CALLS:
            raise ForeignObjectError(f"a call of {getattr(function, 'name', 'an object')}")
        self._count()
        self.stack.append(CALLS[function.name](arguments.items))

    def storage(self) -> None:
        """Push a storage of the file: ("storage", type, key, device, number of items)."""
        value = self.stack.pop()
        match value:
            case _Tuple(items=("storage", _Global(name=name), str(key), str(), int(items), *view)) if (
                name in ITEM_BYTES
            ):
                if view not in ([], [None]) or items < 0:
                    raise MalformedError("it has storages that share their bytes")
            case _:
                raise ForeignObjectError("a reference to something that is no storage")
        self.claimed[key] = max(self.claimed.get(key, 0), items * ITEM_BYTES[name])
        if self.bytes_of is not None and self.claimed[key] > self.bytes_of.get(key, -1):
            raise ExcessError(f"has a storage of {self.claimed[key]} bytes, which are not in the file")
        self._count()
        self.stack.append(_Storage(items))

    def _grow(self, kinds: tuple[str, ...], items: list[_Value], count: int) -> None:
        target = self.stack[-1]
        if not isinstance(target, _Container) or not _is_open(target, kinds):
            raise MalformedError("it changes a value that is complete")
        target.size += count
        target.depth = max(target.depth, 1 + max(map(_placed, items), default=0))
        if target.is_placed:
            raise MalformedError("it holds a container inside itself")
        _require_shallow(target)

    def _count(self) -> None:
        self.objects += 1
        if self.objects > MAX_OBJECTS:
            raise ExcessError(f"holds more than {MAX_OBJECTS} objects")

    def _copy(self, entries: int) -> None:
        self.copied += entries
        if self.copied > MAX_OBJECTS:
            raise ExcessError(f"copies more than {MAX_OBJECTS} entries")


def _placed(value: _Value) -> int:
    """Mark a value as contained, and return its own depth."""
    if isinstance(value, _Container):
        value.is_placed = True
    return value.depth if isinstance(value, (_Container, _Tuple)) else 0


def _require_shallow(value: _Value) -> None:
    if isinstance(value, (_Container, _Tuple)) and value.depth > MAX_DEPTH:
        raise ExcessError(f"nests more than {MAX_DEPTH} containers")


def _is_key(key: _Value) -> bool:
    return key is None or isinstance(key, str) or (isinstance(key, int) and abs(key) < MAX_KEY)


def _is_open(value: _Value, kinds: tuple[str, ...]) -> bool:
    return isinstance(value, _Container) and value.kind in kinds and not value.is_placed


def _ordered_dict(arguments: tuple[_Value, ...]) -> _Value:
    if arguments:
        raise ForeignObjectError("an OrderedDict that is made of something else")
    return _Container(ORDERED_DICT)


def _tensor(arguments: tuple[_Value, ...]) -> _Value:
    match arguments:
        case (_Storage(items=items), offset, _Tuple(items=sizes), _Tuple(items=steps), *_):
            start, shape, strides = _whole(offset), [*map(_whole, sizes)], [*map(_whole, steps)]
        case _:
            raise ForeignObjectError("a tensor that is made of something else")
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise MalformedError("it has a tensor of impossible shape")
    end = start if 0 in shape else start + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if end > items:
        raise ExcessError("has a tensor with values that are not in the file")
    return _Tensor()


def _whole(number: _Value) -> int:
    if not isinstance(number, int) or number < 0:
        raise MalformedError("it has a tensor of impossible shape")
    return number


def _parameter(arguments: tuple[_Value, ...]) -> _Value:
    if not arguments or not isinstance(arguments[0], _Tensor):
        raise ForeignObjectError("a parameter that is made of something else")
    return _Tensor()


CALLS: Mapping[str, Callable[[tuple[_Value, ...]], _Value]] = {
    ORDERED_DICT: _ordered_dict,
    TENSOR: _tensor,
    OLD_TENSOR: _tensor,
    PARAMETER: _parameter,
}
CONSTANTS = frozenset(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"))
VALUES: Mapping[str, _Value] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": _Tuple((), 1)}
INSTRUCTIONS: Mapping[str, Callable[[PickleJudge, Any], None]] = {  # of those that weights_only executes
    "EMPTY_LIST": lambda judge, _: judge.new("list"),
    "EMPTY_DICT": lambda judge, _: judge.new("dict"),
    "MARK": lambda judge, _: judge.mark(),
    "GLOBAL": PickleJudge.name,
    "BINPUT": PickleJudge.put,
    "LONG_BINPUT": PickleJudge.put,
    "BINGET": PickleJudge.get,
    "LONG_BINGET": PickleJudge.get,
    "TUPLE": lambda judge, _: judge.tuple_of(None),
    "TUPLE1": lambda judge, _: judge.tuple_of(1),
    "TUPLE2": lambda judge, _: judge.tuple_of(2),
    "TUPLE3": lambda judge, _: judge.tuple_of(3),
    "APPEND": lambda judge, _: judge.append(judge.take(1)),
    "APPENDS": lambda judge, _: judge.append(judge.take(None)),
    "SETITEM": lambda judge, _: judge.set_items(judge.take(2)),
    "SETITEMS": lambda judge, _: judge.set_items(judge.take(None)),
    "BUILD": lambda judge, _: judge.build(),
    "REDUCE": lambda judge, _: judge.call(),
    "BINPERSID": lambda judge, _: judge.storage(),
}
