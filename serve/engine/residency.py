"""Which adapters are in memory: on the device those in use and the last used, on the host more, the rest in the store.

Knows neither requests nor HTTP; reading the registry is left to plug_ins.py."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ot_ray.errors import NotFoundError
from ot_ray.model import plug_in
from ot_ray.model.multi_adapter import MultiAdapter
from serve.engine.plug_ins import PlugIn, PlugIns, Readings
from serve.failures import BusyError


class Resident:
    """A plug-in on the device, or on its way there."""

    def __init__(self, record: PlugIn) -> None:
        self.record = record
        self.model: Future[PreTrainedModel] = Future()
        self.adapter = -1
        """Its index in `PlugInCache.many`, once it is loaded."""
        self.uses = 0

    @property
    def is_idle(self) -> bool:
        """Whether it may leave."""
        return self.uses == 0 and self.model.done()


class PlugInCache:
    """The base model and at most `max_plug_ins` plug-in models, which share its tensors.

    The least recently used plug-in leaves first, and never one in use. Where all are in use and another is asked for,
    the least recently used one takes no new uses until it has left, so that nobody waits forever. All methods may be
    called from any thread; a plug-in asked for by several at once is loaded once, and different ones load in parallel.

    Args:
        max_host_plug_ins: adapters whose tensors are kept in the host's memory too, so that they come back without
            the store.
        wait_s: seconds that `use` waits for room while every resident plug-in is in use.
        refresh_s: seconds for which a reading of the registry is good.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        base_id: str,
        base: PreTrainedModel,
        plug_ins: PlugIns,
        *,
        max_plug_ins: int = 8,
        max_host_plug_ins: int = 0,
        wait_s: float = 60.0,
        refresh_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base_id, self.base = base_id, base
        self.many = MultiAdapter(base)
        """The model that runs rows of the base and of all residents together."""
        self._plug_ins, self._capacity, self._host_capacity = plug_ins, max_plug_ins, max_host_plug_ins
        self._wait_s, self._clock = wait_s, clock
        self._readings = Readings(refresh_s, clock)
        self._room = threading.Condition()
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._host: OrderedDict[str, Mapping[str, torch.Tensor]] = OrderedDict()
        self._wanted: set[str] = set()
        self._leaving: set[str] = set()
        self.hits = {"device": 0, "host": 0, "store": 0}
        """How many uses found their adapter where."""

    def plug_ins(self, tenant: str | None = None) -> list[PlugIn]:
        """The plug-ins that may be served, of one tenant or of all, as of at most `refresh_s` seconds ago.

        Raises:
            OTRayError: the store cannot be read and never could.
        """
        return list(self._readings.get(("served", tenant), lambda: self._plug_ins.served(tenant)))

    def find(self, name: str) -> PlugIn | None:
        """The plug-in in service under an id or an alias, or None for the base model.

        Raises:
            NotFoundError: no such model, or it was withdrawn.
            OTRayError: the store cannot be read and never could.
        """
        if name == self.base_id:
            return None
        try:
            return self._readings.get(("find", name), lambda: self._plug_ins.find(name))
        except NotFoundError:
            self._forget(name)
            raise NotFoundError(f"no model {name!r} is served; GET /v1/models lists those that are") from None

    def candidate(self, model_id: str) -> PreTrainedModel:
        """A plug-in model that need not be in service, loaded for the caller alone.

        Raises:
            NotFoundError: no such plug-in.
            SplitError: its tensors do not fit the base model.
        """
        record = self._plug_ins.candidate(model_id)
        return plug_in(self.base, record.plan, self._plug_ins.load_state(record.model_id)).eval()

    def resident(self) -> list[str]:
        """Ids of the plug-ins on the device, least recently used first."""
        with self._room:
            return list(self._residents)

    @contextmanager
    def use(self, name: str) -> Iterator[PreTrainedModel]:
        """Hold a model in memory for as long as the context lasts, and load it first if need be.

        Raises:
            NotFoundError: no such model, or it was withdrawn.
            BusyError: every resident plug-in stayed in use for `wait_s` seconds.
            SplitError: the plug-in's tensors do not fit the base model.
        """
        record = self.find(name)
        if record is None:
            yield self.base
            return
        resident = self._wait_for(record)
        try:
            yield resident.model.result()
        finally:
            self.release(resident)

    def _wait_for(self, record: PlugIn) -> Resident:
        deadline = self._clock() + self._wait_s
        with self._room:
            while (resident := self.try_hold(record)) is None:
                if not self._room.wait(max(0.0, deadline - self._clock())):
                    self.give_up(record)
                    raise BusyError(self.full)
            return resident

    @property
    def full(self) -> str:
        """What to say to whoever waited too long for room."""
        return (
            f"all {self._capacity} plug-in models in memory stayed in use for {self._wait_s:g} s; "
            "try again, or let the operator raise max_plug_ins"
        )

    def try_hold(self, record: PlugIn) -> Resident | None:
        """Count one more use of a plug-in, without waiting; if it is not there, a thread begins to load it.

        Returns:
            What to `release` afterwards; its `model` is there, or comes, or fails with what kept it from loading.
            None if there is no room as yet.
        """
        model_id = record.model_id
        with self._room:
            resident = self._residents.get(model_id)
            if resident is None or (model_id in self._leaving and self._wanted - {model_id}):
                if resident is not None or not self._make_room():
                    self._want(model_id)
                    return None
                resident = self._residents[model_id] = Resident(record)
                self._start(resident)
            else:
                self.hits["device"] += 1
            if model_id in self._residents:
                self._residents.move_to_end(model_id)
            resident.uses += 1
            self.give_up(record)
            return resident

    def give_up(self, record: PlugIn) -> None:
        """Say that nobody waits for room for a plug-in any more."""
        with self._room:
            self._wanted.discard(record.model_id)
            while len(self._leaving) > len(self._wanted):
                self._leaving.pop()
            self._room.notify_all()

    def release(self, resident: Resident) -> None:
        """End a use."""
        with self._room:
            resident.uses -= 1
            self._room.notify_all()

    def _want(self, model_id: str) -> None:
        self._wanted.add(model_id)
        if len(self._leaving) < len(self._wanted):
            next_to_go = next((key for key in self._residents if key not in self._leaving), None)
            if next_to_go is not None:
                self._leaving.add(next_to_go)

    def _make_room(self) -> bool:
        if len(self._residents) < self._capacity:
            return True
        idle = next((key for key, resident in self._residents.items() if resident.is_idle), None)
        if idle is None:
            return False
        self._evict(idle)
        return True

    def _evict(self, model_id: str) -> None:
        resident = self._residents.pop(model_id)
        self._leaving.discard(model_id)
        if resident.adapter >= 0:
            self.many.detach(resident.adapter)

    def _start(self, resident: Resident) -> None:
        try:
            threading.Thread(target=self._load, args=(resident,), name="plug-in", daemon=True).start()
        except RuntimeError as error:
            self._give_back(resident, error)

    def _load(self, resident: Resident) -> None:
        model_id = resident.record.model_id
        try:
            state = self._state(model_id)
            model = plug_in(self.base, resident.record.plan, state).eval()
            self._keep_on_host(model_id, state)
            resident.adapter = self.many.attach(model, resident.record.plan)
            resident.model.set_result(model)
        except BaseException as error:
            self._give_back(resident, error)

    def _give_back(self, resident: Resident, error: BaseException) -> None:
        # Those that wait for the same load hear the same error; the next request tries anew.
        with self._room:
            self._residents.pop(resident.record.model_id, None)
            self._leaving.discard(resident.record.model_id)
            self._room.notify_all()
        resident.model.set_exception(error)

    def _state(self, model_id: str) -> Mapping[str, torch.Tensor]:
        with self._room:
            state = self._host.get(model_id)
            self.hits["host" if state is not None else "store"] += 1
        return state if state is not None else self._plug_ins.load_state(model_id)

    def _keep_on_host(self, model_id: str, state: Mapping[str, torch.Tensor]) -> None:
        with self._room:
            self._host[model_id] = state
            self._host.move_to_end(model_id)
            while len(self._host) > self._host_capacity:
                self._host.popitem(last=False)

    def _forget(self, model_id: str) -> None:
        with self._room:
            self._host.pop(model_id, None)
            resident = self._residents.get(model_id)
            if resident is not None and resident.is_idle:
                self._evict(model_id)
                self._room.notify_all()
