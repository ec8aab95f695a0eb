"""Makes small real models and batches of a chosen shape, for tests of the model side."""

import torch

from lightning_crosslmm.batch import IGNORED, VISUAL_MARK, VideoBatch
from lightning_crosslmm.encoder import TimmEncoder
from lightning_crosslmm.fusion import Fusion
from lightning_crosslmm.llm import load_llm
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.pooler import AveragePooler
from lightning_crosslmm.projector import MLPProjector
from lightning_crosslmm.text import end_of_turn_id, load_tokenizer
from lightning_crosslmm.tokens import TokenSet

TOKENIZER = load_tokenizer("byte")
END = end_of_turn_id(TOKENIZER)
IMAGE_SIZE = 16
GRID = (4, 4)
PATCHES = 16
LLM_SHAPE = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
VIT_SHAPE = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2, "class_token": False}


def tiny_encoder(**settings):
    """16x16 pixels, 4x4 patches, width 16, 3 blocks."""
    config = {**VIT_SHAPE, "global_pool": "", **settings.pop("config", {})}
    return TimmEncoder("vit_tiny_patch16_224", IMAGE_SIZE, config=config, **settings)


def tiny_llm(kind="qwen2", attention="sdpa", **shape):
    """Four layers of width 32 and the byte tokenizer's vocabulary; weights large enough for opinions."""
    head = {"head_dim": 8} if kind == "qwen3" else {}
    return load_llm({"model_type": kind, **LLM_SHAPE, **head, **shape}, attention=attention)


def tiny_model(kind="qwen2", attention="sdpa", pooler=None, fusion=None, encoder=None, seed=0, **settings):
    """Assemble a model; further settings are those of `Fusion`: both branches in layers 0 and 2, gates half open."""
    torch.manual_seed(seed)
    fusion = fusion or Fusion(**{"v2v": True, "t2v": True, "interval": 2, "gate_init": 0.5, **settings})
    llm = tiny_llm(kind, attention)
    return CrossLMM(encoder or tiny_encoder(), pooler or AveragePooler(1), MLPProjector, fusion, llm).eval()


def tiny_batch(*samples, rows=None, seed=0, kinds=None):
    """Build a batch from samples like ``["see", 3, "and", 1, "what?", "=cat"]``.

    A number is a visual of so many frames (1 is an image), text that starts with ``=`` is an answer and gets
    its end token. Frames are noise, frame k lies at k / 2 seconds.
    """
    ids, labels, answer, frames, times, asked = [], [], [], [], [], ""
    lengths, questions, frames_of_visual, sample_of_visual = [], [], [], []
    noise = torch.Generator().manual_seed(seed)
    for number, sample in enumerate(samples):
        before = len(ids)
        for part in sample:
            if isinstance(part, int):
                ids, labels, answer = [*ids, VISUAL_MARK], [*labels, IGNORED], [*answer, -1]
                size = (part, 3, IMAGE_SIZE, IMAGE_SIZE)
                frames.append(torch.randint(0, 256, size, dtype=torch.uint8, generator=noise))
                times.append(torch.arange(part) / 2)
                frames_of_visual.append(part)
                sample_of_visual.append(number)
                continue
            is_answer = part.startswith("=")
            said = [*TOKENIZER.encode(part[1:]), END] if is_answer else TOKENIZER.encode(part)
            ids += said
            labels += said if is_answer else [IGNORED] * len(said)
            answer += [len(questions) if is_answer else -1] * len(said)
            if is_answer:
                questions.append(asked)
            asked = part
        lengths.append(len(ids) - before)
    batch = VideoBatch(
        frames_FCHW=torch.cat([torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8), *frames]),
        frame_time_s_F=torch.cat([torch.zeros(0), *times]),
        visual_offsets=torch.tensor([0, *frames_of_visual]).cumsum(0),
        sample_of_visual=torch.tensor(sample_of_visual, dtype=torch.int64),
        ids_L=torch.tensor(ids),
        labels_L=torch.tensor(labels),
        answer_L=torch.tensor(answer),
        text_offsets=torch.tensor([0, *lengths]).cumsum(0),
        row_of_sample=torch.tensor(list(range(len(samples))) if rows is None else rows),
        keys=tuple(f"s{number}" for number in range(len(samples))),
        answer_kinds=tuple(kinds or [""] * len(questions)),
        questions=tuple(questions),
    )
    batch.validate()
    return batch


def token_set(frames_of_visual=(2, 1), grid=(3, 4), width=5, seed=0, sample_of_visual=None):
    """A regular set of noise tokens, as an encoder gives it."""
    noise = torch.Generator().manual_seed(seed)
    num_frames = sum(frames_of_visual)
    patches_FND = torch.randn(num_frames, grid[0] * grid[1], width, generator=noise)
    samples = list(range(len(frames_of_visual))) if sample_of_visual is None else sample_of_visual
    offsets = torch.tensor([0, *frames_of_visual]).cumsum(0)
    return TokenSet.from_grid(patches_FND, grid, offsets, torch.tensor(samples), torch.arange(num_frames) / 2)
