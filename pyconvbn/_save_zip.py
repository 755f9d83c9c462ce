# SPDX-License-Identifier: BSD-3-Clause
"""The container of a saved graph: a zip of stored members, as `numpy.savez` makes it, in one exact form.

Every byte of the file is either data, which its CRC covers, or a header that is fully determined by names, sizes and
CRCs. Reading rebuilds each header and compares, so that nothing but what was written is ever accepted: there are no
compressed, overlapping, encrypted or hidden members, and a size is never believed before the file has it.

Source: APPNOTE.TXT, .ZIP File Format Specification 6.3.10, sections 4.3 and 4.5.3; the npy format of NEP 1.
"""

from __future__ import annotations

import ast
import os
import re
import struct
import zlib
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

__all__ = ["Member", "crc_of", "npy_header", "read_array", "read_bytes", "read_index", "write_zip"]

_DATE = 0x21  # 1 January 1980: the same graph makes the same file
_BIG = 0xFFFFFFFF  # see the 64-bit sizes in the extra field
_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.-]{0,999}")
_KINDS = "biufc"
_SHAPE = re.compile(r"\(\)|\(N,\)|\(N(?:, N)+\)".replace("N", "(?:0|[1-9][0-9]{0,17})"))


class Member(NamedTuple):
    """A member of the file: `offset` is that of its local header."""

    name: str
    size: int
    crc: int
    offset: int


def _local(m: Member) -> bytes:
    name = m.name.encode("ascii")
    head = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, _DATE, m.crc, _BIG, _BIG, len(name), 20)
    return head + name + struct.pack("<2H2Q", 1, 16, m.size, m.size)


def _central(m: Member) -> bytes:
    name = m.name.encode("ascii")
    head = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 3 << 8 | 45, 45, 0, 0, 0, _DATE, m.crc, _BIG, _BIG, len(name), 28, 0, 0, 0,
        0o100644 << 16, _BIG,
    )
    return head + name + struct.pack("<2H3Q", 1, 24, m.size, m.size, m.offset)


def _tail(count: int, start: int, size: int) -> bytes:
    """The end of the file: the 64-bit record, its locator and the classic record that points to them."""
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 3 << 8 | 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    return record + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _BIG, _BIG, 0)


_TAIL = len(_tail(0, 0, 0))


def crc_of(parts: Iterable[Any]) -> int:
    """CRC-32 of bytes-like parts in a row."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def write_zip(file: BinaryIO, members: Iterable[tuple[str, list[Any]]]) -> None:
    """Writes members, each a name and the parts of its data (contiguous buffers)."""
    index = []
    at = 0
    for name, parts in members:
        m = Member(name, sum(memoryview(part).nbytes for part in parts), crc_of(parts), at)
        head = _local(m)
        file.write(head)
        for part in parts:
            file.write(part)
        at += len(head) + m.size
        index.append(m)
    central = b"".join(map(_central, index))
    file.write(central)
    file.write(_tail(len(index), at, len(central)))


def _exactly(file: BinaryIO, size: int, what: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{what} is cut off")
    return data


def read_index(file: BinaryIO) -> dict[str, Member]:
    """The members of a file, none of whose headers differs from what `write_zip` writes."""
    if file.read(4) != b"PK\3\4":
        raise ValueError("this is no saved graph: a zip file was expected")
    size = file.seek(0, os.SEEK_END)
    if size < _TAIL:
        raise ValueError("the file is cut off")
    file.seek(size - _TAIL)
    tail = _exactly(file, _TAIL, "the end of the file")
    count, _, length, start = struct.unpack("<4Q", tail[24:56])
    if tail != _tail(count, start, length) or start + length + _TAIL != size:
        raise ValueError("the end of the zip file is missing or not in the form that saving gives it")
    file.seek(start)
    central = _exactly(file, length, "the list of members")
    members: dict[str, Member] = {}
    at = expected = 0
    while at < length:
        crc, _, _, n = struct.unpack("<3IH", central[at + 16 : at + 30].ljust(14, b"\0"))
        name = central[at + 46 : at + 46 + n]
        end = at + 46 + n + 28
        if end > length or _NAME.fullmatch(name) is None:
            raise ValueError("the list of members is damaged")
        m = Member(name.decode("ascii"), struct.unpack("<Q", central[end - 24 : end - 16])[0], crc, expected)
        if central[at:end] != _central(m):
            raise ValueError(f"the entry of {m.name!r} in the list of members is damaged")
        if m.name in members:
            raise ValueError(f"two members are called {m.name!r}")
        members[m.name] = m
        expected += len(_local(m)) + m.size
        at = end
        if expected > start:
            raise ValueError(f"{m.name!r} is larger than the file")
    if len(members) != count or expected != start:
        raise ValueError("the list of members does not cover the file")
    return members


def _begin(file: BinaryIO, m: Member) -> None:
    """Goes to the data of a member, past its header, which must be right."""
    head = _local(m)
    file.seek(m.offset)
    if file.read(len(head)) != head:
        raise ValueError(f"the header of {m.name!r} is damaged")


def _check_crc(m: Member, crc: int) -> None:
    if crc != m.crc:
        raise ValueError(f"the data of {m.name!r} are damaged: their CRC is wrong")


def read_bytes(file: BinaryIO, m: Member) -> bytes:
    """The data of a member."""
    _begin(file, m)
    data = _exactly(file, m.size, repr(m.name))
    _check_crc(m, zlib.crc32(data))
    return data


# -- arrays ------------------------------------------------------------------------------------------------------------
def npy_header(array: Any) -> bytes:
    """The header of an npy file for a C-contiguous array."""
    return _header(array.dtype.str, tuple(array.shape))


def _header(descr: str, shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("ascii")


def read_array(file: BinaryIO, m: Member) -> Any:
    """The array in a member, writeable; only numbers of fixed size, and never larger than the member."""
    _begin(file, m)
    head = file.read(min(m.size, 10))
    if len(head) != 10 or head[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError(f"{m.name!r} is no npy array")
    (length,) = struct.unpack("<H", head[8:])
    if 10 + length > m.size:
        raise ValueError(f"{m.name!r} is cut off")
    head += _exactly(file, length, repr(m.name))
    form = re.match(r"\{'descr': '([<>|][a-z][0-9]{1,2})', 'fortran_order': False, 'shape': (\([0-9, ]*\)), \}",
                    head[10:].decode("latin-1"))
    if form is None or form[1][1] not in _KINDS or _SHAPE.fullmatch(form[2]) is None:
        raise ValueError(f"{m.name!r} is not an array of numbers in the form that saving gives it")
    shape: tuple[int, ...] = ast.literal_eval(form[2])  # digits and commas
    try:
        dtype = np.dtype(form[1])
    except TypeError:
        raise ValueError(f"{m.name!r}: there is no dtype {form[1]!r}") from None
    if head != _header(dtype.str, shape):
        raise ValueError(f"{m.name!r}: the header of the array is damaged")
    total = dtype.itemsize
    for n in shape:
        total *= n
    if len(head) + total != m.size:
        raise ValueError(f"{m.name!r}: shape {shape} of {dtype} does not fit {m.size - len(head)} bytes")
    if len(shape) > 32 or max(shape, default=0) >= 1 << 48:
        raise ValueError(f"{m.name!r}: shape {shape} cannot be")
    array = np.empty(shape, dtype)
    crc = zlib.crc32(head)
    if total:
        raw = array.reshape(-1).view(np.uint8)
        if file.readinto(raw.data) != total:  # type: ignore[attr-defined]
            raise ValueError(f"{m.name!r} is cut off")
        if dtype.kind == "b" and raw.max() > 1:
            raise ValueError(f"{m.name!r}: a bool is neither 0 nor 1")
        crc = zlib.crc32(raw, crc)
    _check_crc(m, crc)
    return array
