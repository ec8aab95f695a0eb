import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.module import CrossLMMModule
from lightning_crosslmm.optim import OptimSettings
from tests.tiny import TOKENIZER, tiny_batch, tiny_model

RATES = {"encoder": None, "pooler": 1e-3, "projector": 3e-3, "fusion": 3e-3, "llm": 3e-3}
SAMPLES = (["see", 2, "what?", "=cat"], [1, "or", 1, "?", "=dog"], ["no?", "=yes", "sure", "=yes"])
BATCH = tiny_batch(*SAMPLES, kinds=["what", "what", "", "sure"])

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")


def module_of(rates=None, seed=0, checkpointing=False, model=None, **settings):
    optim = OptimSettings(RATES | (rates or {}), **settings)
    model = model or tiny_model(seed=seed)
    kinds = ("what", "sure", "never asked")
    return CrossLMMModule(model, TOKENIZER, optim, Greedy(8), kinds, gradient_checkpointing=checkpointing)


def trainer_of(steps, **settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", devices=1, max_steps=steps, **quiet, **settings)


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


class Noted(lightning.Callback):
    """Notes what was logged at every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
        self.steps.append({name: value.item() for name, value in trainer.callback_metrics.items()} | {"rates": rates})


def fitted(module, steps, *batches, **settings):
    noted = Noted()
    trainer_of(steps, callbacks=[noted], max_epochs=-1, **settings).fit(module, loader(*batches))
    return noted.steps


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_learns_the_answers(checkpointing):
    module = module_of(checkpointing=checkpointing)
    steps = fitted(module, 30, BATCH)
    losses = [step["train/loss"] for step in steps]
    assert losses[-1] < 0.2 * losses[0] and steps[-1]["train/accuracy"] == 1
    answers = module.predict_step(BATCH, 0)
    assert [row["answer"] for row in answers] == ["cat", "dog", "yes", "yes"]


def test_frozen_roles_do_not_move_and_the_others_do():
    module = module_of({"llm": None})
    before = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    fitted(module, 2, BATCH)
    for name, parameter in module.model.named_parameters():
        is_frozen = module.model.role_of(name) in ("encoder", "llm")
        assert torch.equal(parameter, before[name]) == is_frozen, name


def test_each_role_runs_at_its_own_rate():
    steps = fitted(module_of({"fusion": 1e-4}, warmup_steps=2, constant_share=1.0), 3, BATCH)
    # noted after the schedule's step: the rates of the step to come
    assert [step["rates"]["fusion"] for step in steps] == pytest.approx([1e-4, 1e-4, 1e-4])
    assert [step["rates"]["llm/no_decay"] for step in steps] == pytest.approx([3e-3, 3e-3, 3e-3])


def test_parts_that_come_in_evaluation_mode_are_trained_in_training_mode():
    model = tiny_model().eval()
    module, calls = module_of({"encoder": 1e-3}, model=model, checkpointing=True), []
    model.llm.model.layers[1].self_attn.register_forward_pre_hook(lambda layer, _: calls.append(layer.training))
    model.encoder.tower.blocks[0].attn.register_forward_pre_hook(lambda layer, _: calls.append(layer.training))
    fitted(module, 1, BATCH)
    assert calls == [True] * 4  # each twice: recomputed in the backward pass


def test_warm_up_counts_optimizer_steps():
    module = module_of(warmup_steps=4, constant_share=1.0)
    steps = fitted(module, 2, *[BATCH] * 4, accumulate_grad_batches=2)
    assert [step["rates"]["llm"] for step in steps] == pytest.approx([3e-3 * f for f in (0.25, 0.5, 0.5, 0.75)])


def halves():
    """The same four samples as one batch and as two, with many more answer tokens in the second half."""
    asked = [["a", 2, "?", "=cat"], ["b?", "=a"], ["c", 1, "?", "=cow or is it an ox"], [3, "d?", "=hen, I think"]]
    whole = tiny_batch(*asked)
    first, second = tiny_batch(*asked[:2]), tiny_batch(*asked[2:])
    frames = whole.frames_FCHW.split([2, 4])
    return whole, *(
        VideoBatch(**{**vars(half), "frames_FCHW": own}) for half, own in zip((first, second), frames, strict=True)
    )


def test_accumulation_is_a_big_batch():
    whole, *parts = halves()
    found = []
    for batches, accumulate in ((parts, 2), ([whole], 1)):
        module = module_of({"encoder": 1e-3})
        gradients = []
        module.configure_gradient_clipping = lambda *_, module=module, gradients=gradients, **__: gradients.append(
            {name: parameter.grad.clone() for name, parameter in module.model.named_parameters()}
        )
        fitted(module, 1, *batches, accumulate_grad_batches=accumulate)
        found.append(gradients[0])
    largest = max(gradient.abs().max().item() for gradient in found[1].values())
    worst = max((found[0][name] - gradient).abs().max().item() for name, gradient in found[1].items())
    # measured: 3e-7 of the largest gradient, which is single precision's rounding
    assert worst < 3e-6 * largest


def test_validation_counts_answers_per_type():
    module = module_of()
    fitted(module, 30, BATCH)
    (logged,) = trainer_of(1).validate(module, loader(BATCH, tiny_batch(["no?", "=no"])), verbose=False)
    assert logged["val/accuracy"] == pytest.approx(4 / 5)
    assert logged["val/accuracy/what"] == 1 and logged["val/accuracy/sure"] == 1
    assert "val/accuracy/never asked" not in logged
    (tested,) = trainer_of(1).test(module, loader(BATCH), verbose=False)
    assert tested["test/accuracy"] == 1


def test_validation_loss_is_per_answer_token():
    module = module_of()
    short, long = tiny_batch(["a?", "=b"]), tiny_batch(["a?", "=quite a long answer"])
    both = tiny_batch(["a?", "=b"], ["a?", "=quite a long answer"])
    (apart,) = trainer_of(1).validate(module, loader(short, long), verbose=False)
    (together,) = trainer_of(1).validate(module, loader(both), verbose=False)
    assert apart["val/loss"] == pytest.approx(together["val/loss"], rel=1e-5)


def test_batches_without_answers_or_visuals():
    module = module_of()
    steps = fitted(module, 2, tiny_batch([2, "no answer"]), tiny_batch(["none?", "=ok"]))
    assert "train/loss" not in steps[0] and steps[1]["train/loss"] > 0
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    trainer_of(1).validate(module, loader(tiny_batch([2, "no answer"])), verbose=False)


def test_predictions_name_sample_and_question():
    answers = module_of().predict_step(BATCH, 0)
    assert [(row["key"], row["question"], row["expected"]) for row in answers] == [
        ("s0", "what?", "cat"),
        ("s1", "?", "dog"),
        ("s2", "no?", "yes"),
        ("s2", "sure", "yes"),
    ]


def test_looks_ask_the_first_question_of_each_sample():
    looks = module_of().looks(BATCH, limit=2)
    assert [(look.key, look.question, look.expected) for look in looks] == [("s0", "what?", "cat"), ("s1", "?", "dog")]
    assert torch.equal(torch.cat([look.frames_FCHW for look in looks]), BATCH.frames_FCHW)
    assert [tuple(look.t2v_FHW.shape) for look in looks] == [(2, 4, 4), (2, 4, 4)]
    everyone = module_of().looks(BATCH, limit=9)
    assert len(everyone) == 3 and everyone[2].frames_FCHW.shape[0] == 0
    assert module_of().looks(tiny_batch([1, "no answer"]), limit=2) == []


def test_looks_without_a_branch():
    (look, *_) = module_of(model=tiny_model(v2v=False)).looks(BATCH, limit=1)
    assert look.v2v_FHW is None and look.t2v_FHW is not None


def test_a_run_without_an_end_is_refused():
    with pytest.raises(UserError, match="trainer.max_steps is -1; the schedule needs a number"):
        trainer_of(-1, max_epochs=1).fit(module_of(), loader(BATCH))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_that_would_round_frame_times_is_refused(precision):
    with pytest.raises(UserError, match=f"trainer.precision: {precision} stores weights in half precision"):
        trainer_of(1, max_epochs=-1, precision=precision).fit(module_of(), loader(BATCH))
