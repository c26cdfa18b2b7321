import os
import signal
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch
import warm
from hypothesis import settings

os.environ.pop("RAY_ADDRESS", None)
_cache = tempfile.TemporaryDirectory(prefix="pld-ray-cache-")  # not that of the user
os.environ["XDG_CACHE_HOME"] = _cache.name
# Ray's default is 15: beside busy processes, its workers would then get almost no time.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - this is its name
# The tests compare bits with those of a CPU. `make test-gpu` runs those that compare with a GPU's.
if "PLD_RAY_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
LONG = {"test_workers", "test_teacher", "test_train", "test_triton"}  # without slow tests
settings.register_profile("thorough", max_examples=10_000)  # --hypothesis-profile=thorough
torch.set_num_threads(1)  # as in a trial's process: results then agree to the bit


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no process ends long after the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.stem not in LONG))


@pytest.fixture(autouse=True)
def _no_plugins_of_others():
    """Forget the plug-ins that a test has loaded: a later one may use their names."""
    yield
    plugins = sys.modules.get("pld_ray.plugins")
    for name in list(plugins.LOADED if plugins else ()):
        plugins._forget(name)


@pytest.fixture(scope="session")
def local_ray():
    """One Ray for all tests that need it."""
    from pld_ray.sweep import cluster  # sets Ray's environment before it starts

    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm.executable())
        cluster.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def experiment(tmp_path):
    """Write an experiment file and load it."""
    from pld_ray.config.experiment import load_experiment

    def write(text, *overrides, name="small"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return load_experiment(path, overrides)

    write.folder = tmp_path
    return write


@pytest.fixture
def cli(monkeypatch, capfd):
    """Run the command in this process, where torch is imported already: it takes seconds."""
    from pld_ray.cli.main import main

    def run(*arguments, cwd):
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["pld-ray", *map(str, arguments)])
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        stdout, stderr = capfd.readouterr()
        return SimpleNamespace(returncode=end.value.code or 0, stdout=stdout, stderr=stderr)

    return run


@pytest.fixture(scope="session")
def s3():
    """The URI of a bucket on an S3 server of our own; the environment says where it is."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()
