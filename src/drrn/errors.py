"""The error that only the user can mend, and texts that a terminal can show."""

from __future__ import annotations

import unicodedata


def printable(text: object) -> str:
    """A text without what a terminal obeys: escapes, controls, marks that turn the direction of reading.

    The bytes of a file name that are not UTF-8 (lone surrogates in Python) are written as `\\xe9`, so that the text
    can be printed and encoded anywhere; line breaks as `\\n`.
    """
    return "".join(map(_printable, str(text)))


def _printable(letter: str) -> str:
    if letter.isprintable() or unicodedata.category(letter) == "Zs":
        return letter
    if 0xDC80 <= ord(letter) <= 0xDCFF:
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def counted(number: float, noun: str, several: str | None = None) -> str:
    """ "1 image", "2,000 images"; `several` of a noun that takes no -s."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"


class UserError(Exception):
    """Something only the user can mend: a wrong value, a missing file, a full disk.

    Its text names the value or file and says what to do. Entry points print it without a traceback.
    """

    def __init__(self, text: object) -> None:
        super().__init__("\n".join(map(printable, str(text).split("\n"))))


class Diverged(UserError):
    """The loss or a gradient of a training is no longer a finite number."""


class InUse(UserError):
    """Another process works on it at this moment."""
