"""The adapters after the last epochs of a fit, as the members of an ensemble that needs no further training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bora_pyro.errors import InputError, check_at_least
from bora_pyro.inference.callbacks import Callback, FitLoop
from bora_pyro.model import Weights


class LastEpochs(Callback):
    """Keeps θ of all tasks after each of the last epochs of a fit, on the CPU (checkpoint ensembles, Chen et al., 2017).

        >>> import bora_pyro as bp
        >>> from bora_pyro.predict.mixture import predictive
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data, last = bp.load_tasks(bp.table(table), backbone.tokenizer), LastEpochs(2)
        >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1), prior=bp.HierarchicalNormal(tau=100))
        >>> fitted = bp.fit(model, data, callbacks=[last], epochs=3)
        >>> len(last.weights), predictive(model, data.test, last.draws).perplexity() > 1
        (2, True)

    The states are those of the steps, also where the fit keeps the mean of its steps. They differ little if the learning rate has
    fallen to 0 in the last epochs.

    Args:
        number: how many epochs are kept.

    Attributes:
        weights: θ after each epoch, the newest one last: (D, layers, *shape) by name of the latent.

    Raises:
        InputError: ``number`` is below 1; or, in the first epoch, several processes share the fit.
    """

    name = "last_epochs"

    def __init__(self, number: int) -> None:
        check_at_least("number of epochs", number, 1)
        self.weights: deque[Weights] = deque(maxlen=number)
        self._device = torch.device("cpu")

    def after_epoch(self, loop: FitLoop) -> None:
        if loop.processes.size > 1:
            raise InputError("LastEpochs needs the adapters of all tasks in one process; use one process")
        adapters, self._device = loop.state.adapters(), loop.model.backbone.device
        theta = adapters(torch.arange(loop.model.num_tasks)) if callable(adapters) else adapters
        self.weights.append({name: value.detach().cpu().clone() for name, value in theta.items()})

    def draws(self) -> Iterator[Weights]:
        """The states, each on the device of the model when its turn comes: the draws of a mixture."""
        return ({name: value.to(self._device) for name, value in theta.items()} for theta in [*self.weights])

    def state(self) -> dict[str, Tensor]:
        return {f"{place}.{name}": value for place, theta in enumerate(self.weights) for name, value in theta.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        found: dict[int, Weights] = {}
        for key, value in state.items():
            place, _, name = key.partition(".")
            found.setdefault(int(place), {})[name] = value.cpu()
        self.weights.clear()
        self.weights.extend(found[place] for place in sorted(found))
