"""`ColaClient`: gradient learning against a service: sites, sessions to open and to go on with.

What a session does is in cola_session.py, fitting on this device in cola_trainer.py."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from uuid import uuid4

from ot_ray.client.client import KEY_VARIABLE
from ot_ray.client.cola_session import PLACE, ColaSession
from ot_ray.client.cola_wire import SessionState, session_state, site_of
from ot_ray.client.http import Http, quoted
from ot_ray.cola import AuxiliaryConfig, FitConfig, Site
from ot_ray.errors import ConfigError


class ColaClient:
    """One customer of one service, for gradient learning: the service's base model runs forward and backward, the
    customer's device fits the auxiliary model.

        client = ColaClient("https://host")
        session = client.create("*.q_proj", auxiliary=AuxiliaryConfig(rank=8))
        trainer = ColaTrainer(session, FitConfig(lr=1e-3, interval=4), "state")
        for trained in trainer.train(batches):
            print(trained.loss)
        session.save("adapter")

    A thin device leaves the fit to the service (`fit="server"`), and calls `forward_backward`, `step`, `save` and
    `sample` of the session.

    Args:
        url: the service.
        key: the customer's API key; unset, that in OT_RAY_API_KEY.
        patience_s: seconds for which a request is tried again while the service does not answer, or says that it is
            busy.

    Raises:
        ConfigError: the URL is none, or there is no key.
    """

    def __init__(self, url: str, key: str | None = None, *, patience_s: float = 300.0) -> None:
        key = os.environ.get(KEY_VARIABLE) if key is None else key
        if not key:
            raise ConfigError(f"there is no key for {url}; set {KEY_VARIABLE}")
        self._http = Http(url, key, patience_s=patience_s)

    def __repr__(self) -> str:
        return f"ColaClient({self._http.url!r})"

    def sites(self) -> dict[str, Site]:
        """The maps of the service's model that can be sites, by name.

        Raises:
            ServiceError: the service refused, or does not answer.
        """
        return {site.name: site for site in map(site_of, self._http.json("GET", "/v1/cola/sites")["data"])}

    def create(
        self,
        sites: str | Sequence[str],
        *,
        model: str | None = None,
        auxiliary: AuxiliaryConfig | None = None,
        mode: Literal["alone", "joint", "collaboration"] = "alone",
        group: str | None = None,
        fit: Literal["client", "server"] = "client",
        interval: int | None = None,
        fitting: FitConfig | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ColaSession:
        """Open a session.

        Args:
            sites: shell patterns for the names of the base model's maps.
            model: unset, the service's own.
            auxiliary: unset, rank 8.
            mode: through which auxiliaries of the group the rows go.
            group: of sessions of this customer; for `joint` and `collaboration`.
            fit: where the auxiliary is fitted.
            interval: batches for one fit on the server; unset, `step` says when.
            fitting: how the server fits.
            metadata: kept with the session.

        Raises:
            ServiceError: the service refused (a pattern that matches nothing, say), or does not answer.
        """
        body: dict[str, Any] = {"sites": [sites] if isinstance(sites, str) else list(sites), "mode": mode, "fit": fit}
        body["auxiliary"] = (auxiliary or AuxiliaryConfig()).model_dump(mode="json")
        more = {"model": model, "group": group, "interval": interval, "metadata": metadata and dict(metadata)}
        more["fitting"] = None if fitting is None else fitting.model_dump(mode="json", exclude={"interval"})
        body |= {name: value for name, value in more.items() if value is not None}
        # An answer that is lost does not leave a second session behind.
        value = self._http.json("POST", PLACE, body, {"idempotency-key": uuid4().hex})
        return ColaSession(self._http, session_state(value))

    def resume(self, session_id: str) -> ColaSession:
        """Go on with a session.

        Raises:
            ServiceError: there is no such session of this customer's, or the service does not answer.
        """
        return ColaSession(self._http, session_state(self._http.json("GET", f"{PLACE}/{quoted(session_id)}")))

    def sessions(self) -> list[SessionState]:
        """This customer's sessions, newest first.

        Raises:
            ServiceError: the service refused, or does not answer.
        """
        found: list[SessionState] = []
        after = ""
        while True:
            page = self._http.json("GET", f"{PLACE}?limit=100{after}")
            found += map(session_state, page["data"])
            if not page["has_more"] or not page["data"]:
                return found
            after = f"&after={quoted(found[-1].id)}"
