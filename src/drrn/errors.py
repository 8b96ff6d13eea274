"""The error that only the user can mend, and words from files made fit to be printed."""

from __future__ import annotations


class UserError(Exception):
    """Something only the user can mend: a wrong value, a missing file, a full disk.

    Its text names the value or file and says what to do. Entry points print it without a traceback.
    """


def printable(text: object) -> str:
    """A name or a sentence from somebody's file as a terminal may get it: no escapes, no line breaks."""
    return "".join(c if c.isprintable() else "?" for c in str(text))
