"""Where tests find recorded reference arrays and real motion capture, both kept outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_root() -> Path:
    """Folder with `golden/` and `data/`: $MOTIONRFT_SHARED, or `shared` beside the checkout."""
    return Path(os.environ.get("MOTIONRFT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_path(relative: str) -> Path:
    """Return an existing shared file; skip where absent, or fail when MOTIONRFT_REQUIRE_GOLDEN=1 (`make parity`)."""
    path = shared_root() / relative
    if not path.exists():
        message = f"reference data absent: {path}; set MOTIONRFT_SHARED to the folder that holds {relative}"
        if os.environ.get("MOTIONRFT_REQUIRE_GOLDEN") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path
