"""The client's end of the link: it connects as a SuperNode does, and answers the letters that it fetches."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from bora_pyro.errors import InputError
from bora_pyro.federated.flower import check_flower
from bora_pyro.federated.flower.content import bytes_in, content_of
from bora_pyro.federated.message import SERVER, RefusedMessage

# Seconds between two questions whether there is a letter.
_POLL = 0.5


def serve(
    server: str,
    answer: Callable[[bytes], bytes],
    ended: Callable[[], bool],
    *,
    most: int,
    root_certificates: str | None,
    insecure: bool,
    key: Any = None,
    patience: float = 600.0,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Connect to a server, and answer its letters until there is nothing more to answer.

    Args:
        server: host and port of the server.
        answer: reads a letter and returns the answer.
        ended: whether the last letter has been answered.
        most: the largest number of bytes of a letter.
        root_certificates: file with the certificate that the server's own is checked by (PEM); None: those of this machine.
        insecure: connect without TLS.
        key: the private key of the client; None: any process may connect to the server.
        patience: how many seconds to try when the server does not answer.
        say: called with a line for the user.

    Raises:
        InputError: Flower is not installed, or there is no connection.
    """
    check_flower()
    from flwr.supernode.fleet_http_connection import http_request_response

    keys = None if key is None else (key, key.public_key())
    failure: Exception | None = None
    try:
        with http_request_response(server, insecure, root_certificates, keys, max_wait_time=patience) as connection:
            say(f"connected to {server}")
            try:
                _answer_letters(_Ends(*connection), answer, ended, most=most, say=say)
            except Exception as error:  # the connection would log it and go on
                failure = error
    except SystemExit:  # Flower ends the process where it cannot connect
        raise InputError(
            f"no connection to {server}; check that the server runs there, its certificate (root_certificates), and that it "
            "knows the key of this client"
        ) from None
    if failure is not None:
        raise failure


class _Ends(NamedTuple):
    """What Flower gives for a connection: its node, and functions that fetch and send."""

    node_id: int
    receive: Callable[[], Any]
    send: Callable[[Any, Any, float], tuple[set[str], str]]
    get_run: Callable[[int], Any]
    get_fab: Callable[[str, int], Any]
    pull: Callable[[int, str], bytes]
    push: Callable[[int, str, str, bytes], None]
    confirm: Callable[[int, str], None]


def _answer_letters(
    ends: _Ends, answer: Callable[[bytes], bytes], ended: Callable[[], bool], *, most: int, say: Callable[[str], None]
) -> None:
    """Fetch letters and answer them, until there is nothing more to answer."""
    import httpx
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, pull_objects
    from flwr.supercore.run import RunNotRunningException

    while not ended():
        try:
            found = ends.receive()
        except (httpx.HTTPError, RunNotRunningException) as error:
            raise InputError(
                f"the server does not answer any more ({type(error).__name__}); start again when it is back"
            ) from None
        if found is None:
            time.sleep(_POLL)
            continue
        message, tree = found
        run_id, root = message.metadata.run_id, message.metadata.message_id
        names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
        try:
            contents = pull_objects(names, partial(ends.pull, run_id))
            ends.confirm(run_id, root)
            data = bytes_in(root, contents, most=most, sender=SERVER)
        except (httpx.HTTPError, ObjectPullError, RunNotRunningException, RefusedMessage) as error:
            say(f"note: a letter of the server could not be read ({' '.join(str(error).split())[:200]})")
            continue
        begun = time.perf_counter()
        reply = answer(data)
        try:
            _send(ends, message, reply, time.perf_counter() - begun)
        except (httpx.HTTPError, ObjectPushError, RunNotRunningException, ValueError) as error:
            say(f"note: an answer did not reach the server ({' '.join(str(error).split())[:200]})")


def _send(ends: _Ends, message: Any, data: bytes, seconds: float) -> None:
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

    reply = Message(content_of(data), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    parts, tree = get_all_nested_objects(reply), get_object_tree(reply)
    missing, session = ends.send(reply, tree, seconds)
    for name, part in parts.items():
        if name in missing:
            ends.push(message.metadata.run_id, session, name, part.deflate())
