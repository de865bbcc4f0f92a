"""What a session's row says, as the library's own objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ot_ray.cola import AuxiliaryConfig, FitConfig, Site
from serve.catalogue.records import GradientSession

_ON_DEMAND = 2**31 - 1
"""Interval of a session that fits when it is asked to, and not before."""


@dataclass(frozen=True)
class SessionPlan:
    """What the worker has to know of a session."""

    id: str
    tenant_id: str
    model: str
    auxiliary_id: str
    mode: Literal["alone", "joint", "collaboration"]
    group: str | None
    fit: Literal["client", "server"]
    interval: int | None
    """Batches after which the server fits by itself; None leaves it to `step`."""
    sites: dict[str, Site]
    auxiliary: AuxiliaryConfig
    fitting: FitConfig
    """With the session's interval in it."""


def read_plan(session: GradientSession) -> SessionPlan:
    """Read a session's row."""
    settings = session.settings
    interval = settings.get("interval")
    fitting = {**(settings.get("fitting") or {}), "interval": interval or _ON_DEMAND}
    sites = [_site(values) for values in settings["sites"]]
    return SessionPlan(
        id=session.id,
        tenant_id=session.tenant_id,
        model=session.model,
        auxiliary_id=session.auxiliary_id,
        mode=settings["mode"],
        group=settings.get("group"),
        fit=settings["fit"],
        interval=interval,
        sites={site.name: site for site in sites},
        auxiliary=AuxiliaryConfig.model_validate(settings.get("auxiliary") or {}),
        fitting=FitConfig.model_validate(fitting),
    )


def _site(values: dict[str, Any]) -> Site:
    # JSON has no tuples.
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Site(**fields)
