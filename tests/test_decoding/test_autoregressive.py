import pytest
import torch
from transformers import GenerationConfig

from lightning_crosslmm.decoding import Greedy, Sampling
from lightning_crosslmm.errors import UserError
from tests.tiny import tiny_llm

NEVER = 9999  # no token of the vocabulary: nothing stops
PROMPT = torch.tensor([[7, 3, 250, 19, 4]])


def llm_of(seed=0, **generation):
    torch.manual_seed(seed)
    llm = tiny_llm().eval()
    for name, value in generation.items():
        setattr(llm.generation_config, name, value)
    return llm


def answer(llm, decoding, ids_RT=PROMPT, mask_RT=None, stop_id=NEVER, **more):
    embeds_RTD = llm.get_input_embeddings()(ids_RT).detach()
    mask_RT = torch.ones_like(ids_RT) if mask_RT is None else mask_RT
    return decoding.generate(llm, embeds_RTD, mask_RT, None, stop_id=stop_id, pad_id=0, **more)


def by_hand(llm, ids_RT, count):
    """Take the likeliest token, and run everything again."""
    with torch.no_grad():
        for _ in range(count):
            ids_RT = torch.cat([ids_RT, llm(input_ids=ids_RT).logits[:, -1:].argmax(-1)], dim=1)
    return ids_RT[:, -count:]


def test_greedy_is_the_likeliest_token_every_time():
    llm = llm_of()
    expected = by_hand(llm, PROMPT, 12)
    assert len(expected.unique()) > 3
    assert torch.equal(answer(llm, Greedy(12)), expected)


@pytest.mark.parametrize(
    "generation",
    [
        {"repetition_penalty": 5.0},
        {"temperature": 0.1, "top_k": 1, "do_sample": True},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": "likeliest"},
        {"bad_words_ids": "likeliest"},
        {"forced_bos_token_id": 5},
        {"forced_eos_token_id": 5},
        {"begin_suppress_tokens": "likeliest"},
        {"min_new_tokens": 5},
        {"max_length": 3},
        {"num_beams": 3, "length_penalty": 2.0},
        {"num_return_sequences": 2},
        {"use_cache": False},
        {"sequence_bias": "likeliest"},
        {"exponential_decay_length_penalty": (1, 9.0)},
        {"return_dict_in_generate": True},
        {"eos_token_id": "likeliest"},
        {"stop_strings": ["a"]},
        {"max_time": 1e-9},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda generation: ",".join(generation),
)
def test_a_checkpoints_own_generation_settings_decide_nothing(generation):
    expected = by_hand(llm_of(), PROMPT, 8)
    first = int(expected[0, 0])
    fill = {
        "suppress_tokens": [first],
        "begin_suppress_tokens": [first],
        "bad_words_ids": [[first]],
        "sequence_bias": [[[first], -99.0]],
        "eos_token_id": first,
    }
    generation = {name: fill[name] if value == "likeliest" else value for name, value in generation.items()}
    assert torch.equal(answer(llm_of(**generation), Greedy(8)), expected)


def test_the_models_own_settings_are_left_as_they_were():
    llm = llm_of(repetition_penalty=5.0)
    answer(llm, Greedy(2))
    assert isinstance(llm.generation_config, GenerationConfig) and llm.generation_config.repetition_penalty == 5.0


def test_an_answer_ends_at_the_stop_token():
    llm = llm_of()
    expected = by_hand(llm, PROMPT, 8)[0].tolist()
    stop_id = expected[3]
    found = answer(llm, Greedy(8), stop_id=stop_id)[0].tolist()
    assert found == expected[: expected.index(stop_id) + 1]


def test_prompts_padded_on_the_left_are_read_as_if_alone():
    llm = llm_of()
    ids_RT = torch.tensor([[0, 0, 7, 3], [9, 8, 7, 6]])
    mask_RT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    together = answer(llm, Greedy(8), ids_RT, mask_RT)
    assert torch.equal(together[:1], by_hand(llm, ids_RT[:1, 2:], 8))
    assert torch.equal(together[1:], by_hand(llm, ids_RT[1:], 8))


def seeded(llm, decoding, seed=0):
    torch.manual_seed(seed)
    return answer(llm, decoding)[0].tolist()


def test_a_seed_repeats_a_drawn_answer():
    llm, decoding = llm_of(), Sampling(16, temperature=2.0)
    assert seeded(llm, decoding) == seeded(llm, decoding)
    assert seeded(llm, decoding) != seeded(llm, decoding, seed=1)


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_every_cut_reaches_down_to_the_likeliest(cut):
    llm = llm_of()
    assert seeded(llm, Sampling(8, **cut)) == by_hand(llm, PROMPT, 8)[0].tolist()


@pytest.mark.parametrize(
    "own", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"min_p": 0.99}, {"typical_p": 0.01}]
)
def test_a_checkpoints_own_cut_does_not_narrow_the_draw(own):
    assert seeded(llm_of(**own), Sampling(16)) == seeded(llm_of(), Sampling(16))


def test_drawn_tokens_follow_the_distribution():
    llm = llm_of()
    many = PROMPT.expand(4000, -1)
    torch.manual_seed(0)
    drawn = answer(llm, Sampling(1, temperature=2.0), many)[:, 0]
    with torch.no_grad():
        share_W = (llm(input_ids=PROMPT).logits[0, -1] / 2.0).softmax(-1)
    likeliest = int(share_W.argmax())
    found = float((drawn == likeliest).float().mean())
    # four standard deviations of a share of 4000 draws
    assert abs(found - float(share_W[likeliest])) < 4 * (0.25 / 4000) ** 0.5


class Heard:
    def __init__(self):
        self.ids, self.is_over = [], False

    def put(self, ids):
        self.ids += ids.flatten().tolist()

    def end(self):
        self.is_over = True


def test_a_streamer_hears_what_is_returned():
    heard = Heard()
    found = answer(llm_of(), Greedy(6), streamer=heard)
    assert heard.ids == found[0].tolist() and heard.is_over


def test_a_streamer_takes_one_question():
    with pytest.raises(UserError, match="one question at a time, got 2"):
        answer(llm_of(), Greedy(6), PROMPT.expand(2, -1), streamer=Heard())


def test_a_prompt_without_room_is_refused():
    llm = llm_of()
    llm.config.max_position_embeddings = 12
    assert answer(llm, Greedy(7)).shape == (1, 7)
    with pytest.raises(UserError, match="a prompt of 5 tokens leaves room for 7 .* 12, decoding.max_new_tokens is 8"):
        answer(llm, Greedy(8))


@pytest.mark.parametrize("value", [0, -3])
def test_no_tokens_are_refused(value):
    with pytest.raises(UserError, match=f"decoding.max_new_tokens is {value}"):
        Greedy(value)


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_settings_out_of_range_are_refused(setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(UserError, match=f"decoding.{name} {value}"):
        Sampling(4, **setting)
