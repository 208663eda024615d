"""What an operation allocates, and a fit of large adapters to measure in a process of its own."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clairlib import CLAIR, LowRank


class Largest(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return out


def ranks_of_a_fit(K: int, p: int, rank: int) -> set[int]:
    """The ranks of the refined updates, p x p, of K clients that share four directions."""
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(p, 4, generator=g)).Q
    own = [0.1 * torch.randn(p, rank - 4, generator=g) / p**0.5 for _ in range(K)]
    updates = [LowRank(torch.cat([U, noise], dim=1), torch.randn(rank, p, generator=g)) for noise in own]
    result = CLAIR().fit(updates)
    assert result.modules["update"].is_refined
    return {update.rank for update in result.refined}
