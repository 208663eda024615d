"""CLAIR end to end: the numbered statements on planted clients, against the oracle that knows set and rank."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from clairlib import CLAIR, LowRank
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import sin_theta
from clairlib.recovery.convex import decompose
from clairlib.recovery.detection import FAMILY_ERROR
from clairlib.recovery.inputs import SINGLE
from clairlib.simulate import planted
from clairlib.simulate.attacks import random_frame

KINDS = ("unstructured", "dense", "coalition", "sign_flip")


def draw(kind="unstructured", share=0.25, seed=0, K=24, p=50, q=10, r=3, noise=0.1 / 10**0.5):
    """The issue's planted setting unless told otherwise."""
    generator = derive(seed, "clair", kind, round(100 * share))
    return planted(kind, share=share, K=K, p=p, q=q, r=r, noise_std=noise, generator=generator)


def small(kind="unstructured", share=0.25, seed=0, noise=0.02, **options):
    return draw(kind, share, seed, **(dict(K=12, p=20, q=6, r=2, noise=noise) | options))


def oracle(c):
    """Basis and refined updates of one who is told the set and the rank, in plain numpy."""
    X = c.updates.numpy()
    S = c.benign.numpy()
    mean = X[S].mean(0)
    U = np.linalg.svd(np.hstack(list(X[S] - mean)), full_matrices=False)[0][:, : c.rank]
    return torch.as_tensor(U), torch.as_tensor(mean + U @ (U.T @ (X - mean)))


def error(c, refined):
    return float((refined - c.targets)[c.benign].square().sum((1, 2)).mean())


def coloured(c, rho):
    """The same clients with noise of AR(rho) rows."""
    places = torch.arange(c.updates.shape[1], dtype=torch.float64)
    colour = torch.linalg.cholesky(torch.as_tensor(rho) ** (places[:, None] - places).abs())
    return c.targets + colour @ (c.updates - c.targets)


EXTREMES = [("unstructured", 0.0), ("unstructured", 0.75), ("dense", 0.75), ("coalition", 0.45), ("sign_flip", 0.45)]


@pytest.mark.parametrize("solver", ["consensus", "convex"])
@pytest.mark.parametrize("kind", KINDS)
def test_statement1_any_benign_pair_reveals_the_set_without_noise(kind, solver):
    """The set is exact; with the rank given, so are the subspace and the refined updates."""
    c = small(kind, noise=0.0)
    result = CLAIR(rank=2, solver=solver).fit(c.updates)
    assert torch.equal(result.benign, c.benign)
    assert sin_theta(result.basis, c.basis) < 1e-8
    assert (result.refined - c.targets)[c.benign].abs().max() < 1e-8


@pytest.mark.parametrize("kind, share", EXTREMES)
def test_statement2_exact_set_without_noise(kind, share):
    c = draw(kind, share, noise=0.0)
    result = CLAIR().fit(c.updates)
    assert torch.equal(result.benign, c.benign)
    assert (result.refined - c.targets)[c.benign].abs().max() < 1e-8


@pytest.mark.parametrize("kind, share", EXTREMES)
def test_statement2_exact_recovery_without_noise(kind, share):
    for seed in range(2):
        c = draw(kind, share, noise=0.0, seed=seed)
        result = CLAIR().fit(c.updates)
        assert torch.equal(result.benign, c.benign)
        assert result.rank == 3
        assert sin_theta(result.basis, c.basis) < 1e-8
        off = c.common_part - c.basis @ (c.basis.T @ c.common_part)
        assert (result.common_part - off).abs().max() < 1e-8
        assert (result.refined - c.targets)[c.benign].abs().max() < 1e-8
        assert result.gain == 0.0  # nothing to gain, and it says so


def test_statement2_subspace_error_is_proportional_to_the_noise():
    """First order: P_perp (stack of noise) V / sigma_r, at most sigma (sqrt(p) + sqrt(r)) / sigma_r in size."""
    found = {}
    for sigma in (0.001, 0.002, 0.004):
        c = draw(share=0.25, noise=sigma)
        D = c.targets[c.benign] - c.targets[c.benign].mean(0)
        smallest = float(torch.linalg.svdvals(torch.cat(list(D), 1))[2])
        found[sigma] = sin_theta(CLAIR().fit(c.updates).basis, c.basis)
        assert found[sigma] < 1.5 * sigma * (50**0.5 + 3**0.5) / smallest
        assert found[sigma] > 0.3 * sigma * 50**0.5 / smallest
    assert found[0.002] / found[0.001] == pytest.approx(2, rel=0.05)  # the same draw of noise, scaled
    assert found[0.004] / found[0.001] == pytest.approx(4, rel=0.05)


CELLS = [("unstructured", 0.0), ("unstructured", 0.6), ("dense", 0.45), ("dense", 0.75), ("coalition", 0.4)]
CELLS += [("unstructured", 0.75), ("sign_flip", 0.2), ("sign_flip", 0.4)]


@pytest.mark.parametrize("noise", [0.02, 0.3])
@pytest.mark.parametrize("kind, share", CELLS)
def test_statement3_set_and_rank_are_the_oracles(kind, share, noise):
    c = draw(kind, share, noise=noise / 10**0.5)
    result = CLAIR().fit(c.updates)
    assert torch.equal(result.benign, c.benign)
    assert result.rank == 3
    basis, refined = oracle(c)
    assert sin_theta(result.basis, basis) < 1e-8
    assert (result.refined - refined)[c.benign].abs().max() < 1e-8
    grouped = {name for group in result.groups for name in group.members}
    alone = [k for k in (~c.benign).nonzero()[:, 0].tolist() if f"client_{k}" not in grouped]
    assert torch.equal(result.refined[alone], c.updates[alone])
    assert (kind in ("coalition", "sign_flip")) == bool(grouped)
    assert error(c, result.refined) < 0.4 * error(c, c.updates)


@pytest.mark.parametrize("kind", ["coalition", "sign_flip"])
def test_statement3_a_minority_of_45_percent_is_told_apart(kind):
    c = draw(kind, 0.45, noise=0.02 / 10**0.5)
    result = CLAIR().fit(c.updates)
    assert torch.equal(result.benign, c.benign) and result.rank == 3


def test_statement1_a_larger_coalition_swaps_roles():
    """No method can tell them apart: the larger of two frames is the benign one."""
    c = draw("coalition", 0.7, noise=0.02 / 10**0.5)
    assert torch.equal(CLAIR().fit(c.updates).benign, ~c.benign)


def test_statement3_nobody_is_flagged_where_nobody_is_contaminated():
    """At most FAMILY_ERROR of benign families; binomial bound at 1e-4 for 10 of them."""
    seeds, flagged = 10, 0
    for seed in range(seeds):
        result = CLAIR().fit(small(share=0.0, seed=seed, noise=0.05).updates)
        flagged += not bool(result.benign.all())
    assert flagged <= stats.binom.ppf(1 - 1e-4, seeds, FAMILY_ERROR)


def test_contaminated_clients_have_the_highest_scores_and_small_p_values():
    c = draw("unstructured", 0.45)
    result = CLAIR().fit(c.updates)
    assert result.scores[~c.benign].min() > max(5.0, float(result.scores[c.benign].max()))
    assert result.p_values[~c.benign].max() < 1e-4 < result.p_values[c.benign].min()
    assert torch.equal(result.modules["update"].scores, result.scores)
    assert result.contaminated == [f"client_{k}" for k in (~c.benign).nonzero().flatten().tolist()]


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_sixty_clients_of_whom_300_pairs_are_looked_at(noise):
    c = draw(share=0.45, K=60, p=30, q=6, r=2, noise=noise)
    result = CLAIR().fit(c.updates)
    assert torch.equal(result.benign, c.benign) and result.rank == 2


@pytest.mark.parametrize("K, q, r", [(40, 1, 1), (40, 1, 2), (60, 1, 3), (24, 2, 3)])
@pytest.mark.parametrize("kind", ["unstructured", "dense"])
def test_updates_with_fewer_columns_than_the_subspace_has_directions(kind, K, q, r):
    c = draw(kind, 0.2, K=K, p=30, q=q, r=r, noise=0.02)
    result = CLAIR().fit(c.updates)
    assert torch.equal(result.benign, c.benign) and result.rank == r
    assert error(c, result.refined) < 0.35 * error(c, c.updates)


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_coloured_noise(noise):
    c = draw(share=0.3, noise=noise / 10**0.5)
    result = CLAIR().fit(coloured(c, 0.6))
    assert torch.equal(result.benign, c.benign) and result.rank == 3


def test_weights_pay_where_clients_differ_in_noise():
    """Half the clients have 9 times the noise variance of the other half; mean over seeds."""
    K, given, ignored = 16, [], []
    w = torch.where(torch.arange(K) % 2 == 0, 3.0, 1 / 3.0).double()
    for seed in range(3):
        c = draw(share=0.25, seed=seed, K=K, p=30, q=8, r=2, noise=0.05)
        updates = c.targets + (c.updates - c.targets) / w.sqrt()[:, None, None]
        with_weights = CLAIR().fit(updates, weights=w)
        assert torch.equal(with_weights.benign, c.benign)
        given.append(error(c, with_weights.refined))
        ignored.append(error(c, CLAIR().fit(updates).refined))
    assert sum(given) < 0.7 * sum(ignored)  # the verdict allows for levels of noise that it is not told


def test_only_the_ratio_of_weights_matters():
    c = small()
    w = torch.linspace(1, 3, 12)
    first, second = CLAIR().fit(c.updates, weights=w), CLAIR().fit(c.updates, weights=100 * w)
    assert torch.equal(first.benign, second.benign)
    assert torch.allclose(first.refined, second.refined, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_both_solvers_agree_and_the_convex_one_is_certified(kind):
    c = small(kind, noise=0.01)
    consensus, convex = CLAIR().fit(c.updates), CLAIR(solver="convex").fit(c.updates)
    assert torch.equal(convex.benign, c.benign) and torch.equal(consensus.benign, c.benign)
    assert convex.rank == consensus.rank == 2
    assert sin_theta(convex.basis, consensus.basis) < 1e-8
    assert torch.allclose(convex.refined, consensus.refined, atol=1e-8)
    assert consensus.certificate is None
    assert convex.certificate.converged and 0 <= convex.certificate.relative_gap <= 1e-6
    assert "duality gap" in convex.summary() and "duality gap" not in consensus.summary()


def test_weight_and_tolerance_of_the_convex_program_are_those_asked_for():
    c = small(noise=0.0)
    result = CLAIR(solver="convex", lam=0.5, tolerance=1e-8).fit(c.updates)
    expected = decompose(c.updates, lam=0.5, tolerance=1e-8).certificate
    assert result.certificate.relative_gap <= 1e-8
    assert result.certificate.primal == pytest.approx(expected.primal, rel=1e-7)


def lora_clients(seed, K, bad, p=200, q=150, r=2, rho=2, noise=0.02):
    """LoRA updates: B_k in the shared subspace (or one of its own) up to noise, A_k free."""
    generator = derive(seed, "lora", K, rho)
    shared, benign = random_frame(p, r, generator=generator), torch.ones(K, dtype=torch.bool)
    benign[torch.randperm(K, generator=generator)[:bad]] = False
    updates = []
    for ok in benign.tolist():
        frame = shared if ok else random_frame(p, r, generator=generator)
        B = frame @ torch.randn(r, rho, generator=generator, dtype=torch.float64)
        B = B + noise * torch.randn(p, rho, generator=generator, dtype=torch.float64)
        updates.append(LowRank(B, torch.randn(rho, q, generator=generator, dtype=torch.float64) / q**0.5, 0.5))
    return updates, benign, shared




@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rho", [2, 4])
def test_adapters_whose_ranks_do_not_fill_the_matrix(rho, seed):
    """K rho = 24 or 48 directions in 200 rows: set, rank and subspace are found in factored form."""
    updates, benign, shared = lora_clients(seed, K=12, bad=3, rho=rho)
    result = CLAIR().fit(updates)
    assert torch.equal(result.benign, benign)
    assert result.rank == 2
    assert sin_theta(result.basis, shared) < 0.25


def test_adapters_with_the_rank_given():
    updates, benign, shared = lora_clients(0, K=12, bad=3, rho=4)
    result = CLAIR(rank=2).fit(updates)
    assert torch.equal(result.benign, benign) and sin_theta(result.basis, shared) < 0.25


def test_several_modules_give_one_verdict():
    """A client contaminated in two modules of three is contaminated; subspaces and ranks stay per module."""
    first, second, third = (small(share=s, seed=seed) for seed, s in ((0, 0.25), (1, 0.0), (2, 0.0)))
    bad = ~first.benign
    second.updates[bad] = small("dense", share=0.9, seed=3).updates[bad]
    result = CLAIR().fit({"a": first.updates, "b": second.updates, "c": third.updates})
    assert torch.equal(result.benign, first.benign)
    assert result.rank == {"a": 2, "b": 2, "c": 2}
    for name, c in (("a", first), ("c", third)):
        assert sin_theta(result.basis[name], c.basis) < 0.15
        kept = result.modules[name].refined[bad]
        assert torch.equal(kept, c.updates[bad])  # whoever is contaminated keeps all its own updates


def adapters(K, strangers, seed=0, p=64, q=64, rho=8, r=3, noise=0.02):
    """LoRA clients that share an r-dimensional output subspace, strangers with a subspace each of their own."""
    g = derive(seed, "adapters", K, strangers)
    normal = partial(torch.randn, generator=g, dtype=torch.float64)
    shared = torch.linalg.qr(normal(p, r))[0]
    frames = [torch.linalg.qr(normal(p, r))[0] if k < strangers else shared for k in range(K)]
    return [LowRank(U @ normal(r, rho) + noise * normal(p, rho), normal(rho, q) / q**0.5, 2.0) for U in frames]


@pytest.mark.parametrize("K, strangers", [(12, 0), (12, 3), (12, 6), (24, 18)])
def test_strangers_among_low_rank_adapters_are_not_absorbed(K, strangers):
    """A frame that holds every stranger's own directions fits everybody; it must not win."""
    result = CLAIR().fit(adapters(K, strangers))
    assert (~result.benign).nonzero()[:, 0].tolist() == list(range(strangers))
    assert result.rank == 3 and result.has_shared_subspace


def test_clients_that_share_nothing_are_said_to():
    result = CLAIR().fit(adapters(12, 12))
    assert not result.has_shared_subspace and "nothing shared found" in result.summary()


def test_a_module_without_updates_does_not_hide_the_others():
    c = small(noise=0.02)
    result = CLAIR().fit({"real": c.updates, "untrained": torch.zeros_like(c.updates)})
    assert torch.equal(result.benign, c.benign)


def test_what_no_module_shows_alone_the_pooled_verdict_does():
    """A small deviation in each of twelve modules: nobody is outside any module's first set."""
    flagged, alone = [], 0
    for seed in range(3):
        modules = {}
        for m in range(12):
            c = draw(share=0.0, seed=100 * seed + m, K=12, p=20, q=6, r=2, noise=0.1)
            g = derive(seed, "push", m)
            push = torch.outer(*(torch.randn(n, generator=g, dtype=torch.float64) for n in (20, 6)))
            c.updates[4] += 0.8 * push / torch.linalg.matrix_norm(push)
            modules[f"m{m}"] = c.updates
        flagged.append(CLAIR().fit(modules).contaminated)
        alone += sum("client_4" in CLAIR().fit(updates).contaminated for updates in list(modules.values())[:4])
    assert flagged == [["client_4"]] * 3
    assert alone < 6  # of 12 modules looked at by themselves


@pytest.mark.parametrize("size", [1e160, 1e-160])
def test_size_does_not_matter_however_extreme(size):
    c = small(noise=0.02)
    result = CLAIR().fit(size * c.updates)
    assert torch.equal(result.benign, c.benign) and result.rank == c.rank
    torch.testing.assert_close(result.refined / size, CLAIR().fit(c.updates).refined, rtol=1e-6, atol=1e-9)


def test_clients_that_share_nothing_keep_their_own_updates():
    """Differences that are each client's own look like noise to the estimated gain; refinement is refused."""
    c = planted("unstructured", K=24, share=0.8, noise_std=0.03, generator=derive(0, "strangers"))
    updates = c.updates[~c.benign]
    result = CLAIR().fit(updates)
    assert not result.has_shared_subspace and not result.modules[SINGLE].is_refined
    assert torch.equal(result.refined, updates)


@pytest.mark.parametrize(("bad", "searched"), [(True, 3), (False, 5)])
def test_the_search_ends_when_three_modules_agree(monkeypatch, bad, searched):
    """Where the second module's clients are clean, the modules find different sets and all of them are searched."""
    c = planted(share=0.3, noise_std=0.02, generator=derive(0, "agree"))
    clean = planted(share=0.0, noise_std=0.02, generator=derive(1, "agree"))
    asked = []
    first_frame = CLAIR.first_frame
    monkeypatch.setattr(CLAIR, "first_frame", lambda *a: asked.append(a[1].name) or first_frame(*a))
    CLAIR().fit({f"m{i}": c.updates if bad or i != 1 else clean.updates for i in range(5)})
    assert len(asked) == searched
