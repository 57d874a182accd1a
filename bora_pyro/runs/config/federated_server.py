"""The configuration of the server of a federated fit between processes.

>>> words = ["--num_clients", "3", "--insecure", "true", "--listen", "127.0.0.1:9092"]
>>> parse_config(FederatedServerConfig, words).address
('127.0.0.1', 9092)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bora_pyro.errors import InputError, shown
from bora_pyro.federated.options import FEDERATION
from bora_pyro.federated.privacy_options import PRIVACY
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import by_heading, changed, option
from bora_pyro.runs.config.federated import FederationOptions, check_not_private
from bora_pyro.runs.config.groups import HEADINGS, RunOptions

__all__ = ["FederatedServerConfig", "parse_config"]

#: The heading of the options of the connection in ``--help``.
CONNECTION = "connection"


@by_heading(*HEADINGS[1:-2], FEDERATION, PRIVACY, CONNECTION, *HEADINGS[-2:])
@dataclass(kw_only=True)
class FederatedServerConfig(FederationOptions):
    """Run the server of a federated fit: it has no documents, and its clients connect over Flower (bora federated-client)."""

    num_clients: int = option(2, "wait for so many clients before the first round", group=FEDERATION, least=1)
    round_timeout: float = option(
        600.0,
        "seconds that the server waits for the clients of a round; it goes on without those that are late",
        group=FEDERATION,
        positive=True,
    )
    join_timeout: float = option(600.0, "seconds that the server waits for the clients at first", group=FEDERATION, positive=True)
    listen: str = option(
        "127.0.0.1:9092", "address and port for the clients; 0.0.0.0:9092 takes those of other machines", group=CONNECTION
    )
    certificate: str | None = option(
        None, "file with the server's certificate, PEM (default: none)", group=CONNECTION, filled=True
    )
    private_key: str | None = option(
        None, "file with the private key of the certificate, PEM (default: none)", group=CONNECTION, filled=True
    )
    client_keys: str | None = option(
        None,
        "folder with the public key of each client, NAME.pub, as ssh-keygen -t ecdsa -b 384 writes it (default: none)",
        group=CONNECTION,
        filled=True,
    )
    insecure: bool = option(
        False,
        "no TLS and no client keys: whoever reaches the port can read and take part; for trials on one machine",
        group=CONNECTION,
        line_only=True,
    )
    output_dir: str = changed(RunOptions, "output_dir", "runs/federated-server")
    overwrite: bool = changed(RunOptions, "overwrite", False)

    def validate(self) -> None:
        """Check every value that can be checked without the model.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        super().validate()
        check_not_private(self)
        _ = self.address
        if self.start_from is not None:
            raise InputError("start_from is given, which a federated fit between processes does not have; leave it out")

    def check_connection(self) -> None:
        """Check that the connection is secure, or ``insecure`` is given on the command line.

        Raises:
            InputError: a file is missing, or is given besides ``insecure``.
        """
        files: dict[str, Any] = {name: getattr(self, name) for name in ("certificate", "private_key", "client_keys")}
        check_security(self.insecure, files)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of ``listen``."""
        return host_and_port("listen", self.listen)


def host_and_port(name: str, text: str) -> tuple[str, int]:
    """An address as its host and its port.

    >>> host_and_port("server", "[::1]:9092")
    ('::1', 9092)

    Raises:
        InputError: it is no address with a port.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 2**16):
        raise InputError(f"{name} is {shown(text)}; give host:port, as in 127.0.0.1:9092")
    return host, int(port)


def check_security(insecure: bool, files: dict[str, Any]) -> None:
    """Check that all files of a secure connection are given, or none of them and ``insecure``.

    Raises:
        InputError: a file is missing, or is given besides ``insecure``.
    """
    for name, file in files.items():
        if insecure and file is not None:
            raise InputError(f"insecure is true, but {name} is given; leave one of them out")
        if not insecure and file is None:
            raise InputError(
                f"{name} is missing; a secure connection needs {', '.join(files)}. For a trial on one machine give "
                "--insecure true"
            )
