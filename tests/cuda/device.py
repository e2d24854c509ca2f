"""The GPU that these tests run on."""

from __future__ import annotations

import pytest
import torch

GPU = torch.device("cuda", 0)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
