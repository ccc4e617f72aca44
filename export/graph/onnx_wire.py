"""Read the fields of an ONNX file without any package, as Protocol Buffers store them.

Source: Protocol Buffers, "Encoding".
"""

from collections.abc import Iterator, Mapping

VARINT, EIGHT_BYTES, DELIMITED, FOUR_BYTES = 0, 1, 2, 5  # wire types
VARINT_BITS = 70  # ten bytes of seven bits

Field = tuple[int, int | memoryview]  # a field's number and value; fixed-width numbers are bytes


def only(message: memoryview, number: int) -> memoryview:
    """Return the only message in a field.

    Raises:
        ValueError: the field occurs another number of times, or the message is damaged.
    """
    fields = list(messages(message, number))
    if len(fields) != 1:
        raise ValueError(f"field {number} occurs {len(fields)} times, not once")
    return fields[0]


def messages(message: memoryview, number: int) -> Iterator[memoryview]:
    """Yield the messages, or the bytes, in a field that may be repeated."""
    return (value for field, value in fields(message) if field == number and isinstance(value, memoryview))


def grouped(message: memoryview) -> dict[int, list[memoryview]]:
    """Return the messages and the bytes in all fields, by the field's number."""
    groups: dict[int, list[memoryview]] = {}
    for number, value in fields(message):
        if isinstance(value, memoryview):
            groups.setdefault(number, []).append(value)
    return groups


def text(groups: Mapping[int, list[memoryview]], number: int) -> str:
    """Return the text in a field; empty where the field does not occur, and the last one where it is repeated.

    Raises:
        ValueError: it is no UTF-8.
    """
    return bytes(groups[number][-1]).decode() if number in groups else ""


def fields(message: memoryview) -> Iterator[Field]:
    """Yield the number and the value of every field.

    Raises:
        ValueError: the message is damaged.
    """
    position, end = 0, len(message)
    while position < end:
        key = message[position]
        if key < 0x80:  # most numbers have one byte, and calls would take most of the time
            position += 1
        else:
            key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == DELIMITED and position < end and message[position] < 0x80:
            length = message[position]
            position += 1
        elif wire_type == DELIMITED:
            length, position = _varint(message, position)
        elif wire_type in (EIGHT_BYTES, FOUR_BYTES):
            length = 8 if wire_type == EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {wire_type} is unknown")
        if position + length > end:
            raise ValueError("a field ends beyond the end of the file")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, VARINT_BITS, 7):
        if position >= len(message):
            raise ValueError("the file ends within a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number has more than ten bytes")
