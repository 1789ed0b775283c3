"""float32 master weights of parameters that train in lower precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.errors import UsageError

__all__ = ["MasterWeights"]


class MasterWeights:
    """The parameters that train, each with the float32 tensor that the optimizer moves.

    A float32 parameter is its own master. A bfloat16 or float16 one (full finetuning, trained norms) gets a float32
    master, because an update smaller than its rounding would be lost: its gradients are added up in the master's, and
    :meth:`copy_to_model` rounds the master into the parameter.

    Raises:
        UsageError: Nothing requires a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self.masters: dict[str, Tensor] = {}
        self._rounded: list[tuple[Tensor, Tensor]] = []  # (parameter, master)
        self._hooks: list[Any] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
                continue
            master = parameter.detach().float().requires_grad_()
            self.masters[name] = master
            self._rounded.append((parameter, master))
            # Called as soon as autograd has this parameter's gradient, so few half-precision gradients exist at a time.
            hook = parameter.register_post_accumulate_grad_hook(_hand_over(master))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

        if not self.masters:
            raise UsageError("no parameter requires a gradient: the method trains nothing in this model")

    def copy_to_model(self) -> None:
        """Round the masters into the model's parameters, in place."""
        with torch.no_grad():
            for parameter, master in self._rounded:
                parameter.copy_(master)

    def release(self) -> None:
        """Remove the hooks, so that parameters keep their gradients again."""
        for hook in self._hooks:
            hook.remove()


def _hand_over(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's fresh gradient to its master's and frees it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return hook
