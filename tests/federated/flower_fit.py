"""A federated fit between processes on this machine: the commands, their options, certificates and keys."""

from __future__ import annotations

import datetime
import ipaddress
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).parents[2]
#: How long a machine with much other work may take to import what a process needs.
PATIENCE = 600


class Running:
    """A command of ``bora`` in a process of its own, whose output is in a file; or code that gets its words."""

    #: All processes that were started.
    started: ClassVar[list[Running]] = []

    def __init__(self, file, words, code=None):
        self.file = Path(file)
        self.started.append(self)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        line = [sys.executable, "-W", "ignore", *(["-m", "bora_pyro.cli"] if code is None else ["-c", code]), *map(str, words)]
        with self.file.open("a", encoding="utf-8") as out:
            self.process = subprocess.Popen(line, stdout=out, stderr=out, env=environment, cwd=ROOT)

    @property
    def text(self):
        return self.file.read_text(encoding="utf-8")

    def wait_for(self, text, *, times=1, seconds=PATIENCE):
        """Wait until the process has written a text."""
        end = time.monotonic() + seconds
        while self.text.count(text) < times:
            assert time.monotonic() < end, self.text
            assert self.process.poll() is None or self.text.count(text) >= times, self.text
            time.sleep(0.05)

    def end(self, seconds=PATIENCE):
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(self.text) from None

    def kill(self):
        self.process.kill()
        self.process.wait()


def write_certificate(folder):
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bora test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "server.pem", folder / "server.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    files[1].write_bytes(key.private_bytes(*form))
    return files


def write_key(folder, name):
    """A key of a client as ssh-keygen writes it: the file of the private one; the public one is ``keys/NAME.pub``."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    file, public = folder / f"{name}_key", folder / "keys" / f"{name}.pub"
    file.write_bytes(key.private_bytes(*form))
    public.parent.mkdir(exist_ok=True)
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))
    return file
