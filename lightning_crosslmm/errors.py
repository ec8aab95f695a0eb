"""Mistakes a user can make, told in one message."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: the message names the file, key or setting, the value received and the mend.

    The command line prints the message alone, without a traceback, and ends with exit code 2.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """Suggest the choice closest to a misspelt name.

    Args:
        name: what was typed.
        choices: what would have been right.

    Returns:
        ``"; did you mean 'x'?"``, or an empty string when nothing comes close.
    """
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
