"""What reading a prompt costs, measured: time to the first token, and the memory it needs beside the weights."""

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_crosslmm.batch import VISUAL_MARK, VideoBatch, blank_prompt, prompts_for
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.model import CrossLMM

WARM_UPS, REPEATS = 1, 5


class PrefillCost(lightning.Callback):
    """Measure the prefill of the first validation batch, at the end of training or of ``validate`` and ``test``.

    The first question of each of its first samples is answered with one token: encoder, pooler, projector, the LLM on
    the whole prompt, its head. `RunRecord` writes into ``metrics.json``:

    - ``prefill/time_s``: median over 5 such calls after one to warm up, divided by the samples of the call;
    - ``prefill/samples``: samples of a call, ``prefill/llm_tokens``: tokens that the LLM reads for one of them (mean),
      ``prefill/pooled_per_frame``: pooled tokens of one frame (mean);
    - ``prefill/peak_bytes``: most memory during a call, less what was there before it, for all samples together. CUDA:
      ``max_memory_allocated``. Elsewhere: storages that operators return while they live; what an operator allocates
      and frees within itself is not seen there.

    The tower runs, whatever a feature cache holds. Weights, modes and random numbers stay as they were. With several
    processes each measures its own batch, and the numbers are those of the first one.

    Args:
        num_samples: how many prompts are read at once; at most as many as the batch has samples with answers.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.measured: dict[str, float] = {}
        self._batch: VideoBatch | None = None

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first batch."""
        if batch_idx == 0 and not trainer.sanity_checking:
            self._batch = batch

    def on_test_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first batch."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure the trained model."""
        self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure, unless training goes on."""
        if trainer.state.fn == "validate":
            self._measure(trainer, pl_module)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        batch, self._batch = self._batch, None
        if batch is None:
            return
        # As many processes as share the weights must call the model alike, also one that has nothing to ask.
        chosen = first_answers(batch, self.num_samples)
        if (pl_module.model.most or int)(len(chosen)) == 0:
            return
        prompts = prompts_for(batch, chosen) if chosen else blank_prompt(batch)
        with trainer.precision_plugin.forward_context():
            self.measured = prefill_cost(pl_module.model, prompts, pl_module.device)


def first_answers(batch: VideoBatch, limit: int) -> list[int]:
    """Choose the first answer of each of the first samples that have any, by their numbers in the batch."""
    sample_L = torch.repeat_interleave(torch.arange(batch.num_samples), batch.text_offsets.diff())
    first: dict[int, int] = {}
    for sample, answer in zip(sample_L.tolist(), batch.answer_L.tolist(), strict=True):
        if answer >= 0:
            first.setdefault(sample, answer)
    return list(first.values())[:limit]


@torch.no_grad()
def prefill_cost(model: CrossLMM, prompts: VideoBatch, device: torch.device) -> dict[str, float]:
    """Measure one prefill, and leave the model and all random numbers as they were.

    Args:
        model: on `device`.
        prompts: one sample per row, each ending where its answer begins.
        device: its clock and its memory are read.

    Returns:
        The numbers that `PrefillCost` lists.
    """
    decoding = _Counting(max_new_tokens=1)

    def call() -> None:
        model.generate(prompts, decoding, stop_id=0, pad_id=0)

    training = [part for part in model.modules() if part.training]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), model.reuse.without_cache():
        model.eval()
        try:
            peak_bytes = _peak_bytes(call, device)
            times_s = [_seconds(call, device) for _ in range(WARM_UPS + REPEATS)][WARM_UPS:]
        finally:
            for part in training:
                part.training = True
    found = {
        "time_s": statistics.median(times_s) / prompts.num_samples,
        "peak_bytes": float(peak_bytes),
        "samples": float(prompts.num_samples),
        "llm_tokens": decoding.read / prompts.num_samples,
    }
    if len(prompts.frames_FCHW):
        text_tokens = int((prompts.ids_L != VISUAL_MARK).sum())
        found["pooled_per_frame"] = (decoding.read - text_tokens) / len(prompts.frames_FCHW)
    return {f"prefill/{name}": value for name, value in found.items()}


class _Counting(Greedy):
    """Notes how many tokens the LLM was given, where weights are gathered for it and cannot be asked elsewhere."""

    read = 0

    def generate(self, llm: Any, embeds_RTD: Tensor, attention_mask_RT: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Count and go on."""
        self.read = int(attention_mask_RT.sum())
        return super().generate(llm, embeds_RTD, attention_mask_RT, *args, **kwargs)


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    _wait_for(device)
    start_s = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - start_s


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(call: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveStorages() as live:
        call()
    return live.peak_bytes


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of storages that operators make while it is on, for as long as each lives.

    Views count once, in-place results and views of what was there before not at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self._bytes = 0
        self._known: dict[int, int] = {}  # a storage by its address, with the bytes it counts for

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operator and look at what went in and what came out."""
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, counts=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._see(tensor, counts=True)
        return result

    def _see(self, value: Any, counts: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        self._known[address] = storage.nbytes() if counts else 0
        weakref.finalize(storage, self._forget, address).atexit = False
        self._bytes += self._known[address]
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _forget(self, address: int) -> None:
        self._bytes -= self._known.pop(address)
