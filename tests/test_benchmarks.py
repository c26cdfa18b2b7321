"""The benchmarks run, and print and draw what they measured; how fast is not tested."""

import runpy
import sys
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_losses(tmp_path, monkeypatch, capsys):
    benchmark = runpy.run_path(str(FOLDER / "losses.py"))
    benchmark["SIZES"][:] = [(4, 10), (2, 300)]
    monkeypatch.setattr(sys, "argv", ["losses.py", "--rounds", "1", "--out", str(tmp_path)])
    benchmark["main"]()
    results = pd.read_csv(tmp_path / "losses.csv")
    assert (results[results["loss"] == "KD"]["ratio_to_kd"] == 1).all()
    assert set(results["classes"]) == {10, 300} and (results["milliseconds"] > 0).all()
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    assert "PLD by a loop" in capsys.readouterr().out


def test_the_straightforward_forms_are_pld():
    benchmark = runpy.run_path(str(FOLDER / "losses.py"))
    args = benchmark["inputs"](4, 30, "cpu")
    expected = benchmark["losses"].PLDLoss()(*args)
    for form in ("loop", "logcumsumexp"):
        assert abs(benchmark[form](*args) - expected) < 1e-5 * expected
