"""The configuration of a client of a federated fit between processes.

>>> words = ["--name", "ada", "--data", "ada.csv", "--insecure", "true"]
>>> parse_config(FederatedClientConfig, words).server
'127.0.0.1:9092'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bora_pyro.data.options import DataOptions
from bora_pyro.errors import InputError
from bora_pyro.federated.options import FEDERATION
from bora_pyro.federated.privacy_options import PRIVACY
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import by_heading, changed, option
from bora_pyro.runs.config.federated import FederationOptions, check_no_groups, check_not_private
from bora_pyro.runs.config.federated_server import CONNECTION, FederatedServerConfig, check_security, host_and_port
from bora_pyro.runs.config.groups import AUTO, HEADINGS, PriorOptions, RunOptions, SourceOptions
from bora_pyro.runs.config.map_fit import MapFitConfig

__all__ = ["FederatedClientConfig", "parse_config"]


@by_heading(*HEADINGS[:-2], FEDERATION, PRIVACY, CONNECTION, *HEADINGS[-2:])
@dataclass(kw_only=True)
class FederatedClientConfig(FederationOptions, DataOptions, SourceOptions):
    """Run a client of a federated fit: its documents stay here, and a server (bora federated-server) gets only tensors."""

    name: str = option("", "name of the client, as the server knows it (default: none)", group=FEDERATION)
    server: str = option("127.0.0.1:9092", "address and port of the server", group=CONNECTION)
    root_certificates: str | None = option(
        None, "file with the certificate by which the server's own is checked, PEM (default: none)", group=CONNECTION, filled=True
    )
    key: str | None = option(
        None,
        "file with the private key of this client, as ssh-keygen -t ecdsa -b 384 writes it (default: none)",
        group=CONNECTION,
        filled=True,
    )
    insecure: bool = changed(FederatedServerConfig, "insecure", False)
    server_timeout: float = option(
        600.0, "seconds that the client tries to reach a server that does not answer", group=CONNECTION, positive=True
    )
    task_weights: str | None = changed(PriorOptions, "task_weights", None)
    export_adapters: bool = changed(MapFitConfig, "export_adapters", True)
    output_dir: str = changed(RunOptions, "output_dir", "runs/federated-client")
    overwrite: bool = changed(RunOptions, "overwrite", False)
    resume: bool | str = changed(
        RunOptions,
        "resume",
        AUTO,
        "go on from the state in output_dir, which is stored after each round; auto: if there is one",
    )

    def validate(self) -> None:
        """Check every value that can be checked without the data and the model.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        super().validate()
        check_not_private(self)
        check_no_groups(self.task_group_column)
        host_and_port("server", self.server)
        if self.start_from is not None:
            raise InputError("start_from is given, which a federated fit between processes does not have; leave it out")
        if self.overwrite and self.resume is True:
            raise InputError("overwrite and resume are both true; give one of them")

    def check_connection(self) -> None:
        """Check that the connection is secure, or ``insecure`` is given on the command line, and that there is a name.

        Raises:
            InputError: a file is missing, or is given besides ``insecure``; or there is no name.
        """
        if not self.name:
            raise InputError("name is missing; give the name of this client, as the server knows it")
        files: dict[str, Any] = {name: getattr(self, name) for name in ("root_certificates", "key")}
        check_security(self.insecure, files)
