"""The ready instances, as the proxy sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from offloadd.backends.base import Backend, TellsLoad, backend_of
from offloadd.proxy.lease import Host
from offloadd.runtime.executor import Executor
from offloadd.runtime.signals import Asked
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import BackendName, InstanceId, ModelName
from offloadd.state.launch import EngineApi
from offloadd.state.observed import InstanceState


class ReadyHosts:
    """Looked up when they are asked for, and kept until something about instances or the config has changed."""

    def __init__(
        self, executor: Callable[[], Executor], desired: Callable[[], DesiredState], backends: Mapping[str, Backend]
    ) -> None:
        self._executor = executor
        self._desired = desired
        self._backends = backends
        self._kept: dict[ModelName, Sequence[Host]] = {}
        self._apis: tuple[object, dict[tuple[ModelName, BackendName], tuple[ModelSpec, EngineApi]]] = (None, {})
        """What engines speak for each model, under one config: every request asks for it."""

    def of(self, model: ModelName) -> Sequence[Host]:
        """The model's; those that were ejected only when there are no others."""
        found = self._kept.get(model)
        if found is None:
            found = self._kept[model] = self._look_up(model)
        return found

    def changed(self) -> None:
        """Look anew from now on."""
        self._kept.clear()

    def api(self, spec: ModelSpec, name: BackendName) -> EngineApi:
        """What the engine speaks for this model; no more than the usual where its adapter is not known any more."""
        config = self._desired()
        if self._apis[0] is not config:
            self._apis = (config, {})
        known = self._apis[1].get((spec.name, name))
        if known is None or known[0] is not spec:
            backend = self._backend(name)
            known = self._apis[1][spec.name, name] = (spec, backend.api(spec) if backend else EngineApi())
        return known[1]

    def choices(self, leases: Mapping[InstanceId, int], looked_on: bool) -> list[Asked]:
        """Instances that can be asked for their load, while requests of ours run on any of their model's.

        Of models that have several; of all where that is looked on.
        """
        found: list[Asked] = []
        for model in {key.model for key in leases}:
            hosts = self.of(model)
            if (looked_on or len(hosts) > 1) and any(host.instance in leases for host in hosts):
                found += [asked for host in hosts if (asked := self._asked(host)) is not None]
        return found

    def _asked(self, host: Host) -> Asked | None:
        instance = self._executor().get(host.instance)
        backend: object = self._backend(host.backend)
        if instance is None or not isinstance(backend, TellsLoad):
            return None
        return Asked(instance=host.instance, spec=instance.view().spec, endpoint=host.endpoint, backend=backend)

    def _look_up(self, model: ModelName) -> Sequence[Host]:
        found: list[Host] = []
        ejected: list[Host] = []
        executor = self._executor()
        for key, view in executor.views().items():
            instance = executor.get(key)
            if key.model == model and view.state is InstanceState.READY and view.endpoint and instance:
                backend = self._backend(view.backend)
                (ejected if view.ejected else found).append(
                    Host(
                        instance=key,
                        backend=view.backend,
                        endpoint=view.endpoint,
                        slots=view.spec.parallel,
                        sign=instance.sign,
                        cancels_only_streams=backend is not None and backend.cancels_only_streams,
                        api=self.api(view.spec, view.backend),
                    )
                )
        return found or ejected

    def _backend(self, name: BackendName) -> Backend | None:
        return backend_of(self._backends, self._desired().engines.get(name))
