"""SoKA (Chong and Qu, 2025): a sum of Kronecker products, which begins at the largest ones of the frozen weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from bora_pyro.adapters.base import ScaledAdapter, uniform_fan_in
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, check_at_least, check_one_of

#: Where the products begin.
INITS = ("weight", "gradient", "zero")


def rearranged(matrix: Tensor, m: int, n: int) -> Tensor:
    """The (mn, pq) matrix whose row (i, j) is block (i, j) of an (mp, nq) matrix, with blocks of p x q (Van Loan & Pitsianis).

    A Kronecker product becomes a matrix of rank one, vec(U) vec(V)ᵀ.

    >>> u, v = torch.rand(2, 3), torch.rand(4, 5)
    >>> torch.equal(rearranged(torch.kron(u, v), 2, 3), torch.outer(u.flatten(), v.flatten()))
    True
    """
    p, q = matrix.shape[0] // m, matrix.shape[1] // n
    return matrix.reshape(m, p, n, q).transpose(1, 2).reshape(m * n, p * q)


def kronecker_svd(matrix: Tensor, m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """σ (k,), U (k, m, n) and V (k, p, q) with W = Σ_k σ_k U_k ⊗ V_k for W (mp, nq): the Kronecker-product SVD.

        >>> sigma, u, v = kronecker_svd(torch.kron(torch.ones(2, 2), torch.eye(3)), 2, 2)
        >>> sigma.shape, u.shape, v.shape, round(float(sigma[0] ** 2), 3)
        (torch.Size([4]), torch.Size([4, 2, 2]), torch.Size([4, 3, 3]), 12.0)

    The first r terms are the best approximation of W by r Kronecker products of these sizes, and the squared error is the sum
    of the other σ². The U_k are orthonormal, and so are the V_k. The largest entry of each U_k is positive, so that no sign
    depends on the library that computes it.

    Args:
        matrix: W. Its rows are a multiple of ``m`` and its columns one of ``n``.
        m: rows of U.
        n: columns of U.

    Source: Van Loan and Pitsianis, "Approximation with Kronecker Products", 1993.
    """
    left, sigma, right = torch.linalg.svd(rearranged(matrix, m, n), full_matrices=False)
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(left)[0]
    u, v = (left * sign).mT, right * sign[:, None]
    return sigma, u.reshape(-1, m, n), v.reshape(-1, matrix.shape[0] // m, matrix.shape[1] // n)


def rank_by_energy(sigma: Tensor, energy: float) -> int:
    """How many products to keep: the fewest with the share ``energy`` of Σ σ², but none beyond the elbow of the singular values.

        >>> rank_by_energy(torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1, 0.1]), 0.85)
        2
        >>> rank_by_energy(torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1, 0.1]), 1.0)  # the elbow is the fourth value
        3

    The elbow is the value farthest below the straight line from the first to the last value. The values before it are kept.

    Args:
        sigma: all singular values, the largest first.
        energy: the share, above 0 and at most 1.
    """
    squares = sigma.double().square()
    if not float(squares.sum()) > 0:
        return 1
    shares = squares.cumsum(0) / squares.sum()
    by_energy = min(int((shares < energy).sum()) + 1, len(sigma))
    line = torch.lerp(sigma[:1].double(), sigma[-1:].double(), torch.linspace(0, 1, len(sigma), dtype=torch.float64))
    depth = line - sigma.double()
    elbow = int(depth.argmax()) if float(depth.max()) > 0 else len(sigma)
    return min(by_energy, max(elbow, 1))


@dataclass(frozen=True)
class SoKA(ScaledAdapter):
    """A sum of r Kronecker products: W = W_full + (α/r) (Σ_k σ_k U_k ⊗ V_k − the same sum at the start).

        >>> adapter, slot = SoKA(rank=4), Slot("q_proj", ("q_proj",), 16, 32)
        >>> start = adapter.start(slot, lambda: torch.rand(32, 16), torch.Generator())
        >>> {name: tuple(value.shape) for name, value in start.latents.items()}
        {'sigma': (4,), 'U': (4, 4, 4), 'V': (4, 8, 4)}

    U_k (m, n) and V_k (p, q) with mp = out and nq = in. A product has mn + pq + 1 latents and can change a layer in all
    directions. One of LoRA's has in + out latents and changes it in one direction.

    **The start.** With ``init="weight"`` the products begin at the r largest ones of the frozen weight (``kronecker_svd``), as
    PiSSA begins at its largest singular directions. The sum at the start is subtracted. This is the same as to train the largest
    products and to freeze the rest of W_full. So ΔW = 0 at the start. Θ begins there, its prior is flat, and the prior of θ_d is
    centred on Θ: nothing pulls the pretrained weight to 0. τ is about σ, U and V, not about ΔW.

    With ``init="gradient"`` they begin at the r largest products of −∇L, the direction in which the loss of some documents falls
    fastest; σ is scaled to the norm that the weight's r largest products have. ΔW is 0 at the start, too. The gradients come from
    :func:`~bora_pyro.adapters.layer_gradients.layer_gradients`, in Python alone: a run folder does not store them, so commands
    refuse this start.

    With ``init="zero"`` nothing is subtracted: the U_k begin at 0 and the V_k at random, without σ, which would be redundant. One
    such product is LoKr.

    **The rank.** There are ``rank`` products. With ``energy`` each layer has as many as ``rank_by_energy`` keeps of its weight,
    and at most ``rank``; the others are masked. Guides that cannot leave out entries then refuse the adapter.

    **What it costs.** ΔW is never formed: (U ⊗ V) x is computed as U X Vᵀ for x as a matrix X (n, q). That is about
    2 r p (in + m n) multiplications a token, half of it with ``init="zero"``. For r = 8 and a layer of 256 x 256 this is twice
    the product with a dense ΔW: the gain is in latents, not in time. The start is one SVD of an (mn, pq) matrix for each layer,
    on the CPU: a fraction of a second for a layer of 256 x 256, minutes for one of 4096 x 4096.

    **What the paper does not tell**, or not clearly, and what is decided here. The paper speaks of the SVD of the "full weight
    update", which does not exist before the fit; here it is that of the weight by default, or of one step of gradients. The
    thresholds are not known, so ``energy`` is none by default; with it, the smaller of the two ranks counts.
    The sizes of U are not known: m and n are the largest divisors of out and in up to their square roots, as in LoKr. σ, U and V
    are all learned. The paper has no scale, as the default α = r.

    Args:
        rank: r, the number of products, or the most of them if ``energy`` is given.
        alpha: α; the change is scaled by α/r. Default: the rank, so that the scale is 1.
        factor: m = n = factor for every layer; it divides both sizes of each layer. Default: sizes near the square roots.
        init: ``weight``, ``gradient`` or ``zero``.
        energy: the share of the squared singular values that is kept, above 0 and at most 1; usual are 0.9 to 0.99.

        gradients: with ``init="gradient"``, the gradient of the loss for each adapted layer by its path, (out, in).

    Raises:
        InputError: an option is out of its range; or, when a model is built, the rank or the factor does not fit a layer, or a
            layer has no gradient or one of another shape.

    Source: Chong and Qu, "Singular Value Decomposition on Kronecker Adaptation for Large Language Model", 2025, arXiv 2506.15251.
    LoKr: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", ICLR 2024.
    """

    factor: int | None = None
    init: str = "weight"
    energy: float | None = None
    gradients: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("init", self.init, INITS)
        if self.factor is not None:
            check_at_least("factor", self.factor, 1)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"energy is {self.energy}; give a share above 0 and at most 1, for instance 0.9, or none")
        if self.energy is not None and self.init == "zero":
            raise InputError(f"energy is {self.energy}, but init=zero has no singular values; give init=weight, or no energy")

        if self.init == "gradient" and self.gradients is None:
            raise InputError(
                "init is gradient, which needs the gradients of documents; give SoKA(init='gradient', "
                "gradients=layer_gradients(backbone, split)) in Python, or init=weight"
            )
        if self.gradients is not None and self.init != "gradient":
            raise InputError(f"gradients are given, but init is {self.init}; give init='gradient', or no gradients")

    def sizes(self, slot: Slot) -> tuple[int, int, int, int]:
        """m, n, p and q for the layers of ``slot``.

        Raises:
            InputError: the factor or the rank does not fit these layers.
        """
        out, of_input = slot.out_features, slot.in_features
        layer = f"layer {slot.name}, whose weight is {out} x {of_input}"
        if self.factor is None:
            m, n = _near_root(out), _near_root(of_input)
        else:
            m = n = self.factor
            if out % m or of_input % n:
                common = [d for d in range(1, math.gcd(out, of_input) + 1) if out % d == of_input % d == 0]
                valid = min(common, key=lambda d: abs(d - m))
                raise InputError(f"factor {m} does not divide both sizes of {layer}; the nearest that does is {valid}")
        p, q = out // m, of_input // n
        if self.rank > (most := min(m * n, p * q)):
            raise InputError(
                f"rank {self.rank} is too large for {layer}: {most} Kronecker products of {m} x {n} and {p} x {q} give any "
                f"change of it; give rank {most} or less"
            )
        return m, n, p, q

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        m, n, p, q = self.sizes(slot)
        if self.init == "zero":
            return Start({"U": torch.zeros(self.rank, m, n), "V": uniform_fan_in((self.rank, p, q), generator)})
        # on the CPU, so that a run can be read on any device: another library may turn near-equal directions otherwise
        values, u, v = kronecker_svd(weight().cpu(), m, n)
        if self.gradients is not None:
            norm = values[: self.rank].norm()
            values, u, v = kronecker_svd(-self._gradient(slot), m, n)
            values = values * (norm / values[: self.rank].norm().clamp(min=torch.finfo(values.dtype).tiny))
        masks = {}
        active = torch.ones(self.rank, dtype=torch.bool)
        if self.energy is not None:
            active = torch.arange(self.rank) < rank_by_energy(values, self.energy)
            masks = {"sigma": active, "U": active[:, None, None], "V": active[:, None, None]}
        sigma = values[: self.rank] * active
        u, v = (value[: self.rank] * active[:, None, None] for value in (u, v))
        latents = {"sigma": sigma, "U": u, "V": v}
        return Start(latents, fixed={f"start_{name}": value.clone() for name, value in latents.items()}, masks=masks)

    def _gradient(self, slot: Slot) -> Tensor:
        assert self.gradients is not None
        path, shape = slot.paths[0], (slot.out_features, slot.in_features)
        gradient = self.gradients.get(path)
        if gradient is None or gradient.shape != shape:
            found = "missing" if gradient is None else f"of shape {tuple(gradient.shape)}"
            raise InputError(f"the gradient of layer {path} is {found}; give shape {shape}, as layer_gradients does")
        return gradient.float().cpu()

    def products(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """L (..., K, m, n) and R (..., K, p, q) with ΔW = Σ_k L_k ⊗ R_k; K = 2r with ``init="weight"``, else r."""
        u, v = tensors["U"], tensors["V"]
        if self.init == "zero":
            return self.scaling * u, v
        centre = (tensors["start_sigma"][:, None, None] * tensors["start_U"]).to(u)
        # with M = σU, M ⊗ V − M₀ ⊗ V₀ = (M − M₀) ⊗ V + M₀ ⊗ (V − V₀): exactly 0 at the start, and no large numbers cancel
        moved, turned = tensors["sigma"][..., None, None] * u - centre, v - tensors["start_V"].to(v)
        return self.scaling * torch.cat([moved, centre.expand_as(moved)], -3), torch.cat([v, turned], -3)

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        left, right = self.products(tensors)
        blocks = torch.einsum("...kmn,...kpq->...mpnq", left, right)
        return blocks.flatten(-2).flatten(-3, -2)

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        left, right = (value.to(x.dtype) for value in self.products(tensors))
        (m, n), (p, q) = left.shape[-2:], right.shape[-2:]
        blocks = x.unflatten(-1, (n, q))  # X: (rows, tokens, n, q)
        # Σ_k L_k X R_kᵀ; the side that leaves the smaller product comes first
        change = _sum(blocks, left, right) if n * p <= m * q else _sum(blocks.mT, right, left).mT
        return change.flatten(-2)

    def kept_per_token(self, slot: Slot) -> int:
        m, n, p, q = self.sizes(slot)
        return self._terms * min(n * p, m * q)

    def kept_per_row(self, slot: Slot) -> int:
        m, n, p, q = self.sizes(slot)
        return self._terms * (m * n + p * q)

    @property
    def _terms(self) -> int:
        return self.rank if self.init == "zero" else 2 * self.rank


def _sum(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ_k L_k X R_kᵀ, (rows, tokens, m, p), for X (rows, tokens, n, q), L (rows, K, m, n) and R (rows, K, p, q)."""
    rows, tokens, n, q = x.shape
    terms, m, p = left.shape[1], left.shape[2], right.shape[2]
    first = x.reshape(rows, tokens * n, q) @ right.reshape(rows, terms * p, q).mT
    # (rows, tokens, n, K, p) -> (rows, tokens p, K n), to sum over products and n at once
    inner = first.view(rows, tokens, n, terms, p).permute(0, 1, 4, 3, 2).reshape(rows, tokens * p, terms * n)
    return (inner @ left.permute(0, 1, 3, 2).reshape(rows, terms * n, m)).view(rows, tokens, p, m).mT


def _near_root(number: int) -> int:
    """The largest divisor that is at most the square root."""
    return next(d for d in range(math.isqrt(number), 0, -1) if number % d == 0)
