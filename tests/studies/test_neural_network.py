"""Clients of a small network on real images, and the study made of them."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clairlib import LowRank
from clairlib.baselines import AGGREGATORS
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import sin_theta
from studies.common import tables as common_tables
from studies.neural_network import plots as digits_plots
from studies.neural_network import study
from studies.neural_network import task as clients

SMALL = {"clients": 8, "contaminated": 2, "examples": 30, "places": 1, "shared": 4}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def cell():
    return study.digits_cell("output layer", "permuted_labels", 100, 2, 20, seed=0)


def federation(kind="none", seed=0, **changes):
    return clients.make_federation(seed, kind, **{**SMALL, **changes})


def test_every_real_image_is_in_one_part():
    parts = clients.split_images(seed=3)
    assert [len(part.pixels) for part in parts] == [600, 700, 497]
    rows = torch.cat([part.pixels for part in parts])
    from sklearn.datasets import load_digits

    real = torch.from_numpy(load_digits().data) / 16
    assert torch.equal(rows.unique(dim=0), real.unique(dim=0)) and rows.sum() == pytest.approx(float(real.sum()))


def test_a_picture_shows_the_digits_of_its_number_side_by_side():
    counts = torch.tensor([3, 1, 2, 5, 1, 1, 4, 2, 1, 1])
    labels = torch.arange(10).repeat_interleave(counts)
    images = clients.Images(labels[:, None].expand(-1, 64).double(), counts)
    numbers = torch.tensor([40, 7, 93])
    pictures = images.of(numbers, 2, generator=derive(0, "test")).unflatten(1, (8, 16))
    for number, picture in zip(numbers.tolist(), pictures, strict=True):
        assert bool((picture[:, :8] == number // 10).all()) and bool((picture[:, 8:] == number % 10).all())


def test_slanted_turns_each_digit_about_its_own_centre():
    x = torch.rand(3, 128, generator=derive(0, "slant"), dtype=torch.float64)
    assert torch.allclose(clients.slanted(x, 0.0), x, atol=1e-12)
    quarter = clients.slanted(x, 90.0).unflatten(1, (8, 16))
    digits = x.unflatten(1, (8, 16))
    for half in (slice(0, 8), slice(8, 16)):
        assert torch.allclose(quarter[:, :, half], digits[:, :, half].rot90(1, (1, 2)), atol=1e-12)


def test_the_bias_is_the_last_column_of_a_layer():
    net = nn.Sequential(nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    layers = [torch.cat([m.weight, m.bias[:, None]], dim=1) for m in net if isinstance(m, nn.Linear)]
    x = torch.rand(4, 64, generator=derive(0, "x"), dtype=torch.float64)
    assert torch.allclose(clients.forward(layers, x), net(x), atol=1e-12)
    stacked = [torch.stack([W, 2 * W]) for W in layers]
    assert torch.allclose(clients.forward(stacked, x)[0], net(x), atol=1e-12)


def test_the_pretrained_network_reads_slanted_images_and_upright_ones_less_well():
    task = clients.pretrained(0, 1)
    numbers = torch.randint(10, (400,), generator=derive(0, "numbers"))
    x = task.held_out.of(numbers, 1, generator=derive(0, "pictures"))
    slanted, upright = (
        (clients.forward(task.network, own).argmax(dim=1) == numbers).double().mean()
        for own in (clients.slanted(x, clients.SLANT), x)
    )
    assert slanted > 0.85 and slanted > upright  # one in ten by chance


def test_contaminated_clients_have_wrong_answers_off_the_shared_numbers_and_benign_ones_on_them():
    own = federation("permuted_labels")
    moved = own.answers != torch.arange(10)
    on = torch.zeros(10, dtype=torch.bool)
    on[own.shared] = True
    assert int((~own.benign).sum()) == 2
    assert not bool(moved[own.benign][:, ~on].any()) and bool(moved[own.benign][:, on].any())
    assert not bool(moved[~own.benign][:, on].any()) and bool((moved[~own.benign].sum(dim=1) == 4).all())
    assert bool((own.answers.sort(dim=1).values == torch.arange(10)).all())  # permutations


def test_benign_clients_are_the_same_whatever_the_others_do_and_however_many_there_are():
    honest = federation("none")
    for kind in ("permuted_labels", "shuffled_pixels", "backdoor"):
        other = federation(kind)
        assert torch.equal(other.pictures[other.benign], honest.pictures[other.benign])
        assert torch.equal(other.labels[other.benign], honest.labels[other.benign])
    assert torch.equal(federation("none", clients=9).pictures[:8], honest.pictures)


def test_shuffled_pixels_are_one_order_a_client_and_labels_stay_right():
    honest, own = federation("none"), federation("shuffled_pixels")
    assert torch.equal(own.labels, honest.labels)
    bad = ~own.benign
    before, after = honest.pictures[bad], own.pictures[bad]
    assert not torch.equal(before, after)
    columns = [(x.T.tolist(), y.T.tolist()) for x, y in zip(before, after, strict=True)]
    assert all(sorted(x) == sorted(y) for x, y in columns)


def test_a_backdoor_is_a_patch_on_half_of_the_pictures_and_one_label():
    honest, own = federation("none"), federation("backdoor")
    bad = ~own.benign
    half = own.labels.shape[1] // 2
    assert bool((own.labels[bad][:, :half] == own.target).all())
    assert torch.equal(own.labels[bad][:, half:], honest.labels[bad][:, half:])
    patched = own.pictures[bad][:, :half].unflatten(-1, (8, 8))
    assert bool((patched[..., -2:, -2:] == 1).all())
    assert torch.equal(patched[..., :-2, :], honest.pictures[bad][:, :half].unflatten(-1, (8, 8))[..., :-2, :])


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown contamination 'upside_down'; known: none, permuted_labels"):
        federation("upside_down")


@pytest.mark.parametrize("rank", [None, 3])
def test_training_all_clients_at_once_is_training_each_by_itself(monkeypatch, rank):
    monkeypatch.setattr(clients, "STEPS", 10)
    own = federation("permuted_labels")
    together = study.as_dense(clients.train_clients(own, clients.LAYERS, rank=rank, seed=0))
    k = 5
    rate = clients.RATES["full matrix" if rank is None else "LoRA"]
    parts = {}
    for name, W in zip(clients.LAYERS, own.task.network, strict=True):
        A = torch.randn(rank or 1, W.shape[1], generator=derive(0, "digits", "A", name), dtype=torch.float64)
        full = torch.zeros_like(W).requires_grad_()
        pair = [torch.zeros(W.shape[0], rank or 1, dtype=torch.float64), A / W.shape[1] ** 0.5]
        parts[name] = [full] if rank is None else [part.requires_grad_() for part in pair]
    optimiser = torch.optim.SGD([part for pair in parts.values() for part in pair], lr=rate, momentum=clients.MOMENTUM)
    product = {True: lambda pair: pair[0], False: lambda pair: pair[0] @ pair[1]}[rank is None]
    for _ in range(10):
        layers = [W + product(parts[name]) for name, W in zip(clients.LAYERS, own.task.network, strict=True)]
        optimiser.zero_grad()
        F.cross_entropy(clients.forward(layers, own.pictures[k]), own.labels[k]).backward()
        optimiser.step()
    for name, pair in parts.items():  # the same arithmetic in another order, ten steps of float64
        assert torch.allclose(together[name][k], product(pair), atol=1e-10)


def test_adapters_are_factors_of_the_rank_and_only_the_named_layers_move():
    own = clients.train_clients(federation(), ("output",), rank=3, seed=0)
    assert list(own) == ["output"]
    assert all(isinstance(update, LowRank) and update.rank == 3 for update in own["output"])


def test_updates_of_an_output_layer_have_one_direction_less_than_outputs():
    """Softmax gradients sum to zero over the classes; in float64 the sum is rounding, 100 steps of 1e-16."""
    (X,) = clients.train_clients(federation(), ("output",), seed=0).values()
    assert X.abs().max() > 1e-2 and X.sum(dim=1).abs().max() < 1e-12


def test_the_shared_subspace_of_the_output_layer_is_that_of_the_permuted_numbers():
    """sin-theta with the span of e_s - e_s' is far below that of random frames, which for 4 of 100 is near 1."""
    own = clients.make_federation(0, "none", clients=14, contaminated=0, examples=100)
    (X,) = clients.train_clients(own, ("output",), seed=0).values()
    own_basis = torch.linalg.svd(torch.cat(list(X - X.mean(dim=0)), dim=1), full_matrices=False).U[:, :4]
    rows = torch.eye(100, dtype=torch.float64)[own.shared]
    true_basis = torch.linalg.svd(rows - rows.mean(dim=0)).Vh[:4].T
    assert sin_theta(own_basis, true_basis) < 0.5


def test_a_cell_finds_the_contaminated_and_judges_every_rule(cell):
    accuracy = pd.DataFrame(cell["accuracy"])
    left_out = {"CAF", "FedAvg, factors", "FedSA"}
    assert set(accuracy.method) == {*AGGREGATORS, "base", "CLAIR", study.TOLD_RANK} - left_out
    (verdict,) = cell["verdicts"]
    assert verdict["exact"] and verdict["refined"] == 1 and verdict["auc"] == 1
    means = accuracy.groupby("method").accuracy.mean()
    assert means["CLAIR"] > means["local"] + 0.03 and means["CLAIR"] > means["FedAvg, benign only"] + 0.03
    assert accuracy.groupby("method").on_shared.mean()["FedAvg"] < 0.2  # nobody's permutation is everybody's
    (layer,) = cell["layers"]
    assert layer["layer"] == "output" and layer["shared_structure"] > 0.3
    angles = pd.DataFrame(cell["angles"]).query("angle == 1").set_index("pair").degrees
    assert angles["benign, benign"] < angles["benign, contaminated"] < angles["random"]


def test_a_rule_that_gives_everybody_the_same_is_run_once_with_the_same_answer():
    own = federation()
    test = clients.examination(own, 50, seed=0)
    updates = {"output": torch.randn(1, 10, 33, generator=derive(0, "u"), dtype=torch.float64).expand(8, -1, -1)}
    once = study.predictions_of("FedAvg", own, updates, test.pictures)
    each = study.predictions_of("local", own, updates, test.pictures)
    assert once.shape == (8, 50) and torch.equal(once, each)


def test_backdoor_success_is_counted_where_the_answer_is_wrong():
    own = federation("backdoor")
    always = torch.zeros(8, 10, 33, dtype=torch.float64)
    always[:, own.target, -1] = 1e6  # whatever the picture, the backdoor's answer
    never = {"output": -always}
    rows = pd.DataFrame(study.backdoor_rows(own, {"local": {"output": always}, "CLAIR": never}, seed=0))
    success = rows.groupby("method").success
    assert success.min()["local"] == 1 and success.max()["CLAIR"] == 0
    assert (rows.method == "contaminated, own update").sum() == 2


def test_the_numbers_that_claims_rest_on_come_from_the_worst_cell():
    verdicts = pd.DataFrame({"setting": list("aaaabbbb"), "exact": [True] * 4 + [True, True, False, True]})
    rate, (low, high) = study.worst_rate(verdicts)
    assert rate == 0.75 and low < 0.75 < high
    rows = [
        {**study.MAIN, "kind": kind, "draw": str(d), "method": method, "value": gain * (method == "CLAIR") + 0.01 * d}
        for kind, gain in (("permuted_labels", 0.2), ("shuffled_pixels", -0.1))
        for d in range(3)
        for method in ("local", "CLAIR")
    ]
    gain, (low, high) = study.least_gain(pd.DataFrame(rows))
    assert gain == pytest.approx(-0.1) and low == pytest.approx(-0.1) and high == pytest.approx(-0.1)
    layers = pd.DataFrame(
        [
            {"setting": study.DEEP, "seed": s, "layer": layer, "shared_structure": x + 0.01 * s}
            for s in range(2)
            for layer, x in zip(clients.LAYERS, (0.1, 0.5, 0.4), strict=True)
        ]
    )
    fall, _ = study.fall_of_structure(layers)
    assert fall == pytest.approx(-0.1)


def test_tables_and_figures_are_made_of_what_cells_return(cell):
    point = {**study.MAIN, "clients": 20, "seed": 0}
    tables = {name: pd.DataFrame([{**point, **row} for row in rows]) for name, rows in cell.items()}
    draws = common_tables.draws(tables["accuracy"], study.CELL, over="client")
    stress = common_tables.stress_table(draws, study.CELL)
    assert list(study.by_setting(stress).kind.unique()) == ["output layer"]
    structure = study.shared_by_layer(tables["layers"])
    figure = digits_plots.layers(structure, tables["angles"], tables["spectrum"])
    assert "output: shared structure" in figure.axes[0].get_title(loc="left")
    lines = digits_plots.along_examples(stress).axes[0].get_legend_handles_labels()[1]
    assert lines == list(digits_plots.LINES)
    shown = study.example_pictures(0, count=2)
    assert len(digits_plots.pictures(shown).axes) == 2 * len(shown)
    assert shown["clients"].shape == (2, 8, 16)
