"""Rules: settings of cells that depend on their other settings."""

import json

import pytest

from analysis.records import frames
from pld_ray.config.planning import plan
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep import search

TEXT = """
base:
  data: {name: digits, limit: 100}
  teacher: {name: wrn_16_2, train: {epochs: 1}}
  optimizer: {name: sgd, lr: 0.05}
  epochs: 2
grid:
  student: [resnet8, resnet20, wrn_16_1_like]
  loss: [ce, {name: dkd, beta: 2}, {name: kd, temperature: [1, 4]}]
rules:
RULES
""".replace("wrn_16_1_like", "wrn_40_1")


def cells(experiment, *rules, sets=()):
    text = TEXT.replace("RULES", "\n".join(f"  - {rule}" for rule in rules))
    made = plan(experiment(text, *sets))
    return {
        (c.trial.student.name, c.trial.loss.name, getattr(c.trial.loss, "temperature", None)): c
        for c in made.cells
    }


SLOW = "{when: {student: 'resnet*'}, set: {optimizer.lr: 0.01}}"


def test_a_rule_sets_fields_where_it_applies(experiment):
    found = cells(experiment, SLOW)
    assert len(found) == 12
    for (student, *_), cell in found.items():
        assert cell.trial.optimizer.lr == (0.05 if student == "wrn_40_1" else 0.01)
        assert cell.trial.optimizer.name == "sgd"
        assert cell.rules == (() if student == "wrn_40_1" else (0,))
        assert cell.teacher == "wrn_16_2"
    teacher = found["resnet8", "dkd", 4.0].trial.teacher
    assert teacher.optimizer.lr == 0.05  # a rule is of the cells


def test_all_fields_must_fit_and_later_rules_win(experiment):
    rules = (
        "{when: {student: [resnet8, resnet20]}, set: {optimizer.lr: 0.01, batch_size: 64}}",
        "{when: {student: resnet20, loss: dkd}, set: {loss.beta: 8, optimizer.lr: 0.02}}",
        "{when: {loss.temperature: [4, 8], loss: 'k?'}, set: {epochs: 3}}",
        "{when: {batch_size: 64, student: wrn_40_1}, set: {ema: 0.9}}",
    )
    with pytest.raises(InputError, match=r"rules\[3\].when is .*: no cell has these settings"):
        cells(experiment, *rules)  # rules look at the settings before any rule
    found = cells(experiment, *rules[:3])
    dkd = found["resnet20", "dkd", 4.0]
    assert (dkd.trial.loss.beta, dkd.trial.optimizer.lr, dkd.trial.batch_size) == (8, 0.02, 64)
    assert dkd.rules == (0, 1)
    assert found["resnet8", "dkd", 4.0].trial.loss.beta == 2
    epochs = {key: cell.trial.epochs for key, cell in found.items()}
    assert {key for key, n in epochs.items() if n == 3} == {
        (student, "kd", 4.0) for student in ("resnet8", "resnet20", "wrn_40_1")
    }


@pytest.mark.parametrize(
    ("when", "applies"),
    [
        ("{loss.beta: 8}", {"dkd"}),
        ("{loss.temperature: 4}", {"kd", "dkd"}),
        ("{loss.temperature: null}", {"ce"}),
        ("{batch_size: 128, optimizer.momentum: 0.9}", {"ce", "kd", "dkd"}),
        ("{schedule: cosine, data.flip: false, clip_grad: null}", {"ce", "kd", "dkd"}),
        ("{schedule.warmup_epochs: 0, loss: kd}", {"kd"}),
    ],
)
def test_a_field_that_is_not_set_has_its_default(experiment, when, applies):
    rule = f"{{when: {when}, set: {{epochs: 3}}}}"
    text = TEXT.replace("RULES", f"  - {rule}").replace("beta: 2}", "beta: 8}")
    for dkd in ("{name: dkd, beta: 8}", "dkd"):
        sets = [f"grid.loss=[ce, {{name: kd, temperature: 4}}, {dkd}]"]
        made = plan(experiment(text, *sets))
        assert {c.trial.loss.name for c in made.cells if c.trial.epochs == 3} == applies


def test_set_overrides_rules(experiment):
    found = cells(experiment, SLOW, sets=("optimizer.lr=0.5", "loss.temperature=3"))
    assert {cell.trial.optimizer.lr for cell in found.values()} == {0.5}
    assert found["resnet8", "ce", None].rules == (0,)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("{when: {student: resnet9}, set: {epochs: 1}}", r"rules\[0\].when is .*no cell has these"),
        (
            "{when: {loss: ce}, set: {student: resnet8}}",
            r"rules\[0\].set.student: grid varies this",
        ),
        ("{when: {loss: dkd}, set: {loss.name: kd}}", r"rules\[0\].set.loss: grid varies this"),
        ("{when: {loss: ce}, set: {student.name: vgg8}}", "set.student: grid varies this field"),
        ("{when: {loss: kd}, set: {seed: 3}}", r"rules\[0\].set.seed: a rule changes no loss"),
        ("{when: {loss: kd}, set: {teacher: resnet8}}", "set.teacher: a rule changes no loss"),
        (
            "{when: {loss: kd}, set: {teacher: {train: {epochs: 3}}}}",
            "set.teacher.train.epochs: a rule changes no loss, network, teacher or seed",
        ),
        ("{when: {loss: ce}, set: {optimizer.rate: 1}}", "optimizer.rate: unknown field"),
        ("{when: {loss: ce}, set: {}}", r"rules.0.set|rules\[0\].set|rules.set"),
        ("{when: {loss: ce}}", "rules.*set"),
        ("{if: {loss: ce}, set: {epochs: 1}}", "rules.*if: unknown field"),
    ],
)
def test_bad_rules(experiment, rule, said):
    with pytest.raises(InputError, match=said):
        cells(experiment, rule)


def test_a_rule_sets_no_field_that_varies_by_another_spelling(experiment):
    text = TEXT.replace("loss: [ce, {name: dkd, beta: 2}, {name: kd, temperature: [1, 4]}]", "GRID")
    text = text.replace("epochs: 2", "epochs: 2\n  loss: kd").replace("RULES", "  - RULE")
    for grid, rule, said in (
        ("optimizer.lr: [1, 2]", "optimizer: {lr: 0.1}", "set.optimizer.lr: grid varies this"),
        ("loss.temperature: [1, 2]", "loss: dkd", "set.loss: a rule changes no loss"),
        ("loss.temperature: [1, 2]", "loss: {temperature: 3}", "set.loss.temperature: grid varies"),
    ):
        rule = f"{{when: {{student: resnet8}}, set: {{{rule}}}}}"
        with pytest.raises(InputError, match=said):
            plan(experiment(text.replace("GRID", grid).replace("RULE", rule)))


def test_a_rule_sets_how_the_logits_of_a_teacher_are_kept(experiment):
    found = cells(experiment, "{when: {loss: dkd}, set: {teacher.logits: live, teacher.views: 1}}")
    kept = {loss: cell.trial.teacher_logits for (_, loss, _), cell in found.items()}
    assert kept == {"ce": "float16", "dkd": "live", "kd": "float16"}


def test_a_plan_says_which_rule_set_what(experiment, cli, tmp_path):
    cells(experiment, SLOW, "{when: {loss: dkd}, set: {loss.beta: 8}}")
    path = experiment.folder / "small.yaml"
    printed = cli("plan", path, "--json", "--storage", tmp_path / "results", cwd=tmp_path).stdout
    found = {
        (row["trial"]["student"]["name"], row["trial"]["loss"]["name"]): row["rules"]
        for row in json.loads(printed)["trials"]
        if not row["teacher"]
    }
    slow, beta = {"rule": 0, "set": {"optimizer.lr": 0.01}}, {"rule": 1, "set": {"loss.beta": 8}}
    assert found["resnet8", "dkd"] == [slow, beta] and found["resnet20", "ce"] == [slow]
    assert found["wrn_40_1", "dkd"] == [beta] and found["wrn_40_1", "kd"] == []


def test_rules_apply_in_searches_and_miniatures(experiment, tmp_path):
    more = (
        "search={algorithm: random, num_trials: 2, space: {epochs: {choice: [3, 4]}}}",
        "seeds=[]",
    )
    text = TEXT.replace("RULES", f"  - {SLOW}")
    store = Store(tmp_path)
    for each in search.look(experiment(text, *more), store):
        slow = each.group.cell.trial.student.name != "wrn_40_1"
        rates = {drawn.trial.optimizer.lr for drawn in each.drawn}
        assert rates == {0.01 if slow else 0.05}
    wrong = text.replace("optimizer.lr: 0.01", "epochs: 9")
    with pytest.raises(InputError, match=r"rules\[0\].set.epochs: search.space varies this field"):
        search.look(experiment(wrong, *more), store)
    space = "search.space={kd.temperature: {choice: [1, 4]}, dkd.ce_weight: {choice: [1, 2]}}"
    grid = "grid.loss=[ce, kd, dkd]"
    other, same = (
        text.replace(SLOW, f"{{when: {{loss: {loss}}}, set: {{loss.temperature: 2}}}}")
        for loss in ("dkd", "'*kd'")
    )
    search.look(experiment(other, *more, space, grid), store)
    with pytest.raises(InputError, match=r"rules\[0\].set.loss.temperature: search.space varies"):
        search.look(experiment(same, *more, space, grid), store)
    from pld_ray.config.experiment import load_experiment

    small = plan(load_experiment(experiment(text, name="whole"), smoke=True))
    assert {cell.trial.epochs for cell in small.cells} == {2}


def test_what_a_rule_sets_makes_no_other_row(experiment, tmp_path):
    rules = (
        "{when: {student: resnet8, loss: dkd}, set: {loss.beta: 8, epochs: 3}}",
        "{when: {student: resnet20, loss: kd}, set: {loss.ce_weight: 0.5}}",
    )
    text = TEXT.replace("RULES", "\n".join(f"  - {rule}" for rule in rules))
    made = plan(experiment(text))
    rows = frames.frame(made, Store(tmp_path))
    assert set(rows["method"]) == {"CE", "DKD", "KD (τ = 1)", "KD (τ = 4)"}
    assert set(rows["setting"]) == {""} and len(rows) == 3 * 4
    found = dict(zip(rows["student"] + rows["method"], rows["trial.loss.beta"], strict=True))
    assert (found["resnet8DKD"], found["resnet20DKD"]) == (8, 2)  # the trials differ
    grid = text.replace("beta: 2}", "beta: [1, 2]}")
    epochs = experiment(grid.replace("loss.beta: 8, ", ""))
    names = set(frames.frame(plan(epochs), Store(tmp_path))["method"])
    assert {"DKD (β = 1)", "DKD (β = 2)"} < names  # what the grid varies
    said = r"rules\[0\] set what the grid varies: dkd beta 1 .* and dkd beta 2 .* become one trial"
    with pytest.raises(InputError, match=said):
        plan(experiment(grid))


def test_a_rule_may_set_what_the_settings_need(experiment):
    rule = "{when: {student: '*'}, set: {schedule.milestones: [1]}}"
    sets = ("schedule.name=multistep", "teacher.train.schedule.name=cosine")
    found = cells(experiment, rule, sets=sets)
    assert {cell.trial.schedule.milestones for cell in found.values()} == {(1,)}
    assert all(cell.shown is cell.trial for cell in found.values())
