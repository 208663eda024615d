#!/usr/bin/env bash
# flwr's MultiKrum keeps whichever client replied first, the outlier too, when adapters are sent as float16
#
# Versions:  flwr 1.42.0, numpy 2.4.6, Python 3.11. Run on 2026-12-01.
#
# Behaviour: Ten clients send LoRA factors after a short round: a common lora_A that has moved a little, a small lora_B. One client
#            has moved five times as far. As float32, MultiKrum(num_malicious_nodes=1, num_nodes_to_select=1) keeps a benign client.
#            The very same numbers as float16: all distances between clients are 0, and the first reply is kept, whoever it is.
#            No warning, no NaN.
#
# Why:       The distances are |x|^2 + |y|^2 - 2xy in the dtype that was sent. The clients share a start, so |x|^2 (85 here) is the
#            same for all and float16 near 2|x|^2 has steps of 0.125, more than three times the outlier's squared distance. The sort
#            then meets ties only. In float32 the distances turn to noise, some negative, at differences of 3e-4|x|.
#
# Surprise:  float16 holds these clients apart (first row of the output is computed from the float16 numbers), and it is how adapters
#            are commonly kept. The class-based Krum of the same package subtracts first. A robust strategy that has decided nothing
#            looks just like one that has.
#
# Instead:   Send differences from the common start, as float32.
#
# Output seen:
#
#   squared distances          benign to benign   benign to outlier
#   of these float16 numbers            0.00262             0.03411
#   flwr, sent as float32               0.00267             0.03423
#   flwr, sent as float16               0.00000             0.00000
#   clients in order [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]: kept as float16 0 (the outlier), as float32 3
#   clients in order [3, 0, 4, 5, 6, 7, 8, 9, 1, 2]: kept as float16 3, as float32 3
#   clients in order [7, 8, 9, 0, 1, 2, 3, 4, 5, 6]: kept as float16 7, as float32 3
#   as described: in float16 the first reply is kept, the outlier too

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 flwr==1.42.0 2>"$work/pip.log" || { cat "$work/pip.log"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import logging
import sys

import numpy as np
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import MultiKrum
from flwr.serverapp.strategy.multikrum import compute_distances

logging.disable(logging.CRITICAL)
rng = np.random.default_rng(0)
width, rank, layers = 1024, 8, 32
start = [rng.uniform(-1, 1, size=(rank, width)) / np.sqrt(width) for _ in range(layers)]  # peft's lora_A before training


def client(step):
    """float16 factors after a round: entries have moved by about `step` from the common start (lora_B starts at 0)."""
    arrays = {}
    for number, factor in enumerate(start):
        arrays[f"{number}.lora_A"] = (factor + step * rng.normal(size=factor.shape)).astype(np.float16)
        arrays[f"{number}.lora_B"] = (step * rng.normal(size=(width, rank))).astype(np.float16)
    return arrays


def record(arrays, dtype):
    return ArrayRecord({key: Array(value.astype(dtype)) for key, value in arrays.items()})


def picked(order, dtype):
    """Krum's choice by the strategy's own aggregate_train: the name of the one client that it keeps."""
    replies = []
    for place, who in enumerate(order):
        content = RecordDict({
            "arrays": record(clients[who], dtype),
            "metrics": MetricRecord({"num-examples": 1, "client": who}),
        })
        metadata = Metadata(1, f"m{place}", place + 1, 1, f"q{place}", "", 0.0, 1e9, "train")
        replies.append(Message(content=content, metadata=metadata))
    strategy = MultiKrum(num_malicious_nodes=1, num_nodes_to_select=1)
    return int(strategy.aggregate_train(1, replies)[1]["client"])


outlier = 0
clients = [client(2.5e-4)] + [client(5e-5) for _ in range(9)]
flat = np.stack([np.concatenate([a.ravel() for a in c.values()]).astype(np.float64) for c in clients])
print("squared distances          benign to benign   benign to outlier")
exact = [np.sum((flat[1] - flat[2]) ** 2), np.sum((flat[1] - flat[outlier]) ** 2)]
print(f"of these float16 numbers   {exact[0]:16.5f}   {exact[1]:17.5f}")
for dtype in (np.float32, np.float16):
    found = compute_distances([record(c, dtype) for c in (clients[1], clients[2], clients[outlier])])
    print(f"flwr, sent as {dtype.__name__}      {found[0, 1]:16.5f}   {found[0, 2]:17.5f}")

as_described = True
for order in ([0, *range(1, 10)], [3, 0, *range(4, 10), 1, 2], [7, 8, 9, *range(7)]):
    half, single = picked(order, np.float16), picked(order, np.float32)
    print(f"clients in order {order}: kept as float16 {half}{' (the outlier)' if half == outlier else ''}, as float32 {single}")
    as_described &= half == order[0] and single != outlier
print("as described: in float16 the first reply is kept, the outlier too" if as_described else "changed")
sys.exit(0 if as_described else 1)
PY
