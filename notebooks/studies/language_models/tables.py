"""Tables of the language study, and an estimate of GPU time and memory for the models of the hub."""

from __future__ import annotations

import pandas as pd

from studies.common.intervals import mean_interval
from studies.common.rules import TOLD_NOTHING
from studies.common.tables import draws, stress_table
from studies.language_models.labels import LEFT_OUT, Sizes

BY = ["setting", "kind"]  # columns that identify a cell
RULES_TOLD_NOTHING = [name for name in TOLD_NOTHING if name not in LEFT_OUT]
PROPER = "not shuffled"  # contaminated clients trained on unshuffled responses
MEASURES = {"loss": "loss per token", "predicted": "tokens predicted"}  # measures of responses
HUB = {
    "SmolLM2-135M": (134.5e6, 49152, 576),
    "SmolLM2-360M": (361.8e6, 49152, 960),
    "Qwen2.5-0.5B": (494.0e6, 151936, 896),
}
"""Parameters, vocabulary size and hidden size, from the models' cards."""
GPUS = {"T4": (8.1, 16), "A100": (19.5, 40)}
"""Peak float32 TFLOP/s and memory in GB, from NVIDIA's data sheets."""
REACHED = 0.4  # fraction of the peak that is reached; a guess
TRAINED = 2  # trainings per honest client: on all examples, and with early stopping


def response_table(responses: pd.DataFrame, over: str = "seed") -> pd.DataFrame:
    """Summarise each setting, measure and method with `stress_table`'s columns and the worst benign client.

    ``gain`` is positive where the method is better than local, and ``lead`` is positive where CLAIR is better than the
    method; this holds for losses too. ``worst`` is averaged over seeds.
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
    """Measure how far a client's own adapter lowers its loss on unshuffled pairs, compared with the base.

    There is one row per setting and group of clients: benign, contaminated, and contaminated trained without shuffling.
    Each row has the mean with its 95 % t interval over draws.
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
    """Average CLAIR's verdicts over seeds by setting: contaminated clients missed, benign clients flagged, and more."""
    columns = ["missed", "false_alarms", "exact", "auc", "refined"]
    return verdicts.groupby(BY, sort=False)[columns].agg(lambda own: own.astype(float).mean()).reset_index()


def structure_table(structure: pd.DataFrame) -> pd.DataFrame:
    """Average shared structure over seeds by setting, kind and module (95 % t interval).

    Further columns: median rank, and the fraction of seeds in which the module is refined.
    """
    rows = []
    for (setting, kind, module), table in structure.groupby([*BY, "module"], sort=False):
        mean, low, high = mean_interval(table.shared_structure)
        row = {"setting": setting, "kind": kind, "module": module, "shared_structure": mean, "low": low, "high": high}
        rows.append(row | {"rank": table["rank"].median(), "refined": table.refined.mean()})
    return pd.DataFrame(rows)


def drop_after(spectrum: pd.DataFrame, rank: int) -> pd.DataFrame:
    """Average over seeds the ratio of singular value number rank + 1 to number rank, by setting, kind and module.

    ``largest_drop``: fraction of seeds in which this ratio is the smallest among the first 2 * rank ratios.
    """
    wide = spectrum.pivot(index=[*BY, "module", "seed"], columns="direction", values="value")
    ratios = (wide.shift(-1, axis=1) / wide).iloc[:, :-1]
    largest = ratios.loc[:, : 2 * rank].idxmin(axis=1) == rank
    table = pd.DataFrame({"ratio": ratios[rank], "largest_drop": largest.astype(float)})
    return table.groupby(level=[*BY, "module"], sort=False).mean().reset_index()


def gpu_table(sizes: Sizes, length: int, seeds: int, kinds: int, test: int = 120) -> pd.DataFrame:
    """Estimate minutes and GB for the models of the hub by the arithmetic below; nothing here is measured.

    With one layer adapted at one position per text, nearly all work is one forward pass of the frozen part over every
    text: 2 N operations per token, with N parameters without the embedding. Memory holds float32 weights and, for each
    label of a step's group, three arrays of its logits (logits, softmax, gradient), for at most 2048 labels.
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
    """Compare the shared structure of modules that write to the residual stream with that of modules that read it.

    The difference is taken between means over modules of a seed; the result is its mean over seeds with its 95 % t
    interval.
    """
    reads = structure.module.str.endswith(readers)
    means = structure.assign(reads=reads).groupby(["seed", "reads"]).shared_structure.mean().unstack("reads")
    return mean_interval(means[False] - means[True])
