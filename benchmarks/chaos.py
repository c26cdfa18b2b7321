"""What is lost when everything goes wrong: random faults over the demo's grid.

    .venv/bin/python benchmarks/chaos.py    # 50 faults, a quarter of an hour on 2 cores

Runs `pld-ray run demo` undisturbed, then again in another storage while every few seconds something
happens: a process that trains is killed, or stopped so that it hangs; the driver is killed, or told
to stop; a daemon of Ray is killed; a file of the storage is cut short or has a bit flipped; the
disk is full for a while (where this process may mount one); a second driver starts on the same
storage. A driver that has ended is started again with the same command. When all faults are done
the command runs until it exits with 0. Printed: how often each fault struck, how many trials are
missing, how many have other weights than the undisturbed run's, and how many that had finished
were run again though nothing of theirs was damaged. The aim is 0 of each.
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

PATIENCE = 10  # seconds until a stopped process is taken to hang
COMMAND = (sys.executable, "-m", "pld_ray.cli", "run", "demo")
DISK = 32 * 2**20  # bytes


class Scene:
    """A storage, the drivers at work on it, and what is known of its records."""

    def __init__(self, storage: Path, dice: random.Random) -> None:
        self.storage, self.dice = storage, dice
        self.drivers: list[subprocess.Popen[bytes]] = []
        self.seen: dict[str, str] = {}  # trial -> when its record says it finished
        self.damaged: set[str] = set()  # trials that may run again
        self.again: set[str] = set()  # trials that did, though they should not have
        self.codes: Counter[int] = Counter()

    def start(self) -> None:
        """One more driver."""
        command = [*COMMAND, "--storage", self.storage, "--set", f"resources.patience={PATIENCE}"]
        with open(self.storage.with_suffix(".log"), "ab") as log:
            self.drivers.append(subprocess.Popen(command, stdout=log, stderr=log))

    def look(self) -> None:
        """Drop drivers that have ended; note which trials have a record, and since when."""
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
        """Of all drivers, those whose command line begins with one of the names."""
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
    """What can be read of the records, by trial."""
    found = {}
    for path in storage.glob("trials/*/record.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_bytes())
            found[path.parent.name] = {k: record[k] for k in ("finished", "weights_sha256")}
    return found


# ---------------------------------------------------------------- the faults; True: it struck


def to_process(number: signal.Signals, *names: str) -> Callable[[Scene], bool]:
    """A signal for one of the processes so named."""

    def strike(scene: Scene) -> bool:
        processes = scene.processes(*names)
        if processes:
            with suppress(psutil.NoSuchProcess):
                scene.dice.choice(processes).send_signal(number)
        return bool(processes)

    return strike


def to_driver(number: signal.Signals) -> Callable[[Scene], bool]:
    """A signal for one of the drivers."""

    def strike(scene: Scene) -> bool:
        if scene.drivers:
            scene.dice.choice(scene.drivers).send_signal(number)
        return bool(scene.drivers)

    return strike


def damage(pattern: str) -> Callable[[Scene], bool]:
    """Cut a file short or flip one of its bits."""

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
        except FileNotFoundError:  # it has just been replaced
            return False
        return True

    return strike


def another_driver(scene: Scene) -> bool:
    """A second one on the same storage."""
    if len(scene.drivers) != 1:
        return False
    scene.start()
    return True


def full_disk(scene: Scene) -> bool:
    """Not a byte left for two seconds."""
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
    "a process that trains killed": to_process(signal.SIGKILL, "ray::ImplicitFunc"),
    "a process that trains stopped": to_process(signal.SIGSTOP, "ray::ImplicitFunc"),
    "Ray's node daemon killed": to_process(signal.SIGKILL, "raylet"),
    "Ray's control daemon killed": to_process(signal.SIGKILL, "gcs_server"),
    "the Ledger or the Watch killed": to_process(signal.SIGKILL, "ray::Ledger", "ray::Watch"),
    "the driver killed": to_driver(signal.SIGKILL),
    "the driver interrupted": to_driver(signal.SIGINT),
    "the driver terminated": to_driver(signal.SIGTERM),
    "a second driver started": another_driver,
    "a checkpoint damaged": damage("trials/*/checkpoint.pt"),
    "a record damaged": damage("trials/*/record.json"),
    "weights damaged": damage("trials/*/student.safetensors"),
    "metrics of epochs damaged": damage("trials/*/epochs.jsonl"),
    "a chunk of the bank damaged": damage("banks/*/*/*.logits"),
    "the description of a bank damaged": damage("banks/*/bank.json"),
    "the disk full": full_disk,
}


def disturb(scene: Scene, faults: int, console: Console) -> Counter[str]:
    """Strike so many times, then let the command come to its end."""
    struck: Counter[str] = Counter()
    names: list[str] = []
    deadline = time.monotonic() + 3600
    while struck.total() < faults and time.monotonic() < deadline:
        if not scene.drivers:
            scene.start()
        time.sleep(scene.dice.uniform(2, 15))
        scene.look()
        if not names:  # each in turn, in a new order every round
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
    """Run both, compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder to work in, not deleted then")
    given = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        folder.mkdir(exist_ok=True)
        whole = folder / "whole"
        subprocess.run([*COMMAND, "--storage", whole], stdout=subprocess.DEVNULL, check=True)
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
        f"{len(expected.keys() - found.keys())} missing, {other} with other weights, "
        f"{len(scene.again)} run again for nothing",
        highlight=False,
    )
    sys.exit(bool(expected.keys() ^ found.keys() or other or scene.again))


if __name__ == "__main__":
    main()
