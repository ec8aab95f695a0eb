"""The fused layers' common part: source tokens as all of them read them, and the keys that groups of layers share.

It stands outside the LLM, because a shared tensor that one decoder layer made for another would escape gradient
checkpointing and sharding, which take layers one by one.

Axis letters:
    S  source tokens    E  their width
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_crosslmm.fusion.keys import Held, KeysValues, Latent, draw, unit_rms
from lightning_crosslmm.host import HostLayer
from lightning_crosslmm.pieces import in_pieces, pieces_of


class FusionSources(nn.Module):
    """Make once per batch what several fused layers read.

    Args:
        hosts: the first layer of each group that shares keys and values, or their latent; empty where none does.
        names: the sets of keys in a group: ``v2v``, ``t2v``, or ``shared``.
        source_width: E.
        kv_latent: r, or None where groups share keys and values themselves.
        eps: of the LLM's norms.
    """

    def __init__(
        self,
        hosts: Mapping[int, HostLayer],
        names: Iterable[str],
        source_width: int,
        kv_latent: int | None,
        eps: float,
    ) -> None:
        super().__init__()
        self.eps, names = eps, tuple(names)
        self.groups = nn.ModuleDict()
        for number, host in hosts.items():
            made: dict[str, nn.Module] = {
                name: KeysValues(host, source_width) if kv_latent is None else Latent(host, source_width, kv_latent)
                for name in names
            }
            self.groups[str(number)] = nn.ModuleDict(made)
            draw(self.groups[str(number)], host.init_std)

    def forward(self, source_SE: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[int, dict[str, Held]]]:
        """Give (S, E) source tokens of unit RMS, and what each group shares, by its first layer.

        Where groups share, all fused layers do, and none asks for the tokens themselves: there are none of them then.

        Args:
            source_SE: source tokens.
            dtype: of the LLM's hidden states; under autocast its own counts, or every layer would cast all tokens anew.
        """
        kind = source_SE.device.type
        is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on the meta device
        dtype = torch.get_autocast_dtype(kind) if is_cast else dtype
        groups: dict[str, Any] = dict(self.groups.items())
        if not groups:
            return unit_rms(source_SE.to(dtype), self.eps), {}

        def share(piece_SE: Tensor) -> Held:
            unit_SE = unit_rms(piece_SE.to(dtype), self.eps)
            return tuple(held for parts in groups.values() for part in parts.values() for held in part(unit_SE))

        held = iter(in_pieces(share, pieces_of(source_SE)))
        shared = {
            int(number): {name: tuple(next(held) for _ in range(part.num_held)) for name, part in parts.items()}
            for number, parts in groups.items()
        }
        return source_SE.new_empty(0, source_SE.shape[-1], dtype=dtype), shared
