"""Which HR image, LR image and output belong together, by their names."""

import re
from collections.abc import Mapping
from typing import Any

from infra.errors import DataError

# What tells HR from LR in the names of published pairs: 0001x4, Canon_001_HR and _LR4 (RealSR), DSC_1286_x4 and _x1
# (DRealSR; x1 is the LR).
MARK = re.compile(r"(_HR|_LR\d?|_?x[12348])$", re.IGNORECASE)


def by_pair_name(*sides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each side's values by the names that pairs share: a name (without suffix) that is on every side as it is, any
    other without its mark. DataError where two names of a side become one."""
    common = set.intersection(*map(set, sides))
    named: list[dict[str, Any]] = []
    for side in sides:
        found: dict[str, str] = {}
        for name in side:
            pair = name if name in common else MARK.sub("", name)
            if pair in found:
                raise DataError(
                    f"two files are the image {pair}", where=f"{found[pair]} and {name}", todo="remove or rename one"
                )
            found[pair] = name
        named.append({pair: side[name] for pair, name in found.items()})
    return named
