"""The TileLang programs, one a file with its config, and how they are compiled."""

import os
from pathlib import Path

from hsa_tl.files import writable

# TileLang cannot even be imported where its cache cannot be written, as in many containers.
_CACHE = "TILELANG_CACHE_DIR"
_folder = Path(os.environ.get(_CACHE) or os.path.expanduser("~/.tilelang/cache"))
if writable(_folder, _CACHE) != _folder:
    os.environ[_CACHE] = str(writable(_folder, _CACHE))
