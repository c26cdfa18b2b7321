"""Start Ray's workers by forking a process that has imported torch and timm.

A worker imports torch, timm and Ray before it does anything. That takes ten seconds of a slow core,
and the tests start more than a hundred workers. Ray starts them by `sys.executable`, so the tests
set it to `executable()`: a script that asks one server process to fork. Everything else that the
script is given, it runs with the real Python.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

WORKERS = ("setup_worker.py", "default_worker.py")  # in ray/_private/workers
# Not Ray: it reads the variables of a worker when it is imported.
IMPORTED = (
    *("torch._dynamo", "torch.distributed", "timm", "pandas", "pyarrow.fs", "pydantic", "rich"),
    *("attr", "colorful", "fsspec", "google.protobuf", "jsonschema", "msgpack", "psutil"),
    *("requests", "scipy.stats", "yaml"),
)
# The first arguments of Python to run the command of pld-ray, with such workers.
COMMAND = """
import sys
sys.executable = sys.argv.pop(1)
from pld_ray.cli.main import main
main()
"""


def command(*arguments: object) -> list[str]:
    """Return how to start the command of pld-ray in a process of its own."""
    return [sys.executable, "-c", COMMAND, executable(), *map(str, arguments)]


def workers():
    """Return the workers that were started by this process of the tests."""
    import psutil

    return psutil.Process(_server().pid).children()


@functools.cache
def executable() -> str:
    """Return the path of a Python that starts Ray's workers fast."""
    return str(Path(_server().args[-1]).with_name("python"))


@functools.cache
def _server() -> subprocess.Popen:
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    script, address = folder / "python", folder / "socket"
    script.write_text(
        f'#!/bin/sh\nexec {sys.executable} -IS {Path(__file__).resolve()} {address} "$@"\n'
    )
    script.chmod(0o755)
    server = subprocess.Popen(  # one thread, as Ray sets it for a worker; it ends with its stdin
        [sys.executable, __file__, str(address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert server.stdout.readline() == b"ready\n"
    atexit.register(server.kill)
    return server


def _ask(address: str, arguments: list[str]) -> None:
    """Have a worker forked, or run what is no worker."""
    given = [argument for argument in arguments if argument != "-u"]
    if not given or Path(given[0]).name not in WORKERS:
        os.execv(sys.executable, [sys.executable, *arguments])
    request = json.dumps([given, dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        server.recv(1)  # until it is there


def _serve(address: str) -> None:
    """Fork for each request; return in the fork, as the process that was asked for."""
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        print("ready", flush=True)
        while True:
            if sys.stdin in select.select([server, sys.stdin], [], [])[0]:
                return
            client, _ = server.accept()
            size, files, *_ = socket.recv_fds(client, 8, 3)
            with client, client.makefile("rb") as stream:
                request = json.loads(stream.read(int.from_bytes(size, "big")))
                if os.fork() == 0:
                    break
            for file in files:
                os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgrp()  # Ray kills the group of a worker that has ended
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    arguments, environment, folder = request
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
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


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _serve(sys.argv[1])
    else:
        _ask(sys.argv[1], sys.argv[2:])
