"""The 512 x 512 photographs to degrade, from the scikit-image and scikit-learn wheels (extra `demo`)."""

from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np

PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}


def patch(name: str) -> np.ndarray:
    """uint8 (512, 512, 3) RGB: short side brought to 512 px, then the centre (china: from column 76, as recorded)."""
    package, path = PHOTOS[name]
    image = cv2.imread(str(Path(str(files(package))) / path))[..., ::-1]
    height, width = image.shape[:2]
    factor = 512 / min(height, width)
    image = cv2.resize(image, (round(width * factor), round(height * factor)), interpolation=cv2.INTER_CUBIC)
    top, left = (image.shape[0] - 512) // 2, 76 if name == "china" else (image.shape[1] - 512) // 2
    return np.ascontiguousarray(image[top : top + 512, left : left + 512])
