"""What is served, from the config in force and from what is on disk: joins the config's store with the search for models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from offloadd.backends.base import Backend
from offloadd.config.discovered import Served, Shelved, serve_found
from offloadd.observe.devices.aside import aside
from offloadd.registry.discovery.stores import Store, stores_of
from offloadd.registry.discovery.watch import Discovery
from offloadd.registry.readers import read_model
from offloadd.registry.recorder import Recorder
from offloadd.state.desired import DesiredState
from offloadd.state.found import Found, Shelf
from offloadd.state.ids import ModelName
from offloadd.state.launch import ModelFacts

_HINT = "see that the disk is mounted, and that the daemon's user may read it"


class Catalog:
    """The models that can be asked for. `changed` is called when that, or what is on disk, becomes something else."""

    def __init__(
        self,
        config: Callable[[], DesiredState],
        backends: Mapping[str, Backend],
        recorder: Recorder,
        changed: Callable[[], None],
    ) -> None:
        self._config = config
        self._backends = backends
        self._recorder = recorder
        self._changed = changed
        self._basis: tuple[object, object] = (None, None)
        self._served = Served()
        self._published: Mapping[ModelName, Found] = {}
        self.discovery = Discovery(stores=self._stores, read_shape=read_model, aside=aside, changed=self._other_files)

    @property
    def desired(self) -> DesiredState:
        """The config in force with the models on disk, if they are served: the same object until one of the two changes."""
        return self._look().desired

    @property
    def shelf(self) -> Mapping[ModelName, Shelved]:
        """Every model on disk that no entry of the config is about."""
        return self._look().shelf

    @property
    def specs(self) -> DesiredState:
        """As if all of them were served, those that were found a moment ago included."""
        return self.with_config(self._config())

    @property
    def problems(self) -> Mapping[str, str]:
        """Folders that could not be searched, and what to do."""
        return {f"{path} {why}": _HINT for path, why in self.discovery.problems.items()}

    def with_config(self, config: DesiredState) -> DesiredState:
        """The same as `specs` for another config."""
        return serve_found(config, self.discovery.found if config.discovery.enabled else {}, self._backends).specs

    def served_by(self, config: DesiredState) -> DesiredState:
        """What `desired` would be with another config."""
        return serve_found(config, self._found(config), self._backends).desired

    def facts(self) -> Mapping[str, ModelFacts]:
        """What is known of the files of found models, by path."""
        return self.discovery.facts if self._config().discovery.enabled else {}

    def begin(self, shelf: Shelf) -> None:
        """Start from what an earlier daemon saw."""
        if self._config().discovery.enabled:
            self.discovery.begin(shelf)
            self.publish()

    def publish(self) -> None:
        """Serve what was found; what it needs has been worked out by now."""
        self._published = self.discovery.found

    def reloaded(self) -> None:
        """The config is another: so may be the folders."""
        self.discovery.look_soon()

    def _look(self) -> Served:
        config = self._config()
        found = self._found(config)
        if self._basis[0] is not config or self._basis[1] is not found:
            self._basis = (config, found)
            self._served = serve_found(config, found, self._backends)
        return self._served

    def _found(self, config: DesiredState) -> Mapping[ModelName, Found]:
        return self._published if config.discovery.enabled else _NOTHING

    def _stores(self) -> Sequence[Store]:
        config = self._config()
        if not config.discovery.enabled:
            return ()
        stores = stores_of(config.storage.models_path, config.discovery.stores, os.environ)
        # The daemon's own folder has no models, and its logs change all the time.
        return [store for store in stores if Path(store.path) != Path(config.storage.data_dir)]

    def _other_files(self, changed: Mapping[str, Found | None]) -> None:
        self._recorder.found(changed)
        self._changed()


_NOTHING: Mapping[ModelName, Found] = {}
