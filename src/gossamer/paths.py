"""What a person names a place by."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(place: str | Path) -> Path:
    """``place`` with ``~`` and ``~user`` as shells read them; where there is no such user it stays as it is,
    and is then looked for in vain."""
    return Path(os.path.expanduser(place))
