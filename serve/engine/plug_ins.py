"""The plug-ins in service for one base model, as the registry in a store has them.

Promoting and withdrawing is done in the registry; keeping adapters in memory is residency.py's part."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from ot_ray.artifacts import PlugInRecord, Registry, parse_model_id
from ot_ray.errors import ArtifactError, NotFoundError, OTRayError
from ot_ray.model import SplitPlan

_log = logging.getLogger(__name__)
_MOST_READINGS = 4096
T = TypeVar("T")


@dataclass(frozen=True)
class PlugIn:
    """What is known of a plug-in without loading it."""

    model_id: str
    plan: SplitPlan
    created: int
    """Seconds since 1970."""
    owner: str


class PlugIns(Protocol):
    """Where the plug-ins of one base model are found."""

    def served(self, tenant: str | None) -> Sequence[PlugIn]:
        """Every plug-in in service, of one tenant or of all."""
        ...

    def find(self, name: str) -> PlugIn:
        """The plug-in in service under an id or an alias; NotFoundError if there is none."""
        ...

    def candidate(self, model_id: str) -> PlugIn:
        """A plug-in by its id, whether in service or not; NotFoundError if there is none."""
        ...

    def load_state(self, model_id: str) -> Mapping[str, torch.Tensor]:
        """The adapter's tensors, named as `ot_ray.model.adapter_state` names them."""
        ...


class NoPlugIns:
    """The catalogue of a base model that is served alone."""

    def served(self, tenant: str | None) -> Sequence[PlugIn]:
        return []

    def find(self, name: str) -> PlugIn:
        raise NotFoundError(f"{name}: this service has no registry of plug-ins; set store=...")

    def candidate(self, model_id: str) -> PlugIn:
        return self.find(model_id)

    def load_state(self, model_id: str) -> Mapping[str, torch.Tensor]:
        raise NotFoundError(f"{model_id}: this service has no registry of plug-ins; set store=...")


class RegistryPlugIns:
    """The plug-ins of one base model in a registry, which may hold those of others too.

    Args:
        model: the base model's name, the second part of its plug-ins' ids.
    """

    def __init__(self, registry: Registry, model: str) -> None:
        self._registry, self._model = registry, model

    def served(self, tenant: str | None) -> Sequence[PlugIn]:
        """Read the registry; errors are the registry's."""
        return [_plug_in(record) for record in self._registry.served(self._model, tenant)]

    def find(self, name: str) -> PlugIn:
        """Read the registry; errors are the registry's."""
        return self._own(self._registry.resolve(name))

    def candidate(self, model_id: str) -> PlugIn:
        """Read the registry; errors are the registry's, and an id that is none is not found."""
        try:
            return self._own(self._registry.get(model_id))
        except ArtifactError as error:
            raise NotFoundError(str(error)) from error

    def load_state(self, model_id: str) -> Mapping[str, torch.Tensor]:
        """Load and verify a plug-in's tensors; errors are the registry's."""
        return self._registry.load_state(model_id)

    def _own(self, record: PlugInRecord) -> PlugIn:
        if parse_model_id(record.model_id).model != self._model:
            raise NotFoundError(f"{record.model_id} belongs to another base model than {self._model}")
        return _plug_in(record)


def _plug_in(record: PlugInRecord) -> PlugIn:
    owner = parse_model_id(record.model_id).tenant
    return PlugIn(record.model_id, record.plan, int(record.created.timestamp()), owner)


class Readings:
    """What was read of a store a moment ago; while the store cannot be read, an earlier reading stays good.

    Args:
        good_s: seconds for which a reading is good.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, good_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._good_s, self._clock = good_s, clock
        self._read: OrderedDict[Any, tuple[float, Any]] = OrderedDict()
        self._reading: dict[Any, Future[Any]] = {}
        self._lock = threading.Lock()

    def get(self, key: Any, read: Callable[[], T]) -> T:
        """The reading of this key, by `read` unless there is a good one; that nothing was found is a reading too.

        One reads at a time. Meanwhile others get the reading before, or wait if there is none: a store that hangs
        holds one thread a key.

        Raises:
            NotFoundError: as the reading says.
            OTRayError: the store cannot be read, and never could for this key.
        """
        own: Future[Any] = Future()
        with self._lock:
            before, others = self._read.get(key), self._reading.get(key)
            is_good = before is not None and (others is not None or self._clock() - before[0] < self._good_s)
            if not is_good and others is None:
                self._reading[key] = own
        if before is not None and is_good:
            found = before[1]
        elif others is not None:
            found = others.result()
        else:
            found = self._renewed(key, before, read, own)
        if isinstance(found, NotFoundError):
            raise NotFoundError(*found.args)
        return found

    def _renewed(self, key: Any, before: tuple[float, Any] | None, read: Callable[[], Any], own: Future[Any]) -> Any:
        try:
            found = _found(read, before)
        except BaseException as error:
            with self._lock:
                del self._reading[key]
            own.set_exception(error)
            raise
        with self._lock:
            del self._reading[key]
            self._read[key] = (self._clock(), found)
            self._read.move_to_end(key)
            if len(self._read) > _MOST_READINGS:
                self._read.popitem(last=False)
        own.set_result(found)
        return found


def _found(read: Callable[[], Any], before: tuple[float, Any] | None) -> Any:
    try:
        return read()
    except NotFoundError as error:
        return error
    except OTRayError:
        if before is None:
            raise
        _log.exception("the registry cannot be read; the reading before stays good")
        return before[1]
