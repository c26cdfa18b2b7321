"""Identify the data of an experiment by what it holds, also where the data is not at hand."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from pld_ray import plugins
from pld_ray.config.parts import WHERE, Data
from pld_ray.data import datasets
from pld_ray.data.images import Images
from pld_ray.errors import MissingError
from pld_ray.store.store import Store


@dataclass
class DataIdentity:
    """Finds the fingerprint of each dataset once, and remembers what the user should know.

    A dataset that is not on this machine gets the fingerprint that it had when trials in the store
    were trained on it, so that results can be shown without the data.

    Attributes:
        store: Holds the descriptions of the datasets on which trials were trained.
        download: Whether a dataset of a hub may be downloaded.
        fingerprints: What was found, by the fields that say where data is.
        notes: Sentences for the user.
    """

    store: Store
    download: bool = False
    fingerprints: dict[Any, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __call__(self, data: Data) -> str | None:
        """Return the fingerprint of a dataset; None if it has none, or if it is not known.

        Raises:
            InputError: The dataset cannot be used.
        """
        key = datasets.sharing_key(data)
        if key not in self.fingerprints:
            self.fingerprints[key] = self._find(data)
        return self.fingerprints[key]

    def _find(self, data: Data) -> str | None:
        try:
            if self.download:
                found = datasets.identify(data)
            else:
                with datasets.without_downloads():
                    found = datasets.identify(data)
        except MissingError as error:
            return data.fingerprint or self._remembered(data, error)
        if found is not None:
            self._tell_others(data, found)
        return found

    def _remembered(self, data: Data, missing: MissingError) -> str | None:
        """Return the fingerprint that a dataset had when it was last used, and note it."""
        used = [about for about in self.store.datasets() if _similar(about, data)]
        exact = [about for about in used if about["name"] == data.name]
        candidates = {about["fingerprint"]: about for about in exact or used}
        if not candidates or (not exact and len(candidates) > 1):
            if not self.download:  # else the run says that it is missing
                self.notes.append(
                    f"{missing}. Without the data, trials that were trained on it cannot be "
                    "recognised"
                )
            return None
        about = max(candidates.values(), key=lambda about: about["used"])
        self.notes.append(
            f"data {data.name!r} is not on this machine: results are those of the data with the "
            f"fingerprint {about['fingerprint']}, last used on {about['used'][:10]} as "
            f"{about['name']} on {about['host']}"
        )
        return str(about["fingerprint"])

    def _tell_others(self, data: Data, fingerprint: str) -> None:
        """Note that trials in the store were trained on other data that had the same name."""
        others = {
            about["fingerprint"]
            for about in self.store.datasets()
            if about["name"] == data.name and _similar(about, data)
        } - {fingerprint}
        if others:
            self.notes.append(
                f"data {data.name!r} has changed: trials on its content now, with the fingerprint "
                f"{fingerprint}, are other trials than those on its content before "
                f"({', '.join(sorted(others))}), whose results stay in the storage"
            )


def changed_plugins(store: Store) -> list[str]:
    """Return sentences about plug-ins whose source was another when trials in the store used it."""
    kept, notes = store.plugins(), []
    for name, plugin in plugins.LOADED.items():
        if older := kept.get(name, set()) - {plugin.digest}:
            notes.append(
                f"plug-in {name} has changed: trials that use it now, with the digest "
                f"{plugin.digest}, are other trials than those before "
                f"({', '.join(sorted(older))}), whose results stay in the storage"
            )
    return notes


def _similar(about: dict[str, Any], data: Data) -> bool:
    """Return whether a description in the store can be that of a dataset, moved or not."""
    kinds = about["name"].partition(":"), data.name.partition(":")
    said = data.model_dump(mode="json", include={"columns", "split", "config"})
    names = [PurePath(kind[2]).name for kind in kinds]
    return (
        kinds[0][0] == kinds[1][0]
        and names[0] == names[1]
        and all(about.get(name) == value for name, value in said.items())
    )


def dataset_entry(data: Data, images: Images) -> dict[str, Any]:
    """Return what the store keeps about a dataset that trials are trained on."""
    return {
        **data.model_dump(mode="json", include={*WHERE, "fingerprint", "root"}),
        "classes": list(images.class_names),
        "host": platform.node(),
        "used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
