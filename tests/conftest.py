import os

import pytest
import torch

os.environ.pop("RAY_ADDRESS", None)
torch.set_num_threads(1)  # as in a trial's process: results then agree to the bit


@pytest.fixture(scope="session")
def local_ray():
    """One Ray for all tests that need it."""
    import pld_ray.sweep  # noqa: F401 - sets Ray's environment before it starts

    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def experiment(tmp_path):
    """Write an experiment file and load it."""
    from pld_ray.experiment import load_experiment

    def write(text, *overrides, name="small"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return load_experiment(path, overrides)

    write.folder = tmp_path
    return write
