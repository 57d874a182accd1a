"""The private gradient of a client: a Poisson sample of its documents, clipped gradients, and Gaussian noise (DP-SGD).

>>> gradients = {"q.a": torch.tensor([[3.0], [0.3]]), "q.b": torch.tensor([[4.0], [0.4]])}  # of two documents
>>> [value.flatten().tolist() for value in clip_documents(gradients, 1.0).values()]
[[0.5999..., 0.300...], [0.7999..., 0.400...]]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, shown
from bora_pyro.federated.accountant import INSTALL, epsilon_of, is_installed, noise_for
from bora_pyro.federated.aggregate import Tensors
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.random_bits import RandomBits
from bora_pyro.guides.curvature import gradients_of
from bora_pyro.model import BoRA, Weights

# The norm of many float32 numbers has a relative error; a gradient is shortened by so much more.
_ROUNDING = 1e-5


class PrivateGradient:
    """Estimates Σ_n ∇ log p(w_n | θ) over a client's training documents, with noise that hides each of them.

    A step of DP-SGD (Abadi et al., 2016, arXiv 1607.00133): each document is in the sample with probability q, by itself, so the
    sample may be empty. The gradient g_n of a document, times the weight of its task, is shortened to the norm C over all latents
    and tasks. With z of independent Normal(0, 1) numbers, the estimate is

        (Σ_{n in sample} g_n min(1, C/‖g_n‖) + σ C z) / q.

    Divided by the number N of documents it is the mean over q N documents, the expected size of the sample. The size itself is
    not used, because it would tell of the sample.

    The unit of privacy is a document. The pieces of a long document are one document, and so are the options of a question: they
    are sampled together, and their sum is clipped once. A gradient that is not finite counts as 0; it would else be seen in the
    message.

    Args:
        name: the client.
        train: its training documents.
        options: the options of the fit. With ``epsilon``, σ is that of a client which trains in every round.

    Attributes:
        documents: N.
        delta: δ of the guarantee.
        noise_multiplier: σ.
        steps: private steps so far, those with an empty sample included.

    Raises:
        InputError: the client has one document and δ is not given; or ``epsilon`` is given and Opacus is not installed.
    """

    def __init__(self, name: str, train: TokenSplit, options: FederatedOptions) -> None:
        self.documents, self._train, self._options, self.steps = train.num_documents, train, options, 0
        self.delta = 1 / self.documents if options.delta is None else options.delta
        if self.delta >= 1:
            raise InputError(
                f"client {shown(name)} has one training document, for which delta = 1 / N = 1 promises nothing; give a delta "
                "below 1, or deal tasks to fewer clients"
            )
        if options.epsilon is None:
            assert options.noise_multiplier is not None
            self.noise_multiplier = options.noise_multiplier
        else:
            if not is_installed():
                raise InputError(
                    f"epsilon is {options.epsilon:g}, and the noise for it is computed by opacus, which is not installed; "
                    f"{INSTALL}, or give noise_multiplier, whose noise has no epsilon then"
                )
            self.noise_multiplier = noise_for(
                options.epsilon,
                sample_rate=options.sample_rate,
                steps=options.rounds * options.local_steps,
                delta=self.delta,
                accountant=options.accountant,
            )
        self._random = RandomBits(options.noise_seed, name)

    @property
    def epsilon(self) -> float | None:
        """ε of the steps so far; inf without noise, and None without Opacus."""
        if not is_installed():
            return None
        options = self._options
        return epsilon_of(
            self.noise_multiplier,
            sample_rate=options.sample_rate,
            steps=self.steps,
            delta=self.delta,
            accountant=options.accountant,
        )

    @property
    def expected_tokens(self) -> float:
        """The mean number of predicted tokens of a sample."""
        return self._options.sample_rate * self._train.num_tokens

    def sample(self) -> Tensor:
        """A Poisson sample of the documents: the positions of their rows, (rows,), none at times."""
        chosen = self._random.uniform(self.documents) < self._options.sample_rate
        return chosen[self._train.document_of].nonzero()[:, 0]

    def __call__(self, model: BoRA, theta: Weights, *, personal: bool) -> Tensors:
        """Take a sample, and estimate the gradient.

        Args:
            model: the model of the client.
            theta: θ of its tasks, (tasks, layers, *shape) by latent.
            personal: whether each task has values of its own.

        Returns:
            The estimate by latent: (tasks, layers, *shape), or under common values their sum over tasks, (layers, *shape).
        """
        self.steps += 1
        options, sampled = self._options, self._train.subset(self.sample())
        sums = {name: value.new_zeros(value.shape if personal else value.shape[1:]) for name, value in theta.items()}
        budget = min(options.token_budget, model.backbone.pass_tokens)
        for task, gradients in gradients_of(model, theta, sampled, token_budget=budget) if len(sampled) else ():
            weight = model.likelihood.task_weight(task)
            gradients = {name: value * _each(weight, value) for name, value in gradients.items()}
            for name, value in clip_documents(gradients, options.document_clip).items():
                sums[name] = sums[name].index_add(0, task, value) if personal else sums[name] + value.sum(0)
        if self.noise_multiplier:
            deviation = self.noise_multiplier * options.document_clip
            # added in float64: in float32, the bits of a rounded sum would tell about it
            sums = {
                name: (value.cpu().double() + deviation * self._random.normal(value.shape)).to(value)
                for name, value in sums.items()
            }
        return {name: value / options.sample_rate for name, value in sums.items()}


def clip_documents(gradients: Mapping[str, Tensor], clip: float) -> Tensors:
    """The gradients of documents, each shortened to the norm ``clip`` over all latents; 0 for one that is not finite.

    Args:
        gradients: (documents, ...) by latent.
        clip: C; inf: only the finite ones are kept.
    """
    norms = torch.stack([torch.linalg.vector_norm(value.flatten(1), dim=1) for value in gradients.values()])
    norm = torch.linalg.vector_norm(norms, dim=0)
    factor = torch.where(norm <= clip, 1.0, clip / (norm * (1 + _ROUNDING)))
    finite = norm.isfinite()
    return {name: torch.where(_each(finite, value), value * _each(factor, value), 0.0) for name, value in gradients.items()}


def _each(values: Tensor, like: Tensor) -> Tensor:
    """(documents,) as a factor of a tensor (documents, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))
