"""Short spellings of settings on a command line."""

from collections.abc import Sequence

SHORT_WORDS = {"data.num_frames": "data.sampling.num_frames"}


def spelled_out(words: Sequence[str]) -> list[str]:
    """Write short settings in full: ``data.num_frames=256`` is ``data.sampling.num_frames=256``."""
    split = [word.partition("=") for word in words]
    return [SHORT_WORDS.get(key, key) + equals + value for key, equals, value in split]
