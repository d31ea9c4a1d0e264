"""Recordings that are not in the repository, because of their size or their photographs' terms."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def recordings(name: str) -> Path:
    """The folder of the recordings `name`; the test is skipped where it is absent. CCSR_GOLDEN names the folder that
    holds it, by default ../shared/golden beside the repository."""
    root = Path(os.environ.get("CCSR_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
    for folder in (root / name, root.parent / name):  # the second: CCSR_GOLDEN names one folder of recordings
        if folder.is_dir():
            return folder
    pytest.skip(f"no recordings {name!r} below {root} (CCSR_GOLDEN): their terms or size keep them out of here")
