"""Ask the server of `warm` to fork a worker of Ray, or run the real Python for anything else."""

import json
import os
import socket
import sys
from pathlib import Path

WORKERS = ("setup_worker.py", "default_worker.py")  # in ray/_private/workers


def ask(address: str, arguments: list[str]) -> None:
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


if __name__ == "__main__":
    ask(sys.argv[1], sys.argv[2:])
