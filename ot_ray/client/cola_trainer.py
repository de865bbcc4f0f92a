"""`ColaTrainer`: the fit on a customer's device, beside the passes that the service makes, and its exact resumption.

Sending and fetching are cola_session.py's, the state's file cola_state.py's, the fit itself ot_ray.cola's."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ot_ray.client.cola_flight import Flight
from ot_ray.client.cola_session import ColaFuture, ColaSession, pack_auxiliary
from ot_ray.client.cola_state import StateFile
from ot_ray.client.cola_wire import Rows
from ot_ray.cola import Auxiliary, FitConfig, GradientFile, make_fitter
from ot_ray.errors import GradientLearningError, NotFiniteError, ServiceError

_AHEAD = 2
"""Passes that are asked for and not fitted: the service keeps the gradients of the last two."""


@dataclass(frozen=True)
class Trained:
    """What became of a batch."""

    batch: int
    """Counted from 0."""
    loss: float | None
    """Mean cross-entropy before the fit, in nats; None where the pass itself was refused."""
    tokens: int
    """How many are learnt."""
    errors: dict[str, float]
    """What the coding of its gradients cost (`GradientFile.errors`)."""
    fitted: bool
    """Whether it filled the interval, so that a fit was made."""
    refused: str | None
    """Why it was left out, where something in it was not finite; the interval goes on without it."""


class ColaTrainer:
    """Fits a session's auxiliary on this device.

    With a folder, all that the next batch depends on is written there after each batch; a trainer that is made anew
    with the same folder goes on where the last one was, however that ended: `batches` says with which batch, so that
    none is fitted twice and none is left out. Give it the same session, settings and batches.

    Args:
        session: with `fit="client"`, and no other trainer.
        fitting: how it is fitted, and after how many batches.
        folder: of the state; unset, nothing is kept.
        coding: of gradients, one of `ot_ray.cola.CODINGS`.
        device: to fit on.

    Raises:
        GradientLearningError: the service fits the session, or the folder's state is of another session or other
            settings.
        ServiceError: the service refused, or does not answer.
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        session: ColaSession,
        fitting: FitConfig | None = None,
        folder: Path | str | None = None,
        *,
        coding: str = "none",
        device: torch.device | str = "cpu",
    ) -> None:
        if session.settings.fit != "client":
            raise GradientLearningError(f"{session.id} is fitted by the service; open one with fit='client'")
        self.session, self.fitting, self.coding = session, fitting or FitConfig(), coding
        self._file = StateFile(folder)
        self._flying: deque[Flight] = deque()
        self._sent_before: list[int] = []
        self._upload: int | None = None
        self._loading: ColaFuture[int] | None = None
        self.batches, self.refused = 0, 0
        state = self._file.read()
        if state is None:
            auxiliary, self._version = session.auxiliary()
            self.fitter = make_fitter(auxiliary.copy(device), self.fitting)
            return
        self._require_same(state)
        self.fitter = make_fitter(Auxiliary(session.sites, session.settings.auxiliary, device), self.fitting)
        self.fitter.load_state_dict(state["fitter"])
        self.batches, self.refused = state["batches"], state["refused"]
        self._version, self._upload = state["version"], state["upload"]
        self._sent_before = list(range(state["number"], session.next_number))

    @property
    def auxiliary(self) -> Auxiliary:
        """As fitted so far."""
        return self.fitter.auxiliary

    def train_batch(self, rows: Rows) -> Trained:
        """One pass, and the fit where it fills the interval.

        Raises:
            GradientLearningError: the rows are none, or the gradients are of another step, session or version.
            NotFiniteError: the fit made the auxiliary infinite.
            ServiceError: the service refused, or does not answer; the batch is not taken in, but where `batches` says
                that it is.
        """
        self._require_idle()
        return self._take(self._launch(rows))

    def train(self, batches: Iterable[Rows]) -> Generator[Trained, None, None]:
        """Batch by batch. While one is fitted, the service makes the passes of the next ones of its interval, which
        do not depend on the fit, and their gradients come down. Errors are `train_batch`'s.

        Args:
            batches: from the one of number `batches` on.
        """
        self._require_idle()
        source, held = iter(batches), None
        try:
            self._launch_ahead(source)
            while self._flying:
                self._flying[0].wait()
                # It is down, so that its place at the service may be taken.
                held = self._flying.popleft()
                self._launch_ahead(source, held=1)
                trained, held = self._take(held), None
                self._launch_ahead(source)
                yield trained
        finally:
            left = [*self._flying] if held is None else [held, *self._flying]
            self._sent_before += [flight.future.number for flight in left]
            self._flying.clear()

    def flush(self) -> bool:
        """Fit what is left of an interval, as at the end of an epoch; whether there was anything.

        Raises:
            ServiceError: the service refused, or does not answer.
        """
        self._require_idle()
        if not self.fitter.flush():
            return False
        self._send()
        return True

    def settle(self) -> int:
        """Wait until the service has the auxiliary as fitted so far; its version there.

        Raises:
            ServiceError: the service refused, or does not answer.
        """
        if self._upload is not None:
            self._version = (self._loading or self._send_again()).result()
            self._upload = self._loading = None
        return self._version

    def _launch_ahead(self, source: Iterator[Rows], held: int = 0) -> None:
        """Ask for the next passes, as long as they belong to the interval.

        Args:
            held: batches that are neither under way nor fitted.
        """
        while len(self._flying) < _AHEAD:
            if self.fitter.collected + held + len(self._flying) >= self.fitting.interval:
                return
            for rows in source:
                self._flying.append(self._launch(rows))
                break
            else:
                return

    def _launch(self, rows: Rows) -> Flight:
        if self._upload is not None and self._loading is None:
            self._loading = self._send_again()
        while self._sent_before:
            # It may have been asked for by one that ended before it could say so.
            number = self._sent_before.pop(0)
            try:
                return Flight(rows, self.session.forward_backward(rows, self.coding, number), again=True)
            except ServiceError as error:
                if error.status != 409:
                    raise
        return Flight(rows, self.session.forward_backward(rows, self.coding), again=False)

    def _take(self, flight: Flight) -> Trained:
        """Take in a batch, and write down that it is."""
        flight.wait()
        version = self.settle()
        fitted, refused = False, None
        try:
            flight, file = self._gradients(flight, version)
            passed = flight.future.result()
            fitted = self.fitter.collect(file.pairs)
        except NotFiniteError as error:
            passed, refused = flight.passed(), str(error)
        self.batches, self.refused = self.batches + 1, self.refused + (refused is not None)
        if fitted:
            self._send()
        else:
            self._write()
        loss, tokens, errors = (None, 0, {}) if passed is None else (passed.loss, passed.tokens, passed.errors)
        return Trained(self.batches - 1, loss, tokens, errors, fitted, refused)

    def _gradients(self, flight: Flight, version: int) -> tuple[Flight, GradientFile]:
        try:
            file = flight.gradients()
            file.require(self.session.id, flight.future.number, version)
        except (ServiceError, GradientLearningError) as error:
            if not flight.again or isinstance(error, NotFiniteError):
                raise
            # Asked for before a later fit, or too long ago for the service to have it.
            flight = Flight(flight.rows, self.session.forward_backward(flight.rows, self.coding), again=False)
            file = flight.gradients()
            file.require(self.session.id, flight.future.number, version)
        return flight, file

    def _send(self) -> None:
        """Bring a new fit to the service, under a number that is written down first."""
        for name, tensor in self.auxiliary.tensors.items():
            if not tensor.isfinite().all():
                raise NotFiniteError(
                    f"fit {self.fitter.steps} made {name} infinite; it was neither sent nor written; go on with "
                    "another trainer, a lower learning rate and another folder"
                )
        with self.session.numbered() as number:
            self._upload, self._loading = number, None
            self._write()
            self._loading = self.session.put_auxiliary(pack_auxiliary(self.auxiliary), self._version, number)

    def _send_again(self) -> ColaFuture[int]:
        """Bring it once more; if it arrived the first time, that counts."""
        assert self._upload is not None
        self._write()
        try:
            with self.session.numbered(self._upload) as number:
                return self.session.put_auxiliary(pack_auxiliary(self.auxiliary), self._version, number)
        except ServiceError as error:
            if error.status != 409 or self.session.state().version != self._version:
                raise
        # It did not arrive, and another operation has its number.
        self._send()
        assert self._loading is not None
        return self._loading

    def _write(self) -> None:
        sent = [*(flight.future.number for flight in self._flying), *self._sent_before]
        self._file.write(
            {
                "session": self.session.id,
                "fitting": self.fitting.model_dump(mode="json"),
                "batches": self.batches,
                "refused": self.refused,
                "version": self._version,
                "upload": self._upload,
                "number": min(sent, default=self.session.next_number),
                "fitter": self.fitter.state_dict(),
            }
        )

    def _require_same(self, state: dict[str, object]) -> None:
        wanted = {"session": self.session.id, "fitting": self.fitting.model_dump(mode="json")}
        for name, value in wanted.items():
            if state.get(name) != value:
                raise GradientLearningError(
                    f"the folder's state is of {name} {state.get(name)}, not {value}; use that, or another folder"
                )

    def _require_idle(self) -> None:
        if self._flying:
            raise GradientLearningError("batches of train() are under way; take them all in first, or close it")
