"""Folders of the package's own files (conf/, sweeps/, data/): in the clone, or inside the installed package.

Images and patch files go to a clone's data/ too; those of an installed package go to the user's cache.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CLONE = _PACKAGE.parents[1]

HOME = _CLONE if (_CLONE / "conf" / "config.yaml").is_file() else _PACKAGE
CONF = str(HOME / "conf")
DATA = HOME / "data"  # registry.txt, paper/, weights/

os.environ.setdefault("DRRN_HOME", str(HOME))  # conf/config.yaml finds sweeps/ by it
if HOME == _PACKAGE:
    from platformdirs import user_cache_path

    os.environ.setdefault("DRRN_DATA", str(user_cache_path("drrn") / "data"))  # conf/ reads both
    os.environ.setdefault("DRRN_PATCHES", str(user_cache_path("drrn") / "patches"))
