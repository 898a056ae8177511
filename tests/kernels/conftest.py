from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

# Tiny matrices: a second thread costs more than it brings, and much more where other processes want the cores.
torch.set_num_threads(1)
