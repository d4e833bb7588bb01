"""What is served, from the config in force and from what is on disk: joins the config's store with the search for models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from offloadd import lasting
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

MOST_MADE = 4
"""Of the config in force and of one that is about to be, each with the files of now and of a moment ago."""
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
        self._made: list[tuple[DesiredState, Mapping[ModelName, Found], Served]] = []
        """What was worked out, what was asked for last first: for what is served, and for what is about to be."""
        self._looked: tuple[DesiredState | None, Mapping[ModelName, Found], Served | None] = (None, _NOTHING, None)
        """What was asked for last of that: every request asks."""
        self._searched: tuple[object, Sequence[Store]] = (None, ())
        self._published: Mapping[ModelName, Found] = {}
        self.discovery = Discovery(stores=self._stores, read_shape=read_model, changed=self._other_files)

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
        return self._make(config, self._on_disk(config)).specs

    def served_by(self, config: DesiredState) -> DesiredState:
        """What `desired` would be with another config."""
        return self._make(config, self._found(config)).desired

    async def prepare(self, config: DesiredState) -> None:
        """Work out in a thread what the other calls will be asked for: thousands of models would hold up the loop for long."""
        for found in (self._found(config), self._on_disk(config)):
            if self._known(config, found) is None:
                before = self._nearest(config)
                served = await aside(partial(serve_found, config, found, self._backends, before), name="models on disk")
                self._keep(config, found, served)

    def facts(self) -> Mapping[str, ModelFacts]:
        """What is known of the files of found models, by path."""
        return self.discovery.facts if self._config().discovery.enabled else _NO_FACTS

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
        config, published = self._config(), self._published
        of, on, made = self._looked
        if made is None or of is not config or on is not published:
            made = self._make(config, self._found(config))
            self._looked = (config, published, made)
        return made

    def _make(self, config: DesiredState, found: Mapping[ModelName, Found]) -> Served:
        served = self._known(config, found)
        if served is None:
            served = serve_found(config, found, self._backends, self._nearest(config))
            self._keep(config, found, served)
        return served

    def _known(self, config: DesiredState, found: Mapping[ModelName, Found]) -> Served | None:
        for index, (of, on, made) in enumerate(self._made):
            if of is config and on is found:
                self._made.insert(0, self._made.pop(index))
                return made
        return None

    def _nearest(self, config: DesiredState) -> Served | None:
        return next((made for of, _, made in self._made if of is config), None)

    def _keep(self, config: DesiredState, found: Mapping[ModelName, Found], served: Served) -> None:
        lasting.made(len(served.shelf))
        self._made = [(config, found, served), *self._made[: MOST_MADE - 1]]

    def _on_disk(self, config: DesiredState) -> Mapping[ModelName, Found]:
        return self.discovery.found if config.discovery.enabled else _NOTHING

    def _found(self, config: DesiredState) -> Mapping[ModelName, Found]:
        return self._published if config.discovery.enabled else _NOTHING

    def _stores(self) -> Sequence[Store]:
        """What to search. Blocks, for it looks into folders."""
        config = self._config()
        if not config.discovery.enabled:
            return ()
        if self._searched[0] is config:
            return self._searched[1]
        stores = stores_of(config.storage.models_path, config.discovery.stores, os.environ)
        # The daemon's own folder has no models, and its logs change all the time.
        stores = [store for store in stores if Path(store.path) != Path(config.storage.data_dir)]
        if config.discovery.stores == "auto":
            self._searched = (config, stores)  # how a folder that the config names is laid out may change
        return stores

    def _other_files(self, changed: Mapping[str, Found | None]) -> None:
        self._recorder.found(changed)
        self._changed()


_NOTHING: Mapping[ModelName, Found] = {}
_NO_FACTS: Mapping[str, ModelFacts] = {}
