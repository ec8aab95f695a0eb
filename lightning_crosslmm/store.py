"""One request to a store, without a second try. The door to fsspec.

A request asks for 32 MiB at most, so that one deadline fits them all, and what comes is held against what was asked
for: a store may cut an answer short, or give a page that says why it gives nothing.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import sync
from fsspec.core import url_to_fs

from lightning_crosslmm.bounded_folder import PIECE
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.location import SCHEMES, Url

_GAP = 64 << 10  # bytes that are rather read than skipped by another request


class StorageError(UserError):
    """A store did not give what was asked for, however often it was asked; the data in it may be whole."""


class EndsEarlyError(OSError):
    """An object holds fewer bytes than were asked for; the answer itself came whole."""


def read_parts(url: Url, ranges: Sequence[tuple[int, int]], timeout_s: float) -> list[bytes]:
    """Read parts of an object by offset and size, neighbours by one request; a sample's members are neighbours."""
    spans: list[tuple[int, int]] = []
    for offset, size in sorted(ranges):
        if spans and offset <= spans[-1][1] + _GAP:
            spans[-1] = (spans[-1][0], max(spans[-1][1], offset + size))
        else:
            spans.append((offset, offset + size))
    parts: dict[tuple[int, int], bytes] = {}
    for start, end in spans:
        pieces = [(at, min(at + PIECE, end)) for at in range(start, end, PIECE)]
        data = b"".join(request(url, piece, timeout_s) for piece in pieces)
        for offset, size in ranges:
            if start <= offset <= end - size:
                parts[offset, size] = data[offset - start : offset - start + size]
    return [parts[one] for one in ranges]


@lru_cache(maxsize=16)
def _driver(root: str, process: int) -> Any:
    """Give the file system of a store, another one in each process: connections do not survive a fork."""
    scheme = root.partition(":")[0]
    options = {"client_kwargs": {"trust_env": True}} if scheme in ("http", "https") else {}  # proxies and ~/.netrc
    try:
        return url_to_fs(root, skip_instance_cache=True, use_listings_cache=False, **options)[0]
    except ImportError as error:
        raise StorageError(
            f"{root}: {scheme}:// is read by the package {SCHEMES[scheme]}, which is not installed: "
            f"pip install {SCHEMES[scheme]}"
        ) from error


def _driver_of(url: Url) -> Any:
    return _driver(f"{url.scheme}://{urlsplit(url.address).netloc}", os.getpid())


def list_folder(folder: Url, timeout_s: float) -> list[str]:
    """List a folder's paths."""
    driver = _driver_of(folder)
    path = driver._strip_protocol(folder.address)
    if driver.async_impl:
        return sync(driver.loop, driver._ls, path, detail=False, timeout=timeout_s)
    return driver.ls(path, detail=False)


def request(url: Url, span: tuple[int, int] | None, timeout_s: float) -> bytes:
    """Read an object from one offset to another, or all of it, without a second try."""
    driver = _driver_of(url)
    start, end = span or (None, None)
    if url.scheme in ("http", "https"):
        data = sync(driver.loop, _get, driver, url.address, span, timeout=timeout_s)
    elif driver.async_impl:
        path = driver._strip_protocol(url.address)
        data = sync(driver.loop, driver._cat_file, path, start=start, end=end, timeout=timeout_s)
    else:
        data = driver.cat_file(driver._strip_protocol(url.address), start=start, end=end)
    if span is not None and len(data) != span[1] - span[0]:
        kind = EndsEarlyError if len(data) < span[1] - span[0] else OSError
        raise kind(f"{len(data)} of {span[1] - span[0]} bytes came from offset {span[0]}")
    return data


async def _get(driver: Any, address: str, span: tuple[int, int] | None) -> bytes:
    """Ask by HTTP; fsspec's own way takes a whole object, or a page of words, for the bytes that were asked for."""
    headers = {"Accept-Encoding": "identity"}
    if span is not None:
        headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    session = await driver.set_session()
    async with session.get(driver.encode_url(address), headers=headers) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(f"HTTP {answer.status} {answer.reason}")
        if span is not None and answer.status == 200:
            raise OSError(
                f"HTTP 200 with {answer.content_type} of {answer.content_length} bytes instead of the range asked for: "
                "an error page, or a server that does not answer range requests"
            )
        if answer.status == 416:  # the object ends before the range
            return b""
        if answer.status not in (200, 206):
            raise OSError(f"HTTP {answer.status} {answer.reason}")
        return await answer.read()
