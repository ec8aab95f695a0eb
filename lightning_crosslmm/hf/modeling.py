"""An exported model as a model of transformers.

Axis letters:
    B  texts    L  tokens of the longest    M  tokens of all texts, padding left out    D  LLM width    W  vocabulary
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutput

from lightning_crosslmm.compose import PART_TARGETS, build_model
from lightning_crosslmm.decoding import Decoding, Streamer
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.hf.configuration import CrossLMMConfig
from lightning_crosslmm.hf.inputs import Inputs, place_of_tokens
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.standalone import config_of

_CHOSEN_HERE = ("max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "transformers_version")
_FIXED = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "output_scores": False}


class CrossLMMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """`CrossLMM` behind the interface of transformers.

    A text holds one mark per visual, and never learns how many pooled tokens stand for it: that may depend on the
    pictures. So `forward` gives logits per token of the text, and `generate` gives the text's ids with new ones after
    them, as models do whose prompts are as long as what the LLM reads.

    Args:
        config: of an exported folder.
        allow: prefixes of further classes that its settings may name; by default the parts of this package alone,
            because a stranger's folder must run no code. ``from_pretrained(FOLDER, allow=["my_pooler"])`` sets it.

    Raises:
        UserError: a class that is not allowed, or settings that no model can be built from.
    """

    config_class = CrossLMMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities: Any = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: CrossLMMConfig, allow: Sequence[str] = ()) -> None:
        super().__init__(config)
        self._allow = (*PART_TARGETS, *allow)
        self.model = self._build()
        self.post_init()
        tied: dict[str, str] = self.model.llm.all_tied_weights_keys  # post_init looks for them in direct children alone
        self.all_tied_weights_keys |= {f"model.llm.{name}": f"model.llm.{other}" for name, other in tied.items()}

    def _build(self) -> CrossLMM:
        settings = config_of(self.config.parts, f"{self.config.name_or_path or 'this configuration'} (config.json)")
        if self.config._attn_implementation not in (None, "sdpa"):  # what the LLM was trained with is in its settings
            settings.llm.model.attention = self.config._attn_implementation
        model = build_model(settings, self._allow)
        model.llm.generation_config = GenerationConfig()  # ours decides
        return model

    @classmethod
    def from_pretrained(cls, folder: Any, *given: Any, **settings: Any) -> Any:  # type: ignore[override]
        """Load an exported folder; arguments are those of every model of transformers, and ``allow``."""
        found = super().from_pretrained(folder, *given, **settings)
        model = found[0] if isinstance(found, tuple) else found
        model._fill_buffers()
        return found

    def _fill_buffers(self) -> None:
        """Make anew what no file holds: transformers builds on the meta device and leaves such buffers empty."""
        with no_init_weights():
            real = self._build()
        kept = real.state_dict().keys()
        for name, buffer in real.named_buffers():
            if name not in kept:
                owner, _, last = name.rpartition(".")
                part = self.model.get_submodule(owner)
                setattr(part, last, buffer.to(getattr(part, last).device))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_frames: Tensor | None = None,
        frame_time_ns: Tensor | None = None,
        answer_index: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Predict the token after each token of the texts.

        Args:
            input_ids: this and all before `logits_to_keep` as in `Inputs`.
            attention_mask: see there.
            pixel_values: see there.
            num_frames: see there.
            frame_time_ns: see there.
            answer_index: see there.
            labels: see there.
            logits_to_keep: only the last so many places of each row; 0 gives all.

        Returns:
            ``logits`` (B, L, W), 0 where a row is padding; at a mark they predict the word after the visual. ``loss``,
            the mean over labelled tokens in nats, where there are labels.

        Raises:
            UserError: tensors that contradict each other, or a text that is longer than the context.
        """
        inputs = Inputs(input_ids, attention_mask, pixel_values, num_frames, frame_time_ns, answer_index, labels)
        batch = self._batch(inputs)
        prompt = self.model.prompt(batch)
        hidden_MD = self.model.run(prompt).flatten(0, 1)
        hidden_MD = hidden_MD[place_of_tokens(batch, prompt.layout).to(hidden_MD.device)]
        real_BL = inputs.mask().to(hidden_MD.device)
        hidden_BLD = hidden_MD.new_zeros(*real_BL.shape, hidden_MD.shape[-1])
        hidden_BLD[real_BL] = hidden_MD
        first = 0 if labels is not None else -logits_to_keep
        logits_BLW = self.model.llm.lm_head(hidden_BLD[:, first:]) * real_BL[:, first:, None]
        loss = None
        if labels is not None:
            target = labels[:, 1:].masked_fill(~real_BL[:, :-1], -100).flatten().to(logits_BLW.device)
            loss = nn.functional.cross_entropy(logits_BLW[:, :-1].flatten(0, 1).float(), target)
        return CausalLMOutput(loss=loss, logits=logits_BLW[:, -logits_to_keep:])

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_frames: Tensor | None = None,
        frame_time_ns: Tensor | None = None,
        answer_index: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Streamer | None = None,
        **settings: Any,
    ) -> Tensor:
        """Answer each text of a batch.

        Args:
            input_ids: this and all before `generation_config` as in `Inputs`; rows of unequal length are padded on
                either side.
            attention_mask: see there.
            pixel_values: see there.
            num_frames: see there.
            frame_time_ns: see there.
            answer_index: see there.
            generation_config: None takes the folder's own, which decodes as the run did.
            streamer: receives ids as they come; one text only.
            **settings: entries of the generation config to change, ``max_new_tokens=64`` for one.

        Returns:
            (B, L + new) int64: the texts as given, new ids, the one that ends an answer, and padding.

        Raises:
            UserError: a setting that is unknown or not to be had here, or a prompt that leaves no room.
        """
        decoding = _Configured(copy.deepcopy(generation_config or self.generation_config), settings)
        inputs = Inputs(input_ids, attention_mask, pixel_values, num_frames, frame_time_ns, answer_index)
        rows = self.model.generate(
            self._batch(inputs), decoding, stop_id=decoding.stop_id, pad_id=decoding.pad_id, streamer=streamer
        )
        whole = [[*row, decoding.stop_id] if len(row) < decoding.max_new_tokens else row for row in rows]
        longest = max(map(len, whole))
        new = [row + [decoding.pad_id] * (longest - len(row)) for row in whole]
        return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)

    def _batch(self, inputs: Inputs) -> Any:
        marks = (self.config.image_token_id, self.config.video_token_id)
        return inputs.batch(marks, self.model.encoder.image_size).to(self.device)

    def get_input_embeddings(self) -> nn.Module:
        """Give the LLM's."""
        return self.model.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Give the LLM's head."""
        return self.model.llm.get_output_embeddings()

    def gradient_checkpointing_enable(self, *given: Any, **settings: Any) -> None:
        """Recompute encoder blocks and decoder layers in the backward pass."""
        self.model.gradient_checkpointing_enable()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave parts as they drew themselves; a folder that lacks weights is told of by transformers."""


class _Configured(Decoding):
    """Decoding as a generation config of transformers says."""

    def __init__(self, config: GenerationConfig, settings: dict[str, Any]) -> None:
        unknown = config.update(**settings)
        unknown |= {
            name: getattr(config, name) for name, only in _FIXED.items() if getattr(config, name) not in (None, only)
        }
        if unknown:
            name, value = next(iter(unknown.items()))
            raise UserError(
                f"generate takes no {name}={value!r}; it takes entries of a generation config, such as max_new_tokens, "
                f"do_sample, temperature, top_p, and leaves {', '.join(_FIXED)} alone"
            )
        if not isinstance(config.eos_token_id, int):
            raise UserError(f"eos_token_id is {config.eos_token_id}; answers end with one token, give its id")
        if config.max_new_tokens is None:
            raise UserError("max_new_tokens is not set; give the longest answer, max_new_tokens=64 for one")
        super().__init__(config.max_new_tokens)
        self.stop_id = config.eos_token_id
        self.pad_id = self.stop_id if config.pad_token_id is None else config.pad_token_id
        self._choice = {name: value for name, value in config.to_diff_dict().items() if name not in _CHOSEN_HERE}

    def choice(self) -> dict[str, Any]:
        """All the rest of the config."""
        return self._choice


AutoModelForImageTextToText.register(CrossLMMConfig, CrossLMMForConditionalGeneration)
