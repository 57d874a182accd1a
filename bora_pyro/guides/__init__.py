"""How the posterior is approximated: guides for the model. Each one can start from the result of an earlier fit.

    >>> sorted(GUIDES)
    ['auto_normal', 'blob', 'ivon', 'laplace', 'laplace_kfac', 'laplace_kronecker', 'low_rank', 'map', 'multivariate_normal',
     'normal', 'structured', 'subspace', 'swag', 'task_normal', 'tfb']

A guide is a Pyro ``AutoGuide``, for ``SVI(model, guide, ...)``. :data:`GUIDES` has a builder for each name that a configuration
may give.
"""

from collections.abc import Sequence
from typing import Any

from bora_pyro.guides.auto_normal import auto_normal_guide
from bora_pyro.guides.base import GuideBuilder, SiteGuide, init_to_sites, init_to_start, make_parameters
from bora_pyro.guides.blob import BlobGuide, blob_guide
from bora_pyro.guides.ensemble import ENSEMBLE, EnsembleGuide, ensemble_guide
from bora_pyro.guides.ivon import IvonGuide, ivon_guide
from bora_pyro.guides.laplace import LaplaceGuide, laplace_guide
from bora_pyro.guides.laplace_kfac import KfacLaplaceGuide, laplace_kfac_guide
from bora_pyro.guides.laplace_kronecker import KroneckerLaplaceGuide, laplace_kronecker_guide
from bora_pyro.guides.low_rank import LowRankGuide, LowRankNormal, low_rank_guide
from bora_pyro.guides.map import map_guide
from bora_pyro.guides.multivariate_normal import MultivariateNormalGuide, multivariate_normal_guide
from bora_pyro.guides.normal import NormalGuide, normal_guide
from bora_pyro.guides.structured import StructuredNormalGuide, structured_guide
from bora_pyro.guides.subspace import SubspaceGuide, subspace_guide
from bora_pyro.guides.swag import SwagGuide, swag_guide
from bora_pyro.guides.task_normal import TaskNormalGuide, task_normal_guide
from bora_pyro.guides.tfb import TfbGuide, tfb_guide
from bora_pyro.options.members import read_options

#: Guides by the name that a configuration gives them.
GUIDES: dict[str, GuideBuilder] = {
    "map": map_guide,
    "normal": normal_guide,
    "task_normal": task_normal_guide,
    "structured": structured_guide,
    "ivon": ivon_guide,
    "low_rank": low_rank_guide,
    "multivariate_normal": multivariate_normal_guide,
    "subspace": subspace_guide,
    "blob": blob_guide,
    "laplace": laplace_guide,
    "laplace_kfac": laplace_kfac_guide,
    "laplace_kronecker": laplace_kronecker_guide,
    "auto_normal": auto_normal_guide,
    "swag": swag_guide,
    "tfb": tfb_guide,
}

#: Arguments of every builder, which are no options of a single guide.
OF_ALL = ("scale", "temperature")

#: Guides that are made around a MAP estimate: from the curvature there, from steps, or from held-out documents. The others are
#: fitted by an ELBO.
AROUND_MAP = frozenset({"laplace", "laplace_kfac", "laplace_kronecker", "swag", "tfb"})


def guide_options(name: str, options: Sequence[str]) -> dict[str, Any]:
    """The options of a guide that some texts give, as keyword arguments of its builder.

        >>> guide_options("low_rank", ["rank=4"])
        {'rank': 4}

    Args:
        name: the guide's name in ``GUIDES``.
        options: the texts, ``key=value``; none of them is in ``OF_ALL``.

    Raises:
        InputError: the guide has no such option, or a text cannot be converted to its type.
    """
    return read_options("guide", name, GUIDES[name], options, without=OF_ALL)


__all__ = [
    "AROUND_MAP", "ENSEMBLE", "GUIDES", "OF_ALL", "BlobGuide", "EnsembleGuide", "GuideBuilder", "IvonGuide", "KfacLaplaceGuide",
    "KroneckerLaplaceGuide", "LaplaceGuide", "LowRankGuide", "LowRankNormal", "MultivariateNormalGuide", "NormalGuide",
    "SiteGuide", "StructuredNormalGuide", "SubspaceGuide", "SwagGuide", "TaskNormalGuide", "TfbGuide", "auto_normal_guide",
    "blob_guide", "ensemble_guide", "guide_options", "init_to_sites", "init_to_start", "ivon_guide", "laplace_guide",
    "laplace_kfac_guide", "laplace_kronecker_guide", "low_rank_guide", "make_parameters", "map_guide",
    "multivariate_normal_guide", "normal_guide", "structured_guide", "subspace_guide", "swag_guide", "task_normal_guide",
    "tfb_guide",
]  # fmt: skip
