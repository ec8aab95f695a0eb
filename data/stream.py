"""From a place in the shards to a decoded, tokenised sample, and from an epoch's plan to batches.

Workers are told which samples to read, one list per batch. They know nothing of ranks, epochs or each other, so their
number changes the speed and nothing else.

Axis letters:
    F  frames of all visuals of a sample    C H W  channels, pixel rows, pixel columns
"""

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.order import GlobalBatches, SampleRef
from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.conversation import MARK, Conversation, Visual
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shards import ShardSet, read_sample
from lightning_crosslmm.text import Text, Tokenizer, tokenise
from lightning_crosslmm.video import Clip, FrameSampling, read_clip, read_image


@dataclass(frozen=True)
class Sample:
    """One conversation, ready to be collated.

    Args:
        key: the sample's name.
        frames_FCHW: uint8, frames of all its visuals one after the other; F may be 0.
        frame_time_s_F: float32, seconds from the start of the frame's video.
        frames_per_visual: how many frames each visual has.
        text: ids, labels and answer numbers.
        answer_kinds: the question type of each answer.
        questions: what each answer answers, without marks.
    """

    key: str
    frames_FCHW: Tensor
    frame_time_s_F: Tensor
    frames_per_visual: tuple[int, ...]
    text: Text
    answer_kinds: tuple[str, ...]
    questions: tuple[str, ...]


class ClipDataset(Dataset[Sample]):
    """Samples by their place in the shards, in any order, each read by its offsets.

    Args:
        shards: an opened set.
        sampling: which moments of a video become frames.
        image_size: height and width of a frame in pixels.
        tokenizer: carries a chat template.
        max_tokens: longest text allowed.
    """

    def __init__(
        self, shards: ShardSet, sampling: FrameSampling, image_size: int, tokenizer: Tokenizer, max_tokens: int
    ) -> None:
        self._shards = shards
        self._sampling = sampling
        self._image_size = image_size
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def __len__(self) -> int:
        """Samples in all shards."""
        return sum(self._shards.num_samples)

    def __getitem__(self, ref: SampleRef) -> Sample:
        """Read, decode and tokenise one sample.

        Raises:
            UserError: names shard and sample where the shard, a visual or the conversation is damaged.
        """
        path = self._shards.paths[ref.shard]
        entry = self._shards.index(ref.shard).entries[ref.sample]
        where = f"{path}: sample '{entry.key}'"
        members = read_sample(path, entry)
        conversation = Conversation.from_json(members["json"], str(path), entry.key)
        clips = [
            self._read_visual(visual, members[member], f"{where}, member '{member}'")
            for visual, member in zip(conversation.visuals, conversation.members, strict=True)
        ]
        no_frames_FCHW = torch.empty(0, 3, self._image_size, self._image_size, dtype=torch.uint8)
        return Sample(
            key=entry.key,
            frames_FCHW=torch.cat([no_frames_FCHW, *(clip.frames_FCHW for clip in clips)]),
            frame_time_s_F=torch.cat([torch.empty(0), *(clip.frame_time_s_F for clip in clips)]),
            frames_per_visual=tuple(len(clip.frames_FCHW) for clip in clips),
            text=tokenise(conversation, self._tokenizer, self._max_tokens),
            answer_kinds=conversation.answer_kinds,
            questions=tuple(
                MARK.sub("", message.content).strip() for message in conversation.messages if message.role == "user"
            ),
        )

    def _read_visual(self, visual: Visual, blob: bytes, where: str) -> Clip:
        if visual.kind == "image":
            return read_image(blob, where, self._image_size)
        return read_clip(blob, where, self._sampling, self._image_size)


class BatchLoader:
    """Batches of one epoch after another, with the same workers.

    It is no ``DataLoader`` but has one, because Lightning takes those apart: it puts a sampler of its own into each on
    several ranks and whenever it predicts. It has a length, which keeps Lightning from reading one batch ahead and
    saving a position that was never trained. The plan is asked for with an epoch's first batch and not earlier, since
    only then has Lightning settled which epoch and batch come next.

    Workers come from a fork server: a process that never had a thread, a GPU or a tokenizer's pool to inherit locks
    from. It costs some seconds of imports once, as workers stay from epoch to epoch.

    Args:
        dataset: gives samples.
        collate: makes a batch of samples.
        plan: says which batches the epoch that begins has.
        num_batches: how many batches an epoch has for this rank, as ``len`` of the plan.
        num_workers: processes that decode; 0 decodes in this one.
        prefetch_batches: batches each worker may hold ready.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        collate: Callable[[list[Sample]], VideoBatch],
        plan: Callable[[], GlobalBatches],
        num_batches: int,
        num_workers: int = 0,
        prefetch_batches: int = 2,
    ) -> None:
        self._dataset = _Reporting(dataset)
        self._collate = _CollateReports(collate)
        self._plan = plan
        self._num_batches = num_batches
        self._num_workers = num_workers
        self._prefetch_batches = prefetch_batches
        self._planned = _Planned()
        self._loader: DataLoader | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch for this rank."""
        return self._num_batches

    def __iter__(self) -> Iterator[VideoBatch]:
        """Give the batches that the plan names.

        Raises:
            UserError: what a sample of the next batch is refused for.
        """
        self._planned.batches = self._plan()
        if self._loader is None:
            self._loader = self._start()
        for batch in self._loader:
            if isinstance(batch, UserError):
                break
            yield batch
        else:
            return
        self.close()  # before raising: held by a traceback, workers take seconds to end
        raise batch

    def close(self) -> None:
        """Let the workers go; the next epoch would start new ones."""
        self._loader = None

    def _start(self) -> DataLoader:
        workers = {}
        if self._num_workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            workers = {"prefetch_factor": self._prefetch_batches, "multiprocessing_context": context}
        return DataLoader(
            self._dataset,
            batch_sampler=self._planned,
            collate_fn=self._collate,
            num_workers=self._num_workers,
            persistent_workers=self._num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )


class _Planned:
    """The batch sampler of the moment: a DataLoader keeps its workers only while it keeps its batch sampler."""

    batches: GlobalBatches

    def __iter__(self) -> Iterator[list[SampleRef]]:
        return iter(self.batches)


class _Reporting(Dataset["Sample | UserError"]):
    """Hands a user's error over as a value: raised in a worker it would arrive with a traceback inside its message."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self._dataset = dataset

    def __getitem__(self, ref: SampleRef) -> Sample | UserError:
        try:
            return self._dataset[ref]
        except UserError as error:
            return error


class _CollateReports:
    def __init__(self, collate: Callable[[list[Sample]], VideoBatch]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Sample | UserError]) -> VideoBatch | UserError:
        return next((sample for sample in samples if isinstance(sample, UserError)), None) or self._collate(samples)
