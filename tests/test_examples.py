"""The examples of loops: each trains a student that is better than chance, in under 60 lines."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["timm_loop", "lightning_module", "accelerate_loop"])
def test_an_example_trains_a_student(name, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(name).main(epochs=8) > 0.5  # of ten classes
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60
