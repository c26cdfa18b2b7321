"""The benchmarks run, and print and draw what they measured; how fast is not tested."""

import argparse
import io
import json
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
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


@pytest.mark.slow
def test_steps(monkeypatch, capsys):
    benchmark = runpy.run_path(str(FOLDER / "steps.py"))
    monkeypatch.setitem(benchmark["main"].__globals__, "BATCH", 4)
    monkeypatch.setattr(sys, "argv", ["steps.py", "--quick", "--rounds", "2"])
    benchmark["main"]()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    found = {row[0].strip(): float(row[2]) for row in rows[2:] if len(row) == 3}
    assert found["KD"] == 1 and {"AT", "PLD", "MLKD", "CRD", "CRD, gathered"} < found.keys()
    assert all(float(number) > 0 for row in rows[-3:] for number in row[1:])


def test_the_two_forms_of_crd_have_one_value():
    benchmark = runpy.run_path(str(FOLDER / "steps.py"))
    index = torch.tensor([3, 19, 25])
    values = []
    for kind in ("Gathered", "CRDLoss"):
        torch.manual_seed(0)
        pooled = benchmark["Features"]([], torch.randn(3, 6))
        loss = benchmark[kind](negatives=8)
        loss.connect(pooled, pooled)
        loss.connect_samples(torch.arange(30) % 4)
        torch.manual_seed(1)
        others, chosen = benchmark["independent"](loss, index)
        assert (chosen.sum(1) == 8).all()
        assert (loss.labels[others] != loss.labels[index][:, None])[chosen].all()
        loss.draw = lambda own, given=(others, chosen): given
        loss.negatives_of = others.expand(3, -1)[chosen].view(3, 8)
        values += [loss.distance(pooled, pooled, index).detach() for _ in range(2)]
    torch.testing.assert_close(values[:2], values[2:])


def test_the_straightforward_forms_are_pld():
    benchmark = runpy.run_path(str(FOLDER / "losses.py"))
    args = benchmark["inputs"](4, 30, "cpu")
    expected = benchmark["losses"].PLDLoss()(*args)
    for form in ("loop", "logcumsumexp"):
        assert abs(benchmark[form](*args) - expected) < 1e-5 * expected


def test_coverage(monkeypatch, capsys):
    benchmark = runpy.run_path(str(FOLDER / "coverage.py"))
    benchmark["SEEDS"][:] = [3]
    benchmark["SPREADS"][:] = [(1,), (1, 2)]
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--repeats", "50"])
    benchmark["main"]()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[:7]] == [
        "Scores", *(kind for kind in ("normal", "skewed", "tied") for _ in range(2))
    ]  # fmt: skip
    leaves_out, rng = benchmark["bootstrap_leaves_out"], benchmark["np"].random.default_rng(0)
    assert leaves_out(rng.normal(1, 0.1, (2, 6)), rng)
    assert not leaves_out(rng.normal(0, 1, (2, 6)) * 0 + [-1, 1] * 3, rng)


def test_sequential(monkeypatch, capsys):
    benchmark = runpy.run_path(str(FOLDER / "sequential.py"))
    monkeypatch.setattr(sys, "argv", ["sequential.py", "--repeats", "2000"])
    benchmark["main"]()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 3, 4 ")]
    ours, all_spent, naive = (float(part) for part in lines[0].split("|")[3:6])
    assert 3.5 < ours < all_spent < naive < 10
    runs = benchmark["np"].array([[1.0, 2.0, 4.0, 3.0]])  # scipy.stats.ttest_1samp
    assert benchmark["p_values"](runs, (3, 4))[0] == pytest.approx([0.118, 0.0304], abs=1e-3)


@pytest.mark.slow
def test_grid_counts_the_teachers_images(tmp_path, local_ray):
    sys.path.insert(0, str(FOLDER))
    try:
        import grid
    finally:
        sys.path.pop(0)
    arguments = argparse.Namespace(students=3, images=64, epochs=1, rounds=1)
    row = grid.measure("demo", tmp_path, arguments)  # 10 epochs of 200 images, 360 to validate
    assert row["live_images"] == 3 * (10 * 200 + 360)
    assert row["bank_images"] == 10 * 200 + 360
    assert row["faster"] == row["live_seconds"] / row["bank_seconds"] > 0
    assert 0 < row["pld_not_student_percent"] < 100 and row["pld_over_ce"] > 0
    console = Console(width=120, file=io.StringIO())
    grid.show(pd.DataFrame([row]), console)
    assert "| resnet20 → resnet8" in console.file.getvalue()


@pytest.mark.slow
def test_gpu(tmp_path, monkeypatch, capsys):
    benchmark = runpy.run_path(str(FOLDER / "gpu.py"))
    parts = ["steps", "losses", "resume"]  # test_workers.py runs two processes
    arguments = ["gpu.py", "--quick", "--out", str(tmp_path), "--parts", *parts]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark["main"]()
    found = json.loads((tmp_path / "gpu.json").read_text())
    (resumed,) = found["resume"]
    assert resumed["same bits after resume"] and resumed["same bits one by one"]
    assert [row["loss"] for row in found["losses"]] == [
        "copy", "ce", "kd", "dist", "dkd", "pld", "pld, order given"
    ]  # fmt: skip
    (step,) = found["steps"]
    ours, taught = step["CE graph (ms)"], step["KD graph (ms)"]
    assert step["not student (%)"] == pytest.approx(100 * (1 - ours / taught))
    assert step["CE images/s"] == pytest.approx(1000 * 16 / ours)
    assert "times the bytes" in capsys.readouterr().out
