"""The three things a model is run for, each run once and measured: reading a prompt, one more token, a training step.

Axis letters:
    R T  rows and positions of the LLM batch    D  LLM width    Y  predicted tokens
"""

import torch

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.cost.memo import Memo
from lightning_crosslmm.cost.meta import on_meta
from lightning_crosslmm.cost.meter import Meter, tensor_bytes
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.objective import answer_loss


def read_prompt(
    model: CrossLMM, batch: VideoBatch, precision: str = "32-true", memo: Memo | None = None
) -> tuple[Meter, Meter, dict[str, int]]:
    """Read prompts and then one token more, as generation does.

    Args:
        model: on the meta device, or a real one.
        batch: one sample, or several of one length.
        precision: as in ``trainer.precision``; only on the meta device.
        memo: shared by the runs of one model, for speed.

    Returns:
        What the prompts cost, what the token costs, and bytes: ``kv_cache`` and ``t2v_cache`` after the prompts, and
        ``prefill``, the most memory at once above the weights and the frames; and ``llm_tokens``, the length of a row.
    """
    model.eval()
    prefill, decode = Meter(model, memo), Meter(model, memo)
    with torch.no_grad(), on_meta(precision):
        with prefill.running():
            prompt = model.prompt(batch, pad_left=True, keeps_keys=True)
            contexts = {"fusion": prompt.context, "unmerging": prompt.unmerging}
            extra = {name: each for name, each in contexts.items() if each is not None}
            said = model.llm(inputs_embeds=prompt.embeds_RTD, use_cache=True, logits_to_keep=1, **extra)
        sizes = {
            "kv_cache": tensor_bytes(said.past_key_values),
            "t2v_cache": 0 if prompt.context is None else prompt.context.cache_bytes(),
            "prefill": prefill.peak_bytes,
            "llm_tokens": prompt.layout.num_positions,
        }
        ids_RT = torch.zeros(len(prompt.embeds_RTD), 1, dtype=torch.int64, device=prompt.embeds_RTD.device)
        with decode.running():
            model.llm(input_ids=ids_RT, past_key_values=said.past_key_values, use_cache=True, logits_to_keep=1, **extra)
    return prefill, decode, sizes


def train_step(model: CrossLMM, batch: VideoBatch, precision: str = "32-true", memo: Memo | None = None) -> Meter:
    """Run one batch forward and backward; what is frozen or checkpointed stays so.

    Args:
        model: as in `read_prompt`; parameters without ``requires_grad`` are frozen.
        batch: samples of one length.
        precision: see `read_prompt`.
        memo: see `read_prompt`.
    """
    model.train()
    meter = Meter(model, memo)
    with on_meta(precision), meter.running():
        output = model(batch)
        loss = answer_loss(output.logits_YW, output.target_Y)
        del output
        meter.backward(loss)
    model.zero_grad()
    return meter
