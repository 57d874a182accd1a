"""What the two commands of a federated fit between processes have in common: what must agree, the checks, and the keys.

>>> import tempfile
>>> from pathlib import Path
>>> with tempfile.TemporaryDirectory() as folder:
...     public_keys(folder)
Traceback (most recent call last):
bora_pyro.errors.InputError: client_keys ... has no file NAME.pub; put the public key of each client there
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from bora_pyro.errors import InputError, shown
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.strategies import STRATEGIES
from bora_pyro.federated.strategies.base import Strategy, check_members
from bora_pyro.federated.strategies.bora import begin
from bora_pyro.files.regular import read_regular
from bora_pyro.model import BoRA
from bora_pyro.runs.config.federated import FederationOptions
from bora_pyro.runs.description import describe
from bora_pyro.runs.results import sample_of

# Options that the server alone uses; all others of a federated fit must be those of the clients.
_OF_SERVER = ("participation", "weights", "server_rate", "clip", "aggregate", "trim", "patience")
_OF_PRIOR = ("strategy", "tau", "tau_per", "tau_start", "likelihood_option", "option_score")
# How many numbers of each tensor are compared, and the largest number of bytes of a key.
_SAMPLE, _KEY_BYTES = 16, 2**16


def agreement_of(config: FederationOptions, model: BoRA) -> dict[str, Any]:
    """What the server and its clients must have in common, in values for JSON: base, members, options, and the adapter's start.

    Args:
        config: the configuration, resolved.
        model: the model before the fit.
    """
    names = [field.name for field in dataclasses.fields(FederatedOptions) if field.name not in _OF_SERVER]
    start = {name: sample_of(value, numbers=_SAMPLE).tolist() for name, value in (model.starts | model.fixed).items()}
    found = {
        "base": model.backbone.digest,
        "model": describe(model),
        "options": {name: getattr(config, name) for name in (*names, *_OF_PRIOR)},
        "start": start,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def checked_strategy(config: FederationOptions, model: BoRA) -> Strategy:
    """The strategy of a configuration, after a check that it can fit the model. A learned τ in the prior is created.

    Raises:
        InputError: it cannot.
    """
    strategy = STRATEGIES[config.strategy]()
    check_members(model)
    strategy.check(model)
    begin(model.prior, model.starts)
    return strategy


def public_keys(folder: str) -> dict[str, bytes]:
    """The public keys (PEM) of clients by name, from the files NAME.pub of a folder.

    Raises:
        InputError: the folder has none, one cannot be read, or two are the same.
    """
    files = sorted(Path(folder).glob("*.pub"))
    if not files:
        raise InputError(f"client_keys {shown(folder)} has no file NAME.pub; put the public key of each client there")
    # an optional package, of the extra federated
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    found: dict[str, bytes] = {}
    for file in files:
        try:
            key = load_ssh_public_key(read_regular(file, most=_KEY_BYTES))
            if not isinstance(key, EllipticCurvePublicKey):
                raise ValueError("it is of another kind")
        except Exception as error:  # cryptography raises errors of many kinds
            raise InputError(f"{file} is no ECDSA public key ({error}); make one with ssh-keygen -t ecdsa -b 384") from None
        found[file.stem] = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if len(set(found.values())) < len(found):
        raise InputError(f"two clients in client_keys {shown(folder)} have the same key; give each its own")
    return found


def private_key(file: str) -> Any:
    """The private key in a file.

    Raises:
        InputError: there is none of the right kind.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(read_regular(Path(file), most=_KEY_BYTES), None)
        if not isinstance(key, EllipticCurvePrivateKey):
            raise ValueError("it is of another kind")
    except Exception as error:  # cryptography raises errors of many kinds
        raise InputError(
            f"key {file} is no ECDSA private key without a password ({error}); make one with ssh-keygen -t ecdsa -b 384 -N ''"
        ) from None
    return key


def check_files(**files: str | None) -> None:
    """Check that files of options exist.

    Raises:
        InputError: one does not.
    """
    for name, file in files.items():
        if file is not None and not Path(file).is_file():
            raise InputError(f"{name} {shown(file)} does not exist; give the path of a file")
