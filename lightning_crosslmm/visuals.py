"""The visual side of CrossLMM: frames to the pooled tokens that the LLM reads and the source tokens that fusion reads.

Axis letters:
    F  frames    C H W  channels, pixel rows and columns    N  patches per frame    S  tokens    E D  encoder, LLM width
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_crosslmm.batch import VideoBatch, asked_visuals, question_mask
from lightning_crosslmm.encoder import Encoder, Features, Reuse, refuse_reuse
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import frame_time
from lightning_crosslmm.llm.layers import summarise
from lightning_crosslmm.pieces import in_pieces, pieces_of
from lightning_crosslmm.pooler import Pooler, Stage, check_pooled
from lightning_crosslmm.taps import Questions, Taps
from lightning_crosslmm.tokens import TokenSet, frame_in_visual


@dataclass(frozen=True)
class Visuals:
    """The visual side of a batch.

    Args:
        pooled: what the LLM reads, at its width.
        source: what fusion reads, at the LLM's or the encoder's width.
        is_blank: a stand-in for a batch without visuals; takes no part but in the graph.
        question_QD: the question's embeddings where the pooler rewrote them, else None.
    """

    pooled: TokenSet
    source: TokenSet
    is_blank: bool
    question_QD: Tensor | None = None


class VisualSide(nn.Module):
    """Encoder, pooler and projector, and the embedding of time that their tokens carry.

    ``source = encoder(frames); pooled = projector(pooler(source))``, or in the order that the pooler's stage says.

    Args:
        encoder: frames to source tokens.
        pooler: source tokens to pooled tokens.
        projector: called as ``projector(in_width, out_width)``, gives the module. There are two of them where the
            pooler changes the width before the projector and fusion reads projected tokens, and none where nobody asks.
        llm_width: D.
        key_source: what fusion reads, ``projected`` or ``encoder``; None without fusion.

    Raises:
        UserError: pooler and encoder do not fit, naming both.
    """

    def __init__(
        self,
        encoder: Encoder,
        pooler: Pooler,
        projector: Callable[[int, int], nn.Module],
        llm_width: int,
        key_source: str | None,
    ) -> None:
        super().__init__()
        if missing := sorted((pooler.needs | pooler.asks.needs) - encoder.gives - {"question", "question_summary"}):
            substitutes = [word for word in sorted(encoder.gives) if word.startswith("saliency.")]
            mend = "choose another pooler or encoder"
            if missing[0].startswith("saliency.") and substitutes:
                mend = f"set pooler.saliency={substitutes[0].removeprefix('saliency.')}, or {mend}"
            raise UserError(
                f"pooler {type(pooler).__name__} needs {', '.join(missing)}, encoder {type(encoder).__name__} gives "
                f"{', '.join(sorted(encoder.gives))}; {mend}"
            )
        if pooler.stage is Stage.IN_ENCODER:
            refuse_reuse(encoder, f"pooler {type(pooler).__name__} acts inside it on each of them")
        encoder.prepare(pooler.asks)
        self.encoder, self.pooler, self.key_source, self.reuse = encoder, pooler, key_source, Reuse(encoder)
        is_projected = pooler.stage is Stage.AFTER_PROJECTOR
        if pooler.stage is Stage.IN_ENCODER:
            pooler.enter(encoder.facts())
        pooled_width = pooler.connect(llm_width if is_projected else encoder.width, llm_width, encoder.grid)
        replaces_projector, reads_projected = pooler.stage is Stage.AS_PROJECTOR, key_source == "projected"
        in_width = encoder.width if is_projected or replaces_projector else pooled_width
        has_projector = reads_projected or not replaces_projector
        self.projector = projector(in_width, llm_width) if has_projector else None
        needs_own = reads_projected and in_width != encoder.width
        self.source_projector = projector(encoder.width, llm_width) if needs_own else None
        self.tokens_per_frame = pooler.tokens_per_frame(encoder.grid)
        self.pooled_width, self.checks_pooler = pooled_width, False
        self.frame_time: nn.Module | None = None
        self.encoder_time: nn.Module | None = None
        self.most: Callable[[int], int] | None = None  # sharding's: the largest of a count over all processes

    def keep_features(self) -> None:
        """Let the encoder's cache on disk serve from now on, as training and measuring do, and answering does not.

        Raises:
            UserError: the encoder is trained, or drops at random while it trains.
        """
        self.reuse.keep_features(self.encoder)

    def add_time(self, kind: str, llm_width: int, init_std: float) -> None:
        """Let tokens carry their time, those that fusion reads from the encoder at the encoder's width.

        Args:
            kind: see `fusion.frame_time`.
            llm_width: D.
            init_std: of fresh embeddings.
        """
        self.frame_time = frame_time(kind, llm_width, init_std)
        if self.key_source == "encoder":
            self.encoder_time = frame_time(kind, self.encoder.width, init_std)

    def encode(self, batch: VideoBatch, questions: Questions | None = None) -> Visuals:
        """Encode, pool and project the visuals of a batch.

        A training batch without any visual encodes one blank frame, so that every rank runs the same collectives and
        every parameter has a gradient; what it gives is multiplied by 0. Where weights are sharded, the tower runs
        equally often on all processes, on blank frames once its own are done.

        Args:
            batch: samples.
            questions: of its samples, for a pooler that needs them.
        """
        is_blank = len(batch.frames_FCHW) == 0
        frames_FCHW = batch.frames_FCHW
        annotations = (batch.visual_offsets, batch.sample_of_visual, batch.frame_time_s_F, batch.picture_V4)
        if is_blank:
            side = self.encoder.image_size
            frames_FCHW = frames_FCHW.new_zeros(1, 3, side, side)
            annotations = (torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), None)
        if self.pooler.stage is Stage.IN_ENCODER:
            return self._encode_hooked(frames_FCHW, annotations, is_blank)
        patches_FNE, asked = self._patches(frames_FCHW, annotations[0])
        if questions is not None:
            asked["questions"] = replace(questions, is_asked_V=None) if is_blank else questions
        tokens = TokenSet.from_grid(patches_FNE, self.encoder.grid, *annotations)
        projected = None
        if self.key_source == "projected" or self.pooler.stage is Stage.AFTER_PROJECTOR:
            projected = self._project(tokens, self.source_projector or self.projector)
        given = projected if self.pooler.stage is Stage.AFTER_PROJECTOR else tokens
        result = self.pooler(given, **asked)
        self._check(tokens, result, questions)
        pooled, question_QD = result if isinstance(result, tuple) else (result, None)
        if is_blank and questions is not None and question_QD is not None:
            question_QD = questions.features_QD + 0.0 * question_QD  # nothing was seen, yet all parameters take part
        if self.pooler.stage is Stage.BEFORE_PROJECTOR:
            pooled = self._project(pooled, self.projector)
        elif self.pooler.stage is Stage.AS_PROJECTOR:
            pooled = self._timed(pooled, self.frame_time)
        return Visuals(pooled, self._source(tokens, projected), is_blank, question_QD)

    def _patches(self, frames_FCHW: Tensor, visual_offsets: Tensor) -> tuple[Tensor, dict[str, Any]]:
        asks = self.pooler.asks
        found = self.reuse.features(self.encoder, asks, frames_FCHW, visual_offsets, self._features)
        patches_FNE = found.pop("patches_FNE")
        return patches_FNE, {"taps": Taps(asks, **found)} if asks.needs else {}

    def _features(self, frames_FCHW: Tensor) -> Features:
        """Run the tower; what it gives by name, nothing at all for no frames."""
        asks = self.pooler.asks

        def work(chunk_FCHW: Tensor) -> tuple[Tensor, ...]:
            taps = Taps(asks) if asks.needs else None
            return self.encoder(chunk_FCHW, taps=taps), *(getattr(taps, name) for name in asks.fields)

        chunks, blanks = self._chunks(frames_FCHW)
        found = in_pieces(work, chunks) if chunks else ()
        unused = [work(blank_FCHW)[0] for blank_FCHW in blanks]
        if not found:
            return {}
        return dict(zip(("patches_FNE", *asks.fields), (_with_none(found[0], unused), *found[1:]), strict=True))

    def _chunks(self, frames_FCHW: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What the tower runs on: this process's frames, and blank ones for as long as others are not done."""
        chunks = frames_FCHW.split(self.encoder.frames_per_chunk) if len(frames_FCHW) else ()
        missing = 0 if self.most is None else self.most(len(chunks)) - len(chunks)
        return chunks, (frames_FCHW.new_zeros(1, *frames_FCHW.shape[1:]),) * missing

    def _encode_hooked(self, frames_FCHW: Tensor, annotations: tuple[Any, ...], is_blank: bool) -> Visuals:
        chunks, blanks = self._chunks(frames_FCHW)
        hooks = [self.pooler.hook() for _ in chunks]
        outputs = [self.encoder(chunk, hook=hook) for chunk, hook in zip(chunks, hooks, strict=True)]
        outputs[-1] = _with_none(outputs[-1], [self.encoder(blank, hook=self.pooler.hook()) for blank in blanks])
        rows, columns = self.encoder.grid
        nothing_FN0 = outputs[0].new_empty(len(frames_FCHW), rows * columns, 0)
        patches = TokenSet.from_grid(nothing_FN0, self.encoder.grid, *annotations)
        pooled, tokens = self.pooler.collect(hooks, outputs, patches)
        self._check(patches, pooled)
        projected = self._project(tokens, self.projector) if self.key_source == "projected" else None
        read = projected if pooled is tokens and projected is not None else self._project(pooled, self.projector)
        return Visuals(read, self._source(tokens, projected), is_blank)

    def _check(self, given: TokenSet, result: Any, questions: Questions | None = None) -> None:
        if self.checks_pooler:
            check_pooled(self.pooler, given, result, self.pooled_width, self.encoder.grid, questions)

    def _source(self, tokens: TokenSet, projected: TokenSet | None) -> TokenSet:
        if self.key_source != "projected" or projected is None:
            return self._timed(tokens, self.encoder_time)
        return projected

    def _project(self, tokens: TokenSet, projector: nn.Module | None) -> TokenSet:
        assert projector is not None, "built wherever it is called"
        (features_SD,) = in_pieces(lambda piece_SD: (projector(piece_SD),), pieces_of(tokens.features_SD))
        return self._timed(tokens.with_features(features_SD), self.frame_time)

    def _timed(self, tokens: TokenSet, embed: nn.Module | None) -> TokenSet:
        if embed is None:
            return tokens
        device = tokens.features_SD.device
        time_FD = embed(tokens.frame_time_s_F.to(device), frame_in_visual(tokens.visual_offsets))
        tokens_F = tokens.frame_offsets.diff().to(device)
        time_SD = time_FD.repeat_interleave(tokens_F, dim=0, output_size=tokens.num_tokens)
        return tokens.with_features(tokens.features_SD + time_SD.to(tokens.features_SD.dtype))


def questions_of(batch: VideoBatch, llm: Any, needs: frozenset[str]) -> Questions | None:
    """Read the questions of a batch with the LLM's embeddings, and with the LLM itself where a pooler wants a summary.

    Args:
        batch: samples.
        llm: a causal model.
        needs: of the pooler; None comes back where it needs no question.
    """
    wants_summary = "question_summary" in needs
    if not wants_summary and "question" not in needs:
        return None
    embed = llm.get_input_embeddings()
    mask_L = question_mask(batch)
    sample_L = torch.repeat_interleave(torch.arange(batch.num_samples), batch.text_offsets.diff())
    count_B = torch.bincount(sample_L[mask_L], minlength=batch.num_samples)
    offsets = torch.cat([count_B.new_zeros(1), count_B.cumsum(0)])
    features_QD = embed(batch.ids_L[mask_L].to(embed.weight.device))
    summary_BD = summarise(llm, features_QD.detach(), offsets) if wants_summary else None
    return Questions(features_QD, offsets, summary_BD, asked_visuals(batch))


def _with_none(patches_FnE: Tensor, blanks: list[Tensor]) -> Tensor:
    """Keep what the tower gave for blank frames in the graph, so that the backward pass runs as often as elsewhere."""
    for blank_FnE in blanks:
        patches_FnE = patches_FnE + (0.0 * blank_FnE).sum()
    return patches_FnE
