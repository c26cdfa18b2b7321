"""Test fault tolerance: inject random faults while the demo's grid runs.

    .venv/bin/python benchmarks/chaos.py    # 50 faults, 20 minutes on 2 cores

The script runs `pld-ray run demo` without faults. Then it runs the same command in a second storage
and injects a fault every few seconds:

- a training process is killed, or stopped so that it hangs
- the driver is killed, interrupted or terminated
- a daemon or an actor of Ray is killed
- a file in the storage is truncated, or one of its bits is flipped
- the disk is full for two seconds (only if this process may mount a file system)
- a second driver starts on the same storage

When a driver has ended, the same command is started again. Each start draws whether trials run
alone or in gangs of up to four, so that they continue with other companions; in the run without
faults they run alone. After the last fault, the command runs
until it exits with code 0. The script prints how often each fault was injected, how many trials are
missing, how many have different weights than in the run without faults, and how many finished
trials were run again although none of their files was damaged. All three counts should be 0.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

PATIENCE = 10  # seconds without a step after which a process counts as hanging
COMMAND = (sys.executable, "-m", "pld_ray.cli", "run", "demo")
DISK = 32 * 2**20  # size of the storage's file system, in bytes


class Scene:
    """A storage, the drivers that use it, and the records seen so far.

    Attributes:
        storage: Folder of the storage.
        dice: Source of all random choices.
        drivers: The running drivers.
        seen: Trial id -> the finishing time in its record.
        damaged: Trials with a damaged file; these may run again.
        again: Trials that were run again although no file was damaged.
        codes: How many drivers ended with each exit code.
    """

    def __init__(self, storage: Path, dice: random.Random) -> None:
        self.storage, self.dice = storage, dice
        self.drivers: list[subprocess.Popen[bytes]] = []
        self.seen: dict[str, str] = {}
        self.damaged: set[str] = set()
        self.again: set[str] = set()
        self.codes: Counter[int] = Counter()

    def start(self) -> None:
        """Start one more driver, with gangs or without."""
        command = [*COMMAND, "--storage", self.storage, "--set", f"resources.patience={PATIENCE}"]
        command += ["--set", f"resources.gang={self.dice.choice((1, 4))}"]
        with open(self.storage.with_suffix(".log"), "ab") as log:
            self.drivers.append(subprocess.Popen(command, stdout=log, stderr=log))

    def look(self) -> None:
        """Remove the drivers that have ended, and update what is known of the records."""
        for driver in [d for d in self.drivers if d.poll() is not None]:
            self.codes[driver.returncode] += 1
            self.drivers.remove(driver)
        for trial, record in records(self.storage).items():
            before = self.seen.setdefault(trial, record["finished"])
            if before != record["finished"]:
                self.seen[trial] = record["finished"]
                if trial not in self.damaged:
                    self.again.add(trial)
                self.damaged.discard(trial)

    def processes(self, *names: str) -> list[psutil.Process]:
        """Return the child processes of all drivers whose program name starts with a given name."""
        found = []
        for driver in self.drivers:
            with suppress(psutil.Error):
                for process in psutil.Process(driver.pid).children(recursive=True):
                    with suppress(psutil.Error, IndexError):
                        word = process.cmdline()[0]
                        if any(word.rpartition("/")[2].startswith(name) for name in names):
                            found.append(process)
        return found


def records(storage: Path) -> dict[str, dict[str, Any]]:
    """Return the finishing time and weight hash of each readable record, by trial id."""
    found = {}
    for path in storage.glob("trials/*/record.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_bytes())
            found[path.parent.name] = {k: record[k] for k in ("finished", "weights_sha256")}
    return found


# A fault is a function that returns whether it could be injected.


def to_process(number: signal.Signals, *names: str) -> Callable[[Scene], bool]:
    """Return a fault that sends a signal to one of the processes with the given names."""

    def strike(scene: Scene) -> bool:
        processes = scene.processes(*names)
        if processes:
            with suppress(psutil.NoSuchProcess):
                scene.dice.choice(processes).send_signal(number)
        return bool(processes)

    return strike


def to_driver(number: signal.Signals) -> Callable[[Scene], bool]:
    """Return a fault that sends a signal to one of the drivers."""

    def strike(scene: Scene) -> bool:
        if scene.drivers:
            scene.dice.choice(scene.drivers).send_signal(number)
        return bool(scene.drivers)

    return strike


def damage(pattern: str) -> Callable[[Scene], bool]:
    """Return a fault that truncates a file or flips one of its bits.

    Args:
        pattern: Glob pattern of the files, relative to the storage.
    """

    def strike(scene: Scene) -> bool:
        paths = sorted(scene.storage.glob(pattern))
        if not paths:
            return False
        path = scene.dice.choice(paths)
        try:
            content = bytearray(path.read_bytes())
            if scene.dice.random() < 0.5 or not content:
                content = content[: len(content) // 2]
            else:
                content[scene.dice.randrange(len(content))] ^= 1 << scene.dice.randrange(8)
            if path.name in ("record.json", "student.safetensors"):
                scene.damaged.add(path.parent.name)
            path.write_bytes(content)
        except FileNotFoundError:  # the file is being replaced
            return False
        return True

    return strike


def another_driver(scene: Scene) -> bool:
    """Start a second driver on the same storage."""
    if len(scene.drivers) != 1:
        return False
    scene.start()
    return True


def full_disk(scene: Scene) -> bool:
    """Fill the storage's disk completely for two seconds."""
    if not scene.storage.is_mount():
        return False
    ballast = scene.storage / "ballast"
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    time.sleep(2)
    ballast.unlink()
    return True


FAULTS: dict[str, Callable[[Scene], bool]] = {
    "training process killed": to_process(signal.SIGKILL, "ray::ImplicitFunc"),
    "training process stopped": to_process(signal.SIGSTOP, "ray::ImplicitFunc"),
    "Ray's node daemon killed": to_process(signal.SIGKILL, "raylet"),
    "Ray's control daemon killed": to_process(signal.SIGKILL, "gcs_server"),
    "Ledger or LivenessMonitor actor killed": to_process(
        signal.SIGKILL, "ray::Ledger", "ray::LivenessMonitor"
    ),
    "driver killed": to_driver(signal.SIGKILL),
    "driver interrupted": to_driver(signal.SIGINT),
    "driver terminated": to_driver(signal.SIGTERM),
    "second driver started": another_driver,
    "checkpoint damaged": damage("trials/*/checkpoint.pt"),
    "record damaged": damage("trials/*/record.json"),
    "weights damaged": damage("trials/*/student.safetensors"),
    "epoch metrics damaged": damage("trials/*/epochs.jsonl"),
    "bank chunk damaged": damage("banks/*/*/*.logits"),
    "bank description damaged": damage("banks/*/bank.json"),
    "disk full": full_disk,
}


def disturb(scene: Scene, faults: int, console: Console) -> Counter[str]:
    """Inject faults, then run the command until it succeeds.

    Args:
        scene: The storage and its drivers.
        faults: Number of faults to inject; injection also ends after one hour.
        console: Where each fault is printed.

    Returns:
        How often each fault was injected.
    """
    struck: Counter[str] = Counter()
    names: list[str] = []
    deadline = time.monotonic() + 3600
    while struck.total() < faults and time.monotonic() < deadline:
        if not scene.drivers:
            scene.start()
        time.sleep(scene.dice.uniform(2, 15))
        scene.look()
        if not names:  # every fault has its turn, in a new order in each round
            names = scene.dice.sample(list(FAULTS), len(FAULTS))
        name = names.pop()
        if FAULTS[name](scene):
            struck[name] += 1
            console.print(f"{struck.total():3} {name}", highlight=False)
    for _ in range(10):
        while scene.drivers:
            time.sleep(0.5)
            scene.look()
        scene.start()
        code = scene.drivers[-1].wait()
        scene.look()
        if code == 0:
            break
    return struck


def main() -> None:
    """Run the demo without and with faults, compare the results and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=50, help="number of faults to inject")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random faults")
    parser.add_argument("--keep", type=Path, help="folder to work in; it is not deleted")
    given = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        folder.mkdir(exist_ok=True)
        whole = folder / "whole"
        alone = "--set", "resources.gang=1"
        subprocess.run(
            [*COMMAND, "--storage", whole, *alone], stdout=subprocess.DEVNULL, check=True
        )
        storage = folder / "disturbed"
        storage.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", storage]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        scene = Scene(storage, random.Random(given.seed))
        try:
            struck = disturb(scene, given.faults, console)
            expected, found = records(whole), records(storage)
        finally:
            for driver in scene.drivers:
                driver.kill()
            if mounted:
                subprocess.run(["umount", "-l", storage], check=False)
    table = Table(box=box.MARKDOWN)
    table.add_column("fault")
    table.add_column("times", justify="right")
    for fault, times in sorted(struck.items()):
        table.add_row(fault, str(times))
    console.print(table)
    other = sum(
        record["weights_sha256"] != expected[trial]["weights_sha256"]
        for trial, record in found.items()
    )
    codes = ", ".join(f"{code} ({n} times)" for code, n in sorted(scene.codes.items()))
    console.print(f"drivers ended with {codes}", highlight=False)
    console.print(
        f"{struck.total()} faults over {len(expected)} trials: "
        f"{len(expected.keys() - found.keys())} missing, {other} with different weights, "
        f"{len(scene.again)} run again without need",
        highlight=False,
    )
    sys.exit(bool(expected.keys() ^ found.keys() or other or scene.again))


if __name__ == "__main__":
    main()
