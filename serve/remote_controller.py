"""The job controller behind Ray Serve: rounds in a thread of one replica, inspections as Ray tasks.

What a round does is controller/loop.py's; deploying the replica is app.py's."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ot_ray.artifacts import open_model_source
from ot_ray.errors import LaunchError, OTRayError
from ot_ray.launch import JobLauncher, ProcessLauncher, RayJobLauncher, own_cluster
from ot_ray.launch.devices import gpu_visibility
from ot_ray.model.loading import require_length
from ot_ray.store import open_store
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.controller.acceptance import AcceptanceWork, OffsiteReturns, Outcome, accept, judged
from serve.controller.credentials import Renewals
from serve.controller.job_folder import prepare
from serve.controller.loop import Controller
from serve.controller.webhooks import Deliverer
from serve.engine.canary import CanaryReport
from serve.failures import BusyError, DatabaseUnavailableError
from serve.stored_files import sweep_files
from serve.stored_gradients import sweep_gradients

_log = logging.getLogger(__name__)
_CANARY_S, _ACCEPT_S = 600.0, 1800.0
# Together less than Ray Serve waits for a replica to go (graceful_shutdown_timeout_s of app.py).
_ROUND_S, _STEPS_S, _CLOSE_S = 2.0, 3.0, 6.0
# Rounds follow each other within seconds; without one for so long, the replica is replaced.
_SILENT_S = 300.0


class JobController:
    """One replica; Ray Serve replaces it when its rounds stop, and the database lets one replica lead.

    Args:
        engine: the handle of a deployment of `Engine`, for canary runs.
    """

    def __init__(self, config: ServeConfig, engine: DeploymentHandle) -> None:
        self._stop = threading.Event()
        with ExitStack() as opened:
            self._rounds = build_controller(config, engine, opened)
            self._tick_s, self._last = config.jobs.tick_s, time.monotonic()
            self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
            self._thread.start()
            self._opened = opened.pop_all()

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises here again and again."""
        if not self._thread.is_alive() or time.monotonic() > self._last + _SILENT_S:
            raise LaunchError("the controller takes no rounds any more")

    def _run(self) -> None:
        while not self._stop.wait(self._tick_s):
            try:
                self._rounds.tick()
            except DatabaseUnavailableError as error:
                _log.warning("the database does not answer: %s", error)
            except Exception:
                _log.exception("a round of the controller failed")
            self._last = time.monotonic()

    def close(self) -> None:
        """Take no more rounds and let another replica lead; what is under way gets a few seconds."""
        self._stop.set()
        self._thread.join(_ROUND_S)
        # Deliveries may take longer than Ray Serve waits for a replica to go.
        closing = threading.Thread(target=self._opened.close, name="closing", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    def __del__(self) -> None:
        # One that could not be built has nothing to close, and its error is the one to be seen.
        if hasattr(self, "_opened"):
            self.close()


def build_controller(config: ServeConfig, engine: DeploymentHandle, opened: ExitStack) -> Controller:
    """The controller of a service: its database brought up to date, its launcher, and what it does beside jobs.

    Args:
        opened: is given what is to be closed after the last round, the controller among it.

    Raises:
        ConfigError: the database is newer than this code, an address is not valid, or tuning jobs are set to longer
            sequences than the model takes.
        LaunchError: the Jobs API does not answer.
    """
    assert config.database is not None
    assert config.store is not None
    catalogue, store = Catalogue.open(config.database), open_store(config.store)
    opened.callback(catalogue.close)
    catalogue.migrate(config.database.start_wait_s)
    shape = open_model_source(config.model).config
    require_length(config.jobs.sequence_length, shape, "jobs.sequence_length")
    canary = judged(partial(run_canary, engine), config.offsite.max_perplexity_ratio)
    returns = OffsiteReturns(catalogue, store, config.offsite, accept=accept_on_ray, canary=canary)
    deliverer = Deliverer(catalogue, config.webhooks)
    opened.callback(deliverer.close)
    controller = Controller(
        catalogue,
        store,
        open_launcher(config),
        config.jobs,
        accept=accept_on_ray,
        canary=canary,
        prepare=lambda job, folder: prepare(store, job, config.jobs, folder),
        limits=config.offsite.limits,
        chores={
            "credentials": Renewals(catalogue, store, config.jobs).step,
            "offsite uploads": returns.step,
            "webhooks": lambda: deliverer.run_due(time.time()),
        },
        sweeps={
            "files": lambda: sweep_files(catalogue, store),
            "gradients": lambda: sweep_gradients(catalogue, store),
            "uploads": returns.sweep,
            "deliveries": deliverer.sweep,
        },
    )
    opened.callback(controller.close, _STEPS_S)
    return controller


def open_launcher(config: ServeConfig) -> JobLauncher:
    """Where tuning jobs run.

    Raises:
        LaunchError: the Jobs API of this Ray does not answer.
    """
    if config.jobs.launcher == "processes":
        return ProcessLauncher(config.jobs.folder or Path("ot_ray_jobs"))
    cluster = own_cluster()
    if cluster.dashboard is None:
        raise LaunchError("this Ray has no dashboard, and so no Jobs API; start it with one, or set jobs.launcher")
    return RayJobLauncher(cluster.dashboard, cluster.ray)


def accept_on_ray(work: AcceptanceWork) -> Outcome:
    """`accept` as a Ray task that sees no GPU. It asks for no core, for which it would wait behind jobs that train;
    how many run at once is bounded by who calls this.

    Raises:
        BusyError: it took longer than an inspection does, or its process was lost each time that it was tried, of
            which the adapter may be the cause.
    """
    task = ray.remote(num_cpus=0, max_retries=2, runtime_env={"env_vars": gpu_visibility({})})(accept).remote(work)
    try:
        return ray.get(task, timeout=_ACCEPT_S)
    except GetTimeoutError as error:
        ray.cancel(task, force=True)
        raise BusyError(f"the inspection of {work.prefix} took longer than {_ACCEPT_S:g} s") from error
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise BusyError(f"the inspection of {work.prefix} was lost: {error}") from error


def run_canary(engine: DeploymentHandle, model_id: str) -> CanaryReport:
    """Have an engine run a plug-in beside the base model.

    Raises:
        AdapterRejectedError: the plug-in did not pass.
        BusyError: no engine answered, or one had trouble of its own, such as memory, that says nothing of the plug-in.
    """
    try:
        return engine.canary.remote(model_id).result(timeout_s=_CANARY_S)
    except RayTaskError as error:
        if isinstance(error.cause, OTRayError):
            raise error.cause from error
        raise BusyError(f"the engine's canary run of {model_id} broke off: {error.cause!r}") from error
    # Those of Ray Serve are no errors of Ray.
    except (RayError, RayServeException, TimeoutError) as error:
        raise BusyError(f"no engine ran the canary of {model_id}: {error}") from error
