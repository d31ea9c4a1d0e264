"""Kernels, operations and distributions against recordings of the published pipelines (data/degradation)."""

import re
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
import pytest

from degradation import degrade, filters, jpeg, kernels, load_preset
from degradation.resize import resize
from tests.golden.degradation_statistics import collect, distances

