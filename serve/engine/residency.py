"""Which models are in memory: the base model once, and plug-in models that come and go around it.

Knows neither requests nor HTTP; reading the registry is left to the catalogue it is given."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from transformers import PreTrainedModel

from ot_ray.errors import NotFoundError, OTRayError
from ot_ray.model import plug_in
from serve.engine.plug_ins import Catalogue, PlugIn
from serve.failures import BusyError

_log = logging.getLogger(__name__)


class _Resident:
    """A plug-in in memory, or on its way there."""

    def __init__(self) -> None:
        self.model: Future[PreTrainedModel] = Future()
        self.uses = 0


class PlugInCache:
    """The base model and at most `max_plug_ins` plug-in models, which share its tensors.

    The least recently used plug-in leaves first, and never one in use. All methods may be called from any
    thread; a plug-in asked for by several at once is loaded once, and different ones load in parallel.

    Args:
        wait_s: seconds that `use` waits for room while every resident plug-in is in use.
        refresh_s: seconds for which a reading of the catalogue is good.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        base_id: str,
        base: PreTrainedModel,
        catalogue: Catalogue,
        *,
        max_plug_ins: int = 8,
        wait_s: float = 60.0,
        refresh_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base_id, self.base = base_id, base
        self._catalogue, self._capacity = catalogue, max_plug_ins
        self._wait_s, self._refresh_s, self._clock = wait_s, refresh_s, clock
        self._refreshing = threading.Lock()
        self._room = threading.Condition()
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._known: dict[str, PlugIn] = {}
        self._read_at: float | None = None

    def plug_ins(self) -> list[PlugIn]:
        """The plug-ins that may be served, as of at most `refresh_s` seconds ago.

        While the store cannot be read, an earlier reading stays good.

        Raises:
            OTRayError: the store cannot be read and never could.
        """
        # While one thread reads the store, the others go on with the earlier reading.
        if self._refreshing.acquire(blocking=self._read_at is None):
            try:
                self._refresh()
            finally:
                self._refreshing.release()
        return list(self._known.values())

    def _refresh(self) -> None:
        if self._read_at is not None and self._clock() - self._read_at < self._refresh_s:
            return
        try:
            self._known = {record.model_id: record for record in self._catalogue.current()}
        except OTRayError:
            if self._read_at is None:
                raise
            _log.exception("the registry cannot be read; the reading before stays good")
        self._read_at = self._clock()
        self._drop_withdrawn()

    def require(self, model_id: str) -> PlugIn | None:
        """The plug-in of this id, or None for the base model.

        Raises:
            NotFoundError: no such model, or it was withdrawn.
        """
        if model_id == self.base_id:
            return None
        self.plug_ins()
        if record := self._known.get(model_id):
            return record
        raise NotFoundError(f"no model {model_id!r} is served; GET /v1/models lists those that are")

    def resident(self) -> list[str]:
        """Ids of the plug-ins in memory, least recently used first."""
        with self._room:
            return list(self._residents)

    @contextmanager
    def use(self, model_id: str) -> Iterator[PreTrainedModel]:
        """Hold a model in memory for as long as the context lasts, and load it first if need be.

        Raises:
            NotFoundError: no such model, or it was withdrawn.
            BusyError: every resident plug-in stayed in use for `wait_s` seconds.
            SplitError: the plug-in's tensors do not fit the base model.
        """
        record = self.require(model_id)
        if record is None:
            yield self.base
            return
        resident, is_new = self._hold(model_id)
        try:
            if is_new:
                self._load(record, resident)
            yield resident.model.result()
        finally:
            self._release(resident)

    def _hold(self, model_id: str) -> tuple[_Resident, bool]:
        """Count one more use of a resident; the caller that gets True has to load it."""
        with self._room:
            deadline = self._clock() + self._wait_s
            while model_id not in self._residents and not self._make_room():
                if not self._room.wait(max(0.0, deadline - self._clock())):
                    raise BusyError(
                        f"all {self._capacity} plug-in models in memory stayed in use for {self._wait_s:g} s; "
                        "try again, or let the operator raise max_plug_ins"
                    )
            is_new = model_id not in self._residents
            resident = self._residents.setdefault(model_id, _Resident())
            self._residents.move_to_end(model_id)
            resident.uses += 1
            return resident, is_new

    def _make_room(self) -> bool:
        if len(self._residents) < self._capacity:
            return True
        idle = next((key for key, resident in self._residents.items() if resident.uses == 0), None)
        if idle is None:
            return False
        del self._residents[idle]
        return True

    def _load(self, record: PlugIn, resident: _Resident) -> None:
        try:
            state = self._catalogue.load_state(record.model_id)
            model = plug_in(self.base, record.plan, state)
            resident.model.set_result(model.eval())
        except BaseException as error:
            # Those that wait for the same load get the same error; the next request tries anew.
            with self._room:
                del self._residents[record.model_id]
            resident.model.set_exception(error)

    def _release(self, resident: _Resident) -> None:
        with self._room:
            resident.uses -= 1
            self._room.notify_all()

    def _drop_withdrawn(self) -> None:
        with self._room:
            for model_id in [key for key, value in self._residents.items() if value.uses == 0]:
                if model_id not in self._known:
                    del self._residents[model_id]
            self._room.notify_all()
