"""What an exported folder holds for transformers beside the weights: configuration, decoding and processor."""

from pathlib import Path

from omegaconf import DictConfig
from transformers import GenerationConfig

from lightning_crosslmm.compose import PART_TARGETS, instantiate
from lightning_crosslmm.hf.configuration import CrossLMMConfig
from lightning_crosslmm.hf.modeling import CrossLMMForConditionalGeneration
from lightning_crosslmm.hf.processing import CrossLMMProcessor
from lightning_crosslmm.standalone import parts_of
from lightning_crosslmm.text import end_of_turn_id, load_tokenizer

PREFIX = "model."
"""Before the names of weights, as `CrossLMMForConditionalGeneration` has them."""


def write_settings(config: DictConfig, image_size: int, folder: Path) -> None:
    """Write ``config.json``, ``generation_config.json``, the processor's settings and the tokenizer's files.

    Args:
        config: of a run, as `standalone` gives it.
        image_size: pixels per side that the encoder expects.
        folder: exists.

    Raises:
        UserError: the tokenizer is not at hand.
    """
    tokenizer = load_tokenizer(config.llm.tokenizer)
    stop_id, pad_id = end_of_turn_id(tokenizer), tokenizer.pad_token_id
    pad_id = stop_id if pad_id is None else pad_id
    sampling = {name: value for name, value in config.data.sampling.items() if name != "_target_"}
    processor = CrossLMMProcessor(tokenizer, image_size, sampling, config.data.max_tokens)
    processor.save_pretrained(folder)
    CrossLMMConfig(
        parts=parts_of(config),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        architectures=[CrossLMMForConditionalGeneration.__name__],
    ).save_pretrained(folder)
    decoding = instantiate(config.decoding, PART_TARGETS)
    GenerationConfig(
        max_new_tokens=decoding.max_new_tokens, eos_token_id=stop_id, pad_token_id=pad_id, **decoding.choice()
    ).save_pretrained(folder)
