"""Client optimizers by DeepSpeed's names. Where they run is the chain's matter, so all are one."""

from __future__ import annotations

from typing import Any

import torch


class FusedAdam(torch.optim.Adam):
    """AdamW, or with adam_w_mode=False Adam, for initialize(optimizer=...).

    Source: DeepSpeed 0.19.8, FusedAdam.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if not bias_correction or amsgrad:
            raise ValueError(
                f"{type(self).__name__}: moments are always corrected and amsgrad is not here; "
                "leave both out, or give torch.optim.AdamW(amsgrad=True)"
            )
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=adam_w_mode)


class DeepSpeedCPUAdam(FusedAdam):
    """FusedAdam; on a CPU where the masters are.

    Source: DeepSpeed 0.19.8, DeepSpeedCPUAdam.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        if not fp32_optimizer_states:
            raise ValueError("DeepSpeedCPUAdam: moments are float32; leave fp32_optimizer_states out")
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """Adagrad, for initialize(optimizer=...); on a CPU where the masters are.

    Source: DeepSpeed 0.19.8, DeepSpeedCPUAdagrad.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        if amsgrad or not fp32_optimizer_states:
            raise ValueError("DeepSpeedCPUAdagrad: amsgrad is not here, and sums are float32; leave both out")
        super().__init__(model_params, lr, weight_decay=weight_decay, eps=eps)
