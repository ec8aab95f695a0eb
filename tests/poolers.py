"""Every pooler with a small budget, and what poolers are given: for the tests that hold for all of them.

A pooler joins those tests with a line in `CASES`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from lightning_crosslmm import pooler as arms
from lightning_crosslmm.pooler import Pooler
from lightning_crosslmm.taps import Asks, Questions, Taps
from lightning_crosslmm.tokens import Opaque, Partition, SourceMap, TokenSet, Weighted
from tests.tiny import GRID, LLM_SHAPE, VIT_SHAPE, token_set

WIDTH, LLM_WIDTH, KEY_WIDTH = VIT_SHAPE["embed_dim"], LLM_SHAPE["hidden_size"], 4
CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # features of order 1 in single precision, summed in batches of another size


@dataclass(frozen=True)
class Given:
    """What a pooler is called with."""

    tokens: TokenSet
    taps: Taps | None = None
    questions: Questions | None = None


def random_taps(asks: Asks, num_frames: int, seed: int = 0) -> Taps:
    """Views into a tower that was never there; the saliency of a frame sums to 1."""
    noise, patches = torch.Generator().manual_seed(seed), GRID[0] * GRID[1]
    saliency_FN = torch.randn(num_frames, patches, generator=noise).softmax(dim=1)
    keys_FNK = torch.randn(num_frames, patches, KEY_WIDTH, generator=noise)
    layers_FNAE = torch.randn(num_frames, patches, len(asks.layers), WIDTH, generator=noise)
    return Taps(
        asks,
        saliency_FN if asks.saliency else None,
        keys_FNK if asks.keys else None,
        layers_FNAE if asks.layers else None,
    )


def random_questions(num_samples: int, seed: int = 0) -> Questions:
    """Questions of 1, 2, 3, 1, ... tokens."""
    noise = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *(1 + sample % 3 for sample in range(num_samples))]).cumsum(0)
    features_QD = torch.randn(int(offsets[-1]), LLM_WIDTH, generator=noise)
    return Questions(features_QD, offsets, torch.randn(num_samples, LLM_WIDTH, generator=noise))


def given_for(pooler: Pooler, visuals_of_sample: Sequence[Sequence[int]], seed: int = 0) -> Given:
    """Make what the pooler asks for, for samples like ``[[3, 1], [], [2]]``: frames of each visual of each sample."""
    frames = [count for visuals in visuals_of_sample for count in visuals]
    samples = [sample for sample, visuals in enumerate(visuals_of_sample) for _ in visuals]
    width = LLM_WIDTH if pooler.stage == "after_projector" else WIDTH
    tokens = token_set(frames, GRID, width, seed, samples)
    wants_question = bool(pooler.needs & {"question", "question_summary"})
    return Given(
        tokens=replace(tokens, sample_of_visual=tokens.sample_of_visual.long()),
        taps=random_taps(pooler.asks, sum(frames), seed) if pooler.asks.needs else None,
        questions=random_questions(len(visuals_of_sample), seed) if wants_question else None,
    )


def pool(pooler: Pooler, given: Given) -> TokenSet:
    """Call a pooler as the model does."""
    asked = {"taps": given.taps, "questions": given.questions}
    result = pooler(given.tokens, **{name: value for name, value in asked.items() if value is not None})
    return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class Case:
    """A pooler and what it promises.

    Args:
        make: build it, with a budget below 16 patches a frame.
        whole: build it with a budget of every patch, where that changes nothing.
        merges: every patch goes into a pooled token, so that mass is conserved.
        is_raster: the tokens of a frame come in the order of their rows and columns.
        pool: call it; another one for those that act in the encoder.
    """

    make: Callable[[], Pooler]
    whole: Callable[[], Pooler] | None = None
    merges: bool = False
    is_raster: bool = True
    pool: Callable[[Pooler, Given], TokenSet] = pool

    def built(self, whole: bool = False) -> Pooler:
        """Build and connect it; learned ones get weights large enough for opinions, always the same."""
        torch.manual_seed(0)
        pooler = (self.whole if whole else self.make)()
        in_width = LLM_WIDTH if pooler.stage == "after_projector" else WIDTH
        pooler.connect(in_width, LLM_WIDTH, GRID)
        with torch.no_grad():
            for parameter in pooler.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return pooler.eval()


SMALL = {"depth": 2, "heads": 2, "head_width": 4}
CASES = {
    "none": Case(arms.NoPooler, whole=arms.NoPooler, merges=True),
    "average": Case(lambda: arms.AveragePooler(2), whole=lambda: arms.AveragePooler(4), merges=True),
    "average, shared": Case(lambda: arms.AveragePooler(3, stage="after_projector"), merges=True),
    "max": Case(lambda: arms.MaxPooler(2), whole=lambda: arms.MaxPooler(4), merges=True),
    "folder": Case(lambda: arms.FolderPooler(5), whole=lambda: arms.FolderPooler(16), merges=True, is_raster=False),
    "bilinear": Case(lambda: arms.BilinearPooler(3, 2), whole=lambda: arms.BilinearPooler(4)),
    "bilinear, antialias": Case(lambda: arms.BilinearPooler(3, antialias=True), lambda: arms.BilinearPooler(4)),
    "strided": Case(lambda: arms.StridedPooler(3, offset=1), whole=lambda: arms.StridedPooler(1)),
    "uniform": Case(lambda: arms.UniformPooler(5), whole=lambda: arms.UniformPooler(16)),
    "random": Case(lambda: arms.RandomPooler(5), whole=lambda: arms.RandomPooler(16)),
    "pixel_shuffle": Case(arms.PixelShufflePooler, whole=lambda: arms.PixelShufflePooler(1), merges=True),
    "pixel_shuffle, pad": Case(lambda: arms.PixelShufflePooler(3), merges=True),
    "pixel_shuffle, crop": Case(lambda: arms.PixelShufflePooler(3, odd="crop")),
    "perceiver": Case(lambda: arms.PerceiverPooler(3, **SMALL), merges=True),
    "perceiver, clip": Case(
        lambda: arms.PerceiverPooler(4, **SMALL, scope="clip", max_frames=3, stage="as_projector"), merges=True
    ),
    "qformer": Case(lambda: arms.QFormerPooler(3, width=8, depth=3, heads=2), merges=True),
    "qformer, before": Case(
        lambda: arms.QFormerPooler(2, width=8, depth=1, heads=2, stage="before_projector"), merges=True
    ),
    "c_abstractor": Case(lambda: arms.CAbstractorPooler(4, width=8, depth=1), merges=True),
    "c_abstractor, before": Case(
        lambda: arms.CAbstractorPooler(9, width=8, depth=1, stage="before_projector"), merges=True
    ),
    "slowfast": Case(lambda: arms.SlowFastPooler(2, 2), merges=True),
    "slowfast, shared": Case(lambda: arms.SlowFastPooler(2, 3), whole=lambda: arms.SlowFastPooler(1, 4), merges=True),
    "temporal_merge": Case(lambda: arms.TemporalMergePooler(2), whole=lambda: arms.TemporalMergePooler(1), merges=True),
    "temporal_merge, alike": Case(lambda: arms.TemporalMergePooler(3, threshold=0.1), merges=True),
    "temporal_merge, rows": Case(lambda: arms.TemporalMergePooler(2, threshold=0.0, rows=3, columns=2), merges=True),
    "prumerge": Case(arms.PrumergePooler, merges=True, is_raster=False),
    "prumerge, average": Case(
        lambda: arms.PrumergePooler("received", 0.3, 4, "average", "pruned", order="raster"),
        whole=lambda: arms.PrumergePooler("received", 1.0, 4, "average", "pruned", order="raster"),
        merges=True,
        is_raster=False,
    ),
    "prumerge, no rest": Case(lambda: arms.PrumergePooler(neighbours=2, rest_token=False), is_raster=False),
    "prumerge_plus": Case(arms.PrumergePlusPooler, merges=True, is_raster=False),
    "prumerge_plus, ratio": Case(
        lambda: arms.PrumergePlusPooler(ratio=0.2, neighbours=3, stage="after_projector"), merges=True, is_raster=False
    ),
    "visionzip": Case(lambda: arms.VisionzipPooler("probe", 3, 2), merges=True, is_raster=False),
    "visionzip, average": Case(lambda: arms.VisionzipPooler(merge="average"), merges=True, is_raster=False),
    "visionzip, dominant": Case(
        lambda: arms.VisionzipPooler(dominant=3, contextual=0),
        whole=lambda: arms.VisionzipPooler(dominant=16, contextual=0),
    ),
    "sms": Case(arms.SmsPooler, whole=lambda: arms.SmsPooler(min_tokens=16)),
    "sms, clip": Case(lambda: arms.SmsPooler("probe", "max_gap", "clip", max_tokens=5)),
    "sms, bend": Case(lambda: arms.SmsPooler(knee="max_second_difference", min_tokens=2)),
    "sms, outliers": Case(lambda: arms.SmsPooler(knee="iqr", scope="clip")),
    "tokenpacker": Case(lambda: arms.TokenpackerPooler(2, heads=4), merges=True),
    "quecc": Case(lambda: arms.QueccPooler(2, 1, layers=(0, -1), heads=4), merges=True),
    "llava_mini": Case(lambda: arms.LlavaMiniPooler(2, heads=4, fusion_layers=2, fusion_heads=4), merges=True),
    "llava_onevision": Case(arms.LlavaOnevisionPooler, merges=True),
}
every_case = pytest.mark.parametrize("name", list(CASES))


class Heavy(arms.NoPooler):
    """Breaks the contract: a token of one patch says that it stands for two."""

    def forward(self, tokens: TokenSet) -> TokenSet:
        return replace(tokens, mass_S=2 * tokens.mass_S)


def dense(source_map: SourceMap) -> torch.Tensor:
    """Say a map as a matrix (pooled, source) of weights."""
    weighted = source_map.weighted()
    place = (weighted.pooled_E, weighted.source_E)
    return torch.zeros(weighted.num_pooled, weighted.num_sources).index_put_(place, weighted.weight_E, accumulate=True)


def of_samples(tokens: TokenSet, samples: Sequence[int], source: TokenSet | None = None) -> TokenSet:
    """Take some samples of a set, in that order, as if no others had been there.

    Args:
        tokens: source tokens, or pooled ones.
        samples: numbers of samples.
        source: the set that pooled tokens came from.
    """
    visuals = [v for sample in samples for v in (tokens.sample_of_visual == sample).nonzero().flatten().tolist()]
    frames = _ranges(tokens.visual_offsets, visuals)
    index_S = torch.tensor(_ranges(tokens.frame_offsets, frames), dtype=torch.int64)
    if source is None:
        source_map: SourceMap = Partition(torch.arange(len(index_S)), len(index_S), is_identity=True)
    else:
        sources = torch.tensor(_ranges(source.frame_offsets, frames), dtype=torch.int64)
        source_map = Opaque(len(index_S), len(sources))
        if not isinstance(tokens.source_map, Opaque):
            weight_PS = dense(tokens.source_map)[index_S][:, sources]
            pooled_E, source_E = weight_PS.nonzero(as_tuple=True)
            source_map = Weighted(pooled_E, source_E, weight_PS[pooled_E, source_E], *weight_PS.shape)
    counts = [(tokens.sample_of_visual == sample).sum() for sample in samples]
    return TokenSet(
        features_SD=tokens.features_SD[index_S],
        frame_offsets=torch.tensor([0, *tokens.frame_offsets.diff()[frames]]).cumsum(0),
        visual_offsets=torch.tensor([0, *tokens.visual_offsets.diff()[visuals]]).cumsum(0),
        sample_of_visual=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts, dtype=torch.int64)),
        frame_time_s_F=tokens.frame_time_s_F[frames],
        coordinate_S3=tokens.coordinate_S3[index_S],
        mass_S=tokens.mass_S[index_S],
        grid=tokens.grid,
        source_map=source_map,
    )


def _ranges(offsets: torch.Tensor, numbers: Sequence[int]) -> list[int]:
    bounds = offsets.tolist()
    return [place for number in numbers for place in range(bounds[number], bounds[number + 1])]


def given_of_samples(given: Given, samples: Sequence[int]) -> Given:
    """Take some samples of what a pooler is given, in that order."""
    tokens, taps, questions = given.tokens, given.taps, given.questions
    if taps is not None:
        visuals = [v for sample in samples for v in (tokens.sample_of_visual == sample).nonzero().flatten().tolist()]
        frames = _ranges(tokens.visual_offsets, visuals)
        views = {name: getattr(taps, name) for name in ("saliency_FN", "keys_FNK", "layers_FNAE")}
        taps = Taps(taps.asks, **{name: None if view is None else view[frames] for name, view in views.items()})
    if questions is not None:
        count_B = questions.offsets.diff()[list(samples)]
        questions = Questions(
            questions.features_QD[_ranges(questions.offsets, samples)],
            torch.cat([count_B.new_zeros(1), count_B.cumsum(0)]),
            questions.summary_BD[list(samples)],
        )
    return Given(of_samples(tokens, samples), taps, questions)


def assert_same(one: TokenSet, other: TokenSet) -> None:
    """Compare two sets, their maps included."""
    assert one.grid == other.grid or not one.num_frames
    for name in ("frame_offsets", "visual_offsets", "sample_of_visual"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    for name in ("features_SD", "coordinate_S3", "mass_S", "frame_time_s_F"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **CLOSE)
    if isinstance(one.source_map, Opaque) or isinstance(other.source_map, Opaque):
        assert one.source_map == other.source_map
    else:
        torch.testing.assert_close(dense(one.source_map), dense(other.source_map), **CLOSE)
