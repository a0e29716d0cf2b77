"""The order in which examples are seen, a pure function of seed and step: a resumed run sees what
it would have.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def hash_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def shuffled(step: int, batch_size: int, size: int, seed: int) -> Tensor:
    """Which of ``size`` examples make up the batch of a step: (batch_size,), int64.

    Each epoch goes through all of them in a new random order; a batch may begin in one epoch and
    end in the next.
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    chosen = torch.empty(batch_size, dtype=torch.int64)
    for epoch in range(int(positions[0]) // size, int(positions[-1]) // size + 1):
        order = torch.randperm(
            size, generator=torch.Generator().manual_seed(hash_seed(seed, epoch))
        )
        mine = positions // size == epoch
        chosen[mine] = order[positions[mine] % size]
    return chosen
