"""A client that is reached over a network: it answers the letters of a server. It knows no transport.

A letter of the server asks one of these, and the answer has the same kind:

- ``join``: who the client is, how many tasks and documents it has, and what must agree.
- ``train``: take over the common values, take the local steps of a round, and send what the strategy sends.
- ``score``: take over the common values, and send the sums of the validation documents.
- ``end``: the fit is over; these are the common values of its best round.
- ``stop``: the server does not go on with this client, and says why.

A letter that the client cannot read or use is answered by ``error``, and the client waits for the next one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from bora_pyro.errors import InputError, escaped
from bora_pyro.federated.client import Client
from bora_pyro.federated.message import SERVER, VALIDATION, Message, RefusedMessage, check_message
from bora_pyro.federated.rounds import Result
from bora_pyro.federated.strategies.bora import tau_of
from bora_pyro.federated.wire import Letter, decode, encode, most_bytes

#: The kinds of letters.
JOIN, TRAIN, SCORE, END, STOP, ERROR = "join", "train", "score", "end", "stop", "error"


class Participant:
    """Answers the letters of a server for one client.

    Args:
        client: the client.
        agreement: what the server must have too (`bora_pyro.federated.agreement`).
        secret: a text that only this client knows. With it a client that comes back can be told from another of its name.
        on_trained: called after the steps of a round with a report: the ``epoch`` (the round), ``loss`` and the like. It stores
            the state, before the server gets the answer.
        progress: what `progress` returned before the client's process ended; default: the client is new.
    """

    def __init__(
        self,
        client: Client,
        agreement: Mapping[str, Any],
        *,
        secret: str,
        on_trained: Callable[[dict[str, Any]], None] = lambda report: None,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        self.client, self.agreement, self._secret, self._on_trained = client, agreement, secret, on_trained
        progress = progress or {"federation": None, "trained": 0, "best": 0}
        self._federation: str | None = progress["federation"]
        self._trained, self._best = int(progress["trained"]), int(progress["best"])
        #: What the fit has come to, once it is over.
        self.result: Result | None = None
        #: Why the server does not go on with this client.
        self.stopped: str | None = None
        #: Lines for the user about what has happened.
        self.notes: list[str] = []

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to answer."""
        return self.result is not None or self.stopped is not None

    @property
    def progress(self) -> dict[str, Any]:
        """Which federation the client is in, the last round that it trained in, and the round whose values it keeps."""
        return {"federation": self._federation, "trained": self._trained, "best": self._best}

    @property
    def most(self) -> int:
        """The largest number of bytes of a letter to this client."""
        return most_bytes(self.client.expected())

    def answer(self, data: bytes) -> bytes:
        """Read a letter, do what it asks, and return the answer."""
        try:
            letter = decode(data, most=self.most, sender=SERVER)
            asked = {JOIN: self._join, TRAIN: self._train, SCORE: self._score, END: self._end, STOP: self._stop}
            if letter.kind not in asked:
                raise RefusedMessage(f"the server asks for {letter.kind!r}, which this client does not know")
            found = asked[letter.kind](letter)
        except RefusedMessage as error:
            self.notes.append(f"a letter of the server was refused ({error})")
            found = Letter(ERROR, about={"reason": str(error)})
        return encode(found)

    def _join(self, letter: Letter) -> Letter:
        federation = str(letter.about.get("federation"))
        if self._federation not in (None, federation):
            self.stopped = "its stored state is of another federation; give --overwrite true to start anew"
            return Letter(ERROR, about={"reason": f"client {self.client.name!r}: {self.stopped}"})
        self._federation = federation
        enrolment = dataclasses.asdict(self.client.enrolment)
        about = {"enrolment": enrolment, "secret": self._secret, "agreement": self.agreement, "trained": self._trained}
        about |= {"version": self.client.version, "validation_documents": self.client.data.validation.num_documents}
        return Letter(JOIN, about=about)

    def _train(self, letter: Letter) -> Letter:
        number = letter.number
        if number < self._trained:
            raise RefusedMessage(f"the server asks for round {number}, and the last one was {self._trained}")
        if number > self._trained:  # otherwise the answer to this letter was lost
            self._keep(letter)
            self._receive(letter)
            if letter.about.get("anew") is True:
                self.client.begin_at_common()
                self.notes.append(f"this client came back in round {number} without a stored state; its adapters began at Theta")
            self.client.measure_tau(number)
            begun = time.perf_counter()
            report = self.client.train(number)
            seconds = time.perf_counter() - begun
            self._trained = number
            own: dict[str, Any] = {"epoch": number, "step": number * self.client.options.local_steps}
            own |= {"loss": -report.log_likelihood / report.observations, "seconds": seconds}
            self._on_trained(own | {"training_tokens_per_second": report.tokens / seconds})
        return Letter(TRAIN, number, self.client.message(number).tensors)

    def _score(self, letter: Letter) -> Letter:
        self._keep(letter)
        self._receive(letter)
        return Letter(SCORE, letter.number, {VALIDATION: self.client.validation_sums()})

    def _end(self, letter: Letter) -> Letter:
        message = Message(SERVER, letter.number, dict(letter.tensors))
        check_message(message, self.client.expected(), number=letter.number)
        self._keep(letter)
        tau = {name: value for name, value in message.tensors.items() if name in tau_of(self.client.model.prior)}
        common = {name: value for name, value in message.tensors.items() if name not in tau}
        self.result = Result([], letter.number, None, common, tau, 0.0)
        return Letter(END, letter.number)

    def _stop(self, letter: Letter) -> Letter:
        self.stopped = escaped(str(letter.about.get("reason", "no reason was given")))[:1000]
        return Letter(STOP)

    def _receive(self, letter: Letter) -> None:
        """Take over the common values, if the letter has them: of the round that they belong to."""
        if letter.tensors:
            version = letter.about.get("version")
            if type(version) is not int:
                raise RefusedMessage("the server sends values of no round")
            self.client.receive(Message(SERVER, version, dict(letter.tensors)))

    def _keep(self, letter: Letter) -> None:
        """Keep the present values if a round since the last letter was the best one. The client has not trained since."""
        best = letter.number if letter.kind == END else letter.about.get("best")
        if type(best) is not int:
            raise RefusedMessage("the server does not say which round was the best one")
        if best != self._best or not self.client.kept():
            self.client.keep()
            self._best = best


def check_ended(participant: Participant) -> Result:
    """What the fit has come to.

    Raises:
        InputError: the server has not gone on with this client.
    """
    if participant.result is None:
        raise InputError(f"the server has ended this client's part: {participant.stopped or 'it gave no reason'}")
    return participant.result
