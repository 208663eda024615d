"""Stacks of adapters: grouped products, filled-up ranks, clients that leave; and the fused pieces beside them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from clairlib import LowRank
from clairlib.core.seeds import derive
from clairlib.training.batches import Item, collate, split, tabulate
from clairlib.training.fused import root_mean_square_norm, weighted_cross_entropy
from clairlib.training.grouped_lora import GroupedLinear, LoraStacks

P, Q = 5, 7
RANKS = (2, 4, 1)


def draw(*shape, name="values", dtype=torch.float64):
    return torch.randn(*shape, generator=derive(0, name), dtype=dtype)


def stacks_of(ranks=RANKS, **options):
    updates = [LowRank(draw(P, r, name=f"B{r}"), draw(r, Q, name=f"A{r}"), 0.5 + r) for r in ranks]
    options = {"learning_rate": 0.1, "weight_decay": 0.1, "device": "cpu"} | options
    return updates, LoraStacks({"m": updates}, **options)


@pytest.mark.parametrize("bias", [False, True])
def test_each_clients_rows_meet_its_own_update(bias):
    base, x = nn.Linear(Q, P, bias=bias, dtype=torch.float64).requires_grad_(False), draw(6, 4, Q).requires_grad_()
    updates, stacks = stacks_of()
    layer = GroupedLinear(base, "m")
    leaves = stacks.load({"m": layer}, [0, 1, 2])
    out, g = layer(x), draw(6, 4, P, name="g")
    dense = [update.dense().requires_grad_() for update in updates]
    alone = torch.cat([base(x[2 * k : 2 * k + 2]) + x[2 * k : 2 * k + 2] @ dense[k].T for k in range(3)])
    torch.testing.assert_close(out, alone, atol=1e-13, rtol=1e-13)
    found = torch.autograd.grad(out, [x, *leaves], g)
    expected = torch.autograd.grad(alone, [x, *dense], g)
    torch.testing.assert_close(found[0], expected[0], atol=1e-13, rtol=1e-13)
    for k, update in enumerate(updates):  # d = scale B A: dA = scale B' dD, dB = scale dD A'
        r, D = update.rank, expected[1 + k] * update.scale
        torch.testing.assert_close(found[1][k, :r], update.B.T @ D, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(found[2][k, :, :r], D @ update.A.T, atol=1e-12, rtol=1e-12)


def test_what_fills_up_a_rank_stays_zero_and_changes_nothing():
    base, x = nn.Linear(Q, P, dtype=torch.float64).requires_grad_(False), draw(6, 4, Q)
    _, stacks = stacks_of()
    _, alone = stacks_of((1,))
    layer = GroupedLinear(base, "m")
    for _ in range(5):
        for own, rows in ((stacks, x), (alone, x[4:])):
            leaves = own.load({"m": layer}, range(len(own.clients)))
            loss = layer(rows).square().sum()
            own.accumulate(range(len(own.clients)), torch.autograd.grad(loss, leaves))
            own.step(max_norm=0.3)
    for k, rank in enumerate(RANKS):
        assert stacks.flat[0][k, rank:].abs().sum() == stacks.flat[1][k, :, rank:].abs().sum() == 0
    update, same = stacks.update(2)["m"], alone.update(0)["m"]
    assert update.rank == 1 and update.scale == same.scale
    torch.testing.assert_close(update.A, same.A, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(update.B, same.B, atol=1e-13, rtol=1e-13)


def test_gradients_of_several_groups_add_up_in_any_order():
    _, stacks = stacks_of()
    A, B = (draw(3, *stack.shape[1:], name="grad") for stack in stacks.flat)
    for positions in ([2, 0], [1], [0, 1, 2]):
        stacks.accumulate(positions, [A[positions], B[positions]])
    assert torch.equal(stacks.flat[0].grad, 2 * A) and torch.equal(stacks.flat[1].grad, 2 * B)


def test_clients_that_leave_take_their_part_of_the_optimiser_along():
    (_, stacks), (_, few) = stacks_of(), stacks_of((2, 1))
    for step in range(4):
        if step == 2:
            stacks.keep([0, 2])
        for own in (stacks, few):
            keep = list(range(3)) if own is stacks and step < 2 else [0, 2]
            rank = own.flat[0].shape[1]
            grads = [draw(3, 4, Q, name=f"A{step}")[keep, :rank], draw(3, P, 4, name=f"B{step}")[keep, :, :rank]]
            own.accumulate(range(len(keep)), grads)
            own.step(None)
    assert stacks.clients == [0, 2] and stacks.ranks["m"] == [2, 1]
    for position in (0, 1):
        one, other = stacks.update(position)["m"], few.update(position)["m"]
        torch.testing.assert_close((one.A, one.B), (other.A, other.B), atol=1e-13, rtol=1e-13)


def test_gradients_that_lie_transposed_in_memory_are_taken_right():
    D = torch.zeros(2, P, Q, dtype=torch.float64)
    (stacks, same) = (LoraStacks({"m": list(D)}, learning_rate=0.1, weight_decay=0.0, device="cpu") for _ in range(2))
    g = draw(2, P, Q)
    stacks.accumulate([0, 1], [g.mT.contiguous().mT])
    same.accumulate([0, 1], [g])
    for own in (stacks, same):
        own.step(None)
    assert torch.equal(stacks.flat[0], same.flat[0])


class LlamaLikeRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(draw(Q, dtype=torch.float32)), 1e-3

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def test_the_fused_norm_has_the_norms_values_and_gradients():
    norm, x = LlamaLikeRMSNorm().requires_grad_(False), draw(3, 4, Q, dtype=torch.float32).requires_grad_()
    g = draw(3, 4, Q, name="g", dtype=torch.float32)
    one, other = norm(x), root_mean_square_norm(x, norm)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(torch.autograd.grad(one, x, g), torch.autograd.grad(other, x, g))
    double = copy.deepcopy(norm).double()
    assert torch.equal(double(x.double()), root_mean_square_norm(x.double(), double)), "elsewhere the module itself"


def test_the_weighted_cross_entropy_is_torchs():
    logits, targets = draw(6, 9).requires_grad_(), torch.arange(6)
    weights, g = draw(6, name="weights").abs(), draw(6, name="g")
    one = cross_entropy(logits, targets, reduction="none") * weights
    other = weighted_cross_entropy(logits, targets, weights)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(torch.autograd.grad(one, logits, g), torch.autograd.grad(other, logits, g))


def table_of(lengths):
    examples = [{"input_ids": torch.arange(1, n + 1), "labels": torch.arange(1, n + 1)} for n in lengths]
    return tabulate(examples, shift=True, classes=False, pad=0)


def test_groups_keep_to_their_limit_and_hold_every_example_once():
    lengths = (3, 9, 4, 4, 12, 2, 5, 7)
    table = table_of(lengths)
    items = [Item(0, (0, 1, 2), 13), Item(1, (3,), 3), Item(2, (4, 5, 6, 7), 22)]
    for limit in (1, 10, 16, 24, 1000):
        groups = split(table, items, limit)
        for group in groups:
            assert len({part.position for part in group}) == len(group)
            sizes = collate(table, group).ids.numel()
            assert sizes <= limit or [len(part.examples) for part in group] == [1]
        found = sorted((part.position, e) for group in groups for part in group for e in part.examples)
        assert found == [(0, 0), (0, 1), (0, 2), (1, 3), (2, 4), (2, 5), (2, 6), (2, 7)]
    assert len(split(table, items, 1000)) == 1


def test_what_fills_up_a_group_has_no_weight_and_is_the_clients_own():
    table = table_of((3, 5, 4))
    for own in (table, table.only_labelled()):
        group = collate(own, [Item(4, (0, 1), 6), Item(7, (2,), 3)])
        torch.testing.assert_close(group.weights.sum(dim=1), torch.ones(2, dtype=torch.float64))
        rows = group.rows.reshape(2, -1)
        assert group.positions == (4, 7)
        assert rows[0].max() < own.starts[2] <= rows[1].min()
