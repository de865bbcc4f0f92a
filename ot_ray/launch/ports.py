"""Whether a port is free, found out before anything is deployed."""

from __future__ import annotations

import socket

from ot_ray.errors import PortInUseError


def require_free_port(host: str, port: int) -> None:
    """Make sure that the service can listen.

    Raises:
        PortInUseError: another process listens on the port, or this one may not.
    """
    with socket.socket() as probe:
        # Connections of an earlier service that are still closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUseError(
                f"cannot listen on {host}:{port} ({error.strerror or error}); stop the process that does, or set "
                "another port=..."
            ) from None
