"""A run folder answers: load what was trained, look at a video, answer questions.

Axis letters:
    F  frames    L  text tokens
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_crosslmm.batch import IGNORED, VideoBatch, picture
from lightning_crosslmm.compose import PART_TARGETS, build_model, instantiate, load_run
from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.decoding import Decoding
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.looks import Look, Sight, sights
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.run_folder import find_checkpoint
from lightning_crosslmm.standalone import leans_on_files, standalone
from lightning_crosslmm.text import (
    Text,
    TextStreamer,
    Tokenizer,
    decode_answer,
    end_of_turn_id,
    load_tokenizer,
    tokenise,
)
from lightning_crosslmm.video import Clip, FrameSampling, read_clip, read_image
from lightning_crosslmm.weights import load_weights

_IMAGES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Answerer:
    """A trained model with everything it needs to answer about files it has never seen.

    Args:
        model: in eval mode.
        tokenizer: of its LLM.
        decoding: how the next token is chosen.
        sampling: which moments of a video it looks at.
        max_tokens: longest text.
    """

    model: CrossLMM
    tokenizer: Tokenizer
    decoding: Decoding
    sampling: FrameSampling
    max_tokens: int

    @classmethod
    def from_run(cls, run_dir: Path, allow: Sequence[str] = ()) -> "Answerer":
        """Load a run: its config, and its best checkpoint or else its last; onto a GPU if there is one.

        Args:
            run_dir: a folder that ``train.py`` wrote.
            allow: prefixes of further classes that the config may name; by default only the parts of a model are
                trusted, because a stranger's config must run no code.

        Raises:
            UserError: no run there, a class that is not allowed, or a checkpoint of another configuration.
        """
        config = load_run(run_dir)
        trusted = (*PART_TARGETS, *allow)
        if leans_on_files(config):  # the checkpoint holds all weights: nothing pretrained is loaded twice
            with torch.device("meta"):
                config = standalone(config, build_model(config, trusted))
        model = build_model(config, trusted)
        load_weights(model, find_checkpoint(run_dir, "--run", ("best", "last")), whole=True)
        return cls(
            model=model.eval().to("cuda" if torch.cuda.is_available() else "cpu"),
            tokenizer=load_tokenizer(config.llm.tokenizer),
            decoding=instantiate(config.decoding, trusted),
            sampling=instantiate(config.data.sampling, trusted),
            max_tokens=config.data.max_tokens,
        )

    def look(self, path: Path) -> tuple[str, Clip]:
        """Decode a video's frames, or an image; says which it is.

        Raises:
            UserError: the file is missing or damaged.
        """
        size = self.model.encoder.image_size
        if path.suffix.lower() in _IMAGES:
            return "image", read_image(path, str(path), size)
        return "video", read_clip(path, str(path), self.sampling, size)

    def ask(self, path: Path, questions: Sequence[str], say: Callable[[str], None] | None = None) -> list[str]:
        """Answer questions about one file, each knowing the ones before it and their answers.

        Args:
            path: a video or an image.
            questions: at least one.
            say: receives the text of the answers as it comes.

        Returns:
            One answer per question.

        Raises:
            UserError: the file cannot be read, a question is empty, or the conversation exceeds the context.
        """
        kind, clip = self.look(path)
        messages: list[Message] = []
        answers = []
        for number, question in enumerate(questions):
            if not question.strip():
                raise UserError(f"question {number + 1} is empty")
            messages.append(Message("user", question if number else f"<{kind}>\n{question}"))
            answers.append(self._answer(path, kind, clip, messages, say))
            messages.append(Message("assistant", answers[-1]))
        return answers

    def see(self, path: Path, question: str | None = None) -> Look:
        """Tell what became of a file's patches, and where the model looked.

        Args:
            path: a video or an image.
            question: what is asked; without one nothing is answered, and only pooled tokens look.

        Raises:
            UserError: the file cannot be read, the question is empty, or there is none and the pooler wants one.
        """
        if question is not None and not question.strip():
            raise UserError("the question is empty; leave it out to see tokens and V2V alone")
        pooler = self.model.pooler
        if question is None and pooler.needs & {"question", "question_summary"}:
            raise UserError(f"pooler {type(pooler).__name__} reads the question; give one after the file")
        kind, clip = self.look(path)
        messages = [Message("user", f"<{kind}>" if question is None else f"<{kind}>\n{question}")]
        (sight,) = sights(self.model, self._prompt(path, kind, clip, messages))
        if question is None:
            sight = Sight({name: heat for name, heat in sight.layers.items() if name[0] == "v2v"}, sight.pooling)
        return Look(
            key=path.name,
            question=question or "",
            answer="" if question is None else self._answer(path, kind, clip, messages, None),
            expected=None,
            frames_FCHW=clip.frames_FCHW,
            v2v_FHW=sight.mean("v2v"),
            t2v_FHW=sight.mean("t2v"),
            frame_time_s_F=clip.frame_time_s_F if kind == "video" else None,
            sight=sight,
        )

    def _answer(
        self, path: Path, kind: str, clip: Clip, messages: Sequence[Message], say: Callable[[str], None] | None
    ) -> str:
        stop_id, pad_id = end_of_turn_id(self.tokenizer), self.tokenizer.pad_token_id
        (row,) = self.model.generate(
            self._prompt(path, kind, clip, messages),
            self.decoding,
            stop_id=stop_id,
            pad_id=stop_id if pad_id is None else pad_id,
            streamer=None if say is None else TextStreamer(self.tokenizer, say),
        )
        return decode_answer(self.tokenizer, row)

    def _prompt(self, path: Path, kind: str, clip: Clip, messages: Sequence[Message]) -> VideoBatch:
        conversation = Conversation(path.name, tuple(messages), (Visual(kind, path.name),), ())
        text = tokenise(conversation, self.tokenizer, self.max_tokens, add_answer_prompt=True)
        return prompt_batch(path.name, kind, clip, text).to(next(self.model.parameters()).device)


def prompt_batch(key: str, kind: str, clip: Clip, text: Text) -> VideoBatch:
    """Make a batch of one prompt about one clip, an ``image`` or a ``video``."""
    ids_L = torch.tensor(text.ids)
    return VideoBatch(
        frames_FCHW=clip.frames_FCHW,
        frame_time_s_F=clip.frame_time_s_F,
        visual_offsets=torch.tensor([0, len(clip.frames_FCHW)]),
        sample_of_visual=torch.tensor([0]),
        ids_L=ids_L,
        labels_L=torch.full_like(ids_L, IGNORED),
        answer_L=torch.tensor(text.answer),
        text_offsets=torch.tensor([0, len(ids_L)]),
        row_of_sample=torch.tensor([0]),
        keys=(key,),
        answer_kinds=(),
        questions=(),
        picture_V4=torch.tensor([picture(kind, clip.frames_FCHW.shape[-1])]),
    )
