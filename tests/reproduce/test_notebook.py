"""What a notebook keeps: figures, tables, records and claims."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from clairlib.reproduce.claims import LedgerError  # noqa: E402
from clairlib.reproduce.notebook import ClaimFailed, Notebook, start  # noqa: E402

CLAIM = """[[claim]]
id = "C1.a"
statement = "error < bound"
source = "ours"
notebook = "out"
check = "value < 0.2 and low > 0"
smoke = "value < 0.2"
"""


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Notebook:
    (tmp_path / "claims.toml").write_text(CLAIM)
    monkeypatch.chdir(tmp_path)
    return start(profile="smoke", seed=3, output=tmp_path / "new/out")


def log(notebook: Notebook) -> dict:
    return json.loads((notebook.output / "claims.json").read_text())


def line() -> plt.Figure:
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    return figure


def test_start_says_and_keeps_provenance(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "claims.toml").write_text(CLAIM)
    notebook = start(profile="paper", seed=3, output="out")
    assert notebook.output == tmp_path / "out"
    said = capsys.readouterr().out
    assert "profile paper" in said and "seed 3" in said and torch.__version__ in said
    assert log(notebook)["provenance"]["seed"] == 3


def test_start_forgets_the_claims_of_an_earlier_run(notebook):
    notebook.check("C1.a", 0.1)
    again = start(profile="smoke", seed=3, output=notebook.output)
    assert log(again)["claims"] == {}


def test_a_figure_and_its_table_are_kept_the_same_bytes_every_time(notebook):
    table = pd.DataFrame({"x": [1, 2], "y": [0.5, 0.25]})
    kept = []
    for _ in range(2):
        figure = line()
        notebook.show_and_save("line", figure, table)
        assert not plt.fignum_exists(figure.number), "or the inline backend shows it twice"
        kept.append({p.name: p.read_bytes() for p in notebook.output.iterdir() if p.stem == "line"})
    assert sorted(kept[0]) == ["line.csv", "line.pdf", "line.png"]
    assert kept[0] == kept[1]
    pd.testing.assert_frame_equal(pd.read_csv(notebook.output / "line.csv"), table)
    assert not list(notebook.output.glob(".*partial"))


def test_a_named_index_is_written_a_plain_one_is_not(notebook):
    notebook.show_and_save("rows", table=pd.DataFrame({"y": [1]}, index=pd.Index(["clair"], name="method")))
    assert (notebook.output / "rows.csv").read_text() == "method,y\nclair,1\n"


def test_a_failed_write_leaves_the_earlier_file(notebook, monkeypatch):
    notebook.show_and_save("line", line())
    before = (notebook.output / "line.pdf").read_bytes()

    def break_off(self, path, **_):
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(plt.Figure, "savefig", break_off)
    with pytest.raises(OSError, match="disk full"):
        notebook.show_and_save("line", line())
    assert (notebook.output / "line.pdf").read_bytes() == before


@pytest.mark.parametrize(("name", "options"), [("a/b", {"table": pd.DataFrame()}), ("nothing", {})])
def test_nothing_to_show_or_a_name_with_folders_is_refused(notebook, name, options):
    with pytest.raises(ValueError, match=name):
        notebook.show_and_save(name, **options)


def test_records_and_claims_take_tensors_and_arrays(notebook, capsys):
    notebook.record("gain", torch.tensor(0.5), unit="share")
    notebook.record("scores", np.arange(3.0))
    notebook.check("C1.a", np.float64(0.125), (torch.tensor(-1.0), np.float64(0.5)))
    assert log(notebook)["records"]["gain"] == {"value": 0.5, "unit": "share"}
    assert log(notebook)["records"]["scores"] == {"value": [0.0, 1.0, 2.0]}
    expected = {"holds": True, "statement": "error < bound", "value": 0.125, "interval": [-1.0, 0.5]}
    assert log(notebook)["claims"] == {"C1.a": {**expected, "threshold": "value < 0.2"}}
    said = capsys.readouterr().out
    assert "C1.a holds: error < bound (measured 0.125 [-1, 0.5], check value < 0.2)" in said


def test_an_interval_without_ends_is_none(notebook):
    notebook.check("C1.a", 0.1, (float("nan"), float("nan")))
    assert log(notebook)["claims"]["C1.a"]["interval"] is None


def test_a_claim_that_does_not_hold_raises_one_line_and_is_kept(notebook):
    with pytest.raises(ClaimFailed) as caught:
        notebook.check("C1.a", 0.3)
    assert str(caught.value) == "C1.a does not hold: error < bound (measured 0.3, check value < 0.2)"
    assert log(notebook)["claims"]["C1.a"]["holds"] is False


def test_the_full_check_decides_at_other_profiles(notebook):
    with pytest.raises(ClaimFailed, match="low > 0"):
        replace(notebook, profile="paper").check("C1.a", 0.1, (-0.1, 0.3))


def test_a_claim_that_is_not_in_the_ledger_is_refused(notebook):
    with pytest.raises(LedgerError, match="C9.z"):
        notebook.check("C9.z", 1.0)
