"""Two operations of most models with fewer passes over memory and explicit derivatives; the weights are frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RootMeanSquareNorm(torch.autograd.Function):
    """Root-mean-square norm y = w * x / sqrt(mean(x^2) + eps) over the last dimension, of size d.

    The gradient is dx = r g w - x r^3 <g w, x> / d with r = 1 / sqrt(mean(x^2) + eps).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        root = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, root)
        return (x * root).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, root = ctx.saved_tensors
        grad = grads[0] * weight
        along = torch.linalg.vecdot(grad, x).unsqueeze(-1).mul_(root.pow(3)).div_(-x.shape[-1])
        return grad.mul_(root).addcmul_(x, along), None, None


def is_root_mean_square_norm(module: nn.Module) -> bool:
    """Return whether a module has name and parts of Llama's norm; `probe` checks that it also behaves like it."""
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return named and [name for name, _ in module.named_parameters()] == ["weight"]


def root_mean_square_norm(x: Tensor, module: Any) -> Tensor:
    """Return the module's output, in float32 by the fused operation; in other dtypes the module rounds in its way."""
    if x.dtype != torch.float32 or module.weight.dtype != torch.float32:
        return module(x)
    return _RootMeanSquareNorm.apply(x, module.weight, module.variance_epsilon)


class _WeightedCrossEntropy(torch.autograd.Function):
    """Loss -weight * log softmax(logits)[target] of every row, with gradient weight g (softmax - one-hot)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        logs = torch.log_softmax(logits, dim=-1)
        ctx.save_for_backward(logs, targets, weights)
        return logs.gather(1, targets[:, None]).squeeze(1).mul_(-weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logs, targets, weights = ctx.saved_tensors
        scale = (grads[0] * weights)[:, None]
        return logs.exp().mul_(scale).scatter_add_(1, targets[:, None], -scale), None, None


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of every row of logits (N, V), times its weight (N,)."""
    return _WeightedCrossEntropy.apply(logits, targets, weights)
