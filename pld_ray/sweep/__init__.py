"""Run the trials of a plan on Ray, with searches, early stopping, retries and a progress table.

Enters: a plan and a store. Leaves: a record in the store for every finished trial, and the reason
for every failed one.

Uses: losses, config, store, data, models, distill.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Ray reads these variables at import time, so they are set before any module imports Ray.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the store keeps all records
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Tune has no state to save
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # saves 6 s per TorchTrainer
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # a local Ray then uses 127.0.0.1
# a thread of Ray's telemetry outlives ray.shutdown() and can crash the process when it ends
os.environ.setdefault("RAY_enable_open_telemetry", "0")
if "ray" not in sys.modules and (  # an already imported Ray has read its settings
    {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    or Path.home().joinpath(".ray", "auth_token").exists()
):
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # also used to join a cluster
