"""A conditional variational autoencoder of adapters given task vectors (ICM-LoRA), as a Pyro model and guide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from bora_pyro.errors import InputError, check_at_least
from bora_pyro.predict.generators.base import Method

# As for the priors: parameters belong to their module and not to a global store. Set before any PyroModule is built.
pyro.settings.set(module_local_params=True)


class Decoder(PyroModule):
    """The model: z ~ Normal(0, I), y ~ Normal(f(z, c), σ²).

        >>> decoder = Decoder(hidden=4, outputs=3, latent=2, width=8, noise=0.1)
        >>> decoder(torch.zeros(5, 4)).shape
        torch.Size([5, 3])

    Args:
        hidden: size of a vector c.
        outputs: q, the number of coordinates y of an adapter.
        latent: size of z.
        width: width of the two hidden layers.
        noise: σ.
    """

    def __init__(self, hidden: int, outputs: int, *, latent: int, width: int, noise: float) -> None:
        super().__init__()
        self.latent, self.noise = latent, noise
        self.decode = _layers(latent + hidden, width, outputs)

    def forward(self, vectors: Tensor, latents: Tensor | None = None) -> Tensor:
        """Sample the adapters, (rows, q), of tasks with the vectors (rows, hidden); given adapters are observed."""
        with pyro.plate("adapters", len(vectors)):
            z = pyro.sample("z", _normal(vectors.new_zeros(len(vectors), self.latent), 1.0))
            mean = self.decode(torch.cat([z, vectors], -1))
            return pyro.sample("latents", _normal(mean, self.noise), obs=latents)


class Encoder(PyroModule):
    """The guide: q(z | y, c) is a Normal with a mean and a scale for each entry of z. The sizes are those of `Decoder`."""

    def __init__(self, hidden: int, outputs: int, *, latent: int, width: int) -> None:
        super().__init__()
        self.encode = _layers(outputs + hidden, width, 2 * latent)

    def forward(self, vectors: Tensor, latents: Tensor) -> Tensor:
        """Sample z, (rows, latent), for vectors (rows, hidden) and adapters (rows, q)."""
        with pyro.plate("adapters", len(vectors)):
            loc, log_scale = self.encode(torch.cat([latents, vectors], -1)).chunk(2, -1)
            return pyro.sample("z", _normal(loc, log_scale.clamp(-10, 10).exp()))


@dataclass
class CVAE(Method):
    """A conditional VAE (Sohn et al., 2015; for adapters: Shao et al., 2025, ICM-LoRA), with MLPs.

        >>> generator = torch.Generator().manual_seed(0)
        >>> c = torch.randn((12, 2), generator=generator, dtype=torch.float64)
        >>> method = CVAE(steps=60, learning_rate=0.02)
        >>> method.fit(c, c)
        >>> error = sum((method.generate(vector) - vector).square().mean() for vector in c) / 12
        >>> bool(error < 0.5 * c.square().mean())
        True

    The paper's loss is the mean squared error of the adapter plus ``kl_weight`` times the KL divergence of z. Up to a factor this
    is the negative ELBO of a Normal likelihood with the variance σ² = ``kl_weight`` · q/2 for each of q coordinates, so the model
    has this σ and the ELBO has no weights. The centre, ``generate(vector)``, is the decoder at z = 0; a draw has a z of its own.

    Args:
        kl_weight: the paper's weight of the KL divergence.
        latent: size of z.
        width: width of the two hidden layers of encoder and decoder.
        steps: steps of Adam; each has all adapters.
        learning_rate: Adam's rate at the start. It falls to 0 as a cosine.

    Raises:
        InputError: an option is out of range.
    """

    has_draws: ClassVar[bool] = True

    kl_weight: float = 0.005
    latent: int = 8
    width: int = 64
    steps: int = 500
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("latent", "width", "steps"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("kl_weight", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give a finite number above 0")

    def fit(self, vectors: Tensor, latents: Tensor, *, draws: Tensor | None = None, seed: int = 0) -> None:
        rows = latents[:, None] if draws is None else draws  # (D, K, q)
        c = vectors.float().repeat_interleave(rows.shape[1], 0)
        y = rows.flatten(0, 1).float()
        with poutine.seed(rng_seed=seed):
            self._decoder, encoder = self._networks(c.shape[1], y.shape[1])
            elbo = TraceMeanField_ELBO()(self._decoder, encoder)
            optimizer = torch.optim.Adam([*self._decoder.parameters(), *encoder.parameters()], lr=self.learning_rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
            for _ in range(self.steps):
                optimizer.zero_grad()
                loss = elbo(c, y) / len(y)
                loss.backward()
                optimizer.step()
                schedule.step()
        if not all(bool(value.isfinite().all()) for value in self._decoder.parameters()):
            raise InputError(f"the fit of the generator diverged; give a smaller learning_rate than {self.learning_rate:g}")

    def _networks(self, hidden: int, outputs: int) -> tuple[Decoder, Encoder]:
        return self._decoder_of(hidden, outputs), Encoder(hidden, outputs, latent=self.latent, width=self.width)

    def _decoder_of(self, hidden: int, outputs: int) -> Decoder:
        noise = math.sqrt(self.kl_weight * outputs / 2)
        return Decoder(hidden, outputs, latent=self.latent, width=self.width, noise=noise)

    @torch.no_grad()
    def generate(self, vector: Tensor, *, draw: int | None = None) -> Tensor:
        z = torch.zeros(self.latent)
        if draw is not None:
            z = torch.randn(self.latent, generator=torch.Generator().manual_seed(draw))
        return self._decoder.decode(torch.cat([z, vector.float()])).double()

    def state(self) -> dict[str, Tensor]:
        # the encoder serves the fit alone
        return {name.replace(".", "/"): value.detach() for name, value in self._decoder.decode.named_parameters()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        values = {name.replace("/", "."): value for name, value in state.items()}
        weights = [value for name, value in sorted(values.items()) if ".weight" in name]
        first, _, last = weights
        if len(first) != self.width or first.shape[1] <= self.latent:  # before a network of any size is built
            raise ValueError(f"its network has {tuple(first.shape)} weights, not {self.width} x (vector + {self.latent})")
        self._decoder = self._decoder_of(first.shape[1] - self.latent, len(last))
        self._decoder.decode.load_state_dict(values)


def _normal(loc: Tensor, scale: Tensor | float) -> dist.TorchDistribution:
    # without Pyro's checks of the arguments, which would take a fifth of a step of so small a network
    return dist.Normal(loc, scale, validate_args=False).to_event(1)


def _layers(inputs: int, width: int, outputs: int) -> nn.Sequential:
    linear = [PyroModule[nn.Linear](*sizes) for sizes in ((inputs, width), (width, width), (width, outputs))]
    for layer in linear:
        for name in ("weight", "bias"):  # Pyro's own SVI looks for parameters that Pyro registered
            value = getattr(layer, name).detach()
            delattr(layer, name)
            setattr(layer, name, PyroParam(value))
    return PyroModule[nn.Sequential](linear[0], nn.SiLU(), linear[1], nn.SiLU(), linear[2])
