"""`ColaSession`: one session of gradient learning, its operations in order, and futures of what they give.

Fitting on this device is cola_trainer.py's; what the service's answers mean is cola_wire.py's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ot_ray.client.cola_files import fetch_saved
from ot_ray.client.cola_wire import Passed, Rows, SessionState, ended, passed, rows_of, session_state, tagged
from ot_ray.client.downloads import fetch_file
from ot_ray.client.http import Http, quoted
from ot_ray.cola import Auxiliary, GradientFile, read_gradients
from ot_ray.errors import GradientLearningError, ServiceError

PLACE = "/v1/cola/sessions"

_POLL_S = 20  # seconds that the service may keep a question about an operation
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0  # between two questions
T = TypeVar("T")


class ColaFuture(Generic[T]):
    """An operation that the service has taken in; it is carried out whether anybody asks for it or not."""

    def __init__(self, session: ColaSession, number: int, told: Callable[[Mapping[str, Any]], T]) -> None:
        self._session, self.number, self._told = session, number, told
        self._operation: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        return f"ColaFuture({self._session.id!r}, {self.number})"

    def poll(self, wait_s: float = 0) -> Mapping[str, Any]:
        """The operation as the service has it, with its place in the queue while it waits.

        Args:
            wait_s: seconds that the service may wait for its end, at most 30.

        Raises:
            ServiceError: the service refused, or does not answer.
        """
        return self._session.get(f"/operations/{self.number}?wait_s={wait_s:.0f}")

    def done(self) -> bool:
        """Whether it has ended, well or badly. Raises ServiceError."""
        return self._operation is not None or self.poll()["status"] in ("succeeded", "failed")

    def result(self, timeout_s: float | None = None) -> T:
        """What came of it; waits until it has ended.

        Raises:
            NotFiniteError: something in it was not finite; it is undone, and the session goes on.
            ServiceError: it failed, or has not ended after `timeout_s` seconds.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause = _SHORTEST_PAUSE_S
        while self._operation is None:
            left = _POLL_S if deadline is None else min(_POLL_S, max(0.0, deadline - time.monotonic()))
            asked = time.monotonic()
            operation = self.poll(left)
            if ended(operation, self._session.id):
                self._operation = operation
            elif deadline is not None and time.monotonic() >= deadline:
                raise ServiceError(f"operation {self.number} is still {operation['status']} after {timeout_s:g} s")
            elif time.monotonic() - asked < left / 2:
                # A service that stops lets go of all who wait.
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        return self._told(self._operation)

    def version(self, timeout_s: float | None = None) -> int:
        """The auxiliary's version after it, or the one that its pass went through; errors are `result`'s."""
        self.result(timeout_s)
        assert self._operation is not None
        return int(self._operation["version"])

    def gradients(self, timeout_s: float | None = None) -> GradientFile:
        """The gradients of a `forward_backward`, downloaded and verified; a cut download goes on where it was.

        The service keeps them until the second pass after it is made.

        Raises:
            GradientLearningError: they are of another session, step or version, or not of the session's sites.
            NotFiniteError: they hold NaN or infinity.
            ArtifactError: what came has another hash than the service said.
            ServiceError: as for `result`; or they are gone.
        """
        version = self.version(timeout_s)
        assert self._operation is not None
        with self._session.fetched(f"/gradients/{self.number}", passed(self._operation)) as path:
            file = read_gradients(path, self._session.sites)
        file.require(self._session.id, self.number, version)
        return file


class ColaSession:
    """One session. `ColaClient.create` and `ColaClient.resume` make it.

    Operations have numbers, which are given here, in order; one that is sent again, because its answer was lost, is
    carried out once. Several threads may use a session; several processes may not at a time.
    """

    def __init__(self, http: Http, state: SessionState) -> None:
        self._http, self._started = http, state
        self._next, self._lock = state.next_number, threading.RLock()

    def __repr__(self) -> str:
        return f"ColaSession({self.id!r})"

    @property
    def id(self) -> str:
        """To resume it by."""
        return self._started.id

    @property
    def sites(self) -> Mapping[str, Any]:
        """`Site`s by name."""
        return self._started.sites

    @property
    def next_number(self) -> int:
        """Of the next operation that is sent from here."""
        return self._next

    @property
    def settings(self) -> SessionState:
        """The session as it was when it was opened here: what was chosen for it stays so."""
        return self._started

    def state(self) -> SessionState:
        """The session as it is now. Raises ServiceError."""
        return session_state(self.get(""))

    def forward_backward(self, rows: Rows, coding: str = "none", number: int | None = None) -> ColaFuture[Passed]:
        """A pass of the base model, and back.

        Args:
            rows: of text.
            coding: of the gradients, one of `ot_ray.cola.CODINGS`.
            number: of a pass that was asked for with the same rows before; unset, the next.

        Raises:
            GradientLearningError: the rows are none.
            ServiceError: the service refused, or does not answer. Asking for the same again is safe.
        """
        body = {"rows": rows_of(rows), "coding": coding}
        return ColaFuture(self, self._post("forward_backward", body, number), passed)

    def step(self) -> ColaFuture[int]:
        """Fit what was collected, where the service fits; gives the fits so far. Raises ServiceError."""
        return ColaFuture(self, self._post("step", {}), lambda operation: int(operation["result"]["fits"]))

    def sample(
        self,
        prompt: str | list[int],
        max_tokens: int = 64,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> ColaFuture[str]:
        """Text of the model with the session's auxiliary. Raises ServiceError."""
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        if seed is not None:
            body["seed"] = seed
        return ColaFuture(self, self._post("sample", body), lambda operation: str(operation["result"]["text"]))

    def save(self, folder: str | Path, timeout_s: float | None = None) -> Path:
        """The auxiliary as the service exports it, in a folder of this machine; it appears when all is verified.

        Raises:
            AlreadyExistsError: the folder is there and not empty.
            ArtifactError: what came has another hash than the service said.
            ServiceError: the service refused, or does not answer.
        """
        future = ColaFuture(self, self._post("save", {}), lambda operation: operation["result"]["files"])
        files = future.result(timeout_s)
        return fetch_saved(self._http, f"{self._path}/saved/{future.number}/files", files, Path(folder))

    def upload(self, auxiliary: Auxiliary | Mapping[str, Tensor], version: int) -> ColaFuture[int]:
        """Make a fitted auxiliary the session's; gives its version.

        Args:
            version: that it was fitted from; another present one is a conflict.

        Raises:
            ServiceError: the service refused, or does not answer.
        """
        with self.numbered() as number:
            return self.put_auxiliary(pack_auxiliary(auxiliary), version, number)

    def put_auxiliary(self, body: bytes, version: int, number: int) -> ColaFuture[int]:
        """Upload under a number that `numbered` gave, or again under the same one. Raises ServiceError."""
        path = f"{self._path}/auxiliary?number={number}&version={version}"
        answer = self._http.answer("PUT", path, body, {"content-type": "application/octet-stream"})
        self._http.require(answer, "PUT", path)
        return ColaFuture(self, number, lambda operation: int(operation["version"]))

    def auxiliary(self) -> tuple[Auxiliary, int]:
        """The present auxiliary, on the CPU in float32, and its version.

        Raises:
            GradientLearningError, NotFiniteError: what came is none of the session's.
            ArtifactError: it has another hash than the service said.
            ServiceError: the service refused, or does not answer.
        """
        found = Auxiliary(self.sites, self._started.auxiliary)
        size, sha256, answer = tagged(self._http, f"{self._path}/auxiliary")
        version = answer.headers.get("x-cola-version", "")
        if not version.isdecimal():
            raise ServiceError(f"{self._http.url} does not say of which version an auxiliary is; update ot_ray")
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            fetch_file(self._http, f"{self._path}/auxiliary", Path(folder, "file"), size, sha256)
            try:
                found.load(load_file(Path(folder, "file")))
            except SafetensorError as error:
                raise GradientLearningError(f"{self._http.url} sent no auxiliary: {error}; update ot_ray") from None
        return found, int(version)

    def close(self) -> None:
        """End the session; what the service keeps of it goes. Raises ServiceError."""
        self._http.json("DELETE", self._path)

    def get(self, place: str) -> Any:
        """What the service has of the session under a path. Raises ServiceError."""
        return self._http.json("GET", self._path + place)

    @contextmanager
    def fetched(self, place: str, told: Passed) -> Iterator[Path]:
        """The gradients of a pass, verified, until the end of the block. Raises ServiceError, ArtifactError."""
        size, sha256 = told.bytes, told.sha256
        if sha256 is None:
            size, sha256, _ = tagged(self._http, self._path + place)
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            fetch_file(self._http, self._path + place, Path(folder, "file"), size, sha256)
            yield Path(folder, "file")

    @contextmanager
    def numbered(self, number: int | None = None) -> Iterator[int]:
        """The number of an operation that is sent in the block; nobody else sends one meanwhile.

        Args:
            number: unset, the next; it is used up when the block ends well.
        """
        with self._lock:
            chosen = self._next if number is None else number
            yield chosen
            self._next = max(self._next, chosen + 1)

    def _post(self, verb: str, body: Mapping[str, Any], number: int | None = None) -> int:
        with self.numbered(number) as chosen:
            self._http.json("POST", f"{self._path}/{verb}", {"number": chosen, **body})
            return chosen

    @property
    def _path(self) -> str:
        return f"{PLACE}/{quoted(self.id)}"


def pack_auxiliary(auxiliary: Auxiliary | Mapping[str, Tensor]) -> bytes:
    """An auxiliary's tensors as safetensors; the same values give the same bytes."""
    tensors = auxiliary.tensors if isinstance(auxiliary, Auxiliary) else auxiliary
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())})
