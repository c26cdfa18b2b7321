"""Start processes by forking one that has imported torch and timm.

Importing torch and timm takes seven seconds of a slow core, and the tests start more than a hundred
processes that need them. `start` runs Python code in such a process. Ray starts its workers by
`sys.executable`, so the tests set it to `executable()`: a script that asks a server process to
fork. Everything else that the script is given, it runs with the real Python.
"""

import functools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import select
import shlex
import signal
import socket
import sys
import tempfile
from pathlib import Path
from unittest import mock

CLIENT = Path(__file__).with_name("warm_client.py").resolve()
# Not Ray: it reads the variables of a worker when it is imported.
IMPORTED = (
    *("torch._dynamo", "torch.distributed", "timm", "pandas", "pyarrow.fs", "pydantic", "rich"),
    *("attr", "colorful", "fsspec", "google.protobuf", "jsonschema", "msgpack", "psutil"),
    *("requests", "scipy.stats", "yaml"),
)
# The command of pld-ray, with workers that start fast.
COMMAND = """
import sys
sys.executable = sys.argv.pop(1)
from pld_ray.cli.main import main
main()
"""


def start(code: str, *arguments: object, output: Path | None = None) -> multiprocessing.Process:
    """Run code in a process of its own, as `python -c` does.

    Args:
        code: Python code.
        *arguments: What it finds in sys.argv.
        output: A file for what it prints, errors included.
    """
    given = ["-c", *map(str, arguments)]
    task = code, given, output, dict(os.environ), os.getcwd()
    process = _context().Process(target=_run, args=task)
    process.start()
    return process


def command(*arguments: object, output: Path) -> multiprocessing.Process:
    """Run the command of pld-ray in a process of its own."""
    return start(COMMAND, executable(), *arguments, output=output)


def workers():
    """Return the workers that were started by this process of the tests."""
    import psutil

    return psutil.Process(_server()[1].pid).children()


def executable() -> str:
    """Return the path of a Python that starts Ray's workers fast."""
    return str(_server()[0])


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    """Return how processes are started: they are forked from one with the modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # as Ray sets it for a worker
        multiprocessing.forkserver.ensure_running()
    return context


def _run(code, arguments, output, environment, folder) -> None:
    """Run code as `python -c` does."""
    _become_like(environment, folder)
    if output is not None:
        with open(output, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    sys.argv = arguments
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def _become_like(environment, folder) -> None:
    """Take over the environment and the working folder of another process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)


@functools.cache
def _server() -> tuple[Path, multiprocessing.Process]:
    """Return the script that starts workers, and the process that it asks for them."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    script, address = folder / "python", folder / "socket"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {CLIENT} {address} "$@"\n')
    script.chmod(0o755)
    ended, ending = _context().Pipe(duplex=False)  # it ends with this process
    server = _context().Process(target=_serve, args=(str(address), ended), daemon=True)
    server.start()
    ended.close()
    server.ending = ending
    while not address.exists():
        assert server.is_alive()
        multiprocessing.connection.wait([server.sentinel], timeout=0.05)
    return script, server


def _serve(address: str, ended: multiprocessing.connection.Connection) -> None:
    """Fork for each request, and go on in the fork as the process that was asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{address}.new")
        server.listen(64)
        os.rename(f"{address}.new", address)
        while ended not in select.select([server, ended], [], [])[0]:
            client, _ = server.accept()
            size, files, *_ = socket.recv_fds(client, 8, 3)
            with client, client.makefile("rb") as stream:
                request = json.loads(stream.read(int.from_bytes(size, "big")))
                forked = os.fork() == 0
            if forked:
                break
            for file in files:
                os.close(file)
        else:
            return
    ended.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgrp()  # Ray kills the group of a worker that has ended
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    arguments, environment, folder = request
    _become_like(environment, folder)
    os.execvp = functools.partial(_exec, os.execvp)
    _become(arguments)


def _exec(real, file: str, args: list[str]) -> None:
    """Go on in this process where setup_worker.py would start Python once more."""
    words = shlex.split(args[-1])
    if words[0] != "exec":  # it has something else to do before
        real(file, args)
    _become(words[2:])
    sys.exit()


def _become(arguments: list[str]) -> None:
    """Run a script as Python would."""
    places = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = arguments
    sys.path[:1] = [str(Path(arguments[0]).parent), *places]
    runpy.run_path(arguments[0], run_name="__main__")
