"""Muon for weight matrices and convolutions, AdamW for everything else, behind one optimiser.

`torch.optim.Muon` takes 2D parameters only; the VAE is all convolutions, and on CPUs without bf16 units its
bf16 iteration costs three times this one. The update is Muon's (Jordan et al. 2024): momentum, then an
approximate orthogonalisation by a quintic Newton-Schulz iteration; its size follows "Muon is Scalable" (arXiv
2502.16982): an update of RMS 0.2, so that one learning rate has the meaning it has for AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from longtake.config import Config
from longtake.errors import ConfigError

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values land in about [0.7, 1.2].

    Args:
        matrix: [rows, columns].
        dtype: of the iteration; bf16 halves its time where the processor multiplies bf16 natively.

    Returns:
        [rows, columns] in that dtype.
    """
    a, b, c = _NEWTON_SCHULZ
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.T if transposed else x
    return result


class MuonAdamW(torch.optim.Optimizer):
    """Muon on parameters in the `muon` group, AdamW on those in the `adamw` group."""

    def __init__(
        self,
        muon: Iterable[nn.Parameter],
        adamw: Iterable[nn.Parameter],
        muon_learning_rate: float,
        adamw_learning_rate: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        iteration_dtype: torch.dtype = torch.float32,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(muon), "kind": "muon", "lr": muon_learning_rate, "base_lr": muon_learning_rate},
            {
                "params": list(adamw),
                "kind": "adamw",
                "lr": adamw_learning_rate,
                "base_lr": adamw_learning_rate,
            },
        ]
        defaults = {"weight_decay": weight_decay, "momentum": momentum, "betas": betas}
        self.iteration_dtype = iteration_dtype
        super().__init__([group for group in groups if group["params"]], defaults)

    def scale_learning_rates(self, factor: float) -> None:
        """Set every group's learning rate to its base times `factor` (the schedule's value, in [0, 1])."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def scale_rates_of(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """Some of the parameters learn at so many times the rate of the others; before the first step."""
        chosen = {id(parameter) for parameter in parameters}
        if factor == 1 or not chosen:
            return
        for group in list(self.param_groups):
            mine = [parameter for parameter in group["params"] if id(parameter) in chosen]
            if mine:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
                rates = {"lr": factor * group["lr"], "base_lr": factor * group["base_lr"]}
                self.add_param_group({**group, **rates, "params": mine})

    @property
    def state_bytes(self) -> int:
        """Bytes that the state of every parameter takes once each has had a gradient."""
        total = 0
        for group in self.param_groups:
            numbers = 1 if group["kind"] == "muon" else 1 + (group["betas"][0] > 0)
            total += numbers * sum(parameter.nbytes for parameter in group["params"])
        return total

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if group["kind"] == "muon":
                    self._muon(parameter, parameter.grad, state, group)
                else:
                    self._adamw(parameter, parameter.grad, state, group)
        return loss

    def _muon(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum"]
        buffer.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(buffer, group["momentum"]).flatten(1)
        rows, columns = update.shape
        update = orthogonalise(update, self.iteration_dtype).to(parameter.dtype)
        update = update * (0.2 * max(rows, columns) ** 0.5)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view(parameter.shape), alpha=-group["lr"])

    @staticmethod
    def _adamw(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        if "step" not in state:
            state["step"] = 0
            state["square"] = torch.zeros_like(parameter)
            if beta1 > 0:
                state["mean"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["square"].lerp_(grad.square(), 1 - beta2)
        mean = grad
        if beta1 > 0:
            state["mean"].lerp_(grad, 1 - beta1)
            mean = state["mean"] / (1 - beta1 ** state["step"])
        scale = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(1e-8)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, scale, value=-group["lr"])


class AdamWConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) on every parameter of a network, matrices too.

    Published recipes of distilled video models use betas (0, 0.999) and weight decay 0.01. With a first beta
    of 0 the optimiser keeps one number per weight instead of two.
    """

    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0, description="share of a weight lost per unit of learning rate")

    @model_validator(mode="after")
    def _forgets(self) -> AdamWConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas} leave 0..1", "use for instance [0.9, 0.999]")
        return self

    def build(self, module: nn.Module) -> MuonAdamW:
        """The optimiser of a module's parameters that require gradients."""
        return MuonAdamW(
            (),
            (parameter for parameter in module.parameters() if parameter.requires_grad),
            muon_learning_rate=self.learning_rate,
            adamw_learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=self.betas,
        )


def split_parameters(
    module: nn.Module, adamw_names: tuple[str, ...] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters for Muon (matrices and convolutions) and for AdamW (the rest, and names containing a given
    part).
    """
    muon, adamw = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 1
        if is_matrix and not any(part in name for part in adamw_names):
            muon.append(parameter)
        else:
            adamw.append(parameter)
    return muon, adamw
