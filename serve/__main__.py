"""`python -m serve --config file key=value...`: the service in the foreground, until Ctrl-C.

Everything it does is in local.py; without `--address` it brings a Ray of its own."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading

from ot_ray.config import load
from ot_ray.errors import OTRayError
from serve.config import ServeConfig


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes; 0 after one, 1 if the service could not start."""
    parser = argparse.ArgumentParser(prog="python -m serve", description="Serve a base model and its plug-ins.")
    parser.add_argument("--config", help="YAML file with the fields of ServeConfig")
    parser.add_argument("--address", help="a running Ray to serve on; without it, a local one is started")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to set, as in model.source=folder")
    options = parser.parse_args(arguments)
    try:
        _serve(load(ServeConfig, options.config, options.overrides), options.address)
    except OTRayError as error:
        sys.stderr.write(f"serve: {error}\n")
        return 1
    return 0


def _serve(config: ServeConfig, address: str | None) -> None:
    # A Ray of our own asks for a token, unless its owner says otherwise.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    from serve.local import require_free_port, run, shutdown

    require_free_port(config.host, config.port)
    if address is None:
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=address, log_to_driver=False)
    # After ray.init, which has a handler of its own: a stop from outside ends as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.stderr.write(f"serve: {config.model.name} answers at {run(config)}; stop with Ctrl-C\n")
        threading.Event().wait()
    except KeyboardInterrupt:
        shutdown()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
