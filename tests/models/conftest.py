"""One thread a process: the models are small, and threads that wait for a busy core cost far more than they gain."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
