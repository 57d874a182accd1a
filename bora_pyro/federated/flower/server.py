"""The server's end of the link: it listens for SuperNodes over HTTPS, and carries letters to them."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from types import TracebackType

from bora_pyro.errors import InputError
from bora_pyro.federated.flower import check_flower
from bora_pyro.federated.flower.content import bytes_in, content_of
from bora_pyro.federated.flower.fleet import Fleet
from bora_pyro.federated.message import RefusedMessage
from bora_pyro.federated.remote import Answer

_START_SECONDS = 30.0


class FlowerServer:
    """Listens for clients, and carries letters to them (:class:`~bora_pyro.federated.remote.Link`). It is a context manager.

    Args:
        host, port: where it listens; port 0: any that is free.
        most: the largest number of bytes of an answer.
        certificate, private_key: files with the server's certificate and its key (PEM); None: no TLS.
        keys: the public key (PEM) of each client by its name; None: any process may connect.

    Raises:
        InputError: Flower is not installed, or the certificate cannot be used; on entering, that it cannot listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        most: int,
        certificate: str | None = None,
        private_key: str | None = None,
        keys: Mapping[str, bytes] | None = None,
    ) -> None:
        check_flower()
        import uvicorn
        from flwr.supercore.heartbeat import HeartbeatSender

        self._most, self._fleet, self._where = most, Fleet(keys), f"{host}:{port}"
        state, task_id = self._fleet.state, self._fleet.task_id
        self._heartbeat = HeartbeatSender(lambda: bool(state.acknowledge_task_heartbeat(task_id)))
        files = {"ssl_certfile": certificate, "ssl_keyfile": private_key}
        config = uvicorn.Config(self._fleet.app(), host=host, port=port, log_level="critical", access_log=False, **files)
        try:
            config.load()
        except (OSError, ValueError) as error:
            raise InputError(f"certificate {certificate} with private_key {private_key} cannot be used ({error})") from None
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="fleet-api", daemon=True)
        self._open: set[str] = set()
        self._arriving: dict[str, tuple[str, int, list[str]]] = {}

    def __enter__(self) -> FlowerServer:
        self._thread.start()
        end = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise InputError(
                    f"listen {self._where}: nothing can listen there; give a free port and an address of this machine"
                )
            time.sleep(0.02)
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.should_exit = True
        if self._heartbeat.is_running:
            self._heartbeat.stop()
        self._thread.join(timeout=10)

    def _serve(self) -> None:
        try:
            self._server.run()
        except SystemExit:  # uvicorn's way to say that the address is in use
            return

    @property
    def address(self) -> str:
        """Where it listens: host and port."""
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes of all letters with what Flower adds to them, without the rest of HTTPS."""
        run = self._fleet.state.get_run_info(run_ids=[self._fleet.run_id])[0]
        return {"sent": run.bytes_sent, "received": run.bytes_recv}

    def sessions(self) -> dict[str, str | None]:
        """The clients that are connected: the name that the key of each stands for, if there are keys."""
        from flwr.supercore.constant import NodeStatus

        found = self._fleet.state.get_node_info(statuses=[NodeStatus.ONLINE])
        names = self._fleet.names
        return {
            f"{node.node_id}/{self._fleet.connections[node.node_id]}": None if names is None else names[node.node_id]
            for node in found
            if node.node_id in self._fleet.connections
        }

    def send(self, session: str, data: bytes, *, seconds: float) -> str:
        """Put a letter where the client fetches it; after so many seconds it is not delivered."""
        from flwr.app import Metadata
        from flwr.app.message import make_message, remove_content_from_message
        from flwr.common.constant import SUPERLINK_NODE_ID
        from flwr.supercore.date import now
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

        run_id, node_id = self._fleet.run_id, int(session.partition("/")[0])
        # the random group makes the identifier of the letter a secret: only who has got the letter can answer it
        group, created = secrets.token_hex(16), now().timestamp()
        about = Metadata(run_id, "", SUPERLINK_NODE_ID, node_id, "", group, created, max(seconds, 1.0), "query")
        message = make_message(about, content_of(data))
        ticket: str = message.object_id
        message.metadata.__dict__["_message_id"] = ticket
        state, tree = self._fleet.state, get_object_tree(message)
        push = state.start_session(run_id)
        stored, missing = state.store_message_and_object_tree(remove_content_from_message(message), tree, push)
        for name, part in get_all_nested_objects(message).items() if stored else ():
            if name in missing:
                state.store_object(run_id, push, name, part.deflate())
        self._open.add(ticket)
        return ticket

    def receive(self) -> list[Answer]:
        """The answers that have arrived whole since the last call, and the reasons why others cannot arrive."""
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.object_store import NoObjectInStoreError

        state, found = self._fleet.state, list[Answer]()
        for message in state.get_message_res(message_ids=set(self._open), run_id=self._fleet.run_id):
            about = message.metadata
            self._open.discard(ticket := about.reply_to_message_id)
            state.delete_messages(message_ins_ids={ticket})
            state.object_store.delete(ticket)
            if message.has_error():
                found.append(Answer(ticket, None, str(message.error.reason)))
                continue
            try:
                tree = state.object_store.get_object_tree(about.message_id)
            except NoObjectInStoreError:
                found.append(Answer(ticket, b"", "its answer was not sent whole"))
                continue
            names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
            self._arriving[ticket] = (about.message_id, about.src_node_id, names)
        return [*found, *self._whole()]

    def _whole(self) -> list[Answer]:
        """The answers of which all parts have arrived."""
        found = list[Answer]()
        for ticket, (root, node_id, names) in [*self._arriving.items()]:
            contents = {name: self._fleet.state.get_object(self._fleet.run_id, name) for name in names}
            if any(content == b"" for content in contents.values()):
                continue
            del self._arriving[ticket]
            self._fleet.state.object_store.delete(root)
            if any(content is None for content in contents.values()):
                found.append(Answer(ticket, b"", "its answer was not sent whole"))
                continue
            sender = (self._fleet.names or {}).get(node_id, f"node {node_id}")
            try:
                found.append(Answer(ticket, bytes_in(root, contents, most=self._most, sender=sender)))
            except RefusedMessage as error:
                found.append(Answer(ticket, b"", str(error)))
        return found
