"""Every aggregation rule against flwr, byzfl, peft, scipy or cvxpy, and on adapters against their dense products."""

from __future__ import annotations

import copy

import cvxpy as cp
import numpy as np
import peft
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from clairlib import LowRank
from clairlib.baselines import AGGREGATORS, aggregate
from clairlib.baselines import aggregators as baselines
from clairlib.baselines import weights as cw
from clairlib.baselines.aggregators import TOLD
from clairlib.baselines.robust_pca import robust_pca
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import sin_theta
from clairlib.simulate import ATTACKS, planted
from helpers import oracles
from helpers.memory import Largest

CONTAMINATED = [0, 1, 3]
ON_FACTORS = {"FedAvg, factors", "FedSA"}
ENTRYWISE = {"coordinate median", "trimmed mean", "NNM + trimmed mean", "entrywise RPCA", "entrywise RPCA, personal"}
ON_PRODUCTS = [name for name in AGGREGATORS if name not in ON_FACTORS]


def normal(*shape, name="normal"):
    return torch.randn(*shape, generator=derive(0, "baselines", name), dtype=torch.float64)


def updates(K=10, p=6, q=5):
    """Gaussian updates, the first two far off."""
    X = normal(K, p, q)
    X[:2] = 3 * X[:2] + 2
    return X


def adapters(ranks=(3, 2, 4, 1, 3, 2, 2, 5), p=12, q=9, dtype=torch.float64):
    """Low-rank updates of ranks and scales that differ, with a common part and two far off."""
    M = LowRank(normal(p, 1, name="M"), normal(1, q, name="M'"))
    made = []
    for k, rho in enumerate(ranks):
        B, A = normal(p, rho, name=f"B{k}"), normal(rho, q, name=f"A{k}")
        joined = LowRank(torch.cat([M.B, B], dim=1), torch.cat([M.A, 0.3 * A]), 4.0 if k < 2 else 0.5 + 0.1 * k)
        made.append(LowRank(joined.B.to(dtype), joined.A.to(dtype), joined.scale))
    return made


def dense(lowrank):
    return torch.stack([update.dense() for update in lowrank])


def told(name, K, contaminated=2, rank=2):
    benign = torch.arange(K) >= contaminated
    everything = {"contaminated": contaminated, "benign": benign, "rank": rank}
    return {TOLD[AGGREGATORS[name].told]: everything[TOLD[AGGREGATORS[name].told]]} if AGGREGATORS[name].told else {}


def combined(name, X, **told_):
    """The one update that a shared rule gives everybody."""
    made = aggregate(name, X, **told_)
    assert len(made) == len(X) and all(update is made[0] for update in made)
    return made[0]


def flwr_results(X):
    return [([one], 1) for one in X.numpy()]


def vectors(X):
    return X.flatten(1).numpy()


# -- rules that flwr and byzfl have ------------------------------------------------------------------------------


@pytest.mark.parametrize("contaminated", CONTAMINATED)
def test_krum_and_multikrum_are_flwrs(contaminated):
    for draw in range(20):  # neighbours counted wrongly choose the same client now and then
        X = normal(10, 3, 2, name=f"krum {draw}")
        chosen = oracles.flwr_aggregate.aggregate_krum(flwr_results(X), contaminated, 0)[0]
        assert torch.equal(combined("Krum", X, contaminated=contaminated), torch.tensor(chosen))
        mean = oracles.flwr_aggregate.aggregate_krum(flwr_results(X), contaminated, len(X) - contaminated)[0]
        torch.testing.assert_close(combined("MultiKrum", X, contaminated=contaminated), torch.tensor(mean))


@pytest.mark.parametrize("contaminated", CONTAMINATED)
def test_krum_is_byzfls_that_counts_one_neighbour_more(contaminated):
    """byzfl sums over the K - f - 1 nearest others: our f is theirs less one, where 2 (f + 1) < K."""
    for draw in range(20):
        X = normal(10, 3, 2, name=f"krum {draw}")
        chosen = oracles.byzfl_aggregators.Krum(contaminated + 1)(vectors(X))
        assert np.array_equal(combined("Krum", X, contaminated=contaminated).flatten().numpy(), chosen)


def test_krum_past_its_assumption_counts_one_neighbour():
    X = updates(K=7)
    nearest = cw.squared_distances(cw.gram_matrix(X)).fill_diagonal_(torch.inf).min(dim=1).values
    assert torch.equal(combined("Krum", X, contaminated=6), X[nearest.argmin()])


@pytest.mark.parametrize("K", [9, 10])
def test_coordinate_median_is_flwrs_and_byzfls(K):
    X = updates(K)
    ours = combined("coordinate median", X).numpy()
    assert np.array_equal(ours, oracles.flwr_aggregate.aggregate_median(flwr_results(X))[0])
    assert np.array_equal(ours.flatten(), oracles.byzfl_aggregators.Median()(vectors(X)))


@pytest.mark.parametrize("contaminated", CONTAMINATED)
def test_trimmed_mean_is_flwrs_byzfls_and_scipys(contaminated):
    X = updates()
    ours, share = combined("trimmed mean", X, contaminated=contaminated).numpy(), contaminated / len(X) + 1e-9
    others = [
        oracles.flwr_aggregate.aggregate_trimmed_avg(flwr_results(X), share)[0],
        oracles.byzfl_aggregators.TrMean(contaminated)(vectors(X)).reshape(ours.shape),
        stats.trim_mean(X.numpy(), share, axis=0),
    ]
    for other in others:
        np.testing.assert_allclose(ours, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("K, contaminated", [(9, 5), (10, 5), (10, 9)])
def test_trimmed_mean_past_half_is_the_median(K, contaminated):
    X = updates(K)
    assert torch.equal(combined("trimmed mean", X, contaminated=contaminated), combined("coordinate median", X))


def test_geometric_median_is_byzfls():
    """byzfl starts Weiszfeld's iteration at zero; both end at the one minimum, theirs smoothed below 1e-9."""
    X = updates()
    other = oracles.byzfl_aggregators.GeometricMedian(nu=1e-9, T=3000)(vectors(X))
    np.testing.assert_allclose(combined("geometric median", X).flatten().numpy(), other, atol=1e-8)


@pytest.mark.parametrize("contaminated", CONTAMINATED)
def test_nnm_and_trimmed_mean_are_byzfls(contaminated):
    X = updates()
    mixed = oracles.byzfl_preaggregators.NNM(contaminated)(vectors(X))
    other = oracles.byzfl_aggregators.TrMean(contaminated)(mixed)
    ours = combined("NNM + trimmed mean", X, contaminated=contaminated)
    np.testing.assert_allclose(ours.flatten().numpy(), other, rtol=1e-12, atol=1e-14)


def test_centred_clipping_is_byzfls_with_the_median_distance_as_radius():
    X, v = updates(), np.zeros(30)
    other = oracles.byzfl_aggregators.CenteredClipping(L=1)
    for _ in range(cw.CLIPPING_ROUNDS):
        other.tau = float(np.sort(np.linalg.norm(vectors(X) - v, axis=1))[4])  # the lower of the middle two
        v = other(vectors(X))
    np.testing.assert_allclose(combined("centred clipping", X).flatten().numpy(), v, rtol=1e-10, atol=1e-12)


def test_centred_clipping_ends_at_hubers_estimate():
    """Its equation sum_k psi_k = 0, psi_k the clipped deviation, to the rounds' accuracy; the mean leaves far more."""
    X = updates()

    def unbalanced(centre):
        D = X - centre
        size = torch.linalg.matrix_norm(D)
        return float((D * (size.median() / size).clamp(max=1)[:, None, None]).mean(dim=0).norm() / size.median())

    assert unbalanced(combined("centred clipping", X)) < 1e-3 < 0.05 < unbalanced(X.mean(dim=0))


@pytest.mark.parametrize("contaminated", [1, 3, 4])
def test_caf_is_byzfls_started_at_the_leading_direction(contaminated, monkeypatch):
    """byzfl makes one power step from a random start; on a line, handed its direction, that step is exact."""
    places, direction = normal(10, name="line"), normal(6, 5, name="direction")
    places[:3] += 4
    X = normal(6, 5) + places[:, None, None] * direction
    monkeypatch.setattr(np.random, "randn", lambda n: direction.flatten().numpy())
    other = oracles.byzfl_aggregators.CAF(contaminated)(vectors(X))
    ours = combined("CAF", X, contaminated=contaminated).flatten().numpy()
    np.testing.assert_allclose(ours, other, rtol=1e-9, atol=1e-12)


def caf_by_covariance(X, contaminated):
    """The filter as published, on the covariance itself."""
    c, least = np.ones(len(X)), np.inf
    while c.sum() > len(X) - 2 * contaminated:
        mean = np.average(X, axis=0, weights=c)
        values, directions = np.linalg.eigh(np.cov(X.T, aweights=c, ddof=0))
        if values[-1] < least:
            least, best = values[-1], mean
        along = ((X - mean) @ directions[:, -1]) ** 2
        c = c * (1 - along / along.max())
    return best


@pytest.mark.parametrize("contaminated", [1, 3, 4])
def test_caf_from_inner_products_is_the_filter_on_the_covariance(contaminated):
    X = updates()
    ours = combined("CAF", X, contaminated=contaminated).flatten().numpy()
    np.testing.assert_allclose(ours, caf_by_covariance(vectors(X), contaminated), rtol=1e-8, atol=1e-10)


def test_norm_filter_leaves_out_what_scipys_z_score_does():
    X = normal(30, 4, 3)
    X[5] *= 40
    z = stats.zscore(np.linalg.norm(vectors(X), axis=1), ddof=1)
    assert (np.abs(z) > 3).tolist() == [k == 5 for k in range(30)]
    torch.testing.assert_close(combined("norm filter", X), torch.cat([X[:5], X[6:]]).mean(dim=0))
    torch.testing.assert_close(combined("norm filter", X[:10]), X[:10].mean(dim=0))  # cannot fire with ten


# -- means, and rules on factors ---------------------------------------------------------------------------------


def peft_merged(clients, how):
    """peft's merge of adapters, as the change of the weight matrix."""
    p, q = clients[0].shape
    model = nn.Sequential(nn.Linear(q, p, bias=False)).double()
    for k, client in enumerate(clients):
        config = peft.LoraConfig(r=client.rank, lora_alpha=client.scale * client.rank, target_modules=["0"])
        if k == 0:
            model = peft.get_peft_model(model, config, adapter_name="0")
        else:
            model.add_adapter(str(k), config)
        layer = model.base_model.model[0]
        layer.lora_B[str(k)].weight.data, layer.lora_A[str(k)].weight.data = client.B.clone(), client.A.clone()
    names = [str(k) for k in range(len(clients))]
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", combination_type=how)
    return layer.get_delta_weight("merged").detach()


def test_fedavg_of_adapters_is_pefts_concatenation_and_the_mean_of_products():
    clients = adapters()
    merged = combined("FedAvg", clients)
    assert isinstance(merged, LowRank) and merged.rank == sum(client.rank for client in clients)
    torch.testing.assert_close(merged.dense(), peft_merged(clients, "cat"))
    torch.testing.assert_close(merged.dense(), dense(clients).mean(dim=0))


def test_factor_mean_is_pefts_linear_merge_over_the_number_of_clients_and_not_the_mean_of_products():
    clients = [LowRank(client.B, client.A, 0.5) for client in adapters(ranks=[3] * 5)]
    merged = combined("FedAvg, factors", clients).dense()
    torch.testing.assert_close(len(clients) * merged, peft_merged(clients, "linear"))
    assert float((merged - dense(clients).mean(dim=0)).norm() / merged.norm()) > 0.1


def test_fedsa_keeps_own_B_and_shares_the_mean_A():
    clients = adapters(ranks=[3] * 5)
    mean_A = torch.stack([client.A for client in clients]).mean(dim=0)
    for client, made in zip(clients, aggregate("FedSA", clients), strict=True):
        torch.testing.assert_close(made.dense(), client.scale * client.B @ mean_A)


@pytest.mark.parametrize("name", sorted(ON_FACTORS))
def test_rules_on_factors_refuse_products_and_mixed_ranks(name):
    with pytest.raises(TypeError, match="takes the factors of adapters; got dense"):
        aggregate(name, updates())
    with pytest.raises(ValueError, match="one rank; got adapters of rank 2, 3, 4, 5, 6"):
        aggregate(name, adapters())


def test_local_is_everybodys_own_and_the_oracle_the_mean_of_the_benign():
    X = updates()
    benign = torch.arange(10) > 3
    assert all(torch.equal(made, own) for made, own in zip(aggregate("local", X), X, strict=True))
    torch.testing.assert_close(combined("FedAvg, benign only", X, benign=benign), X[4:].mean(dim=0))


# -- robust PCA --------------------------------------------------------------------------------------------------


def test_robust_pca_reaches_the_optimum_of_cvxpy():
    X = normal(9, 7) + 5 * (normal(9, 7, name="where") > 1.3)
    L, S = robust_pca(X)
    lam = 9**-0.5
    low = cp.Variable(X.shape)
    optimum = cp.Problem(cp.Minimize(cp.normNuc(low) + lam * cp.sum(cp.abs(X.numpy() - low)))).solve(solver="CLARABEL")
    value = float(torch.linalg.matrix_norm(L, "nuc") + lam * S.abs().sum())
    torch.testing.assert_close(L + S, X)
    assert value == pytest.approx(optimum, rel=1e-5)


def test_robust_pca_recovers_a_low_rank_matrix_from_wrong_entries():
    low = normal(60, 2) @ normal(2, 40, name="right")
    wrong = 10 * normal(60, 40, name="wrong") * (torch.rand(60, 40, generator=derive(0, "where")) < 0.05)
    assert float((robust_pca(low + wrong)[0] - low).norm() / low.norm()) < 1e-4
    assert not robust_pca(torch.zeros(3, 2))[0].any()


def test_entrywise_rpca_gets_rid_of_wrong_entries_and_keeps_what_is_common():
    M = normal(12, 10)
    wrong = 10 * (torch.rand(8, 12, 10, generator=derive(0, "entries")) < 0.05) * normal(8, 12, 10, name="w")
    assert float((combined("entrywise RPCA", M + wrong) - M).norm() / M.norm()) < 1e-4
    assert float((combined("FedAvg", M + wrong) - M).norm() / M.norm()) > 0.1


def test_personal_rpca_keeps_clients_differences_in_a_shared_subspace():
    truth = planted(share=0.0, noise_std=0.0, K=16, p=30, q=6, r=2, generator=derive(0, "personal"))
    wrong = 5 * (torch.rand(16, 30, 6, generator=derive(0, "entries")) < 0.03) * normal(16, 30, 6, name="w")
    made = torch.stack(aggregate("entrywise RPCA, personal", truth.targets + wrong))
    error, local = (made - truth.targets).norm(), wrong.norm()
    assert float(error / local) < 0.25


# -- Subspace-Median ---------------------------------------------------------------------------------------------


def test_subspace_median_by_the_projectors_themselves():
    X, rank = planted("dense", K=9, p=8, q=5, r=2, noise_std=0.1, generator=derive(0, "median")).updates, 2
    centre = cw.geometric_median(X)
    U = torch.linalg.svd(X - centre).U[..., :rank]
    median = cw.geometric_median(U @ U.mT)
    P = torch.linalg.eigh(median).eigenvectors[:, -rank:]
    expected = centre + P @ P.T @ (X - centre)
    torch.testing.assert_close(torch.stack(aggregate("Subspace-Median", X, rank=rank)), expected, rtol=0, atol=1e-6)


def test_subspace_median_is_exact_without_noise_and_contamination():
    truth = planted(share=0.0, noise_std=0.0, generator=derive(1, "median"))
    made = torch.stack(aggregate("Subspace-Median", truth.targets, rank=3))
    torch.testing.assert_close(made, truth.targets, rtol=0, atol=1e-8)
    wide = (made - made.mean(dim=0)).permute(1, 0, 2).flatten(1)
    assert sin_theta(torch.linalg.svd(wide).U[:, :3], truth.basis) < 1e-6


# -- adapters, modules, and what holds for every rule -------------------------------------------------------------


@pytest.mark.parametrize("name", ON_PRODUCTS)
def test_adapters_of_any_ranks_give_what_their_products_give(name):
    clients = adapters()
    ours = aggregate(name, clients, **told(name, len(clients)))
    expected = aggregate(name, dense(clients), **told(name, len(clients)))
    for made, product in zip(ours, expected, strict=True):
        assert isinstance(made, Tensor if name in ENTRYWISE else LowRank)
        made = made if isinstance(made, Tensor) else made.dense()
        torch.testing.assert_close(made, product, rtol=0, atol=1e-10 * float(product.norm()))


def test_gram_matrix_of_adapters_is_that_of_their_products():
    X = dense(adapters())
    gram = cw.gram_matrix(adapters())
    expected = torch.einsum("jpq,kpq->jk", X, X)
    torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-12 * float(expected.max()))
    distances = cw.distances_to(gram, torch.eye(len(X), dtype=torch.float64)[3])
    torch.testing.assert_close(distances, torch.linalg.matrix_norm(X - X[3]), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in AGGREGATORS if name not in ENTRYWISE])
def test_rules_by_inner_products_allocate_nothing_of_size_p_times_q(name):
    p = q = 20_000
    clients = adapters(ranks=[2] * 4, p=p, q=q, dtype=torch.float32)  # rank 3 with the common part
    with Largest() as largest:
        made = aggregate(name, clients, **told(name, 4, contaminated=1))
    assert made[0].shape == (p, q)
    assert largest.entries <= 4 * p * sum(client.rank for client in clients)


@pytest.mark.parametrize("name", ["coordinate median", "trimmed mean", "NNM + trimmed mean"])
def test_entrywise_rules_hold_a_bounded_number_of_entries(name, monkeypatch):
    clients = adapters(p=60, q=50)
    expected = combined(name, clients, **told(name, 8))
    monkeypatch.setattr(baselines, "BLOCK_ENTRIES", 8 * 50 * 7)
    with Largest() as largest:
        made = combined(name, clients, **told(name, 8))
    torch.testing.assert_close(made, expected)
    assert largest.entries <= 2 * 60 * 50 < 2 * 8 * 60 * 50  # two float32 units an entry: the result itself


@pytest.mark.parametrize("name", [name for name in ON_PRODUCTS if "RPCA" not in name and "Subspace" not in name])
def test_modules_are_judged_together_as_one_large_update(name):
    X = updates(p=10)
    X[4, :6] += 20  # far off in one module only
    apart = aggregate(name, {"first": X[:, :6], "second": X[:, 6:]}, **told(name, 10))
    together = aggregate(name, X, **told(name, 10))
    for first, second, whole in zip(apart["first"], apart["second"], together, strict=True):
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ON_PRODUCTS)
def test_every_rule_follows_the_order_of_clients_and_the_unit(name):
    X, order = updates(), torch.randperm(10, generator=derive(0, "order"))
    facts = told(name, 10)
    moved = facts | ({"benign": facts["benign"][order]} if "benign" in facts else {})
    ours, expected = torch.stack(aggregate(name, 4 * X[order], **moved)), torch.stack(aggregate(name, X, **facts))
    torch.testing.assert_close(ours, 4 * expected[order], rtol=0, atol=1e-5)


ROBUST = [n for n in ON_PRODUCTS if not AGGREGATORS[n].personal and n not in ("FedAvg", "norm filter")]


@pytest.mark.parametrize("name", ROBUST)
def test_robust_rules_stay_near_the_benign_mean_where_fedavg_is_carried_off(name):
    truth = planted("scaled", K=20, generator=derive(3, "baselines"))
    known = {"contaminated": 6, "benign": truth.benign}
    facts = {TOLD[told_]: known[TOLD[told_]]} if (told_ := AGGREGATORS[name].told) else {}
    mean = truth.updates[truth.benign].mean(dim=0)
    carried_off = float((combined("FedAvg", truth.updates) - mean).norm())
    allowed = 1.0 if name == "Krum" else 0.5  # one client, which lies as far from the mean as clients differ
    assert float((combined(name, truth.updates, **facts) - mean).norm()) < allowed * carried_off


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("name", ON_PRODUCTS)
def test_every_rule_stands_every_attack_at_half(name, kind):
    X = planted(kind, share=0.5, K=8, p=8, q=4, r=2, generator=derive(4, "baselines")).updates
    made = torch.stack(aggregate(name, X, **told(name, 8, contaminated=4)))
    assert made.shape == X.shape and bool(made.isfinite().all())


def test_equal_updates_are_their_own_aggregate_by_every_rule():
    X = normal(1, 6, 5).expand(12, 6, 5).clone()
    for name in ON_PRODUCTS:
        for made in aggregate(name, X, **told(name, 12)):
            torch.testing.assert_close(made, X[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_dtype_is_kept_and_inputs_are_left_alone(name):
    clients = adapters(ranks=[2] * 8, dtype=torch.float32)
    before = copy.deepcopy(clients)
    for made in aggregate(name, clients, **told(name, 8)):
        assert (made if isinstance(made, Tensor) else made.B).dtype == torch.float32
    assert all(torch.equal(a.B, b.B) and torch.equal(a.A, b.A) for a, b in zip(clients, before, strict=True))


# -- the door ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ON_PRODUCTS if AGGREGATORS[name].told])
def test_a_rule_that_must_be_told_says_so(name):
    what = AGGREGATORS[name].told
    with pytest.raises(ValueError, match=f"^{name.replace('+', '.')} must be told the {what}: give {TOLD[what]}="):
        aggregate(name, updates())


def test_a_rule_that_is_not_told_does_not_see():
    X = updates()
    assert torch.equal(combined("FedAvg", X, benign=torch.arange(10) > 1, contaminated=2), combined("FedAvg", X))


def test_nonsense_is_refused_in_one_line():
    X = updates()
    with pytest.raises(ValueError, match="unknown aggregator 'Krumm'; known: local, FedAvg"):
        aggregate("Krumm", X)
    with pytest.raises(ValueError, match="contaminated must lie in 0 .. 9 for 10 clients; got 10"):
        aggregate("Krum", X, contaminated=10)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        aggregate("Subspace-Median", X, rank=0)
    with pytest.raises(ValueError, match="bool mask of the 10 clients"):
        aggregate("FedAvg, benign only", X, benign=torch.zeros(10, dtype=torch.bool))
    with pytest.raises(ValueError, match="client 'client_3' has NaN or Inf"):
        aggregate("FedAvg", torch.where(torch.arange(10)[:, None, None] == 3, torch.nan, X))
