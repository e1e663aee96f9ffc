"""A process of Prefect's that ends with the one that started it:

    python -m flows.prefect_process PARENT_PID server LISTENING_SOCKET
    python -m flows.prefect_process PARENT_PID worker start ...

Prefect's own `server start` asks nobody for the Host of a request, and binds its port too late to be sure of it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

HOSTS = ("127.0.0.1", "localhost")
STOP_SECONDS = 2
"""For requests that are being answered when the server is stopped."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int, kind: str, *arguments: str) -> None:
    # A worker that is asked to stop waits for its flow runs; they follow its death (`end_with_parent`).
    end_with_parent(parent, signal.SIGTERM if kind == "server" else signal.SIGKILL)
    if kind == "server":
        return _serve(int(arguments[0]))
    from prefect.cli import app

    sys.argv = ["prefect", kind, *arguments]
    app()


def _serve(descriptor: int) -> None:
    """Serve Prefect's API and UI on a socket that listens already; a request for another host is refused."""
    import uvicorn
    from prefect.server.api.server import create_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = TrustedHostMiddleware(create_app(final=True), allowed_hosts=list(HOSTS))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Ask Linux to signal this process when its parent dies: a killed run leaves no server behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before
            os.kill(os.getpid(), number)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
