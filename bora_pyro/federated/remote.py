"""The clients of a server that are reached over a network: who joins, who answers in time, and who comes back.

It knows no transport: a :class:`Link` carries letters as bytes. ``bora_pyro/federated/flower`` has the link over Flower.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from bora_pyro.errors import InputError, escaped, shown
from bora_pyro.federated.agreement import difference
from bora_pyro.federated.message import Message, RefusedMessage
from bora_pyro.federated.participant import END, ERROR, JOIN, SCORE, STOP, TRAIN
from bora_pyro.federated.rounds import Arrived, Result, rounds_text
from bora_pyro.federated.server import Server
from bora_pyro.federated.strategies.base import Enrolment
from bora_pyro.federated.wire import LARGEST_HEADER, Letter, decode, encode, most_bytes

# Seconds between two looks at what has arrived, for the last letter, and for telling all that the server stops.
_POLL, _LAST, _GOODBYE = 0.05, 120.0, 10.0
_LONGEST_NAME = 80


class Answer(NamedTuple):
    """What came back for a letter: its bytes. They are empty if they cannot be read, and None if there is no answer."""

    ticket: str
    data: bytes | None
    reason: str = ""


class Link(Protocol):
    """Carries letters to processes that have connected, and their answers back."""

    def sessions(self) -> Mapping[str, str | None]:
        """The processes that are connected now: a name of each session, and the client that its key stands for, if any.

        A process that connects again has another session.
        """

    def send(self, session: str, data: bytes, *, seconds: float) -> str:
        """Send a letter that is worth answering for so long, and return a ticket for its answer."""

    def receive(self) -> list[Answer]:
        """The answers that have arrived since the last call."""


@dataclass
class _Member:
    """A client that has joined.

    Attributes:
        session: its present session.
        secret: only the client knows it.
        enrolment: what it has told.
        version: the round of its common values.
        anew: whether it has come back without its state.
    """

    session: str
    secret: str
    enrolment: Enrolment
    version: int
    anew: bool = False


class RemoteClients:
    """The clients of a server over a link.

    Args:
        link: carries the letters.
        agreement: what every client must have too.
        round_timeout: how many seconds the server waits for the clients of a round.
        say: called with a line for the user about clients that come and go.
    """

    def __init__(self, link: Link, agreement: Mapping[str, Any], *, round_timeout: float, say: Callable[[str], None]) -> None:
        self.uploaded = self.downloaded = 0
        self.notes: list[str] = []
        self._link, self._agreement, self._timeout, self._say = link, agreement, round_timeout, say
        self._federation = secrets.token_hex(16)
        self._members: dict[str, _Member] = {}
        self._validation: dict[str, int] = {}
        self._joining: dict[str, str] = {}
        self._seen: set[str] = set()
        self._left_over: list[Answer] = []
        self._best = self._round = 0
        self._server: Server | None = None

    def gather(self, number: int, seconds: float) -> list[Enrolment]:
        """Wait until so many clients have joined.

        Returns:
            What is known of them, in the order of their names.

        Raises:
            InputError: too few have joined in time.
        """
        end = time.monotonic() + seconds
        while len(self._members) < number:
            if time.monotonic() > end:
                who = ", ".join(sorted(self._members)) or "none"
                raise InputError(f"{number} clients were to join within {seconds:g} s, and {len(self._members)} did: {who}")
            self._look()
            time.sleep(_POLL)
        return [self._members[name].enrolment for name in sorted(self._members)]

    @property
    def validation_documents(self) -> int:
        """The number of validation documents of all clients."""
        return sum(self._validation.values())

    def begin(self, server: Server) -> None:
        """Begin the rounds. From now on no new client joins; one that was there may come back."""
        self._server = server

    def train(self, number: int, asked: Sequence[str]) -> Arrived:
        """The messages of the clients that train in a round, as far as they arrive in time."""
        self._round = number
        return self._arrived(TRAIN, number, asked, most_bytes(self._of_server.expected()))

    def score(self, number: int) -> Arrived:
        """The validation sums of all clients, as far as they arrive in time."""
        return self._arrived(SCORE, number, [*self._members], most_bytes(self._of_server.expected_scores()))

    def keep(self, number: int) -> None:
        """The clients are told with the next letter that this round is the best one so far."""
        self._best = number

    def end(self, result: Result) -> list[str]:
        """Send the common values of the best round to all clients, and return the names of those that have not got them."""
        letter = Letter(END, result.best_round, result.common | result.tau)
        self._best = result.best_round
        _, refused, missing = self._ask([*self._members], lambda name: letter, LARGEST_HEADER, min(self._timeout, _LAST))
        return sorted(entry["client"] for entry in [*refused, *missing])

    def dismiss(self, reason: str) -> None:
        """Tell every process that is connected that the server does not go on."""
        tickets = {self._stop(session, reason) for session in self._link.sessions()}
        end = time.monotonic() + _GOODBYE
        while tickets and time.monotonic() < end:
            tickets -= {answer.ticket for answer in self._link.receive()}
            time.sleep(_POLL)

    @property
    def _of_server(self) -> Server:
        assert self._server is not None
        return self._server

    def _arrived(self, kind: str, number: int, asked: Sequence[str], most: int) -> Arrived:
        found, refused, missing = self._ask(asked, lambda name: self._letter(kind, number, name), most, self._timeout)
        arrived = Arrived(refused=refused, report={"missing": missing} if kind == TRAIN else {})
        for name in asked:
            if name in found:
                message = Message(name, found[name].number, dict(found[name].tensors))
                self.uploaded += message.num_bytes
                self._members[name].version = self._of_server.version
                self._members[name].anew = self._members[name].anew and kind != TRAIN
                arrived.messages.append(message)
        return arrived

    def _letter(self, kind: str, number: int, name: str) -> Letter:
        """A letter of a round; with the common values if the client has older ones."""
        message, member = self._of_server.message(), self._members[name]
        about = {"best": self._best, "version": message.number, "anew": member.anew}
        if member.version == message.number:
            return Letter(kind, number, about=about)
        self.downloaded += message.num_bytes
        return Letter(kind, number, message.tensors, about)

    def _ask(
        self, names: Sequence[str], letter_of: Callable[[str], Letter], most: int, seconds: float
    ) -> tuple[dict[str, Letter], list[dict[str, str]], list[dict[str, str]]]:
        """Send a letter to clients and wait. A client that comes back meanwhile gets the letter again.

        One that is not connected is not waited for, unless all are gone.

        Returns:
            The answers by client; the ``client`` and the ``reason`` of those that were refused, and of those that are missing.
        """
        found: dict[str, Letter] = {}
        refused, missing = list[dict[str, str]](), list[dict[str, str]]()
        open_, sent, end = dict[str, str](), dict[str, str](), time.monotonic() + seconds
        waiting = [*names]
        while waiting and (left := end - time.monotonic()) > 0:
            connected = self._look()
            for name in waiting:
                session = self._members[name].session
                if session in connected and sent.get(name) != session:
                    open_[self._link.send(session, encode(letter_of(name)), seconds=left)] = name
                    sent[name] = session
            for answer in self._take():
                name = open_.pop(answer.ticket, "")
                if name not in waiting or answer.data is None:
                    continue
                waiting.remove(name)
                try:
                    if not answer.data:
                        raise RefusedMessage(f"{shown(name)}: {answer.reason}")
                    letter = decode(answer.data, most=most, sender=name)
                    if letter.kind == ERROR:
                        raise RefusedMessage(f"{shown(name)} answers: {_reason(letter)}")
                    found[name] = letter
                except RefusedMessage as error:
                    refused.append({"client": name, "reason": str(error)})
            gone = [name for name in waiting if self._members[name].session not in connected]
            if gone and (found or refused or len(gone) < len(waiting)):
                missing += [{"client": name, "reason": "it was not connected"} for name in gone]
                waiting = [name for name in waiting if name not in gone]
            time.sleep(_POLL)
        missing += [{"client": name, "reason": f"it did not answer within {seconds:g} s"} for name in waiting]
        return found, refused, missing

    def _look(self) -> Mapping[str, str | None]:
        """Ask processes that have connected who they are; the sessions that are connected."""
        connected = self._link.sessions()
        for session in connected:
            if session not in self._seen:
                self._seen.add(session)
                letter = Letter(JOIN, about={"federation": self._federation})
                self._joining[self._link.send(session, encode(letter), seconds=self._timeout)] = session
        if self._joining:
            self._left_over += self._take()
        return connected

    def _take(self) -> list[Answer]:
        """The answers that have arrived, without those of processes that join."""
        arrived, self._left_over = [*self._left_over, *self._link.receive()], []
        for answer in arrived:
            session = self._joining.pop(answer.ticket, None)
            if session is not None and answer.data is not None:
                self._join(session, answer.data)
                arrived = [other for other in arrived if other is not answer]
        return arrived

    def _join(self, session: str, data: bytes) -> None:
        """Accept a process as a client, or tell it why not."""
        try:
            name = self._accept(session, decode(data, most=2 * LARGEST_HEADER, sender="a process that joins"))
        except RefusedMessage as error:
            self._note(f"a client was not accepted: {error}")
            self._stop(session, str(error))
        else:
            self._say(f"{shown(name)} is connected ({len(self._members)} clients)")

    def _accept(self, session: str, letter: Letter) -> str:
        """Accept a client that joins for the first time, or that comes back; return its name."""
        if letter.kind != JOIN:
            raise RefusedMessage(_reason(letter))
        enrolment, secret, trained, version, validation = _told(letter)
        name, keys = enrolment.name, self._link.sessions()
        if (of_key := keys.get(session)) not in (None, name):
            raise RefusedMessage(f"{shown(name)} has the key of {shown(of_key)}; give --name {of_key}, or the key of its own")
        if found := difference(self._agreement, letter.about.get("agreement")):
            raise RefusedMessage(f"{shown(name)} and the server differ: {found}")
        member = self._members.get(name)
        if member is None and self._server is not None:
            raise RefusedMessage(f"{shown(name)} comes too late: the rounds have begun without it")
        if member is not None:
            if of_key is None and secret != member.secret and member.session in keys:
                raise RefusedMessage(
                    f"{shown(name)} is the name of another client, which is connected; give another --name, or wait for a minute "
                    "if that one has died"
                )
            if enrolment != member.enrolment:
                raise RefusedMessage(f"{shown(name)} comes back with other documents or tasks than before")
            if self._server is not None:
                state = f"with its state of round {trained}" if trained else "without a stored state, and begins anew"
                self._note(f"client {shown(name)} came back in round {self._round} {state}")
        self._members[name] = _Member(session, secret, enrolment, version, anew=self._server is not None and not trained)
        self._validation[name] = validation
        return name

    def _stop(self, session: str, reason: str) -> str:
        return self._link.send(session, encode(Letter(STOP, about={"reason": reason})), seconds=self._timeout)

    def _note(self, note: str) -> None:
        self.notes.append(note)
        self._say(f"note: {note}")


def _reason(letter: Letter) -> str:
    return escaped(str(letter.about.get("reason", f"a letter of kind {letter.kind!r}")))[:500]


def _told(letter: Letter) -> tuple[Enrolment, str, int, int, int]:
    """What a client says of itself: its enrolment, its secret, its last round, the round of its values, validation documents."""
    try:
        enrolment = Enrolment(**letter.about["enrolment"])
        secret = letter.about["secret"]
        numbers = [letter.about[name] for name in ("trained", "version", "validation_documents")]
        counts = [enrolment.documents, enrolment.tasks, *numbers]
        if not (
            type(enrolment.name) is type(secret) is str
            and 0 < len(enrolment.name) <= _LONGEST_NAME
            and enrolment.name == escaped(enrolment.name).strip()
            and all(type(count) is int and 0 <= count < 2**53 for count in counts)
            and enrolment.documents > 0 < enrolment.tasks
            and type(enrolment.observations) is float
            and 0 < enrolment.observations < 2.0**53
        ):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise RefusedMessage("a process that joins does not say who it is, or how many documents and tasks it has") from None
    return enrolment, secret, *numbers


def absences(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note for each client that did not answer in some rounds.

    >>> absences([{"epoch": 2, "missing": [{"client": "bob", "reason": "it did not answer within 5 s"}]}])
    ["client 'bob' was missing in round 2, which went on without it (it did not answer within 5 s)"]
    """
    rounds: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    for entry in history:
        for missing in entry.get("missing", ()):
            rounds.setdefault(missing["client"], []).append(entry["epoch"])
            reasons.setdefault(missing["client"], missing["reason"])
    return [
        f"client {shown(client)} was missing in {rounds_text(of_client)}, which went on without it ({reasons[client]})"
        for client, of_client in rounds.items()
    ]
