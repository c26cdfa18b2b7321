"""Sweeps: the trials of a plan on Ray, with searches, early stopping, retries and progress.

Enters: a plan and a store. Leaves: a record in the store for every trial that finished, and the
reasons of those that failed.

Uses: losses, config, store, data, models, distill.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Ray reads these when it is imported, so they are set before any module here imports it.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # our store keeps the records
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Tune has nothing to save
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # saves 6 s per TorchTrainer
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # a local Ray uses 127.0.0.1
if "ray" not in sys.modules and (  # a Ray that is already imported has decided this
    {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    or Path.home().joinpath(".ray", "auth_token").exists()
):
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # also for clusters that are joined
