"""The report: one page that needs nothing else."""

import re
from html.parser import HTMLParser

import pytest
import torch

from analysis.records import frames
from analysis.report import page, summary
from analysis.tables import comparison
from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.store.store import Store

ENVIRONMENT = {"device": "cpu", "cores": 2, "threads": 1, "host": "here", "python": "3.11"}


class Page(HTMLParser):
    """Checks that every tag is closed, and collects what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.links += [given[name] for name in ("href", "src") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def made(experiment, tmp_path):
    text = """
title: A <test> & more
base: {data: digits, student: resnet8, teacher: resnet20, epochs: 2}
grid: {loss: [ce, pld]}
seeds: [0, 1]
"""
    plans, store = [plan(experiment(text))], Store(tmp_path / "results")
    for cell in plans[0].cells[:3]:
        metrics = {"top1": 80.0 + cell.trial.seed, "ece": 0.1}
        history = [{"epoch": e, "top1": 70 + e, "train_loss": 1 / e} for e in (1, 2)]
        store.log(cell.trial, history)
        record = {"metrics": metrics, "seconds": {"seconds": 100.0}, "parameters": 10}
        store.finish(cell.trial, record | {"environment": ENVIRONMENT}, {"w": torch.zeros(1)})
    again = plans[0].experiment.model_copy(update={"name": "again", "seeds": [0]})
    return [*plans, plan(again), plan(load_experiment("homogeneous_pairs"))], store


def test_the_page_needs_no_network_and_shows_every_trial_once(made, tmp_path):
    plans, store = made
    html, markdown = page.write(plans, store, tmp_path / "out")
    parsed = Page()
    parsed.feed(html.read_text())
    assert parsed.open == []
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in parsed.links)
    assert {link[1:] for link in parsed.links if link[0] == "#"} <= set(parsed.ids)
    trials = [key for made in plans for key in made.trials]
    shown = [name[1:] for name in parsed.ids if re.fullmatch("t[0-9a-f]{16}", name)]
    assert sorted(shown) == sorted(set(trials)) and len(trials) > len(set(trials))
    text = " ".join(parsed.text)
    assert "A <test> & more" in text and "<test>" not in html.read_text()
    assert "3 of 20 trials finished; 5 min of training" in text
    assert "3 of 5 trials finished" in text and "Table 2: Homogeneous pairs" in text
    assert '"name": "resnet20"' in text  # a spec, behind a click
    (script,) = re.findall("<script.*?</script>", html.read_text(), re.DOTALL)
    for network in ("@import", "http:", "https:", "fetch(", "src=", "XMLHttp", "import("):
        assert network not in script and (network == "src=" or network not in html.read_text())
    rows = re.findall(r"<tr data-trial=([0-9a-f]{16})><td>([^<]*)<", html.read_text())
    labels = {key: trial.loss.label for made in plans for key, trial in made.trials.items()}
    assert len(rows) >= 2 and all(labels[key] == method for key, method in rows)
    written = markdown.read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", written)
    assert len(pictures) == sum(link.startswith("data:") for link in parsed.links) > 4
    assert all((tmp_path / "out" / picture).is_file() for picture in pictures)
    assert "| average " in written and "+0.42" in written


def test_lost_files_of_epochs_cost_the_curves_alone(made, tmp_path):
    plans, store = made
    for file in (tmp_path / "results").rglob("epochs.jsonl"):
        file.unlink()
    html, _ = page.write(plans[:1], store, tmp_path / "out")
    assert 'alt="accuracy"' in html.read_text() and 'alt="curves"' not in html.read_text()


def test_a_large_grid_has_the_settings_of_each_cell_once(experiment, tmp_path, monkeypatch):
    text = "base: {data: digits, student: resnet8, epochs: 2}\ngrid: {loss: [ce, ls]}\n"
    made = plan(experiment(text + "seeds: [0, 1, 2]"))
    monkeypatch.setattr(page, "MANY", 5)
    html, _ = page.write([made], Store(tmp_path / "none"), tmp_path / "out")
    found = re.findall(r'<(\w+) class="trial" id="t(\w+)"', html.read_text())
    kinds = dict((key, kind) for kind, key in found)
    assert [kinds[cell.trial.id] for cell in made.cells] == ["details", "div", "div"] * 2


def test_without_any_result_it_shows_what_is_reported(tmp_path):
    plans = [plan(load_experiment("divergences"))]
    html, _ = page.write(plans, Store(tmp_path / "none"), tmp_path / "out")
    text = html.read_text()
    assert "0 of 3 trials finished" in text and "69.83" in text and "All metrics" not in text


def test_the_summary_says_what_is_decided(experiment, tmp_path):
    text = "base: {data: digits, student: resnet8, teacher: resnet20, epochs: 1}\n"
    text += "grid: {loss: [ce, ls, kd, pld]}\nseeds: [0, 1, 2, 3]\n"
    made = plan(experiment(text))
    frame = frames.frame(made, Store(tmp_path / "none"))
    scores = {
        "ce": [1.0, 2.1, 3.0, 4.1],
        "ls": [9.0, 2.0, 7.0, 1.0],
        "kd": [5.0, 6.0, 7.0, 8.0],
        "pld": [4.0, 5.0, 6.0, 7.0],
    }
    frame["top1"] = [scores[cell.trial.loss.name][cell.trial.seed] for cell in made.cells]
    frame["finished"] = True
    said = summary.sentences(frame, comparison.tables(frame), "digits")
    assert said[0] == "Compared: CE, LS, KD, PLD, on digits, resnet20 → resnet8; 4 seeds each."
    # PLD minus CE: 3, 2.9, 3, 2.9; minus LS: -5, 3, -1, 6; minus KD: always -1
    half = 3.182446 * 0.0577350 / 2
    better = f"CE (+2.95 [+{2.95 - half:.2f}, +{2.95 + half:.2f}])"
    assert said[1] == (f"Decided at 5 % (paired t-test, Holm over 3): PLD is better than {better}.")
    assert said[2].startswith("Not decided: PLD against LS (+0.75 [−")
    assert said[3].endswith("PLD against KD (−1.00).") and "Nothing can be said" in said[3]
    assert len(said) == 4
    some = frame[(frame["seed"] == 0) | (frame["loss"] == "pld")]
    assert summary.sentences(some, comparison.tables(some), "digits")[0].endswith(
        "; 1 to 4 seeds each."
    )
