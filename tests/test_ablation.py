"""The figures of what a grid varies show the numbers that one would compute by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle

from analysis.figures import ablation, methods, parameters
from analysis.records import frames
from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.errors import InputError
from pld_ray.store.store import Store

TEXT = """
base: {data: digits, student: resnet8, teacher: resnet20, epochs: 2}
grid:
  loss: [ce, {name: kd, temperature: [1, 2, 4, 8]}, {name: pld, temperature: [1, 2, 4, 8]}]
  optimizer.lr: [0.001, 0.01, 0.1]
seeds: [0, 1, 2]
"""


def records(made, tmp_path, score):
    """Return the records of a plan whose trials have made-up scores."""
    frame = frames.frame(made, Store(tmp_path / "none"))
    frame["finished"] = True
    trials = [cell.trial for cell in made.cells]
    frame["top1"] = [score(trial) for trial in trials]
    return frame


def additive(trial):
    """Return a score without interaction: one effect of the temperature, one of the rate."""
    temperature = {1: 0.0, 2: 3.0, 4: 2.0, 8: -1.0}[getattr(trial.loss, "temperature", 1)]
    rate = {0.001: 0.0, 0.01: 1.0, 0.1: -1.0}[trial.optimizer.lr]
    return 80 + temperature + rate + trial.seed


def test_figures_have_the_common_style(experiment, tmp_path):
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    few = records(plan(experiment(TEXT, "grid.optimizer.lr=[0.01]")), tmp_path, additive)
    shown = {**ablation.ablation(frame)[0], **ablation.chosen(few, "loss.temperature")[0]}
    assert len(shown) == 2
    for picture in shown.values():
        for axis in picture.axes:
            assert axis.get_label() == "<colorbar>" or not axis.spines["top"].get_visible()


def test_parameters(experiment, tmp_path):
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    found = {each.column: each for each in parameters.parameters(frame)}
    assert list(found) == ["trial.loss.temperature", "trial.optimizer.lr"]
    assert found["trial.loss.temperature"].values == (1, 2, 4, 8)
    assert [each.scale for each in found.values()] == ["log", "log"]
    assert found["trial.loss.temperature"].name == "temperature (τ)"


def test_parameters_that_others_determine_are_left_out(tmp_path):
    made = plan(load_experiment("ce_weight"))
    frame = records(made, tmp_path, lambda trial: 70.0)
    found = parameters.parameters(frame)
    assert [each.column for each in found] == ["trial.loss.ce_weight"]
    assert found[0].scale == "linear" and len(found[0].values) == 11


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1, 2, 3, 4], "linear"),
        ([0.1, 0.5, 0.9], "linear"),
        ([0.001, 0.01, 0.1], "log"),
        ([0, 0.001, 0.01, 0.1], "ordinal"),
        ([-1, 0, 1], "linear"),
        ([0.5, 1, 1.5, 2, 4], "log"),
    ],
)
def test_scales(values, scale):
    assert parameters.scale_of(np.array(values, dtype=float)) == scale


def test_importance_is_the_share_of_the_variance(experiment, tmp_path):
    """Without interaction, the variances of the two effects add up."""
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    kd = frame[frame["loss"] == "kd"]
    temperature, rate = parameters.parameters(kd)
    spread = [np.var([0, 3, 2, -1]), np.var([0, 1, -1])]
    assert parameters.importance(kd, temperature) == pytest.approx(spread[0] / sum(spread))
    assert parameters.importance(kd, rate) == pytest.approx(spread[1] / sum(spread))
    # CE has no temperature: a third of the losses counts as 0
    shares = parameters.importance(frame, temperature)
    assert shares == pytest.approx(2 / 3 * spread[0] / sum(spread))


def line(axis, colour):
    """Return the points of the line with markers of a colour."""
    (found,) = [
        each for each in axis.lines if each.get_color() == colour and each.get_marker() == "o"
    ]
    return found.get_xdata(), found.get_ydata()


def test_one_number_is_a_line_for_each_loss(experiment, tmp_path):
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    frame = frame[frame["trial.optimizer.lr"] == 0.01]
    pictures, told = ablation.ablation(frame)
    assert list(pictures) == ["ablation"] and not told
    (axis,) = pictures["ablation"].axes
    colours = ablation.loss_colours(["ce", "kd", "pld"], "loss")
    for loss in ("kd", "pld"):
        x, y = line(axis, colours[loss])
        assert list(x) == [1, 2, 4, 8]
        assert y == pytest.approx([82, 85, 84, 81])  # seeds 0, 1, 2: their mean is 1
    (level,) = [each for each in axis.lines if each.get_linestyle() == "--"]
    assert level.get_ydata()[0] == pytest.approx(82) and level.get_color() == colours["ce"]
    assert axis.get_xscale() == "log"
    # the band of KD at temperature 1: Student's interval of 81, 82, 83
    half = 4.302652729911275 / np.sqrt(3)
    band = axis.collections[1].get_paths()[0].vertices
    at_one = band[np.isclose(band[:, 0], 1)][:, 1]
    assert at_one.min() == pytest.approx(82 - half) and at_one.max() == pytest.approx(82 + half)


def test_two_numbers_are_a_heat_map_for_each_loss(experiment, tmp_path):
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    pictures, _ = ablation.ablation(frame)
    maps = [axis for axis in pictures["ablation"].axes if axis.images]
    assert [axis.get_title() for axis in maps] == ["CE", "KD", "PLD"]
    kd = maps[1]
    values = kd.images[0].get_array()
    expected = [[81 + t + r for t in (0, 3, 2, -1)] for r in (0, 1, -1)]
    assert np.asarray(values) == pytest.approx(np.array(expected))
    (frame_of_best,) = [patch for patch in kd.patches if isinstance(patch, Rectangle)]
    assert frame_of_best.get_xy() == (0.5, 0.5)  # temperature 2, rate 0.01: the second of both
    assert maps[0].images[0].get_array().shape == (3, 1)  # CE has no temperature
    limits = {axis.images[0].get_clim() for axis in maps}
    assert len(limits) == 1, "the maps must share one scale of colours"


def test_three_numbers_are_a_heat_map_and_the_effects(experiment, tmp_path):
    text = TEXT + "  # \n"
    text = text.replace("seeds", "  optimizer.weight_decay: [0, 0.01, 0.1]\nseeds")
    frame = records(plan(experiment(text)), tmp_path, additive)
    frame["top1"] += frame["trial.optimizer.weight_decay"]  # hardly any effect
    pictures, _ = ablation.ablation(frame)
    assert list(pictures) == ["ablation-effects", "ablation"]
    names = [axis.get_xlabel() for axis in pictures["ablation-effects"].axes]
    assert names == ["temperature (τ)", "optimizer.lr", "optimizer.weight_decay"]
    maps = [axis for axis in pictures["ablation"].axes if axis.images]
    assert {(axis.get_xlabel(), axis.get_ylabel()) for axis in maps} == {
        ("temperature (τ)", "optimizer.lr")
    }
    _, y = line(pictures["ablation-effects"].axes[1], ablation.COLOURS["kd"])
    mean = 81 + np.mean([0, 3, 2, -1]) + np.mean([0, 0.01, 0.1])
    assert y == pytest.approx([mean, mean + 1, mean - 1])


def test_categories_are_dots(experiment, tmp_path):
    text = TEXT.replace("optimizer.lr: [0.001, 0.01, 0.1]", "optimizer: [adamw, sgd]")
    text = text.replace("temperature: [1, 2, 4, 8]", "temperature: 2")
    made = plan(experiment(text))
    score = {"adamw": 80, "sgd": 70}
    frame = records(made, tmp_path, lambda trial: score[trial.optimizer.name] + trial.seed)
    (axis,) = ablation.ablation(frame)[0]["ablation"].axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["adamw", "sgd"]
    dots = [each.get_ydata() for each in axis.lines if each.get_marker() == "o"]
    assert (
        len(dots) == 6
        and sorted(np.concatenate(dots))
        == [70] * 3 + [71] * 3 + [72] * 3 + [80] * 3 + [81] * 3 + [82] * 3
    )


def test_nothing_that_varies_draws_nothing(experiment, tmp_path):
    text = TEXT.replace("temperature: [1, 2, 4, 8]", "temperature: 2")
    frame = records(
        plan(experiment(text.replace("[0.001, 0.01, 0.1]", "[0.01]"))), tmp_path, additive
    )
    assert ablation.ablation(frame) == ({}, [])


def test_pages_have_at_most_twelve_panels(experiment, tmp_path):
    text = TEXT.replace("optimizer.lr: [0.001, 0.01, 0.1]", "batch_size: [32, 64]")
    frame = records(plan(experiment(text)), tmp_path, lambda trial: 80.0 + trial.seed)
    many = [frame.assign(student=f"student{i}") for i in range(7)]
    pictures, _ = ablation.ablation(pd.concat(many, ignore_index=True))
    assert list(pictures) == ["ablation-1", "ablation-2"]
    assert [len(picture.axes) for picture in pictures.values()] == [12, 2]


def test_more_losses_than_colours(experiment, tmp_path):
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    kd = frame[(frame["loss"] == "kd") & (frame["trial.optimizer.lr"] == 0.01)]
    names = [
        "ce",
        "kd",
        "pld",
        "dist",
        "dkd",
        "ls",
        "at",
        "rkd",
        "vid",
        "sp",
        "pkt",
        "listmle",
        "fitnet",
    ]
    rows = [kd.assign(loss=name, top1=kd["top1"] + i) for i, name in enumerate(names)]
    pictures, told = ablation.ablation(pd.concat(rows, ignore_index=True))
    assert told == ["the figures of parameters show the best 12 of 13 losses"]
    legend = pictures["ablation"].axes[0].get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(set(labels) - {"without it", "95 % interval"}) == 12 and "CE" not in labels


def test_figure_1a_of_the_paper_comes_out_of_the_rule(tmp_path):
    """KD and DIST are lines over the weight of cross-entropy, and PLD is a horizontal line."""
    made = plan(load_experiment("ce_weight"))
    score = {"kd": lambda w: 76 - w, "dist": lambda w: 77 - 2 * w}

    def top1(trial):
        weight = getattr(trial.loss, "ce_weight", 0.0)
        return score.get(trial.loss.name, lambda w: 78.0)(weight)

    pictures, _ = ablation.ablation(records(made, tmp_path, top1))
    (axis,) = pictures["ablation"].axes
    assert axis.get_xlabel() == "ce_weight" or "CE" in axis.get_xlabel()
    weights = np.round(np.arange(0, 1, 0.1), 1)
    x, y = line(axis, ablation.COLOURS["kd"])
    assert x == pytest.approx(weights) and y == pytest.approx(76 - weights)
    x, y = line(axis, ablation.COLOURS["dist"])
    weights = np.append(weights, 1.0)
    assert x == pytest.approx(weights) and y == pytest.approx(77 - 2 * weights)
    levels = {each.get_color() for each in axis.lines if each.get_linestyle() == "--"}
    assert ablation.COLOURS["pld"] in levels and ablation.COLOURS["kd"] not in levels


def test_a_figure_of_ones_own_choice(experiment, tmp_path):
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    pictures, told = ablation.chosen(frame, "optimizer.lr", "loss.temperature", "loss.name")
    (name,) = pictures
    assert name == "optimizer-lr-by-loss-temperature-per-loss-name" and not told
    axes = pictures[name].axes
    assert [axis.get_title() for axis in axes] == ["CE", "KD", "PLD"]
    colours = ablation.loss_colours(["without", 1, 2, 4, 8], "_by")
    x, y = line(axes[1], colours[4])
    assert list(x) == [0.001, 0.01, 0.1] and y == pytest.approx([83, 84, 82])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"x": "optimizer.l"},
            "'optimizer.l' does not vary in these trials: expected one of optimizer.lr, loss.temp",
        ),
        ({"x": "optimizer.lr", "by": "epochs"}, "'epochs' does not vary"),
        ({"x": "optimizer.lr", "facet": "momentum"}, "'momentum' does not vary"),
        ({"x": "optimizer.lr", "metric": "top2"}, "--y is 'top2': expected a metric; did you mean"),
    ],
)
def test_wrong_fields(experiment, tmp_path, fields, said):
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    with pytest.raises(InputError, match=said):
        ablation.chosen(frame, **fields)


def test_the_best_settings_of_many(experiment, tmp_path):
    """27 settings: the figure of accuracy shows one of each loss."""
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    best = methods.best_settings(frame)
    assert best.groupby("loss")["method"].unique().map(list).to_dict() == {
        "ce": ["CE (optimizer.lr 0.01)"],
        "kd": ["KD (τ = 2) (optimizer.lr 0.01)"],
        "pld": ["PLD (τ = 2) (optimizer.lr 0.01)"],
    }
    assert len(best) == 9 and best["setting"].nunique() == 1
    few = frame[frame["loss"] != "kd"]
    assert methods.best_settings(few) is few
    settings = [*itertools.product((1, 2, 4, 8), (0.001, 0.01, 0.1))]
    assert len(settings) == 12  # of KD and of PLD; CE has three


# ---------------------------------------------------------------- what a reader could miss


def test_none_is_a_value(experiment, tmp_path):
    """The best setting is the one without clipping; it is neither left out nor out of the share."""
    text = TEXT.replace("optimizer.lr: [0.001, 0.01, 0.1]", "clip_grad: [null, 1, 5, 25]")
    text = text.replace("temperature: [1, 2, 4, 8]", "temperature: 2")
    score = {None: 90, 1: 70, 5: 71, 25: 72}
    frame = records(plan(experiment(text)), tmp_path, lambda t: score[t.clip_grad] + t.seed)
    (found,) = parameters.parameters(frame)
    assert found.values == ("none", 1, 5, 25) and found.scale is None
    assert parameters.importance(frame, found) == pytest.approx(1)
    (axis,) = ablation.ablation(frame)[0]["ablation"].axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["none", "1", "5", "25"]
    two = frame[frame["trial.clip_grad"].isna() | (frame["trial.clip_grad"] == 1)]
    assert [each.values for each in parameters.parameters(two)] == [("none", 1)]


def test_values_that_look_alike_stay_apart(experiment, tmp_path):
    text = TEXT.replace("[1, 2, 4, 8]", "[2.00001, 2.00002, 4]")
    score = {2.00001: 60, 2.00002: 80, 4: 70}
    made = plan(experiment(text.replace("loss: [ce, ", "loss: [")))
    frame = records(made, tmp_path, lambda t: score[t.loss.temperature] + t.seed)
    (axis, *_) = ablation.ablation(frame)[0]["ablation"].axes
    assert np.asarray(axis.images[0].get_array())[0] == pytest.approx([61, 81, 71])
    names = [tick.get_text() for tick in axis.get_xticklabels()]
    assert names == ["2.00001", "2.00002", "4"]
    seeds = frame.assign(seed=frame["seed"] + 10001)
    (picture,) = ablation.chosen(seeds, "optimizer.lr", "seed")[0].values()
    legend = picture.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["10001", "10002", "10003"]


def test_equal_scores_have_equal_colours_on_all_pages(experiment, tmp_path):
    frame = records(plan(experiment(TEXT)), tmp_path, lambda trial: 70.0)
    many = [frame.assign(student=f"student{i}", top1=70.0 + i // 5) for i in range(6)]
    for rows in (frame, pd.concat(many, ignore_index=True)):
        pictures, _ = ablation.ablation(rows)
        maps = [axis for picture in pictures.values() for axis in picture.axes if axis.images]
        limits = {axis.images[0].get_clim() for axis in maps}
        assert len(limits) == 1 and limits.pop() == ((69, 71) if rows is frame else (70, 71))


def test_a_grid_that_is_not_finished_is_told(experiment, tmp_path):
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    frame.loc[3:5, "finished"] = False
    said = "3 of 81 trials have no top1 yet"
    assert ablation.ablation(frame)[1][0].startswith(said)
    assert ablation.chosen(frame, "optimizer.lr")[1][0].startswith(said)
    frame.loc[frame["seed"] == 0, "ece"] = 0.1
    assert ablation.chosen(frame, "optimizer.lr", metric="ece")[1][0].startswith("55 of 81")


def test_the_best_of_many_lines_by_the_metric(experiment, tmp_path):
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    rows = [frame.assign(seed=seed, ece=float(seed)) for seed in range(14)]
    pictures, told = ablation.chosen(pd.concat(rows), "optimizer.lr", "seed", metric="ece")
    assert told == ["the figure shows the best 12 of 14 values of seed by ece"]
    (picture,) = pictures.values()
    labels = [text.get_text() for text in picture.axes[0].get_legend().get_texts()]
    assert labels == [str(seed) for seed in range(12)]


@pytest.mark.parametrize("fields", [{"x": "student"}, {"x": "optimizer.lr", "by": "student"}])
def test_students_are_compared_in_one_panel(experiment, tmp_path, fields):
    frame = records(plan(experiment(TEXT)), tmp_path, additive)
    both = pd.concat([frame, frame.assign(student="other", top1=frame["top1"] + 5)])
    (picture,) = ablation.chosen(both, **fields)[0].values()
    assert len(picture.axes) == 1 and picture.axes[0].get_title() == ""
    (faceted,) = ablation.chosen(both, "optimizer.lr", facet="student")[0].values()
    assert [axis.get_title() for axis in faceted.axes] == ["resnet8", "other"]
