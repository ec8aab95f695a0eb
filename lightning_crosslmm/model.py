"""CrossLMM: encoder, pooler, projector, placement, LLM and fusion, assembled.

Axis letters:
    F  frames    C H W  channels, pixel rows and columns    N  patches per frame    S  source tokens    P  pooled tokens
    E  encoder width    D  LLM width    R T  rows and positions of the LLM batch    Y  predicted tokens    W  vocabulary
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_crosslmm.batch import VISUAL_MARK, VideoBatch, question_mask
from lightning_crosslmm.decoding import Decoding, Streamer
from lightning_crosslmm.encoder import Encoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import Fusion, FusionContext
from lightning_crosslmm.llm import host_layer, insert_block
from lightning_crosslmm.llm.layers import enable_checkpointing, packed_mask
from lightning_crosslmm.llm.virtual import Unmerging, unmerge_attention
from lightning_crosslmm.placement import Layout, fusion_context, place
from lightning_crosslmm.pooler import Pooler
from lightning_crosslmm.tokens import TokenSet
from lightning_crosslmm.unmerging import check_room, check_unmerging, unmerge
from lightning_crosslmm.visuals import Visuals, VisualSide, questions_of

ROLES = ("encoder", "pooler", "projector", "fusion", "llm")


@dataclass(frozen=True)
class Prompt:
    """A batch ready for the LLM.

    Args:
        embeds_RTD: input embeddings.
        attention_mask: (R, T) with 1 where a position is real, or (R, 1, T, T) for packed rows.
        position_RT: position ids.
        layout: where everything stands.
        context: for the fused layers; None without fusion or visuals.
        unmerging: what the LLM's attention shall see; None where it sees what is there.
        pooled: tokens of the visuals; None without.
    """

    embeds_RTD: Tensor
    attention_mask: Tensor
    position_RT: Tensor
    layout: Layout
    context: FusionContext | None
    unmerging: Unmerging | None = None
    pooled: TokenSet | None = None


@dataclass(frozen=True)
class Output:
    """What training and validation read.

    Args:
        logits_YW: one row per answer token of the batch.
        target_Y: the answer tokens.
        answer_Y: the answer each belongs to.
    """

    logits_YW: Tensor
    target_Y: Tensor
    answer_Y: Tensor


class CrossLMM(VisualSide):
    """A video LMM that reads few tokens per frame and re-reads all of them inside the LLM.

    ``source = encoder(frames); pooled = projector(pooler(source)); answer = LLM([pooled; text], source)``

    Source: CrossLMM, arXiv:2505.17020v1, Fig. 2.
    Differs: see `AveragePooler`, `MLPProjector`, `Fusion`, `FusionBlock` and `place`, each for its own part.

    Args:
        encoder: frames to source tokens.
        pooler: source tokens to pooled tokens.
        projector: called as ``projector(in_width, out_width)``, gives the module.
        fusion: which layers read source tokens, and how.
        llm: a causal model from `load_llm`.
        virtual_unmerging: ``expanded`` or ``unique`` lets the LLM attend as if every patch stood in the prompt (see
            `unmerge`); ``none`` to what does.

    Raises:
        UserError: two parts that do not fit, naming both.
    """

    def __init__(
        self,
        encoder: Encoder,
        pooler: Pooler,
        projector: Callable[[int, int], nn.Module],
        fusion: Fusion,
        llm: PreTrainedModel,
        virtual_unmerging: str = "none",
    ) -> None:
        check_unmerging(virtual_unmerging, pooler)
        config, layers = llm.config, fusion.layers(llm.config.num_hidden_layers)
        super().__init__(
            encoder,
            pooler,
            projector,
            llm_width=config.hidden_size,
            key_source=fusion.key_source if layers else None,
        )
        self.virtual_unmerging = virtual_unmerging
        if virtual_unmerging != "none":
            unmerge_attention(llm)
        self.llm, self.fusion_settings, self.fused_layers = llm, fusion, tuple(layers)
        source_width = encoder.width if fusion.key_source == "encoder" else config.hidden_size
        groups = fusion.groups(config.num_hidden_layers)
        hosts = {number: host_layer(llm, number) for number in groups.values() if number is not None}
        self.fusion_sources = fusion.sources(hosts, source_width, config.rms_norm_eps)
        for number, group in groups.items():
            block = fusion.block(host_layer(llm, number), number, source_width, group)
            insert_block(llm, number, block, before_layer=fusion.placement == "before_layer")
        self.add_time(fusion.frame_time, config.hidden_size, config.initializer_range)

    def prompt(self, batch: VideoBatch, *, pad_left: bool = False, keeps_keys: bool = False) -> Prompt:
        """Place a batch in front of the LLM.

        Args:
            batch: samples; marks and visuals agree (`VideoBatch.validate`).
            pad_left: as generation wants.
            keeps_keys: keep what text reads for the text that follows, for generation.

        Raises:
            UserError: a row is longer than the LLM's context.
        """
        embed: Any = self.llm.get_input_embeddings()
        device = embed.weight.device
        wants_visuals = len(batch.frames_FCHW) > 0 or self.training or self.most is not None
        visuals = self.encode(batch, questions_of(batch, self.llm, self.pooler.needs)) if wants_visuals else None
        layout = self._place(batch, visuals, pad_left)
        text_MD = embed(layout.text_ids_M.to(device, non_blocking=True))
        if visuals is not None and visuals.question_QD is not None:
            question_M = question_mask(batch)[batch.ids_L != VISUAL_MARK]
            rewritten_QD = visuals.question_QD.to(text_MD.dtype)
            text_MD = text_MD.index_copy(0, question_M.nonzero().flatten().to(device), rewritten_QD)
        flat_PD = text_MD.new_zeros(layout.num_rows * layout.num_positions, text_MD.shape[-1])
        flat_PD = flat_PD.index_copy(0, layout.text_position.to(device), text_MD)
        if visuals is not None and visuals.is_blank:
            flat_PD = flat_PD + 0.0 * visuals.pooled.features_SD.sum()
        elif visuals is not None:
            pooled_PD = visuals.pooled.features_SD.to(text_MD.dtype)
            flat_PD = flat_PD.index_copy(0, layout.pooled_position_P.to(device), pooled_PD)
        context = None
        if visuals is not None and self.fused_layers:
            context = fusion_context(
                layout,
                visuals.source,
                *self.fusion_sources(visuals.source.features_SD, text_MD.dtype),
                is_training=self.training,
                t2v_cache=self.fusion_settings.t2v_cache if keeps_keys else None,
            )
        unmerging = None
        if visuals is not None and not visuals.is_blank and self.virtual_unmerging != "none":
            patches, most = math.prod(self.encoder.grid), self.llm.config.max_position_embeddings
            unmerging = unmerge(batch, visuals.pooled, layout, patches, self.virtual_unmerging, most)
        sample_RT = layout.sample_RT.to(device)
        mask = (sample_RT >= 0).long()
        if layout.is_packed:
            mask = packed_mask(sample_RT, self.llm.config._attn_implementation, text_MD.dtype)
        return Prompt(
            embeds_RTD=flat_PD.view(layout.num_rows, layout.num_positions, -1),
            attention_mask=mask,
            position_RT=layout.position_RT.to(device),
            layout=layout,
            context=context,
            unmerging=unmerging,
            pooled=None if visuals is None or visuals.is_blank else visuals.pooled,
        )

    def _place(self, batch: VideoBatch, visuals: Visuals | None, pad_left: bool) -> Layout:
        if visuals is None or visuals.is_blank:
            boundaries = (torch.tensor([0]), batch.sample_of_visual, torch.zeros(0))
            pooled = source = TokenSet.from_grid(torch.zeros(0, 1, 1), (1, 1), *boundaries)
        else:
            pooled, source = visuals.pooled, visuals.source
        return place(
            batch,
            pooled,
            source,
            scope=self.fusion_settings.scope,
            window_frames=self.fusion_settings.window_frames,
            pad_left=pad_left,
            max_positions=self.llm.config.max_position_embeddings,
        )

    def run(self, prompt: Prompt) -> Tensor:
        """Run the LLM's layers on a prompt: (R, T, D), after the last norm."""
        contexts = {"fusion": prompt.context, "unmerging": prompt.unmerging}
        extra = {name: each for name, each in contexts.items() if each is not None}
        return self.llm.model(
            inputs_embeds=prompt.embeds_RTD,
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_RT,
            use_cache=False,
            **extra,
        ).last_hidden_state

    def forward(self, batch: VideoBatch) -> Output:
        """Predict the answer tokens of a batch.

        The head runs on positions that predict an answer and on no other: with a vocabulary of 152,000 it would
        otherwise cost more memory than everything else.
        """
        prompt = self.prompt(batch)
        hidden_RTD = self.run(prompt)
        layout = prompt.layout
        hidden_YD = hidden_RTD.flatten(0, 1)[layout.predict_position_Y.to(hidden_RTD.device)]
        return Output(
            logits_YW=self.llm.lm_head(hidden_YD),
            target_Y=layout.target_Y.to(hidden_RTD.device),
            answer_Y=layout.answer_Y,
        )

    @torch.no_grad()
    def look(self, prompts: VideoBatch) -> Prompt:
        """Run prompts and note in the context's `looks` where each fused layer looked.

        Args:
            prompts: one sample per row, each ending where its answer begins.
        """
        was_training = self.training
        self.eval()
        try:
            prompt = self.prompt(prompts)
            if prompt.context is not None:
                prompt = replace(prompt, context=replace(prompt.context, looks=[]))
                self.run(prompt)
        finally:
            self.train(was_training)
        return prompt

    @torch.no_grad()
    def generate(
        self, batch: VideoBatch, decoding: Decoding, *, stop_id: int, pad_id: int, streamer: Streamer | None = None
    ) -> list[list[int]]:
        """Answer the prompts of a batch, of unequal length or not.

        Args:
            batch: one sample per row, its text ending where the answer begins.
            decoding: how the next token is chosen.
            stop_id: the token that ends an answer.
            pad_id: the token after it.
            streamer: receives ids as they come (one prompt only).

        Returns:
            New ids of each sample, the stop token left out.

        Raises:
            UserError: packed rows, or a prompt that leaves no room for the answer.
        """
        if batch.num_samples != len(batch.row_of_sample.unique()):
            raise UserError("generation wants one sample per row; leave data.pack_tokens to training")
        was_training = self.training
        self.eval()
        try:
            prompt = self.prompt(batch, pad_left=True, keeps_keys=True)
            check_room(prompt.unmerging, decoding.max_new_tokens, self.llm.config.max_position_embeddings)
            ids_RT = decoding.generate(
                self.llm,
                prompt.embeds_RTD,
                prompt.attention_mask,
                prompt.context,
                stop_id=stop_id,
                pad_id=pad_id,
                streamer=streamer,
                unmerging=prompt.unmerging,
            )
        finally:
            self.train(was_training)
        return [row[: row.index(stop_id)] if stop_id in row else row for row in ids_RT.tolist()]

    def role_of(self, parameter_name: str) -> str:
        """Name the role of a parameter: encoder, pooler, projector, fusion or llm."""
        top = parameter_name.split(".", 1)[0]
        if top in ("frame_time", "encoder_time", "fusion_sources") or ".fusion." in parameter_name:
            return "fusion"
        return "projector" if top == "source_projector" else top

    def gradient_checkpointing_enable(self) -> None:
        """Recompute encoder blocks and decoder layers, fusion included, in the backward pass."""
        self.encoder.gradient_checkpointing_enable()
        enable_checkpointing(self.llm)

    def num_parameters(self) -> dict[str, int]:
        """Count parameters by role; tied ones once."""
        counts = dict.fromkeys(ROLES, 0)
        for name, parameter in self.named_parameters():
            counts[self.role_of(name)] += parameter.numel()
        return counts
