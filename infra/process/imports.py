"""Imports of large libraries without the optional packages that they load only because these are installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*packages: str, importing: str) -> Iterator[None]:
    """Inside the block, `packages` seem not to be installed: None in sys.modules is Python's way to block an import.

    Unless the library `importing` is loaded, which has then found them. The block holds for all threads of the process.
    """
    if importing in sys.modules:
        yield
        return
    loaded = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in packages:
            sys.modules.pop(name, None)
        sys.modules.update(loaded)
