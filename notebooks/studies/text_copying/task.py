"""The text-copying task: sequences in which a segment appears twice, and accuracy on the second copy.

The task is that of Song, Xu and Zhong (arXiv:2408.09503). `dialects` defines the clients' variants of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

VOCABULARY = 64
LENGTH = 64
SEGMENT = (10, 19)  # shortest and longest segment in distribution, both included
UNPREDICTED = 4  # tokens of the second copy before the first label: too few to recognise a copy
NO_TARGET = -100  # index that torch's cross entropy ignores


@dataclass(frozen=True)
class Batch:
    """Sequences with the prediction target after each position.

    Attributes
    ----------
    tokens : (n, length) long
        Input of the model.
    targets : (n, length) long
        ``targets[i, t]`` follows ``tokens[i, :t + 1]``; NO_TARGET where nothing is predicted.
    """

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Accuracy:
    """Fractions of labelled tokens predicted right.

    They are taken over all labelled tokens, over a dialect's symbols, and over the other tokens; nan where there are
    none.
    """

    overall: float
    on_symbols: float
    off_symbols: float


def zipf_probs() -> Tensor:
    """Return token probabilities (VOCABULARY,) in distribution, float64, with sum 1.

    p_i is proportional to 1 / (i + 2.7) for i = 1 .. VOCABULARY.
    """
    weights = 1.0 / (torch.arange(1, VOCABULARY + 1, dtype=torch.float64) + 2.7)
    return weights / weights.sum()


def copy_sequences(
    count: int,
    token_probs: Tensor,
    *,
    generator: torch.Generator,
    segment: tuple[int, int] = SEGMENT,
    length: int = LENGTH,
) -> Batch:
    """Draw sequences of independent tokens in which a segment appears twice, without overlap.

    Parameters
    ----------
    count : number of sequences.
    token_probs : (V,) token probabilities.
    segment : shortest and longest segment, both included; every length between is equally likely.
    length : tokens per sequence.

    Returns
    -------
    Batch
        Its targets are the tokens of the second copy, without its first UNPREDICTED.

    Raises
    ------
    ValueError
        A segment does not fit twice, or leaves nothing to predict.
    """
    shortest, longest = segment
    if not UNPREDICTED < shortest <= longest <= length // 2:
        allowed = f"{UNPREDICTED + 1} to {length // 2} tokens"
        raise ValueError(f"a segment must have {allowed}, got {shortest} to {longest}")
    tokens = torch.multinomial(token_probs, count * length, replacement=True, generator=generator).view(count, length)
    size = torch.randint(shortest, longest + 1, (count, 1), generator=generator)
    places = torch.rand(count, 2, generator=generator, dtype=torch.float64).sort(dim=1).values
    first, gap = (places * (length - 2 * size + 1)).long().split(1, dim=1)  # in order
    second = gap + size

    at = torch.arange(length).expand(count, length)
    in_copy = (at >= second) & (at < second + size)
    tokens = tokens.gather(1, torch.where(in_copy, at - (second - first), at))
    predicted = (at + 1 >= second + UNPREDICTED) & (at + 1 < second + size)
    return Batch(tokens, torch.where(predicted, tokens.roll(-1, dims=1), NO_TARGET))


def familiar_batch(count: int, *, generator: torch.Generator) -> Batch:
    """Draw sequences in distribution: Zipf tokens, segments of 10 to 19 tokens."""
    return copy_sequences(count, zipf_probs(), generator=generator)


def unfamiliar_batch(count: int, *, generator: torch.Generator) -> Batch:
    """Draw sequences out of distribution: uniform tokens, and segments of 25 tokens, longer than any in training."""
    return copy_sequences(count, torch.ones(VOCABULARY), generator=generator, segment=(25, 25))


def copy_accuracy(logits: Tensor, targets: Tensor, symbols: Tensor | None = None) -> Accuracy:
    """Measure teacher-forced accuracy: the fraction of targets that are the argmax of their logits.

    Parameters
    ----------
    logits : (..., V)
    targets : (...), at the same positions.
    symbols : (m,) tokens that are counted separately; a position belongs to them if its target does.
    """
    labelled = targets != NO_TARGET
    right = (logits.argmax(dim=-1) == targets)[labelled].double()
    on = torch.isin(targets[labelled], targets.new_empty(0) if symbols is None else symbols)
    return Accuracy(right.mean().item(), right[on].mean().item(), right[~on].mean().item())


def free_running_accuracy(
    logits_of: Callable[[Tensor], Tensor],
    batch: Batch,
    read: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> float:
    """Measure accuracy when the model copies from its own output instead of the true tokens.

    The labelled positions of each sequence are hidden and generated greedily, one token per step, for all sequences at
    once. Tokens after a first error count too.

    Parameters
    ----------
    logits_of : maps tokens (n, length) to logits (n, length, V); must be causal.
    read : maps a written token to the token that the model reads next (a dialect's `read`).
    """
    labelled = batch.targets != NO_TARGET
    start, size = labelled.long().argmax(dim=1), labelled.sum(dim=1)
    given = batch.tokens.masked_fill(labelled.roll(1, dims=1), 0)
    written = torch.full_like(batch.targets, NO_TARGET)
    for step in range(int(size.max())):
        rows = (step < size).nonzero().squeeze(1)
        at = start[rows] + step
        guess = logits_of(given[rows])[torch.arange(len(rows)), at].argmax(dim=-1)
        written[rows, at] = guess
        given[rows, at + 1] = read(guess)
    return (written == batch.targets)[labelled].double().mean().item()
