from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "worker")]

# Tiny matrices: a second thread costs more than it brings, and much more where other processes want the cores.
torch.set_num_threads(1)
