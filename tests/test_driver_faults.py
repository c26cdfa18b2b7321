"""Faults of the command itself while an experiment runs: one fault a test, nothing is lost."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import warm
from faults import LIMIT, command, finishes, results, store, under_way, wait, whole

pytestmark = pytest.mark.slow


class Driver:
    """The command as a process, with a Ray of its own."""

    def __init__(self, path, storage):
        self.printed = Path(storage).with_name("printed.txt")
        self.process = warm.command("run", path, "--storage", storage, output=self.printed)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.join()

    def output(self):
        """Wait until the command has ended, and return what it printed."""
        self.process.join(LIMIT)
        assert self.process.exitcode is not None
        return self.printed.read_text()

    def wait_for(self, condition):
        """Wait for something that the command brings about."""
        wait(lambda: condition() or not self.process.is_alive())
        if not self.process.is_alive():
            pytest.fail(f"the command has ended early: {self.output()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_told_to_stop(whole, store, finishes, number):
    path, made, *_ = whole
    with Driver(path, store.uri) as driver:
        driver.wait_for(lambda: under_way(store, made))
        assert listening(driver) == {"127.0.0.1"}
        os.kill(driver.process.pid, number)
        output = driver.output()
    assert driver.process.exitcode == 128 + number
    assert output.endswith("stopped; run the same command again to resume\n")
    assert "Traceback" not in output
    assert len(results(made, store)) < len(made.trials)  # it did not wait for them
    finishes()


def listening(driver):
    """The addresses on which a driver and the processes it has started listen."""
    here = psutil.Process(driver.process.pid)
    found = set()
    for process in (here, *here.children(recursive=True), *warm.workers()):
        with suppress(psutil.Error):
            sockets = process.net_connections("inet")
            found |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    return {ip.removeprefix("::ffff:") for ip in found}


def test_a_driver_that_is_killed(whole, store, finishes):
    path, made, *_ = whole
    with Driver(path, store.uri) as driver:
        driver.wait_for(lambda: under_way(store, made))
        driver.process.kill()
        driver.output()
    before = store.records(made.trials)
    output = finishes()
    if len(before) < len(made.trials):
        left = len(made.trials) - len(before)
        assert f"{left} trials to run, {len(before)} done before" in output
    assert re.search(r"^\| PLD +\| +\d\d\.\d\d ", output, re.MULTILINE)
    assert before.items() <= store.records(made.trials).items()  # not run again
    left = [*Path(store.uri).rglob("claim-*"), *Path(store.uri).rglob("drivers/*")]
    assert not left


def test_two_drivers_share_the_work_and_a_killed_one_leaves_it_to_the_other(whole, store, finishes):
    path, made, *_ = whole
    with Driver(path, store.uri) as other:
        other.wait_for(lambda: under_way(store, made))  # the other driver has one of the two trials

        def kill():
            wait(lambda: len(list(Path(store.uri).rglob("claim-*"))) == 2)
            other.process.kill()
            other.output()

        finishes(meanwhile=kill)
