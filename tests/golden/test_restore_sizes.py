"""Sizes that the published scripts give networks and outputs, recorded from their code: 9 LR sizes at 5 scales."""

import math
from pathlib import Path

import numpy as np
import pytest

from infra import ConfigError
from training.config import SizeRule
from training.restore.published_sizes import published_input, published_output

RECORD = np.load(Path(__file__).parent / "data" / "ccsr" / "preprocess_sizes.npz")
ROWS = [dict(zip(RECORD["columns"].tolist(), row.tolist(), strict=True)) for row in RECORD["rows"]]


def test_the_record_is_whole() -> None:
    assert len(ROWS) == 45
    assert {row["scale"] for row in ROWS} == {1, 1.5, 2, 3, 4}


@pytest.mark.parametrize(("rule", "column"), [("v1", "v1_net"), ("v1_tiled", "v1tile_net"), ("v2", "v2_net")])
def test_networks_see_the_published_size(rule: SizeRule, column: str) -> None:
    for row in ROWS:
        lr = np.zeros((int(row["lr_h"]), int(row["lr_w"]), 3), np.uint8)
        size = (math.ceil(lr.shape[0] * row["scale"]), math.ceil(lr.shape[1] * row["scale"]))
        assert size == (row["v1_up_h"], row["v1_up_w"])
        if row[f"{column}_w"] < 0:
            with pytest.raises(ConfigError, match="whole scale"):
                published_input(lr, size, rule, where="x")
            continue
        seen = published_input(lr, size, rule, where="x")
        assert seen.shape == (row[f"{column}_h"], row[f"{column}_w"], 3), row
        if rule == "v2":
            assert size == (row["v2_out_h"], row["v2_out_w"])
        assert published_output(seen, size, rule).shape == (*size, 3)
