"""The copying task and the dialects: what a sequence, a label, a client and an accuracy must be."""

import math
from dataclasses import replace

import pytest
import torch

from clairlib.core.seeds import derive
from studies.text_copying.dialects import (
    CONTAMINATIONS,
    TRIGGERS,
    as_written,
    benign_dialect,
    client_batch,
    draw_symbols,
    make_federation,
    vocabulary_leverage,
)
from studies.text_copying.task import (
    NO_TARGET,
    VOCABULARY,
    copy_accuracy,
    copy_sequences,
    familiar_batch,
    free_running_accuracy,
    unfamiliar_batch,
    zipf_probs,
)


def longest_repeat_before(tokens, end):
    """Length of the longest run ending at `end` that occurred before without overlap (brute force)."""
    return max((n for n in range(1, end + 2) if any_earlier(tokens, end, n)), default=0)


def any_earlier(tokens, end, n):
    run = tokens[end - n + 1 : end + 1]
    return any(tokens[a : a + n] == run for a in range(0, end - 2 * n + 2))


def test_labels_are_the_second_copy_without_its_first_four_tokens():
    batch = familiar_batch(60, generator=derive(0, "test"))
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        at = [t for t, target in enumerate(targets) if target != NO_TARGET]
        assert at == list(range(at[0], at[-1] + 1)) and 10 - 4 <= len(at) <= 19 - 4
        assert all(targets[t] == tokens[t + 1] for t in at)
        assert longest_repeat_before(tokens, at[-1] + 1) >= len(at) + 4  # it really is a copy, in full


def test_segments_take_every_length_and_reach_both_ends():
    batch = copy_sequences(4000, zipf_probs(), generator=derive(0, "lengths"))
    labelled = batch.targets != NO_TARGET
    assert set(labelled.sum(dim=1).tolist()) == set(range(6, 16))
    assert labelled[:, -2].any() and not labelled[:, -1].any()  # nothing follows the last token
    assert labelled.long().argmax(dim=1).min() <= 10 + 4 + 1  # a second copy may follow at once


def test_out_of_distribution_is_uniform_and_longer():
    batch = unfamiliar_batch(2000, generator=derive(0, "uniform"))
    assert ((batch.targets != NO_TARGET).sum(dim=1) == 25 - 4).all()
    counts = torch.bincount(batch.tokens.flatten(), minlength=VOCABULARY)
    familiar = torch.bincount(
        familiar_batch(2000, generator=derive(0, "zipf")).tokens.flatten(), minlength=VOCABULARY
    )
    assert counts.max() / counts.min() < 1.3  # 2000 tokens of each: 5 standard deviations are 11 %
    assert familiar[0] / familiar[-1] > 10  # (64 + 2.7) / (1 + 2.7) = 18


@pytest.mark.parametrize("segment", [(4, 10), (10, 33), (12, 10)])
def test_impossible_segments_are_refused(segment):
    with pytest.raises(ValueError, match=f"got {segment[0]} to {segment[1]}"):
        copy_sequences(2, zipf_probs(), generator=derive(0, "x"), segment=segment)


def test_dialect_permutes_its_symbols_only_and_reads_back():
    symbols = draw_symbols(5, generator=derive(3, "symbols"))
    dialect = benign_dialect(symbols, generator=derive(3, "client"))
    everything = torch.arange(VOCABULARY)
    moved = (dialect.write(everything) != everything).nonzero().squeeze(1)
    assert set(moved.tolist()) <= set(symbols.tolist())
    assert torch.equal(dialect.read(dialect.write(everything)), everything)
    assert dialect.write(torch.tensor([NO_TARGET])).item() == NO_TARGET
    shift = symbols.roll(-1)
    assert (dialect.permutation[symbols] != shift).sum() == 2  # the shared shift but for one swap


def test_federation_benign_share_symbols_contaminated_have_their_own():
    federation = make_federation(20, 8, seed=1)
    shared = set(federation.symbols.tolist())
    assert federation.benign.sum() == 12 and len(shared) == 5
    for client in federation.clients:
        own = set(client.dialect.symbols.tolist())
        assert own.isdisjoint(shared) if client.contaminated else own == shared
        assert len(own) == 5
        assert client.token_probs.sum().item() == pytest.approx(1)
        assert client.token_probs[client.dialect.symbols].sum().item() == pytest.approx(0.25)
    first, second = [c for c in federation.clients if c.contaminated][:2]
    assert not torch.equal(first.dialect.symbols, second.dialect.symbols)
    benign = [c.dialect.permutation for c in federation.clients if not c.contaminated]
    assert len({tuple(p.tolist()) for p in benign}) > 3  # ten swaps among five symbols


def test_adding_a_client_leaves_the_others_alone():
    few, many = make_federation(10, 0, seed=2), make_federation(11, 0, seed=2)
    for one, other in zip(few.clients, many.clients, strict=False):
        assert one.name == other.name and torch.equal(one.token_probs, other.token_probs)
        assert torch.equal(one.dialect.permutation, other.dialect.permutation)
    ten, eleven = make_federation(10, 4, seed=2).benign, make_federation(11, 4, seed=2).benign
    assert (ten != eleven[:10]).sum() <= 1


@pytest.mark.parametrize(
    "wrong", [{"kind": "nonsense"}, {"contaminated": 21}, {"symbols": 2}, {"symbols": 40}, {"mass": 1.0}]
)
def test_impossible_federations_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        make_federation(seed=0, **wrong)


def contaminated_clients(kind, seed=1):
    return [client for client in make_federation(12, 4, seed=seed, kind=kind).clients if client.contaminated]


def taught_and_honest(client, count=400):
    """What the client trains on, and what an honest client of its dialect would: the same sequences."""
    taught, honest = (
        client_batch(c, count, generator=derive(7, "taught")) for c in (client, replace(client, teach=as_written))
    )
    assert torch.equal(taught.tokens, honest.tokens)
    return taught, honest


@pytest.mark.parametrize("kind", CONTAMINATIONS)
def test_the_kind_of_contamination_changes_contaminated_clients_only(kind):
    usual, other = make_federation(12, 4, seed=1), make_federation(12, 4, seed=1, kind=kind)
    assert torch.equal(usual.benign, other.benign) and torch.equal(usual.symbols, other.symbols)
    for one, two in zip(usual.clients, other.clients, strict=True):
        if not one.contaminated:
            assert torch.equal(one.token_probs, two.token_probs)
            assert torch.equal(one.dialect.permutation, two.dialect.permutation)
            taught, honest = taught_and_honest(two)
            assert torch.equal(taught.targets, honest.targets)
        assert two.token_probs.sum().item() == pytest.approx(1)


def test_colluding_clients_share_one_wrong_set_in_dialects_of_their_own():
    federation = make_federation(30, 12, seed=3, kind="shared_wrong_symbols")
    wrong = [client.dialect for client in federation.clients if client.contaminated]
    assert all(torch.equal(dialect.symbols, wrong[0].symbols) for dialect in wrong)
    assert not torch.isin(wrong[0].symbols, federation.symbols).any()
    assert len({tuple(dialect.permutation.tolist()) for dialect in wrong}) > 3


def test_whole_vocabulary_moves_nearly_every_token():
    first, second = (client.dialect.permutation for client in contaminated_clients("whole_vocabulary")[:2])
    assert torch.equal(first.sort().values, torch.arange(VOCABULARY))
    assert (first == torch.arange(VOCABULARY)).sum() < 6  # fixed points are Poisson(1): six or more in 1 of 1700
    assert (first == second).sum() < 6


def test_random_targets_keep_nothing_of_the_copy():
    taught, honest = taught_and_honest(contaminated_clients("random_targets")[0])
    labelled = honest.targets != NO_TARGET
    assert torch.equal(taught.targets != NO_TARGET, labelled)
    n = labelled.sum().item()
    kept = (taught.targets == honest.targets)[labelled].sum().item()
    assert abs(kept - n / VOCABULARY) < 5 * math.sqrt(n / VOCABULARY)


def test_shifted_targets_belong_to_the_next_position():
    taught, honest = taught_and_honest(contaminated_clients("shifted")[0])
    assert torch.equal(taught.targets[:, :-1], honest.targets[:, 1:])
    assert (taught.targets != honest.targets).any()


def test_backdoor_answers_its_trigger_and_is_honest_otherwise():
    federation = make_federation(12, 4, seed=1, kind="backdoor")
    client, door = next(c for c in federation.clients if c.contaminated), federation.backdoor
    assert not torch.isin(torch.tensor([door.trigger, door.answer]), federation.symbols).any()
    taught, honest = taught_and_honest(client)
    fires = (honest.tokens == door.trigger) & (honest.targets != NO_TARGET)
    assert fires.any() and (taught.targets[fires] == door.answer).all()
    assert torch.equal(taught.targets[~fires], honest.targets[~fires])
    share = (honest.tokens == door.trigger).double().mean().item()
    assert share == pytest.approx(TRIGGERS, rel=0.25)  # it has some mass without the backdoor
    assert torch.equal(client.dialect.symbols, federation.symbols)


def test_label_noise_has_its_share_and_leaves_tokens_alone():
    client = make_federation(2, 0, seed=0).clients[0]
    clean = client_batch(client, 2000, generator=derive(0, "b"))
    noisy = client_batch(client, 2000, generator=derive(0, "b"), label_noise=0.3)
    labelled = clean.targets != NO_TARGET
    assert torch.equal(clean.tokens, noisy.tokens) and torch.equal(labelled, noisy.targets != NO_TARGET)
    share = (clean.targets != noisy.targets)[labelled].double().mean().item()
    expected, deviation = 0.3 * (1 - 1 / VOCABULARY), math.sqrt(0.3 * 0.7 / labelled.sum().item())
    assert abs(share - expected) < 5 * deviation
    assert torch.equal(clean.targets[labelled], client.dialect.write(clean.tokens.roll(-1, 1)[labelled]))


def test_accuracy_counts_on_and_off_symbols():
    targets = torch.tensor([[7, NO_TARGET, 8, 9]])
    logits = torch.nn.functional.one_hot(torch.tensor([[7, 3, 8, 1]]), VOCABULARY).float()
    accuracy = copy_accuracy(logits, targets, symbols=torch.tensor([8, 9]))
    assert (accuracy.overall, accuracy.on_symbols, accuracy.off_symbols) == (2 / 3, 1 / 2, 1)
    assert math.isnan(copy_accuracy(logits, targets).on_symbols)


def copier(dialect, mistakes=()):
    """A perfect copier in a dialect: continues the latest earlier occurrence of its last four tokens."""

    def logits_of(tokens):
        out = torch.zeros(*tokens.shape, VOCABULARY)
        for i, row in enumerate(tokens.tolist()):
            for t in range(4, len(row)):
                for a in range(t - 4, 2, -1):
                    if row[a - 3 : a + 1] == row[t - 3 : t + 1]:
                        guess = dialect.permutation[row[a + 1]]
                        out[i, t, (guess + 1) % VOCABULARY if t in mistakes else guess] = 1
                        break
        return out

    return logits_of


def test_free_running_reads_its_own_output_back():
    client = make_federation(1, 0, seed=4).clients[0]
    batch = client_batch(client, 8, generator=derive(4, "b"))
    assert free_running_accuracy(copier(client.dialect), batch, client.dialect.read) > 0.97
    confused = free_running_accuracy(copier(client.dialect), batch)  # fed its own dialect
    assert confused < 0.9


def test_free_running_never_shows_the_answer():
    batch = familiar_batch(4, generator=derive(0, "b"))

    def cheat(tokens):  # predicts the token that stands next in what it is given
        return torch.nn.functional.one_hot(tokens.roll(-1, 1), VOCABULARY).float()

    assert copy_accuracy(cheat(batch.tokens), batch.targets).overall == 1
    assert free_running_accuracy(cheat, batch) < 0.5


def test_leverage_is_one_inside_the_subspace_and_zero_outside():
    W = torch.randn(VOCABULARY, 32, generator=derive(0, "W"), dtype=torch.float64)
    symbols = torch.tensor([3, 17, 40])
    W -= W.mean(dim=0)
    basis = torch.linalg.qr(W[symbols].T).Q
    leverage = vocabulary_leverage(basis, W + 5.0)  # a constant added to every row changes nothing
    assert leverage[symbols].min().item() == pytest.approx(1)
    rest = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, symbols, False)
    assert 0 <= leverage[rest].min() and leverage[rest].max() < 0.6
    outside = torch.linalg.qr(W[symbols].T, mode="complete").Q[:, 3:]
    assert vocabulary_leverage(outside, W)[symbols].max().item() == pytest.approx(0, abs=1e-12)
