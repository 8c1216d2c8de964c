"""Where the ranks of a sweep meet."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port for the store of the ranks. A store in a file grows with each agreement, and a new client reads it all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
