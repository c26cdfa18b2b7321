import json

import pandas as pd
import pytest

from pld_ray.cli import results
from pld_ray.config.planning import plan
from pld_ray.errors import InputError
from pld_ray.store.store import Store

TEXT = """
base:
  {data: digits, student: resnet8, teacher: resnet20, epochs: 4, optimizer: {betas: [0.9, 0.99]}}
grid: {loss: [ce, {name: kd, temperature: [2, 3]}]}
"""
RECORD = {"metrics": {"top1": 81.5}, "seconds": {"seconds": 2.5}, "environment": {"torch": "2.9"}}


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_every_trial_is_a_row_with_its_spec_and_state(experiment, tmp_path, ending):
    made, store = plan(experiment(TEXT)), Store(tmp_path / "results")
    teacher, ce, kd, other = made.trials.values()
    for trial in (teacher, ce, kd):
        store.start(trial)
    store.finish(teacher, RECORD, {})
    store.log(ce, [{"epoch": 1, "seconds": 1.0, "top1": 30.0}])
    store.stop(ce, "asha")
    store.fail(kd.id, "the training loss is nan")
    sets = {"overrides": None, "smoke": False, "storage": str(tmp_path / "results")}
    results.export([str(tmp_path / "small.yaml")], to=tmp_path / f"all{ending}", **sets)
    read = pd.read_csv if ending == ".csv" else pd.read_parquet
    table = read(tmp_path / f"all{ending}").set_index("id")
    assert list(table.index) == list(made.trials)
    assert table["state"].tolist() == ["done", "stopped", "failed", "not begun"]
    assert table["metrics.top1"].tolist()[:2] == [81.5, 30.0]
    assert table["metrics.top1"].isna().tolist() == [False, False, True, True]
    assert table["why"].tolist()[1:3] == ["asha", "the training loss is nan"]
    assert table["trial.loss.temperature"].tolist()[2:] == [2.0, 3.0]
    assert table.loc[kd.id, "trial.teacher.student.name"] == "resnet20"
    assert json.loads(table.loc[other.id, "trial.optimizer.betas"]) == [0.9, 0.99]
    assert table.loc[teacher.id, "environment.torch"] in ("2.9", 2.9)
    results.export(None, to=tmp_path / f"begun{ending}", **sets)
    assert set(read(tmp_path / f"begun{ending}")["id"]) == {teacher.id, ce.id, kd.id}


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a name that ends in .csv or .parquet"):
        results.export(None, to=tmp_path / "x.xls", storage=str(tmp_path))
    with pytest.raises(InputError, match="there are no trials"):
        results.export(None, to=tmp_path / "x.csv", storage=str(tmp_path))
