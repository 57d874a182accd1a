"""What a federated fit with private steps guarantees, and what it does not.

>>> clients = {"ada": {"documents": 20, "delta": 0.04}}
>>> found = {"guaranteed": True, "epsilon": 2.98, "delta": 0.04, "clients": clients, "accountant": "rdp", "not_private": ["x"]}
>>> privacy_sentence(found)
'each training document has (ε = 2.98, δ = 0.04) differential privacy ...; not covered: x'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from bora_pyro.errors import InputError
from bora_pyro.federated.accountant import is_installed
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.strategies.base import Strategy
from bora_pyro.priors import LearnedPrecision, Prior

if TYPE_CHECKING:
    from bora_pyro.federated.client import Client

#: What private steps do not cover.
NOT_PRIVATE = (
    "the names and the number of the tasks, and the number of training documents of each",
    "the validation and test documents, and all scores of them in the run folder (no validation sums are sent)",
    "copies of a document that other clients have, and other documents of the same author",
    "what the base model, or an adapter that the fit starts from, has seen of the documents before",
)
#: Why a learned τ is refused.
TAU_HAS_NO_NOISE = "tau is learned from sums of single documents, which get no noise; with privacy give a number for tau"


def check_private(strategy: Strategy, prior: Prior, options: FederatedOptions) -> None:
    """Check that all that leaves a client can be made private.

    Raises:
        InputError: the options ask for privacy, and τ is learned from sums without noise.
    """
    if options.private and strategy.personal and isinstance(prior, LearnedPrecision):
        raise InputError(TAU_HAS_NO_NOISE)


def spent(clients: Iterable[Client]) -> dict[str, Any]:
    """What the private steps so far have cost, as the report of a round has it.

    Args:
        clients: the clients of a fit with privacy.

    Returns:
        The worst ``epsilon`` and the largest ``delta``, and by client its ``noise_multiplier``, ``steps``, ``epsilon`` and
        ``delta``. ε is None if it is not known, or infinite.
    """
    found: dict[str, dict[str, Any]] = {}
    for client in clients:
        own = client.private
        assert own is not None
        epsilon = own.epsilon
        found[client.name] = {
            "documents": own.documents,
            "noise_multiplier": own.noise_multiplier,
            "steps": own.steps,
            "epsilon": None if epsilon is None or math.isinf(epsilon) else epsilon,
            "delta": own.delta,
        }
    known = [one["epsilon"] for one in found.values()]
    worst = None if None in known else max(known)
    return {"epsilon": worst, "delta": max(one["delta"] for one in found.values()), "clients": found}


def privacy_record(options: FederatedOptions, last: Mapping[str, Any]) -> dict[str, Any]:
    """The entry ``federated.privacy`` of ``metrics.json``.

    Args:
        options: the options of a fit with privacy.
        last: what `spent` returned after the last round.
    """
    reason = _why_not(options, last)
    found = {
        "guaranteed": reason is None,
        **({} if reason is None else {"why_not": reason}),
        "unit": "a training document, added or removed",
        **last,
        "document_clip": options.document_clip if math.isfinite(options.document_clip) else "inf",
        "sample_rate": options.sample_rate,
        "accountant": options.accountant if is_installed() else None,
        "noise_seed": options.noise_seed,
        "not_private": list(NOT_PRIVATE),
    }
    return {"statement": privacy_sentence(found)} | found


def _why_not(options: FederatedOptions, last: Mapping[str, Any]) -> str | None:
    """Why a fit has noise and no guarantee; None: it has one."""
    if options.noise_multiplier == 0:
        return "no noise was added (noise_multiplier 0)"
    if not is_installed():
        return "the noise is only noise, because the accountant, opacus, is not installed"
    if last["epsilon"] is None:
        return "epsilon is infinite"
    if options.noise_seed is not None:
        return "the seed of the noise is known (noise_seed), and with it the noise can be taken away"
    return None


def privacy_sentence(found: Mapping[str, Any]) -> str:
    """What a fit guarantees in one line, for people.

    Args:
        found: `privacy_record`.
    """
    if not found["guaranteed"]:
        return f"no privacy is claimed: {found['why_not']}"
    clients = found["clients"].values()
    # a smaller ε than the true one must not be shown
    epsilon = f"{math.ceil(found['epsilon'] * 100) / 100:g}"
    weak = any(client["delta"] * client["documents"] >= 1 for client in clients)
    return (
        f"each training document has (ε = {epsilon}, δ = {found['delta']:.3g}) differential privacy against all who see what its "
        f"client has sent (the worst of {len(clients)} client{'s' * (len(clients) != 1)}; accountant {found['accountant']}"
        f"{'; a δ of 1 / N or more of N documents is weak' * weak}); not covered: {'; '.join(found['not_private'])}"
    )
