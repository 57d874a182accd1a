"""Flower's Fleet API as a web application, and the state behind it. There is no other API in it.

It uses parts of Flower 1.42 that its documentation does not name; ``pyproject.toml`` pins that version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bora_pyro.federated.flower.content import CHUNK

# The largest number of bytes of a request: a part of a letter, and what Flower adds to it.
_LARGEST_REQUEST = CHUNK + 2**20


class Fleet:
    """The state of the Fleet API: the clients that may connect, and the messages that wait.

    Args:
        keys: the public key (PEM) of each client by its name; None: any process may connect.

    Attributes:
        state: Flower's state.
        names: the client of each node, if the clients have keys.
        connections: how often each node has connected.
        run_id, task_id: messages belong to a run of an app and its task. There is no app: this process is both.
    """

    def __init__(self, keys: Mapping[str, bytes] | None) -> None:
        from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
        from flwr.server.superlink.linkstate import LinkStateFactory
        from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
        from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.superlink.federation import NoOpFederationManager

        self.connections = connections = dict[int, int]()

        class State(InMemoryLinkState):
            """Lets a client whose process was killed connect again at once, and counts its connections."""

            def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
                self.deactivate_node(node_id)
                connections[node_id] = connections.get(node_id, 0) + 1
                return super().activate_node(node_id, heartbeat_interval)

        objects, manager = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME), NoOpFederationManager()
        self.state: Any = State(manager, objects.store())
        self._factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, manager, objects)
        self._factory.state_instance = self.state
        self.names: dict[int, str] | None = None
        if keys is not None:
            owner = (NOOP_FLWR_AID, NOOP_ACCOUNT_NAME)
            self.names = {self.state.create_node(*owner, key, HEARTBEAT_DEFAULT_INTERVAL): name for name, key in keys.items()}
        about: tuple[Any, ...] = ("bora_pyro/federated", "1", None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID)
        self.run_id: int = self.state.create_run(*about, str(TaskType.SERVER_APP))
        self.task_id: int = self.state.get_run_info(run_ids=[self.run_id])[0].primary_task_id
        self.state.claim_task(self.task_id)
        self.state.activate_task(self.task_id)

    def app(self) -> Any:
        """The web application."""
        from fastapi import FastAPI
        from flwr.supercore.error import http_error_translator
        from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
        from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
        from flwr.superlink.routers.fleet.router import router
        from starlette.middleware import Middleware
        from starlette.middleware.base import BaseHTTPMiddleware

        middleware = [
            Middleware(_Bounded),
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
        ]
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=middleware)
        app.state.linkstate_factory = self._factory
        app.state.enable_supernode_auth = self.names is not None  # then no node can register itself
        app.include_router(router)
        return app


class _Bounded:
    """Refuses requests without a length, or with a large one, before their bodies are read into memory."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit() or int(length) > _LARGEST_REQUEST:
                await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
                await send({"type": "http.response.body", "body": b""})
                return
        await self._app(scope, receive, send)
