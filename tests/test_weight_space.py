import numpy as np
import pytest
import torch
from small import cells, live, run

from analysis.landscapes import weights
from analysis.landscapes.weights import Settings, directions, line, sharpness, subject
from pld_ray.config.planning import plan
from pld_ray.data.datasets import load, sharing_key
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store


def test_directions_have_the_length_of_each_filter():
    weights = {"conv": torch.randn(4, 3, 3, 3) * 7, "norm": torch.randn(4), "fc": torch.randn(2, 5)}
    one, two = directions(weights, seed=3)
    for found in (one, two):
        for name in ("conv", "fc"):
            for row, filter_ in zip(found[name], weights[name], strict=True):
                assert row.norm().item() == pytest.approx(filter_.norm().item(), rel=1e-5)
        assert not found["norm"].any()
    assert not torch.equal(one["conv"], two["conv"])
    assert torch.equal(directions(weights, seed=3)[1]["fc"], two["fc"])


def test_sharpness_of_a_known_quadratic():
    a = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    a = a + a.T
    weights = {"u": torch.randn(3, 2), "v": torch.randn(6)}

    def loss(w, matrix):
        x = torch.cat([w["u"].reshape(-1), w["v"]])
        return x @ matrix @ x / 2

    top, _ = sharpness(lambda w: loss(w, a), weights)
    assert top == pytest.approx(torch.linalg.eigvalsh(a)[-1].item(), rel=1e-2)
    diagonal = torch.arange(12.0) - 3
    top, trace = sharpness(lambda w: loss(w, diagonal.diag()), weights)
    assert top == pytest.approx(8, rel=1e-2) and trace == pytest.approx(diagonal.sum().item())


def test_sharpness_of_a_network_against_the_whole_hessian(experiment, tmp_path):
    trial, store = cells(experiment)[0], Store(tmp_path)  # PLD
    run(live(trial), store)
    one = subject(live(trial), load(trial.data), store, 20)
    name = "fc.weight"
    network, loss = one.network(), one.losses()["own"]

    def at(w):
        return loss(one.logits(network, {**one.weights, **w}))

    whole = torch.autograd.functional.hessian(lambda w: at({name: w}), one.weights[name])
    whole = whole.reshape(640, 640)
    top, trace = sharpness(at, {name: one.weights[name]})
    assert top == pytest.approx(torch.linalg.eigvalsh(whole)[-1].item(), rel=2e-2)
    assert trace == pytest.approx(whole.trace().item(), rel=0.5)  # an estimate from 16 vectors


@pytest.mark.slow
def test_landscapes_are_computed_once_and_drawn(experiment, tmp_path, local_ray):
    text = """
base:
  data: {name: digits, pad: 1, limit: 100}
  student: resnet8
  teacher: resnet8
  epochs: 1
grid: {loss: [ce, pld, at]}
seeds: [0, 1]
"""
    made, store = plan(experiment(text)), Store(tmp_path / "results")
    images = load(made.cells[0].trial.data)
    for cell in made.cells[::2]:  # the first seed of each method
        run(cell.trial, store, images)
    trials = weights.students(made, store)
    assert list(trials) == ["CE", "PLD", "AT"]
    shown = {sharing_key(trial.data): images for trial in trials.values()}
    settings = Settings(points=3, reach=0.5, images=50)
    weights.compute(trials, shown, store, settings)
    kept = {name: store.landscape(trial.id) for name, trial in trials.items()}
    assert {name: list(k["losses"]) for name, k in kept.items()} == {
        "CE": ["ce"],
        "PLD": ["ce", "own"],
        "AT": ["ce"],
    }
    assert kept["PLD"]["axis"] == [-0.5, 0, 0.5]
    # in the middle: the student itself
    one = subject(trials["PLD"], images, store, 50)
    network = create_model(trials["PLD"].student, *images.shape)
    network.load_state_dict(store.load_weights(trials["PLD"]))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(network.eval()(one.x), one.labels).item()
    assert kept["PLD"]["losses"]["ce"]["values"][1][1] == pytest.approx(expected, rel=1e-5)
    assert line(one, 0.5, [-0.5], 0)["own"][0] == pytest.approx(
        kept["PLD"]["losses"]["own"]["values"][2][0], rel=1e-5
    )
    assert np.isfinite([kept["PLD"]["losses"]["own"][k] for k in ("top_eigenvalue", "trace")]).all()

    def never(*_):
        raise AssertionError("computed again")

    subject_, weights.subject = weights.subject, never
    weights.compute(trials, shown, store, settings)
    weights.subject = subject_
    paths = weights.draw(trials, store, tmp_path / "out")
    assert {path.suffix for path in paths} == {".png", ".md", ".csv", ".tex"}
    rows = (tmp_path / "out/sharpness.md").read_text().splitlines()
    head = ["Student of", "Top-1 %", "λ, CE", "tr, CE", "λ, own loss", "tr, own loss"]
    assert [cell.strip() for cell in rows[0].split("|")[1:-1]] == head
    assert [row.split()[1] for row in rows[2:5]] == ["CE", "PLD", "AT"]
    assert rows[2].split()[-4:] == ["–", "|", "–", "|"]
