"""Draws docs/degradation.png: one photograph's crop, eight draws of every preset, enlarged to the HR size."""

import sys
from pathlib import Path

# tests/ is not installed; its photographs serve here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np

from degradation import PRESETS, degrade, load_preset
from infra import rng_for
from tests.golden.wheel_photos import patch

SHEET = Path(__file__).resolve().parents[1] / "docs" / "degradation.png"
SIDE = 112
LABEL = 22


def labelled(image: np.ndarray, text: str) -> np.ndarray:
    """`image` under a white strip with `text`."""
    strip = np.full((LABEL, image.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([strip, image])


def main() -> None:
    hr = patch("astronaut")
    area = np.s_[50 : 50 + SIDE, 170 : 170 + SIDE]
    rows = []
    for name in PRESETS:
        cells = [labelled(hr[area], "HR")]
        for k in range(8):
            lr = degrade(hr, load_preset(name), rng_for(0, "sheet", k)).lr
            enlarged = cv2.resize(lr, (512, 512), interpolation=cv2.INTER_CUBIC)
            cells.append(labelled(enlarged[area], name if k == 0 else ""))
        rows.append(np.hstack(cells))
    cv2.imwrite(str(SHEET), np.vstack(rows)[..., ::-1])


if __name__ == "__main__":
    main()
