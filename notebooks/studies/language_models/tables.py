"""Tables of the language study, and what a GPU would take for the models of a hub."""

from __future__ import annotations

import pandas as pd

from studies.common.intervals import mean_interval
from studies.common.rules import TOLD_NOTHING
from studies.common.tables import draws, stress_table
from studies.language_models.labels import LEFT_OUT, Sizes

BY = ["setting", "kind"]  # what names a cell
RULES_TOLD_NOTHING = [name for name in TOLD_NOTHING if name not in LEFT_OUT]
PROPER = "not shuffled"  # contaminated clients of responses, had they been honest
MEASURES = {"loss": "loss per token", "predicted": "tokens predicted"}  # of responses
HUB = {
    "SmolLM2-135M": (134.5e6, 49152, 576),
    "SmolLM2-360M": (361.8e6, 49152, 960),
    "Qwen2.5-0.5B": (494.0e6, 151936, 896),
}
"""Parameters, vocabulary and hidden size, from the models' cards."""
GPUS = {"T4": (8.1, 16), "A100": (19.5, 40)}
"""Peak float32 TFLOP/s and memory in GB, from NVIDIA's data sheets."""
REACHED = 0.4  # of the peak, a guess
TRAINED = 2  # times that every honest client is trained: on all examples, and with early stopping


def response_table(responses: pd.DataFrame, over: str = "seed") -> pd.DataFrame:
    """A row per setting, measure and method: `stress_table`'s columns, and ``worst``, the worst benign client.

    ``gain`` and ``lead`` are positive where a method is better than local, CLAIR better than it, for a loss too.
    ``worst``: mean over seeds.
    """
    tables = []
    for column, words in MEASURES.items():
        sign = -1 if column == "loss" else 1
        signed = responses.assign(**{column: sign * responses[column]})
        table = stress_table(draws(signed, BY, over, column), BY)
        if sign < 0:
            table = table.assign(value=-table.value, low=-table.high, high=-table.low)
        each = signed.groupby([*BY, "seed", "method"], sort=False)[column].min()
        worst = sign * each.groupby(level=[*BY, "method"], sort=False).mean().rename("worst")
        tables.append(table.merge(worst.reset_index(), on=[*BY, "method"]).assign(measure=words))
    return pd.concat(tables, ignore_index=True)


def response_lessons(responses: pd.DataFrame, contaminated: pd.DataFrame, over: str = "seed") -> pd.DataFrame:
    """How far its own adapter lowers a client's loss on proper pairs, below the base's.

    A row per setting and kind of clients, benign, contaminated, and the contaminated had they not shuffled: mean with
    its 95 % t interval over `draws`.
    """
    rows = []
    for who, table in {"benign": responses, "contaminated": contaminated}.items():
        for setting, rows_of in draws(table, BY, over, "loss").groupby("setting", sort=False):
            wide = rows_of.pivot(index="draw", columns="method", values="value")
            for method in [name for name in ("local", PROPER) if name in wide]:
                mean, low, high = mean_interval(wide["base"] - wide[method])
                clients = who if method == "local" else f"{who}, {method}"
                rows.append({"setting": setting, "clients": clients, "gain": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def response_verdicts(verdicts: pd.DataFrame) -> pd.DataFrame:
    """CLAIR's verdict by setting: contaminated clients missed, benign ones flagged, and more, means over seeds."""
    columns = ["missed", "false_alarms", "exact", "auc", "refined"]
    return verdicts.groupby(BY, sort=False)[columns].agg(lambda own: own.astype(float).mean()).reset_index()


def structure_table(structure: pd.DataFrame) -> pd.DataFrame:
    """Shared structure by setting, kind and module: mean over seeds with its 95 % t interval, median rank, refined."""
    rows = []
    for (setting, kind, module), table in structure.groupby([*BY, "module"], sort=False):
        mean, low, high = mean_interval(table.shared_structure)
        row = {"setting": setting, "kind": kind, "module": module, "shared_structure": mean, "low": low, "high": high}
        rows.append(row | {"rank": table["rank"].median(), "refined": table.refined.mean()})
    return pd.DataFrame(rows)


def drop_after(spectrum: pd.DataFrame, rank: int) -> pd.DataFrame:
    """Singular value number rank + 1 over number rank, geometric mean over seeds, beside the largest other such ratio.

    By setting, kind and module; ``largest_drop``: share of seeds in which the ratio is the smallest of the first ones.
    """
    wide = spectrum.pivot(index=[*BY, "module", "seed"], columns="direction", values="value")
    ratios = (wide.shift(-1, axis=1) / wide).iloc[:, :-1]
    largest = ratios.loc[:, : 2 * rank].idxmin(axis=1) == rank
    table = pd.DataFrame({"ratio": ratios[rank], "largest_drop": largest.astype(float)})
    return table.groupby(level=[*BY, "module"], sort=False).mean().reset_index()


def gpu_table(sizes: Sizes, length: int, seeds: int, kinds: int, test: int = 120) -> pd.DataFrame:
    """Estimated minutes and GB of the hub's models, from the arithmetic below; nothing of it was measured.

    With one layer adapted at one position a text, nearly all work is the frozen part's one forward pass over every
    text: 2 N operations a token, N parameters without the embedding. Memory: float32 weights, and per label of a
    step's group three times its logits (themselves, their softmax, their gradient), 2048 labels at most.
    """
    rows = []
    texts = TRAINED * (sizes.clients - sizes.contaminated) + kinds * sizes.contaminated
    tokens = seeds * length * (texts * sizes.examples + kinds * test)
    for model, (parameters, words, hidden) in HUB.items():
        flops = 2 * (parameters - words * hidden) * tokens
        labels = min(2048, sizes.clients * sizes.examples)
        gigabytes = (4 * parameters + 3 * 4 * labels * words) / 1e9
        for gpu, (peak, room) in GPUS.items():
            row = {"model": model, "gpu": gpu, "minutes": flops / (REACHED * peak * 1e12) / 60, "GB": gigabytes}
            rows.append(row | {"fits": gigabytes < 0.9 * room})
    return pd.DataFrame(rows)


def writers_against_readers(structure: pd.DataFrame, readers: tuple[str, ...]) -> tuple[float, float, float]:
    """Shared structure of the modules that write to the residual stream, less that of those that read it.

    Mean over modules of a seed; the mean difference over seeds with its 95 % t interval.
    """
    reads = structure.module.str.endswith(readers)
    means = structure.assign(reads=reads).groupby(["seed", "reads"]).shared_structure.mean().unstack("reads")
    return mean_interval(means[False] - means[True])
