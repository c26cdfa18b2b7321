import csv
import math
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from analysis.figures import methods, style
from analysis.landscapes import logits
from analysis.records import frames
from analysis.tables import comparison, comparison_printing
from pld_ray.config.planning import plan
from pld_ray.errors import InputError
from pld_ray.losses import PLDLoss
from pld_ray.store.store import Store

TEXT = """
title: A test
base: {data: digits, student: resnet8, teacher: resnet20, epochs: 2}
grid:
  loss: [ce, {name: kd, temperature: [1, 4]}, pld]
seeds: [0, 1, 2]
"""
TOP1 = {"CE": [80, 82, 84], "KD (τ = 1)": [85, 86, 87], "PLD": [88, 90, 92]}


@pytest.fixture
def results(experiment, tmp_path):
    """A plan and a store with made-up records: CE, one KD and PLD; KD at 4 has none."""
    made, store = plan(experiment(TEXT)), Store(tmp_path / "results")
    frame = frames.frame(made, store)
    for cell, method in zip(made.cells, frame["method"], strict=True):
        if method not in TOP1:
            continue
        top1 = float(TOP1[method][cell.trial.seed])
        metrics = {"top1": top1, "top5": 99.0, "ece": 0.1, "val_loss": 1.0, "train_loss": 1.0}
        if cell.trial.teacher:
            metrics |= {"kl_teacher_student": 0.5, "agreement": 95.0, "teacher_top1": 97.5}
        history = [{"epoch": e, "top1": top1 - 2 + e, "train_loss": 1 / e} for e in (1, 2)]
        store.log(cell.trial, history)
        record = {"metrics": metrics, "seconds": {"seconds": 3.0}, "parameters": 10}
        record["notes"] = ["look here"] if method == "PLD" else []
        if method == "PLD":
            record["seconds"]["teacher_avoided_seconds"] = 2.0
        store.finish(cell.trial, record, {"w": torch.zeros(1)})
    return made, store


def test_comparison_by_hand(results):
    table = comparison.comparison(frames.frame(*results)).set_index("method")
    assert list(table.index) == ["Teacher", "CE", "KD (τ = 1)", "KD (τ = 4)", "PLD"]
    assert table.loc["Teacher", "top1"] == 97.5
    assert table.loc["CE", "top1"] == 82 and table.loc["CE", "top1_std"] == pytest.approx(2)
    assert table.loc["CE", "gain"] == pytest.approx(8)
    assert table.loc["KD (τ = 1)", "gain"] == pytest.approx(4)
    assert math.isnan(table.loc["KD (τ = 4)", "top1"])
    assert math.isnan(table.loc["KD (τ = 4)", "gain"])
    assert table.loc["KD (τ = 4)", "n"] == 0 and table.loc["PLD", "n"] == 3


@pytest.mark.parametrize(
    ("wanted", "name", "gains"),
    [
        ("kd", "KD (τ = 1)", {"CE": 4, "KD (τ = 4)": None, "PLD": -4}),
        ("KD", "KD (τ = 1)", {"CE": 4, "KD (τ = 4)": None, "PLD": -4}),
        ("KD (τ = 1)", "KD (τ = 1)", {"CE": 4, "KD (τ = 4)": None, "PLD": -4}),
        ("ce", "CE", {"KD (τ = 1)": -4, "KD (τ = 4)": None, "PLD": -8}),
    ],
)
def test_any_method_is_the_reference(results, wanted, name, gains, tmp_path):
    made, store = results
    chosen = made.experiment.model_copy(update={"reference": wanted})
    made = replace(made, experiment=chosen)
    frames.check_reference(made)
    frame = frames.frame(made, store)
    table = comparison.comparison(frame)
    assert comparison.reference_name(table) == name
    found = table.set_index("method")["gain"]
    assert math.isnan(found[name])
    assert {key: found[key] for key in gains if gains[key] is not None} == {
        key: value for key, value in gains.items() if value is not None
    }
    against = comparison.against(frame)
    assert set(against["method"]) == {name}
    assert dict(zip(against["against"], against["mean"], strict=True)) == {
        key: value for key, value in gains.items() if value is not None
    }
    assert f"{name} gain" in comparison_printing.printed(table)
    assert f"{name} against" in comparison_printing.printed_against(against)
    said = " ".join(comparison_printing.text(comparison.tables(frame), chosen).split())
    assert f"{name} gain: top-1 of {name} minus top-1 of" in said and "PLD gain" not in said
    names = [
        path.stem
        for path in methods.draw(frame, frames.curves(frames.frame(made, store), store), tmp_path)
    ]
    assert names == ["accuracy", "gains", "curves", "ranks", "profiles"]


def test_without_pld_the_first_method_is_the_reference(experiment, tmp_path):
    made = plan(experiment(TEXT.replace(", pld]", ", dist]")))
    table = comparison.comparison(frames.frame(made, Store(tmp_path / "none")))
    assert comparison.reference_name(table) == "CE"
    assert "CE gain" in comparison_printing.printed(table)
    made = plan(experiment(TEXT.replace("[ce, {name: kd, temperature: [1, 4]}, pld]", "[pld]")))
    frame = frames.frame(made, Store(tmp_path / "none"))
    alone = comparison.comparison(frame)
    assert comparison.reference_name(alone) == ""
    assert not [column for column in comparison_printing.printed(alone) if "gain" in column]
    assert "gain" not in comparison_printing.text(comparison.tables(frame), made.experiment)


def test_methods_have_as_many_digits_as_tell_them_apart(experiment):
    near = "[1, 1.00000001, 1.0000000000000002]"
    made = plan(experiment(TEXT.replace("temperature: [1, 4]", f"temperature: {near}")))
    methods = list(dict.fromkeys(frames.places(made)["method"]))
    assert methods == [
        "CE",
        "KD (τ = 1.0)",
        "KD (τ = 1.00000001)",
        "KD (τ = 1.0000000000000002)",
        "PLD",
    ]


def test_a_reference_that_is_no_method_is_refused(experiment):
    made = plan(experiment(TEXT, "reference=kdd"))
    with pytest.raises(InputError, match="reference is 'kdd': expected a loss or a method .*kd"):
        frames.check_reference(made)


def test_the_ranking_of_the_finished_methods(results):
    table = comparison.ranking(frames.frame(*results))
    assert list(table["method"]) == ["PLD", "KD (τ = 1)", "CE"] and list(table["rank"]) == [1, 2, 3]
    assert table.attrs["blocks"] == 3
    own = comparison.tables(frames.frame(*results), all_pairs_too=True)
    said = " ".join(comparison_printing.text(own, results[0].experiment).split())
    assert "| PLD | 1.00 |" in said and "Mean rank over 3 blocks" in said


def test_the_matrix_of_wins():
    """A has won 2, tied 1 and lost 0 against B, and so on; a row against a column."""
    pairs = pd.DataFrame(
        [("A", "B", 2, 1, 0), ("A", "C", 0, 0, 3), ("B", "C", 1, 2, 0)],
        columns=["method", "against", "wins", "ties", "losses"],
    )
    assert comparison_printing.printed_wins(pairs).to_dict("split")["data"] == [
        ["1 A", "", "2/1/0", "0/0/3"],
        ["2 B", "0/1/2", "", "1/2/0"],
        ["3 C", "3/0/0", "0/2/1", ""],
    ]
    assert comparison_printing.printed_wins(pairs[:1]).empty  # the table says it


def test_all_pairs_of_methods(results):
    pairs = comparison.all_pairs(frames.frame(*results))
    found = {(row["method"], row["against"]): row for row in pairs.to_dict("records")}
    means = {key: row["mean"] for key, row in found.items()}
    assert means == {("CE", "KD (τ = 1)"): -4, ("CE", "PLD"): -8, ("KD (τ = 1)", "PLD"): -4}
    assert all(row["n"] == 3 for row in found.values())
    # differences of 5, 4 and 3 points: t = 4 sqrt(3) with 2 degrees of freedom; of 8, 8 and 8: none
    assert found["CE", "KD (τ = 1)"]["p"] == pytest.approx(0.020204, rel=1e-4)
    assert math.isnan(found["CE", "PLD"]["p"])
    # 80, 82, 84 against 85, 86, 87: no run of CE beats one of KD
    assert found["CE", "KD (τ = 1)"]["probability"] == 0
    assert list(comparison_printing.printed_against(pairs, True))[:2] == ["Method", "Against"]


def test_what_the_bank_spared_is_a_column(results):
    spared = frames.frame(*results).groupby("method", sort=False)["teacher_avoided_seconds"].sum()
    assert spared.to_dict() == {"CE": 0, "KD (τ = 1)": 0, "KD (τ = 4)": 0, "PLD": 6}


def test_how_teacher_logits_are_kept_sets_no_method_apart_that_has_no_teacher(experiment, tmp_path):
    live = plan(experiment(TEXT, "teacher.logits=live", "epochs=3"))
    assert set(frames.frame(live, Store(tmp_path / "x"))["setting"]) == {""}
    both = plan(experiment(TEXT, "grid.teacher.logits=[live, float32]"))
    frame = frames.frame(both, Store(tmp_path / "x"))
    assert len(both.cells) == 24 and (frame["method"] == "CE").sum() == 3  # the same for both
    settings = frame.groupby("method")["setting"].unique()
    assert list(settings["CE"]) == [""]
    assert list(settings["PLD"]) == ["teacher_logits live", "teacher_logits float32"]


def test_notes_are_told_once_below_the_table(results, capsys):
    from pld_ray.api import session

    session.write_tables(*results, out=None)
    printed = capsys.readouterr().out
    assert printed.count("note: look here") == 1
    assert printed.index("| PLD") < printed.index("note:") < printed.index("tables: ")


def test_gains_are_paired_by_seed(results):
    frame = frames.frame(*results)
    lost = (frame["method"] == "CE") & (frame["seed"] == 0)
    frame.loc[lost, ["top1", "finished"]] = [float("nan"), False]
    table = comparison.comparison(frame).set_index("method")
    assert table.loc["CE", "gain"] == pytest.approx(((90 - 82) + (92 - 84)) / 2)
    assert table.loc["CE", "n"] == 2 and table.loc["CE", "planned"] == 3


def test_tables_as_text_and_files(results, tmp_path):
    made, store = results
    own = comparison.tables(frames.frame(made, store))
    text = comparison_printing.text(own, made.experiment)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert ["CE", "82.00 ± 2.00", "+8.00", "–", "–", "10.0 ± 0.0", "3.0 ± 0.0", "3"] in rows
    assert ["KD (τ = 4)", "–", "", "–", "–", "–", "–", "0 of 3"] in rows
    assert text.startswith("A test: resnet20 → resnet8")
    tables_ = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len({len(line) for line in lines}) for lines in tables_] == [1, 1]
    # PLD against CE over three seeds: 8, 8, 8
    assert ["CE", "+8.00", "–", "–", "1.00", "3/0/0", "3"] in rows
    *written, against = comparison_printing.write(own, tmp_path / "out", made.experiment)
    assert against.name == "against.csv"
    paths = {path.suffix: path for path in written}
    with open(paths[".csv"], newline="") as file:
        by_method = {row["method"]: row for row in csv.DictReader(file)}
    assert float(by_method["PLD"]["top1_std"]) == pytest.approx(2)
    tex = paths[".tex"].read_text()
    assert r"\toprule" in tex and r"CE & 82.00 $\pm$ 2.00 & +8.00" in tex
    assert r"KD ($\tau$ = 1)" in tex and tex.isascii()


def test_other_axes_become_settings_and_losses_without_teacher_stay_in_their_pair(
    experiment, tmp_path
):
    text = TEXT + "optimizer: x\n"
    text = TEXT.replace(
        "seeds", "  optimizer.lr: [0.1, 0.2]\n  teacher: [resnet20, wrn_16_2]\nseeds"
    )
    made = plan(experiment(text))
    frame = frames.frame(made, Store(tmp_path / "none"))
    assert set(frame["setting"]) == {"optimizer.lr 0.1", "optimizer.lr 0.2"}
    ce = frame[frame["loss"] == "ce"]
    assert set(ce["teacher"]) == {"resnet20", "wrn_16_2"}
    assert ce["id"].nunique() == 6  # 2 rates x 3 seeds: the teacher makes no other trial of it
    text = comparison_printing.text(comparison.tables(frame), made.experiment)
    assert "wrn_16_2 → resnet8" in text and "optimizer.lr 0.2" in text


def test_figures_are_written_and_repeat_to_the_byte(results, tmp_path):
    frame = frames.frame(*results)
    curves = frames.curves(frame, results[1])
    assert len(curves) == 9 * 2
    first = methods.draw(frame, curves, tmp_path / "one")
    second = methods.draw(frame, curves, tmp_path / "two")
    names = ["accuracy.png", "gains.png", "curves.png", "ranks.png", "profiles.png"]
    assert [p.name for p in first] == names
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert one.with_suffix(".pdf").read_bytes() == two.with_suffix(".pdf").read_bytes()
    assert methods.draw(frame[:0], curves, tmp_path / "three") == []
    assert not (tmp_path / "three").exists()


def test_accuracy_bars_have_the_means_and_the_teachers_line(results):
    frame = frames.frame(*results)
    figure = methods.accuracy(frame[frame["finished"]], style.method_colours(frame))
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    assert bars == pytest.approx([82, 86, 90])
    assert [
        line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == "--"
    ] == [97.5]


def test_gains_are_drawn_at_their_means(results):
    frame = frames.frame(*results)
    compared = comparison.against(frame)
    (axis,) = methods.gains(compared, style.method_colours(frame)).axes
    marks = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    assert marks == [8, 4]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["CE", "KD (τ = 1)"]


def test_no_two_methods_share_a_colour(results):
    colours = style.method_colours(frames.frame(*results))
    assert len(set(colours.values())) == len(colours)


def test_landscape_plane_and_values():
    t, d1, d2 = logits.plane(10, seed=3)
    assert t.norm().item() == pytest.approx(1)
    gram = torch.stack([d1, d2]) @ torch.stack([d1, d2]).T
    torch.testing.assert_close(gram, torch.eye(2, dtype=torch.float64))
    axis, values = logits.surface(PLDLoss(2.0), t, d1, d2)
    assert axis[0] == pytest.approx(-5) and axis[-1] == pytest.approx(5)
    import reference

    for i, j in ((0, 0), (7, 31), (60, 13)):  # rows are b, columns a
        s = (t + axis[j] * d1 + axis[i] * d2).numpy()
        expected = reference.pld(s[None], t.numpy()[None], [int(t.argmax())], 2.0)
        assert values[i, j] == pytest.approx(expected)
    assert np.isfinite(values).all()


def test_landscape_figures_are_written(tmp_path):
    names = [p.name for p in logits.draw(tmp_path)]
    assert names == ["landscape_methods.png", "landscape_temperatures.png"]
    assert (tmp_path / "landscape_methods.pdf").stat().st_size > 1000


# ---------------------------------------------------------------- sweeps

SWEEP = """
title: A sweep
base: {data: digits, student: resnet8, teacher: resnet20, epochs: 2}
grid:
  loss: [ce, {name: kd, temperature: [1, 2, 4]}, {name: pld, temperature: [1, 2, 4]}]
  optimizer.lr: [0.01, 0.1]
seeds: [0, 1, 2]
"""


def sweep(experiment, tmp_path):
    """Records of a sweep: KD and PLD are best at temperature 4, and 0.1 is better than 0.01."""
    made = plan(experiment(SWEEP))
    frame = frames.frame(made, Store(tmp_path / "none"))
    frame["finished"], frame["teacher_top1"] = True, 99.0
    trials = [cell.trial for cell in made.cells]
    frame["top1"] = [
        80.0 + getattr(t.loss, "temperature", 0) + 10 * t.optimizer.lr + t.seed for t in trials
    ]
    frame["ece"] = frame["top1"] / 100  # the lower, the better: the other way round
    return made, frame


def test_the_best_settings_of_each_loss_come_first(experiment, tmp_path):
    _, frame = sweep(experiment, tmp_path)
    table = comparison.tables(frame).numbers
    assert list(table["method"]) == [
        *("Teacher", "CE", "CE", *["KD (τ = 4)"] * 2, *["KD (τ = 2)"] * 2, *["KD (τ = 1)"] * 2),
        *(*["PLD (τ = 4)"] * 2, *["PLD (τ = 2)"] * 2, *["PLD (τ = 1)"] * 2),
    ]
    assert list(table["setting"][:3]) == ["", "optimizer.lr 0.1", "optimizer.lr 0.01"]
    by_ece = comparison.tables(frame, sort="ece").numbers
    assert list(by_ece["method"])[3:5] == ["KD (τ = 1)"] * 2
    assert by_ece.loc[1, "setting"] == "optimizer.lr 0.01"
    as_listed = comparison.tables(frame, sort="grid").numbers
    assert list(as_listed["method"]).count("Teacher") == 2
    with pytest.raises(InputError, match="sort is 'top2': expected one of grid, top1"):
        comparison.tables(frame, sort="top2")


def test_a_teacher_that_differs_by_setting_keeps_its_rows(experiment, tmp_path):
    _, frame = sweep(experiment, tmp_path)
    for other in (98.0, math.nan):
        frame.loc[frame["trial.optimizer.lr"] == 0.1, "teacher_top1"] = other
        table = comparison.tables(frame).numbers
        teachers = table[table["method"] == "Teacher"]
        assert list(teachers["setting"]) == ["optimizer.lr 0.01", "optimizer.lr 0.1"]


def test_the_first_settings_and_the_reference_are_printed(experiment, tmp_path):
    made, frame = sweep(experiment, tmp_path)
    own = comparison.tables(frame)
    cells = comparison_printing.printed(own.numbers, 1)
    assert list(cells["Method"]) == ["Teacher", "CE", "KD (τ = 4)", "PLD (τ = 4)", "PLD (τ = 1)"]
    assert "PLD (τ = 1) gain" in cells
    said = " ".join(comparison_printing.text(own, made.experiment, 1).split())
    assert "Of each loss, the first setting; table.csv has all 14." in said
    assert "Holm's correction over 6 comparisons" in said
    assert "The images that choose the best setting also measure it" in said
    held = comparison.tables(frame.assign(held_out=True))
    said = " ".join(comparison_printing.text(held, made.experiment).split())
    assert "It is measured on held-out training images." in said and "the first" not in said
    paths = comparison_printing.write(own, tmp_path / "out", made.experiment, 1)
    assert len(pd.read_csv(paths[1])) == 15 and len(pd.read_csv(paths[-1])) == 6


def test_the_lines_and_the_legend_of_many_methods_can_be_read():
    names = [f"method {i}" for i in range(25)]
    colours = {name: style.PALETTE[i % len(style.PALETTE)] for i, name in enumerate(names)}
    rows = [
        {"student": student, "teacher": "t", "setting": "", "method": name, "epoch": epoch}
        | {"loss_ce": 1 / (epoch + i), "loss_kd": 0.1, "top1": i + epoch}
        for student in ("s", "u")
        for i, name in enumerate(names)
        for epoch in (1, 2)
    ]
    for draw in (methods.term_curves, methods.profiles):
        with matplotlib.rc_context(style.STYLE):
            figure = draw(pd.DataFrame(rows), colours)
        axes = figure.axes
        looks = [(line.get_color(), line.get_linestyle()) for line in axes[-1].get_lines()]
        assert len(set(looks)) == 25
        high = figure.get_figheight() * axes[-1].get_position().height
        assert high > 1.5  # inches
        legend = axes[-1].get_legend().get_window_extent()
        assert legend.height / figure.dpi < figure.get_figheight() / (
            len(axes) / 2 if len(axes) > 1 else 1
        )
        assert legend.x1 <= figure.bbox.x1
