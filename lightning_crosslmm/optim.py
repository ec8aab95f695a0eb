"""The optimizer: one learning rate per role, frozen where it is null, and a schedule in steps."""

import math
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.llm import is_adapter
from lightning_crosslmm.model import ROLES, CrossLMM


class OptimSettings:
    """AdamW with a learning rate per role and warm-up, then cosine decay (after an optional constant stretch).

    ``factor(s) = s/warm-up`` at first, 1 until the decay starts, then ``end + (1 - end) (1 + cos(pi p)) / 2`` with p
    from 0 to 1.

    Source: CrossLMM, arXiv:2505.17020v1, Table 3, for the learning rates of the two stages (see conf/experiment).
    Differs: optimizer, schedule, warm-up and decay are not given there; these are LLaVA-NeXT's habits.

    Args:
        lr: learning rate per role (encoder, pooler, projector, fusion, llm); null freezes the role.
        weight_decay: on matrices; norms, biases, gates and embeddings have none.
        betas: of AdamW.
        warmup_steps: optimizer steps of linear warm-up.
        constant_share: share of the steps after warm-up that run at the full rate before the decay starts, 0 to 1.
        end_factor: where the decay ends, as a share of the full rate.

    Raises:
        UserError: a role that does not exist or is missing, everything frozen, or a value outside its range.
    """

    def __init__(
        self,
        lr: Mapping[str, float | None],
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.999),
        warmup_steps: int = 0,
        constant_share: float = 0.0,
        end_factor: float = 0.0,
    ) -> None:
        for role in lr:
            if role not in ROLES:
                raise UserError(f"optim.lr has no role '{role}'; right are {', '.join(ROLES)}{nearest(role, ROLES)}")
        if missing := [role for role in ROLES if role not in lr]:
            raise UserError(f"optim.lr.{missing[0]} is missing; give a learning rate, or null to freeze")
        if all(value is None for value in lr.values()):
            raise UserError("optim.lr freezes every role: nothing would be trained; give one of them a learning rate")
        if warmup_steps < 0 or not 0 <= constant_share <= 1 or not 0 <= end_factor <= 1:
            raise UserError(
                f"optim.warmup_steps {warmup_steps} must be 0 or more, optim.constant_share {constant_share} and "
                f"optim.end_factor {end_factor} between 0 and 1"
            )
        self.lr = dict(lr)
        self.weight_decay, self.betas = weight_decay, (betas[0], betas[1])
        self.warmup_steps, self.constant_share, self.end_factor = warmup_steps, constant_share, end_factor

    def freeze(self, model: CrossLMM) -> None:
        """Take the gradient from every parameter of a frozen role, and give it to the others.

        An LLM with adapters (``llm.lora``) trains these and keeps its own weights.

        Raises:
            UserError: adapters on an LLM that is frozen.
        """
        has_adapters = any(is_adapter(name) for name, _ in model.named_parameters())
        if has_adapters and self.lr["llm"] is None:
            raise UserError("llm.lora adapts the LLM and optim.lr.llm=null freezes it; give a rate, or llm.lora=null")
        for name, parameter in model.named_parameters():
            role = model.role_of(name)
            keeps = role == "llm" and has_adapters and not is_adapter(name)
            parameter.requires_grad_(self.lr[role] is not None and not keeps)

    def optimizer(self, model: CrossLMM) -> Optimizer:
        """Build AdamW with up to two groups per trained role, named ``role`` and ``role/no_decay``."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                role = model.role_of(name)
                decays = parameter.ndim >= 2 and "embed" not in name
                groups.setdefault(role if decays else f"{role}/no_decay", []).append(parameter)
        return AdamW(
            [
                {
                    "name": name,
                    "params": parameters,
                    "lr": self.lr[name.split("/")[0]],
                    "weight_decay": 0.0 if "/" in name else self.weight_decay,
                }
                for name, parameters in groups.items()
            ],
            betas=self.betas,
            fused=any(p.device.type == "cuda" for ps in groups.values() for p in ps),
        )

    def factor(self, step: int, total_steps: int) -> float:
        """Scale of the learning rates at an optimizer step, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_from = self.warmup_steps + self.constant_share * (total_steps - self.warmup_steps)
        if step < decay_from:
            return 1.0
        progress = min(1.0, (step - decay_from) / max(1.0, total_steps - decay_from))
        return self.end_factor + (1 - self.end_factor) * (1 + math.cos(math.pi * progress)) / 2

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """Build the schedule for a run of `total_steps` optimizer steps."""
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))
