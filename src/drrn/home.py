"""Where the package's own files lie (conf/, sweeps/, data/): in the clone, or inside the installed package.

In a clone images and patch files go to its data/ too; installed, they go to the user's cache.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CLONE = _PACKAGE.parents[1]

HOME = _CLONE if (_CLONE / "conf" / "config.yaml").is_file() else _PACKAGE
CONF = str(HOME / "conf")
DATA = HOME / "data"  # registry.txt, paper/, weights/

os.environ.setdefault("DRRN_HOME", str(HOME))  # where conf/config.yaml looks for sweeps/
if HOME == _PACKAGE:
    from platformdirs import user_cache_path

    os.environ.setdefault("DRRN_DATA", str(user_cache_path("drrn") / "data"))  # conf/ names both
    os.environ.setdefault("DRRN_PATCHES", str(user_cache_path("drrn") / "patches"))
