#!/usr/bin/env python3
"""Stores an adapter's values in 16 bits, so that the three that are committed stay small.

    pip install numpy safetensors
    python3 adapters/halve.py adapters/qa ...
"""
import sys
from pathlib import Path

import numpy
from safetensors import safe_open
from safetensors.numpy import save_file

for directory in map(Path, sys.argv[1:]):
    path = directory / "adapter_model.safetensors"
    with safe_open(path, "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name).astype(numpy.float16) for name in file.keys()}, file.metadata()
    save_file(tensors, path, metadata)
