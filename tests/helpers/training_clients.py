"""Clients of tiny models, and the check that training them at once is training each alone."""

import pytest
import torch

from clairlib.training import ClientData, Schedule
from helpers.sequential import factors_of, tokens_of, train_alone

SEED = 3
EXACT = 1e-8
SINGLE = 1e-4  # float32: AdamW divides by gradients near rounding; measured up to 1e-5 on entries of order 0.1
FULL = Schedule(steps=6)
PARTS = Schedule(steps=50, epochs=3, batch=4, accumulate=2, max_norm=0.5)  # 9, 3 and 6 steps

CLIENTS = [
    ClientData("ada", tokens_of(9, seed=1), rank=2),
    ClientData("bob", tokens_of(3, seed=2), rank=4, alpha=5.0),
    ClientData("cleo", tokens_of(6, seed=3), rank=3, use_rslora=True),
]
CLASSIFIERS = [
    ClientData("ada", tokens_of(6, seed=1, classes=3), rank=2),
    ClientData("bob", tokens_of(3, seed=2, classes=3), rank=4, use_rslora=True),
]


def assert_as_alone(model, clients, targets, schedule, trained, tolerance=EXACT):
    for client, own in zip(clients, trained, strict=True):
        losses, adapted = train_alone(model, client, targets, schedule, seed=SEED)
        assert own.name == client.name and own.status == "trained"
        torch.testing.assert_close(own.losses, losses, atol=tolerance, rtol=tolerance)
        factors = factors_of(adapted)
        assert set(factors) == set(own.updates)
        for name, (B, A, scale) in factors.items():
            update = own.updates[name]
            assert update.scale == pytest.approx(scale, rel=1e-12) and update.B.abs().max() > 1e-3
            torch.testing.assert_close(update.B, B, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(update.A, A, atol=tolerance, rtol=tolerance)
