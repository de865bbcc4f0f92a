"""`python -m serve --config file key=value...`: the service in the foreground, until Ctrl-C.

Everything it does is in local.py; without `--address` it brings a Ray of its own."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from ot_ray.config import load
from ot_ray.errors import OTRayError
from ot_ray.launch import ray_cluster, require_free_port
from serve.config import ServeConfig


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes; 0 after one, 2 if the service could not start, or its Ray is gone."""
    parser = argparse.ArgumentParser(prog="python -m serve", description="Serve a base model and its plug-ins.")
    parser.add_argument("--config", help="YAML file with the fields of ServeConfig")
    parser.add_argument("--address", help="a running Ray to serve on; without it, a local one is started")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to set, as in model.source=folder")
    options = parser.parse_args(arguments)
    try:
        _serve(load(ServeConfig, options.config, options.overrides), options.address)
    except OTRayError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _serve(config: ServeConfig, address: str | None) -> None:
    if address is None and "RAY_ADDRESS" not in os.environ:
        # Before a Ray is started for nothing; on one that runs, the service that holds the port may be this one's own.
        require_free_port(config.host, config.port)
    # Tuning jobs are submitted to the Jobs API, which is part of the dashboard.
    submits = config.database is not None and config.jobs.launcher == "ray-jobs"
    with ray_cluster(address, dashboard=submits, show_logs=False):
        # After the cluster, which brings handlers of its own: a stop from outside ends as Ctrl-C does. Shells
        # start background commands with SIGINT ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        # Ray chooses its authentication when it is imported, so that this waits for the cluster.
        from serve.local import attend, run, shutdown

        try:
            sys.stderr.write(f"serve: {config.model.name} answers at {run(config)}; stop with Ctrl-C\n")
            attend()
        except KeyboardInterrupt:
            shutdown()


if __name__ == "__main__":
    sys.exit(main())
