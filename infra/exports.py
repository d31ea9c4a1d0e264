"""Names that a package's root offers, loaded from their modules at first use."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def load(package: str, places: Mapping[str, str], name: str) -> Any:
    """What the package's `__getattr__` returns for `name`; `places` says which module holds each name."""
    if name not in places:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(places[name]), name)
