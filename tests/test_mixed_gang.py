"""Gangs of losses that each ask for something else: two views, indices, further features."""

from small import cells, run
from test_gang import same, together

from pld_ray.config.trial import Trial
from pld_ray.store.store import Store

MEMBERS = (
    {"loss": {"name": "mlkd", "strong": ["cutout"]}, "ema": 0.9},
    {
        "loss": {"name": "mlkd", "strong": ["cutout"], "variant": "released"},
        "teacher_logits": "live",
    },
    {"loss": {"name": "crd", "negatives": 30, "dim": 4}},
    {"loss": {"name": "kd"}, "teacher_logits": "live", "epochs": 3},
    {"loss": "ofd"},
    {"loss": "simkd"},
    {"loss": "sdd"},
    {"loss": "ctkd", "epochs": 1},
)


def test_members_that_need_different_things_have_the_bits_of_trials_alone(experiment, tmp_path):
    (first,) = cells(experiment, "grid.loss=[kd]", "epochs=2")
    base = first.model_dump(mode="json")
    trials = [Trial.model_validate(base | each) for each in MEMBERS]
    alone, gang = (Store(tmp_path / name) for name in ("alone", "gang"))
    for store in (alone, gang):
        run(first.teacher, store)
    assert together(trials, gang) == {trial.id: None for trial in trials}
    same(trials, alone, gang)
