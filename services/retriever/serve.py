"""uvicorn around the app: ends with an error when loading failed, and tells waiting clients when it is told to stop."""

from __future__ import annotations

import logging
import signal
import socket

import uvicorn

from services.contract.config import RetrieverConfig
from services.retriever.app import CLOSE_GRACE_S, create_app
from services.retriever.errors import RetrieverError
from services.retriever.service import Loaders, Service

log = logging.getLogger("retriever")


class Server(uvicorn.Server):
    """`run()` returns after SIGTERM or SIGINT, or when the index could not be loaded."""

    def __init__(self, config: RetrieverConfig, loaders: Loaders) -> None:
        app = create_app(config, loaders)
        self.service: Service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_config=None,
                log_level="warning",
                access_log=False,
                backlog=2048,
                timeout_graceful_shutdown=2 * CLOSE_GRACE_S,
            )
        )

    @property
    def port(self) -> int:
        """The port really bound: the configured one may be 0."""
        return self.servers[0].sockets[0].getsockname()[1]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            log.info("listening on http://%s:%d, loading in the background", self.config.host, self.port)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks every 0.1 s whether to stop."""
        return await super().on_tick(counter) or self.service.state == "failed"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Before uvicorn waits for the open requests: what cannot be answered in time is told so with a 503.
        self.service.close(CLOSE_GRACE_S)
        await super().shutdown(sockets=sockets)


def serve(config: RetrieverConfig, loaders: Loaders) -> None:
    """Blocks until stopped. Raises RetrieverError when loading failed or the port is taken."""
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: None)  # uvicorn raises it again after a clean stop: that is no failure
    server = Server(config, loaders)
    try:
        server.run()
    except SystemExit:
        raise RetrieverError(
            f"cannot listen on {config.host}:{config.port}: is the port taken? Set retriever.port or --port"
        ) from None
    if server.service.state == "failed":
        raise RetrieverError(server.service.detail)
