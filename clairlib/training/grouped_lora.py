"""Adapters of many clients as stacks, applied to the clients' tokens by grouped matrix products.

Only a client's own tokens touch its part of a stack, and AdamW works entry by entry, so each client trains as if it
were alone. Adapters of smaller rank are padded with zeros. The zeros stay: rows of A are multiplied by zero columns of
B and vice versa, so neither gets a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from clairlib.linalg.low_rank import LowRank

Update = LowRank | Tensor
MOMENTS = ("exp_avg", "exp_avg_sq")


class _GroupedProduct(torch.autograd.Function):
    """Compute x W' + bias + scale_k x_k A_k' B_k', with gradients for x, A and B only.

    Shapes: x (G, n, q), W (p, q), A (G, rho, q), B (G, p, rho), scale (G, 1, 1).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
        inner = torch.bmm(x, A.mT)  # (G, n, rho)
        B = B * scale
        ctx.save_for_backward(x, W, A, B, scale, inner)
        return linear(x, W, bias).baddbmm_(inner, B.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, W, A, B, scale, inner = ctx.saved_tensors
        g_inner = torch.bmm(g, B)
        g_x = (g @ W).baddbmm_(g_inner, A) if ctx.needs_input_grad[0] else None
        return g_x, None, None, torch.bmm(g_inner.mT, x), torch.bmm(g.mT, inner).mul_(scale), None


class GroupedLinear(nn.Module):
    """A frozen linear module with one update per client; the rows of its input are ordered client after client.

    ``weight`` and ``bias`` are the base module's own. ``dtype`` (autocast) is the dtype of the products.
    """

    def __init__(self, base: Any, name: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.name = base.weight, base.bias, name
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dtype = dtype or base.weight.dtype
        # cast once, as autocast would do at every call
        self.cast_weight = base.weight.detach().to(self.dtype)
        self.cast_bias = None if base.bias is None else base.bias.detach().to(self.dtype)
        self.factors: list[Tensor] = []
        self.scale = torch.ones(())

    def load(self, factors: Sequence[Tensor], scale: Tensor) -> None:
        """Set the updates of the next forward passes: A (G, rho, q) and B (G, p, rho), or one D (G, p, q)."""
        self.factors = [factor.to(self.dtype) for factor in factors]
        self.scale = scale.to(self.dtype).view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        G = len(self.scale)
        if x.shape[0] % G:
            raise ValueError(f"module {self.name!r} does not see its input example by example; it cannot be adapted")
        W, bias = self.cast_weight, self.cast_bias
        rows = x.to(self.dtype).reshape(G, -1, self.in_features)  # (G, n, q)
        if len(self.factors) == 2:
            out = _GroupedProduct.apply(rows, W, bias, *self.factors, self.scale)
        else:
            weights = (W + self.factors[0]).mT  # (G, q, p); one product per client, as many as for the base alone
            out = torch.bmm(rows, weights) if bias is None else torch.baddbmm(bias, rows, weights)
        return out.view(*x.shape[:-1], self.out_features)


class LoraStacks:
    """The trained parameters of the K clients still in training, module by module, and AdamW on them."""

    def __init__(
        self, updates: Mapping[str, Sequence[Update]], *, learning_rate: float, weight_decay: float, device: str
    ) -> None:
        self.parameters: dict[str, list[nn.Parameter]] = {}  # module -> [A (K, rho, q), B (K, p, rho)] or [D (K, p, q)]
        self.scales: dict[str, Tensor] = {}  # module -> (K,)
        self.ranks: dict[str, list[int]] = {}  # module -> the clients' own ranks
        for name, own in updates.items():
            self.parameters[name] = [nn.Parameter(stack.to(device)) for stack in _stacked(own)]
            scales = [update.scale if isinstance(update, LowRank) else 1.0 for update in own]
            self.scales[name] = torch.tensor(scales, dtype=torch.float64, device=device)
            self.ranks[name] = [update.rank if isinstance(update, LowRank) else 0 for update in own]
        self.clients = list(range(len(own)))  # index of the client at each position
        self.flat = [stack for stacks in self.parameters.values() for stack in stacks]
        self.best: list[Tensor] = []
        self.optimizer = torch.optim.AdamW(self.flat, lr=learning_rate, weight_decay=weight_decay, fused=True)

    def index(self, positions: Sequence[int]) -> slice | list[int]:
        """Return the stack index of these positions; a slice if they are neighbours, which saves a copy."""
        first, count = positions[0], len(positions)
        return slice(first, first + count) if positions[-1] == first + count - 1 else list(positions)

    def load(self, layers: Mapping[str, GroupedLinear], positions: Sequence[int]) -> list[Tensor]:
        """Set the layers' updates to those of a group; return them as leaves, in the order of ``flat``."""
        at, leaves = self.index(positions), []
        for name, stacks in self.parameters.items():
            own = [stack.detach()[at].requires_grad_() for stack in stacks]
            layers[name].load(own, self.scales[name][at])
            leaves += own
        return leaves

    def accumulate(self, positions: Sequence[int], grads: Sequence[Tensor]) -> None:
        """Add the gradients of a group."""
        at = self.index(positions)
        for stack, grad in zip(self.flat, grads, strict=True):
            if stack.grad is None and grad.shape == stack.shape:
                stack.grad = grad.contiguous()  # the fused AdamW takes its entries in memory order
                continue
            if stack.grad is None:
                stack.grad = torch.zeros_like(stack)
            stack.grad[at] += grad

    def step(self, max_norm: float | None) -> None:
        """Take one AdamW step. Each client's gradient is clipped as ``torch.nn.utils.clip_grad_norm_`` does."""
        if max_norm is not None:
            squares = [stack.grad.square().sum(dim=(1, 2)) for stack in self.flat if stack.grad is not None]
            factor = (max_norm / (torch.stack(squares).sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)
            for stack in self.flat:
                assert stack.grad is not None
                stack.grad *= factor[:, None, None]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def keep(self, positions: Sequence[int]) -> None:
        """Keep the clients at these positions; remove all others, with their part of AdamW's state."""
        if len(positions) == len(self.clients):
            return
        at = torch.tensor(positions, dtype=torch.long, device=self.flat[0].device)
        for stack in self.flat:
            stack.data = stack.data[at]
            state = self.optimizer.state[stack]
            for moment in MOMENTS:
                if moment in state:
                    state[moment] = state[moment][at]
        self.best = [stack[at] for stack in self.best]
        self.scales = {name: scales[at] for name, scales in self.scales.items()}
        self.ranks = {name: [ranks[k] for k in positions] for name, ranks in self.ranks.items()}
        self.clients = [self.clients[k] for k in positions]

    def packed(self) -> dict[str, Tensor]:
        """Return the parameters, AdamW's moments and the best parameters by name."""
        tensors = {}
        for index, stack in enumerate(self.flat):
            tensors[f"stack.{index}"] = stack.detach()
            state = self.optimizer.state[stack]
            tensors |= {f"{moment}.{index}": state[moment] for moment in MOMENTS if moment in state}
        return tensors | {f"best.{index}": best for index, best in enumerate(self.best)}

    def unpack(self, tensors: Mapping[str, Tensor], clients: list[int], step: int) -> None:
        """Bring new stacks of all clients to the packed state, in which only ``clients`` were still in training."""
        self.keep(clients)
        device = self.flat[0].device
        for index, stack in enumerate(self.flat):
            stack.data.copy_(tensors[f"stack.{index}"])
            state = {moment: tensors[f"{moment}.{index}"].to(device) for moment in MOMENTS}
            self.optimizer.state[stack] = {"step": torch.tensor(float(step), device=device)} | state
        self.best = [tensors[f"best.{i}"].to(device) for i in range(len(self.flat)) if f"best.{i}" in tensors]

    def remember(self, positions: Sequence[int]) -> None:
        """Save the parameters at these positions as the best so far."""
        self.best = self.best or [stack.detach().clone() for stack in self.flat]
        for best, stack in zip(self.best, self.flat, strict=True):
            best[list(positions)] = stack.detach()[list(positions)]

    def update(self, position: int, *, best: bool = False) -> dict[str, Update]:
        """Return one client's updates by module, on the CPU: the present ones, or the best so far."""
        stacks = iter(self.best if best else self.flat)
        updates: dict[str, Update] = {}
        for name, parameters in self.parameters.items():
            own = [next(stacks).detach()[position].cpu() for _ in parameters]
            if len(own) == 1:
                updates[name] = own[0].clone()
                continue
            (A, B), rank = own, self.ranks[name][position]
            updates[name] = LowRank(B[:, :rank].clone(), A[:rank].clone(), float(self.scales[name][position]))
        return updates


def are_finite(updates: Mapping[str, Update]) -> bool:
    """Return whether all factors are finite."""
    factors = [f for u in updates.values() for f in ((u.A, u.B) if isinstance(u, LowRank) else (u,))]
    return all(bool(factor.isfinite().all()) for factor in factors)


def _stacked(updates: Sequence[Update]) -> list[Tensor]:
    """Return [A, B], padded with zeros to the largest rank, or [D]."""
    pairs = [update for update in updates if isinstance(update, LowRank)]
    if not pairs:
        return [torch.stack([update for update in updates if isinstance(update, Tensor)])]
    rho = max(update.rank for update in pairs)
    A = torch.stack([nn.functional.pad(update.A, (0, 0, 0, rho - update.rank)) for update in pairs])
    B = torch.stack([nn.functional.pad(update.B, (0, rho - update.rank)) for update in pairs])
    return [A, B]
