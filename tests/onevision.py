"""Small LLaVA-OneVision checkpoints, as transformers itself makes and saves them, and the arms that take them."""

import functools

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from lightning_crosslmm.batch import VISUAL_MARK
from lightning_crosslmm.encoder import TransformersEncoder
from lightning_crosslmm.fusion import Fusion
from lightning_crosslmm.llm import load_llm
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.pooler import LlavaOnevisionPooler
from lightning_crosslmm.projector import MLPProjector

SIDE, IMAGE_ID, VIDEO_ID = 20, 262, 263
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
LLM = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
SHAPES = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3, 4) for columns in (1, 2, 3, 4)]


def theirs(layer=-1, tied=False, llm=None, **changes):
    """The model of transformers, random and opinionated."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, image_size=SIDE, vision_use_head=False),
        text_config=Qwen2Config(**{**LLM, **(llm or {})}, tie_word_embeddings=tied, initializer_range=0.12),
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        image_grid_pinpoints=SHAPES,
        vision_feature_layer=layer,
        **changes,
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).eval()


def ours(layer=-1, tied=False, pooler=None, seed=1, llm=None, norm=False, **fusion):
    """A model of the same geometry and other random weights; further settings are those of `Fusion`."""
    torch.manual_seed(seed)
    fusion = Fusion(**{"v2v": False, "t2v": False, **fusion})
    encoder = TransformersEncoder({"model_type": "siglip_vision_model", **TOWER}, SIDE, layer=layer)
    llm = load_llm({"model_type": "qwen2", **LLM, "tie_word_embeddings": tied, **(llm or {})})
    projector = functools.partial(MLPProjector, norm=norm)
    return CrossLMM(encoder, pooler or LlavaOnevisionPooler(), projector, fusion, llm).eval()


def words(folder):
    """Settings of train.py that compose `ours`."""
    return [
        "experiment=llava_onevision_0_5b",
        f"init_from={folder}",
        f"encoder.image_size={SIDE}",
        *(f"encoder.config.{key}={value}" for key, value in TOWER.items()),
        *(f"++llm.model.config.{key}={value}" for key, value in LLM.items() if key != "rope_parameters"),
        "llm.model.config.rope_parameters.rope_theta=500.0",
        "llm.model.config.tie_word_embeddings=false",
    ]


def their_inputs(batch, pooled, sample):
    """What transformers' model takes for one sample of a batch, its marks widened to `pooled`'s tokens."""
    start, end = batch.text_offsets[sample : sample + 2].tolist()
    pixels_FCHW = (batch.frames_FCHW.float() / 255 - 0.5) / 0.5
    visuals = iter((batch.sample_of_visual == sample).nonzero().flatten().tolist())
    counts = pooled.token_offsets_of_visual.diff().tolist()
    ids, videos, images, sizes = [], [], [], []
    for number in batch.ids_L[start:end].tolist():
        if number != VISUAL_MARK:
            ids.append(number)
            continue
        visual = next(visuals)
        first, last = batch.visual_offsets[visual : visual + 2].tolist()
        is_video = batch.picture_V4 is None or int(batch.picture_V4[visual, 0]) == 0
        ids += [VIDEO_ID if is_video else IMAGE_ID] * counts[visual]
        (videos if is_video else images).append(pixels_FCHW[first:last])
        if not is_video:
            sizes.append(batch.picture_V4[visual, :2].tolist())
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    if videos:
        inputs["pixel_values_videos"] = torch.stack(videos)
    if images:
        longest = max(map(len, images))
        padded = [torch.cat([each, each.new_zeros(longest - len(each), *each.shape[1:])]) for each in images]
        inputs |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}
        if longest == 1:  # several images of a prompt, or else transformers wants tiles
            inputs["batch_num_images"] = torch.tensor([2])
    return inputs
