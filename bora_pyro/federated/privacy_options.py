"""The options of differential privacy in a federated fit.

>>> PrivacyOptions().private, PrivacyOptions(epsilon=3.0).private
(False, True)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from bora_pyro.errors import InputError, check_one_of, shown
from bora_pyro.options.field import option

#: The heading of these options in ``--help``.
PRIVACY = "differential privacy"
#: The accountants of Opacus: Rényi divergences, or the distribution of the privacy loss.
RDP, PRV = ACCOUNTANTS = ("rdp", "prv")


@dataclass(kw_only=True)
class PrivacyOptions:
    """Options of private steps: documents are sampled, their gradients are clipped, and noise is added at the client.

        >>> PrivacyOptions(epsilon=3.0, noise_multiplier=1.0).check_privacy()
        Traceback (most recent call last):
        bora_pyro.errors.InputError: epsilon is 3 and noise_multiplier is 1, which decide the same noise; give one of them

    Either ``epsilon`` or ``noise_multiplier`` turns privacy on. The help of each field is its documentation.
    """

    epsilon: float | None = option(
        None,
        "epsilon of a training document over the whole fit, which decides the noise and needs Opacus (default: no noise)",
        group=PRIVACY,
        positive=True,
    )
    noise_multiplier: float | None = option(
        None,
        "sigma, in place of epsilon: a step's noise has the standard deviation sigma times document_clip (default: no noise)",
        group=PRIVACY,
    )
    delta: float | None = option(
        None, "delta of the guarantee (default: 1 / N of a client's N training documents)", group=PRIVACY
    )
    document_clip: float = option(
        1.0,
        "C: largest norm of a training document's gradient over all latents; a longer one is shortened",
        group=PRIVACY,
    )
    sample_rate: float = option(
        0.2, "q: probability that a training document is in a private step of its client, by itself", group=PRIVACY
    )
    accountant: str = option(
        RDP,
        "how epsilon is computed: rdp is fast; prv is smaller and slower (both of Opacus)",
        group=PRIVACY,
        choices=ACCOUNTANTS,
    )
    noise_seed: int | None = option(
        None,
        "seed of the noise and the samples, to repeat a fit; who knows it can take the noise away, so nothing is guaranteed "
        "(default: bits of the operating system)",
        group=PRIVACY,
        least=0,
        most=2**32 - 1,
    )

    @property
    def private(self) -> bool:
        """Whether clients take private steps."""
        return self.epsilon is not None or self.noise_multiplier is not None

    def check_privacy(self) -> None:
        """Check the values, and that none is given without privacy.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if not self.private:
            for field in dataclasses.fields(PrivacyOptions):
                if (value := getattr(self, field.name)) != field.default:
                    raise InputError(
                        f"{field.name} is {shown(value)}, and neither epsilon nor noise_multiplier is given; give one of these, "
                        f"or leave {field.name} out"
                    )
            return
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise InputError(
                f"epsilon is {self.epsilon:g} and noise_multiplier is {self.noise_multiplier:g}, which decide the same noise; "
                "give one of them"
            )
        check_one_of("accountant", self.accountant, ACCOUNTANTS)
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise InputError(f"epsilon is {self.epsilon}; give a finite number above 0")
        if self.noise_multiplier is not None and not 0 <= self.noise_multiplier < math.inf:
            raise InputError(f"noise_multiplier is {self.noise_multiplier}; give a finite number from 0 up")
        if self.delta is not None and not 0 < self.delta < 1:
            raise InputError(f"delta is {self.delta}; give a number between 0 and 1, well below 1 / N of N training documents")
        if not 0 < self.sample_rate <= 1:
            raise InputError(f"sample_rate is {self.sample_rate}; give a probability above 0 and up to 1")
        if not self.document_clip > 0:
            raise InputError(f"document_clip is {self.document_clip}; give a number above 0")
        if math.isinf(self.document_clip) and self.noise_multiplier != 0:
            raise InputError("document_clip is inf, and noise is measured by it; give a finite number, or noise_multiplier 0")
