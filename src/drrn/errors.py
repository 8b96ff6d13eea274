"""The error that only the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Something only the user can mend: a wrong value, a missing file, a full disk.

    Its text names the value or file and says what to do. Entry points print it without a traceback.
    """
