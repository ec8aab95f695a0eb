"""Left-to-right decoding through transformers' ``generate``.

Axis letters:
    R T  rows and positions of the prompt    D  LLM width    Z  new tokens
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lightning_crosslmm.errors import UserError


class Streamer(Protocol):
    """Receives token ids as they are chosen."""

    def put(self, ids: Tensor) -> None:
        """Take the next ids."""
        ...

    def end(self) -> None:
        """Learn that no more come."""
        ...


class Decoding:
    """Choose tokens one after the other.

    Args:
        max_new_tokens: longest answer, 1 or more.

    Raises:
        UserError: `max_new_tokens` below 1.
    """

    def __init__(self, max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise UserError(f"decoding.max_new_tokens is {max_new_tokens}; it must be 1 or more")
        self.max_new_tokens = max_new_tokens

    def choice(self) -> dict[str, Any]:
        """Give transformers' settings for choosing a token."""
        raise NotImplementedError

    def generate(
        self,
        llm: PreTrainedModel,
        embeds_RTD: Tensor,
        attention_mask_RT: Tensor,
        context: Any,
        *,
        stop_id: int,
        pad_id: int,
        streamer: Streamer | None = None,
        unmerging: Any = None,
    ) -> Tensor:
        """Extend prompts, padded on the left, until each has stopped.

        Args:
            llm: a causal model.
            embeds_RTD: input embeddings of the prompts.
            attention_mask_RT: 1 where a position is real.
            context: for the fused layers, or None.
            stop_id: the token that ends an answer.
            pad_id: what follows it.
            streamer: receives ids as they come; one row only.
            unmerging: what the attention shall see in place of the prompt, or None.

        Returns:
            (R, Z) int64, new tokens only.

        Raises:
            UserError: the prompt and the longest answer exceed the context, or a streamer and several rows.
        """
        room = llm.config.max_position_embeddings - embeds_RTD.shape[1]
        if room < self.max_new_tokens:
            raise UserError(
                f"a prompt of {embeds_RTD.shape[1]} tokens leaves room for {room} in the LLM's context of "
                f"{llm.config.max_position_embeddings}, "
                f"decoding.max_new_tokens is {self.max_new_tokens}; shorten one of them"
            )
        if streamer is not None and len(embeds_RTD) > 1:
            raise UserError(f"streaming takes one question at a time, got {len(embeds_RTD)}")
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=stop_id,
            pad_token_id=pad_id,
            **self.choice(),
        )
        extra = {name: each for name, each in (("fusion", context), ("unmerging", unmerging)) if each is not None}
        # generate fills what we leave open from the checkpoint's own settings, which must not decide a measurement
        model: Any = llm
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            with torch.no_grad():
                return model.generate(
                    inputs_embeds=embeds_RTD,
                    attention_mask=attention_mask_RT,
                    generation_config=settings,
                    streamer=streamer,
                    **extra,
                )
        finally:
            model.generation_config = own


class Greedy(Decoding):
    """Take the likeliest token.

    Args:
        max_new_tokens: longest answer.
    """

    def choice(self) -> dict[str, Any]:
        """No sampling."""
        return {"do_sample": False}


class Sampling(Decoding):
    """Draw from the sharpened, cut distribution; torch's random state decides, so a seed repeats the answer.

    Args:
        max_new_tokens: longest answer.
        temperature: above 0; below 1 sharpens.
        top_p: keep the likeliest tokens that make up this share, 0 < top_p <= 1.
        top_k: keep at most so many; 0 keeps all.

    Raises:
        UserError: a value outside its range.
    """

    def __init__(self, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> None:
        super().__init__(max_new_tokens)
        if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
            raise UserError(
                f"decoding.temperature {temperature} must be above 0, "
                f"decoding.top_p {top_p} in (0, 1], decoding.top_k {top_k} 0 or more"
            )
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def choice(self) -> dict[str, Any]:
        """Sampling settings."""
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
