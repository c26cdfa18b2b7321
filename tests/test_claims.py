import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from uuid import uuid4

import pytest

from pld_ray.store.claims import Claims, born
from pld_ray.store.files import Files


@pytest.fixture(params=["local", "s3"])
def files(request, tmp_path):
    if request.param == "local":
        return Files(tmp_path)
    return Files(f"{request.getfixturevalue('s3')}/{uuid4().hex}")


def test_one_driver_has_a_trial_until_it_gives_it_back(files):
    with Claims(files) as one, Claims(files) as two:
        assert one.take("a") and one.take("a") and not two.take("a")
        assert two.take("b") and not one.take("b")
        one.release("a")
        assert two.take("a") and not one.take("a")
    assert files.listed("drivers") == {} and files.listed("trials") == {}
    with Claims(files) as three:
        assert three.take("a")


def elsewhere(files, name, **sign):
    """Another machine's driver that holds trial a."""
    files.write(f"drivers/{name}.json", json.dumps({"machine": "other", "pid": 1} | sign).encode())
    files.write(f"trials/a/claim-{name}.json", b"{}")


@pytest.mark.parametrize(
    "sign, taken",
    [
        ({"until": time.time() + 3600}, False),
        ({"until": time.time() - 1}, True),  # it has been silent for too long
        ({"until": "soon"}, True),
        ({}, True),
    ],
)
def test_a_claim_from_another_machine_holds_while_it_is_renewed(files, sign, taken):
    elsewhere(files, "far", **sign)
    with Claims(files) as here:
        assert here.take("a") is taken
        assert ("claim-far.json" in files.listed("trials/a")) is not taken


@pytest.mark.parametrize("sign", [b"", b"{", b"[]", None])
def test_a_driver_whose_sign_is_damaged_is_dead(files, sign):
    files.write("trials/a/claim-nobody.json", b"{}")
    if sign is not None:
        files.write("drivers/nobody.json", sign)
    with Claims(files) as here:
        assert here.take("a")


def test_a_claim_of_a_process_that_is_dead_is_free_at_once(tmp_path):
    code = (
        "import sys, time\nfrom pld_ray.store.claims import Claims\n"
        "from pld_ray.store.files import Files\n"
        "with Claims(Files(sys.argv[1])) as claims:\n"
        "    print(claims.take('a'), flush=True)\n    time.sleep(100)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        with Claims(Files(tmp_path)) as here:
            assert not here.take("a")
            other.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 10  # the process is a zombie then: not waited for
            while not here.take("a"):
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_when_a_process_began():
    assert born(os.getpid()) == born(os.getpid()) > born(1)
    assert born(2**22 + 1) is None


def test_signs_are_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(Claims, "LEASE", 0.6)
    with Claims(Files(tmp_path)) as claims:
        path = tmp_path / "drivers" / f"{claims.name}.json"
        first = json.loads(path.read_text())["until"]
        time.sleep(1.0)
        assert json.loads(path.read_text())["until"] > max(first, time.time())


def test_a_driver_that_begins_removes_what_dead_drivers_left(files):
    elsewhere(files, "dead", until=time.time() - 1)
    elsewhere(files, "far", until=time.time() + 3600)
    files.write("trials/a/record.json", b"{}")
    with Claims(files) as here:
        assert set(files.listed("drivers")) == {f"{here.name}.json", "far.json"}
        assert set(files.listed("trials/a")) == {"record.json", "claim-far.json"}


def _race(root, start, won):
    files = Files(root)
    with Claims(files) as claims:
        start.wait()
        won.put([str(i) for i in range(40) if claims.take(str(i))])
        time.sleep(4)  # the others see that this one lives


@pytest.mark.parametrize("dead", [False, True])
def test_of_many_drivers_one_has_each_trial(tmp_path, dead):
    if dead:  # the claims of a driver that was killed are there to be taken
        for i in range(40):
            Files(tmp_path).write(f"trials/{i}/claim-gone.json", b"{}")
    spawn = multiprocessing.get_context("spawn")
    start, won = spawn.Event(), spawn.Queue()
    drivers = [spawn.Process(target=_race, args=(str(tmp_path), start, won)) for _ in range(4)]
    for driver in drivers:
        driver.start()
    time.sleep(1)
    start.set()
    taken = [won.get(timeout=400) for _ in drivers]
    for driver in drivers:
        driver.join()
    trials = [trial for mine in taken for trial in mine]
    assert len(trials) == len(set(trials)) > 20  # none has two; few were given up by both
