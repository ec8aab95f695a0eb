"""The chain of headers of a tar, read header by header so that damage shows, and what follows it is found again.

A tar is members one after the other, each a header of 512 bytes and data padded to 512, and two blocks of zeros. The
standard library's ``tarfile`` parses the headers, but takes a cut or damaged one for the end and says nothing. Names
and sizes are read as it reads them: ustar with prefix, long names of GNU, PAX records.
"""

import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
_CHUNK = 1 << 20
_LONGEST_NAME = 1 << 16  # of the records that hold names that a header has no room for
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_NAMES = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MAGIC, _MAGIC_AT = b"ustar", 257
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class TarMember(NamedTuple):
    """A member: its name, where its bytes lie, and whether it is a plain file; folders and links are none."""

    name: str
    offset: int
    size: int
    is_folder: bool
    is_file: bool


class Damage(NamedTuple):
    """A place in the tar, in bytes from its start, and what is wrong with it."""

    offset: int
    what: str


def padded(size: int) -> int:
    """Round a member's size up to what it takes in a tar, which is made of blocks of 512 bytes."""
    return -(-size // BLOCK) * BLOCK


def walk(file: BinaryIO) -> Iterator[TarMember | Damage]:
    """Go through a tar from header to header; where one is damaged, go on at the next that is none.

    Args:
        file: the tar, open for reading; its members' bytes are skipped.

    Yields:
        Members in their order, and damage between them. A member that the end of the file cuts comes before the damage.
    """
    num_bytes = file.seek(0, io.SEEK_END)
    offset: int | None = 0
    while offset is not None:
        block = _read(file, offset, BLOCK)
        if len(block) < BLOCK:
            yield Damage(offset, _what_is_short(block) if offset else _what_instead(block))
            return
        if _is_zero(block):
            follows = _after_end(file, offset + BLOCK)
            if follows is None:
                return
            yield Damage(offset, f"ends, but {follows}")
            offset = _next_header(file, offset + BLOCK)
            continue
        try:
            member = _member(file, offset)
        except (tarfile.HeaderError, ValueError) as error:
            yield Damage(offset, f"has a damaged header ({error})" if offset else _what_instead(block))
            offset = _next_header(file, offset + BLOCK)
            continue
        yield member
        offset = member.offset + padded(member.size)
        if offset > num_bytes:
            yield Damage(member.offset, f"is cut off inside the member '{member.name}'")
            return


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _is_zero(block: bytes) -> bool:
    return not block.strip(b"\0")


def _member(file: BinaryIO, offset: int) -> TarMember:
    """Read a header with those before it that only hold its long name."""
    long_name, records = "", dict[str, str]()
    while True:
        info = tarfile.TarInfo.frombuf(_read(file, offset, BLOCK), "utf-8", "surrogateescape")
        offset += BLOCK
        if info.type not in _NAMES:
            break
        if not 0 <= info.size <= _LONGEST_NAME:
            raise ValueError(f"a name of {info.size} bytes")
        data = _read(file, offset, info.size)
        offset += padded(info.size)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = data.partition(b"\0")[0].decode()
        elif info.type in _PAX:
            records = _pax_records(data)
    name = records.get("path") or long_name or info.name
    name.encode()  # a ValueError where the header's bytes are no UTF-8
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    size = int(records.get("size", info.size)) if has_data else 0
    if size < 0:
        raise ValueError(f"a size of {size} bytes")
    is_sparse = info.issparse() or any(record.startswith("GNU.sparse") for record in records)
    return TarMember(name, offset, size, info.isdir(), info.isreg() and not is_sparse)


def _pax_records(data: bytes) -> dict[str, str]:
    """Parse lines ``LENGTH KEY=VALUE``, where the length counts itself."""
    records = {}
    while data.strip(b"\0"):
        length = int(data.partition(b" ")[0])
        if not 5 <= length <= len(data):
            raise ValueError("PAX records of wrong lengths")
        key, _, value = data[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _after_end(file: BinaryIO, offset: int) -> str | None:
    """Say what follows the first block of zeros, if it is anything but zeros."""
    block = _read(file, offset, BLOCK)
    if len(block) < BLOCK:
        return "without the second of the two blocks of zeros at its end"
    while block:
        if not _is_zero(block):
            return "more follows (a hole, or two tars in one file)"
        block = file.read(_CHUNK)
    return None


def _next_header(file: BinaryIO, offset: int) -> int | None:
    """Find the next block from here on that is a header."""
    file.seek(offset)
    while chunk := file.read(_CHUNK):
        found = chunk.find(_MAGIC)
        while found >= 0:
            start = found - _MAGIC_AT
            if start >= 0 and start % BLOCK == 0 and _is_header(chunk[start : start + BLOCK]):
                return offset + start
            found = chunk.find(_MAGIC, found + 1)
        offset += len(chunk)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _what_is_short(block: bytes) -> str:
    return "is cut off inside a header" if block else "is cut off (the blocks of zeros at its end are missing)"


def _what_instead(block: bytes) -> str:
    if not block:
        return "is empty (0 bytes)"
    for start, name in _COMPRESSED.items():
        if block.startswith(start):
            return f"is compressed ({name}); shards are read by offset, so unpack it to a plain tar"
    return "is not a tar, or its first header is damaged"


class Window(io.RawIOBase):
    """A member as a file of its own: the bytes from one offset of a tar to another; no more of it is in memory."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        super().__init__()
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place of the member."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """Tell the place."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read on from the place."""
        wanted = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[:wanted])  # type: ignore[attr-defined]
        self._at += count
        return count
