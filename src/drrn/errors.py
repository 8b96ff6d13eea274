"""The user error, and texts that are safe to print."""

from __future__ import annotations

import unicodedata


def printable(text: object) -> str:
    """Escape the characters of a text that control a terminal: escapes, control codes, bidirectional marks.

    Bytes of a file name that are not UTF-8 (lone surrogates in Python) become `\\xe9`, so that the text can be
    printed and encoded anywhere; line breaks become `\\n`.
    """
    return "".join(map(_printable, str(text)))


def _printable(letter: str) -> str:
    if letter.isprintable() or unicodedata.category(letter) == "Zs":
        return letter
    if 0xDC80 <= ord(letter) <= 0xDCFF:
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def counted(number: float, noun: str, several: str | None = None) -> str:
    """ "1 image", "2,000 images"; `several` is the plural of a noun without a regular one."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"


def signed(difference: float, digits: int) -> str:
    """A difference with its sign, + or − (U+2212)."""
    text = f"{difference:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


class UserError(Exception):
    """An error that only the user can mend: a wrong value, a missing file, a full disk.

    Its text names the value or file and says what to do. Entry points print it without a traceback.
    """

    def __init__(self, text: object) -> None:
        super().__init__("\n".join(map(printable, str(text).split("\n"))))


class Diverged(UserError):
    """The loss or a gradient of a training is no longer a finite number."""


class InUse(UserError):
    """Another process is using the same file or folder."""
