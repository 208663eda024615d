#!/usr/bin/env bash
# peft's weighted merges with weights that sum to 1 are no average: n equal adapters come out n times as large, or 1/n
#
# Versions:  peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11. Run on 2026-12-01.
#
# Behaviour: `add_weighted_adapter` over n copies of one adapter, weights 1/n, should give that adapter back. combination_type "cat"
#            and "svd" do. "linear", "dare_linear" and "magnitude_prune" give n times it. "ties" and "ties_svd" give 1/n of it.
#            No warning.
#
# Why:       "linear" adds the factors, not the updates: (sum sqrt(w) B)(sum sqrt(w) A). For unrelated adapters the cross terms are
#            noise; for equal ones each factor is sqrt(n) times the adapter's and the update n times. The ties family divides by the
#            number of clients that agree in sign, so weights that sum to 1 divide a second time.
#
# Surprise:  The documentation calls "linear" a rough approximation, which sounds like noise around the right size. The error is a
#            factor, it grows with the number of clients and is worst where they agree: in federated training, from one start.
#            And the right scale of `weights` depends on combination_type: 1/n for cat and svd, 1 for the ties family,
#            1/n**2 for linear where clients agree.
#
# Instead:   "cat" (exact, rank n*r) or "svd" with svd_rank=n*r (exact, slow). Not with use_rslora adapters, which this version
#            merges sqrt(rank) too large.
#
# Output seen:
#
#   the average of n equal adapters, weights 1/n each, as a multiple of that adapter
#   combination_type      n=1     n=2     n=4    n=10
#   cat                  1.00    1.00    1.00    1.00
#   svd                  1.00    1.00    1.00    1.00
#   linear               1.00    2.00    4.00   10.00
#   magnitude_prune      1.00    2.00    4.00   10.00
#   dare_linear          1.00    2.00    4.00   10.00
#   ties                 1.00    0.50    0.25    0.10
#   ties_svd             1.00    0.50    0.25    0.10
#   as described: the factor is n, 1/n or 1 by combination_type

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 2>"$work/pip.log" || { cat "$work/pip.log"; exit 2; }
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def merged_over_client(clients, combination_type, **options):
    """Merge `clients` copies of one adapter with weights that sum to 1: the merged update as a multiple of the client's."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], r=4, lora_alpha=8, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), config, adapter_name="client0")
    layer = model.base_model.model[0]
    names = [f"client{i}" for i in range(clients)]
    for name in names[1:]:
        model.add_adapter(name, config)
        for factor in (layer.lora_A, layer.lora_B):
            factor[name].weight.data.copy_(factor["client0"].weight.data)
    model.add_weighted_adapter(names, [1 / clients] * clients, "merged", combination_type=combination_type, **options)
    merged, client = layer.get_delta_weight("merged"), layer.get_delta_weight("client0")
    factor = (merged * client).sum() / (client * client).sum()
    assert torch.allclose(merged, factor * client, atol=1e-5)  # only the size differs
    return factor.item()


dense = {"density": 1.0}  # prune nothing: what is seen is the merge alone
table = {
    "cat": {}, "svd": {}, "linear": {}, "magnitude_prune": dense, "dare_linear": dense, "ties": dense, "ties_svd": dense,
}
sizes = (1, 2, 4, 10)
print("the average of n equal adapters, weights 1/n each, as a multiple of that adapter")
print(f"{'combination_type':<17}" + "".join(f"{f'n={n}':>8}" for n in sizes))
as_described = True
for name, options in table.items():
    factors = [merged_over_client(n, name, **options) for n in sizes]
    print(f"{name:<17}" + "".join(f"{factor:8.2f}" for factor in factors))
    power = 0 if name in ("cat", "svd") else -1 if name.startswith("ties") else 1
    as_described &= all(abs(factor / n**power - 1) < 1e-3 for factor, n in zip(factors, sizes))
print("as described: the factor is n, 1/n or 1 by combination_type" if as_described else "changed")
sys.exit(0 if as_described else 1)
PY
