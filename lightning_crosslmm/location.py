"""Where a file lies: a ``Path`` on this machine or a ``Url`` in a store.

Which schemes may stand in a URL is a list, and nothing else is opened. Neither an address nor a message holds a
password: those belong where the store's driver looks for them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lightning_crosslmm.errors import UserError, nearest

SCHEMES = {  # what may be opened -> the package that opens it
    "file": "fsspec",
    "memory": "fsspec",
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}


@dataclass(frozen=True)
class Url:
    """The address of an object or folder, with those parts of a ``Path`` that shards need; as text, the address."""

    address: str

    def __str__(self) -> str:
        """Give the address."""
        return self.address

    def __truediv__(self, name: str) -> "Url":
        """Name an object of this folder."""
        return Url(f"{self.address.removesuffix('/')}/{name}")

    @property
    def scheme(self) -> str:
        """What stands before the colon."""
        return self.address.partition(":")[0]

    @property
    def name(self) -> str:
        """What stands after the last slash."""
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        """The folder."""
        return Url(self.address.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> "Url":
        """Put another suffix in the place of the last one."""
        return Url(self.address.removesuffix(Path(self.name).suffix) + suffix)


Location = Path | Url


def locate(name: str | Path) -> Location:
    """Tell a local path from a URL.

    Raises:
        UserError: the scheme is none that is opened, or the URL is chained or holds credentials.
    """
    text = str(name)
    found = re.match(r"([A-Za-z][\w+.-]+):", text)
    if found is None and "::" not in text:
        return Path(text)
    scheme = found[1] if found else ""
    if scheme not in SCHEMES or not text.startswith(f"{scheme}://") or "::" in text:
        raise UserError(
            f"{without_credentials(text)}: is not opened; name local files, or a URL without '::' that begins with "
            f"{', '.join(f'{known}://' for known in SCHEMES)}{'' if scheme in SCHEMES else nearest(scheme, SCHEMES)}"
        )
    if scheme == "file":
        return Path(text.removeprefix("file://"))
    host = urlsplit(text).netloc
    has_user = ":" in host.rpartition("@")[0] if scheme in ("az", "abfs") else "@" in host  # they: CONTAINER@ACCOUNT
    if has_user or "?" in text or "#" in text:
        raise UserError(
            f"{without_credentials(text)}: a URL of shards has no user, password, '?' or '#', because a run writes "
            f"down its settings; give credentials where {SCHEMES[scheme]} looks for them (environment variables, its "
            "own file, ~/.netrc)"
        )
    return Url(text)


def without_credentials(text: str) -> str:
    """Take user, password and query out of every URL in a text."""
    return re.sub(r"\w+://[^\s'\"()]+", _bare, text)


def _bare(url: re.Match[str]) -> str:
    scheme, _, rest = re.split(r"[?#]", url[0])[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
