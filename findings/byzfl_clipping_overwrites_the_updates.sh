#!/usr/bin/env bash
# byzfl's Clipping and ARC overwrite the updates that they are given; whether they do depends on container and dtype
#
# Versions:  byzfl 0.0.11, torch 2.13.0 (CPU), numpy 2.4.6, scipy 1.17.1, Python 3.11. Run on 2026-12-01.
#
# Behaviour: `clipped = byzfl.Clipping(c=2.0)(updates)` returns the clipped rows and also writes them into `updates`; so does ARC. It
#            happens for a numpy array and for a float32 tensor, not for a float64 tensor nor for a list of arrays. The other steps
#            tried here (NNM, TrMean, Krum) leave their input as it is.
#
# Why:       Rows are clipped in place. A list is stacked into a new array first, and a tensor goes through `.float()`, which copies
#            only when the dtype changes. So the input survives by accident or not at all.
#
# Surprise:  These are called like functions and return their result, and the documentation shows nothing but that result. Compare
#            aggregators on one array and every one after the first Clipping or ARC gets data without the outlier: it looks robust.
#            Score clients after the aggregation and the outlier has the norm of a benign one. Change the dtype and it goes away.
#
# Instead:   Hand over a copy: `byzfl.ARC(f=2)(updates.copy())`, or `.clone()`.
#
# Output seen:
#
#   norm of the outlier in the caller's own data, before and after step(data)
#   numpy array           Clipping(c=2.0)   36.27   2.00   overwritten
#   numpy array           ARC(f=2)          36.27   1.58   overwritten
#   numpy array           NNM(f=2)          36.27  36.27
#   numpy array           TrMean(f=2)       36.27  36.27
#   numpy array           Krum(f=2)         36.27  36.27
#   torch tensor float32  Clipping(c=2.0)   36.27   2.00   overwritten
#   torch tensor float32  ARC(f=2)          36.27   1.58   overwritten
#   torch tensor float32  NNM(f=2)          36.27  36.27
#   torch tensor float32  TrMean(f=2)       36.27  36.27
#   torch tensor float32  Krum(f=2)         36.27  36.27
#   torch tensor float64  Clipping(c=2.0)   36.27  36.27
#   torch tensor float64  ARC(f=2)          36.27  36.27
#   torch tensor float64  NNM(f=2)          36.27  36.27
#   torch tensor float64  TrMean(f=2)       36.27  36.27
#   torch tensor float64  Krum(f=2)         36.27  36.27
#   list of arrays        Clipping(c=2.0)   36.27  36.27
#   list of arrays        ARC(f=2)          36.27  36.27
#   list of arrays        NNM(f=2)          36.27  36.27
#   list of arrays        TrMean(f=2)       36.27  36.27
#   list of arrays        Krum(f=2)         36.27  36.27
#   Average()(data), then again after a run with Clipping between: 3.789 0.489
#   as described: Clipping and ARC overwrite what they are given

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
{
  "$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 scipy==1.17.1 matplotlib==3.11.2
  "$work/venv/bin/pip" install -q --no-deps byzfl==0.0.11
} 2>"$work/pip.log" || { cat "$work/pip.log"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import sys
from unittest.mock import MagicMock

# `import byzfl` also imports its benchmark, which wants these two. No aggregator uses them, and they are large.
for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "seaborn"):
    sys.modules[name] = MagicMock()

import byzfl
import numpy as np
import torch

updates = np.random.default_rng(0).normal(size=(10, 4))  # ten clients' updates, one a row
updates[9] *= 20  # the last is an outlier
kinds = {
    "numpy array": lambda: updates.copy(),
    "torch tensor float32": lambda: torch.tensor(updates, dtype=torch.float32),
    "torch tensor float64": lambda: torch.tensor(updates),
    "list of arrays": lambda: list(updates.copy()),
}
steps = {
    "Clipping(c=2.0)": lambda: byzfl.Clipping(c=2.0),
    "ARC(f=2)": lambda: byzfl.ARC(f=2),
    "NNM(f=2)": lambda: byzfl.NNM(f=2),
    "TrMean(f=2)": lambda: byzfl.TrMean(f=2),
    "Krum(f=2)": lambda: byzfl.Krum(f=2),
}


def norm_of_last(rows):
    return float(np.linalg.norm(np.asarray(rows[9], dtype=np.float64)))


print("norm of the outlier in the caller's own data, before and after step(data)")
as_described = True
for kind, make in kinds.items():
    for name, step in steps.items():
        data = make()
        before = norm_of_last(data)
        step()(data)
        after = norm_of_last(data)
        print(f"{kind:<21} {name:<16} {before:6.2f} {after:6.2f}{'   overwritten' if after != before else ''}")
        should = name.startswith(("Clipping", "ARC")) and kind in ("numpy array", "torch tensor float32")
        as_described &= (after != before) == should

data = updates.copy()
first = byzfl.Average()(data)
byzfl.Average()(byzfl.Clipping(c=2.0)(data))
second = byzfl.Average()(data)
print("Average()(data), then again after a run with Clipping between:", np.linalg.norm(first).round(3), np.linalg.norm(second).round(3))
as_described &= not np.allclose(first, second)
print("as described: Clipping and ARC overwrite what they are given" if as_described else "changed")
sys.exit(0 if as_described else 1)
PY
