"""Short words of the command line."""

from lightning_crosslmm.compose import compose_overrides
from lightning_crosslmm.short_words import SHORT_WORDS, spelled_out
from train import CONF_DIR


def test_short_words_are_settings_and_others_stay_as_they_are():
    words = [f"{short}=3" for short in SHORT_WORDS]
    assert compose_overrides(CONF_DIR, spelled_out(words)).data.sampling.num_frames == 3
    assert spelled_out(["-m", "data.num_frames=1,2", "pooler=max"]) == [
        "-m",
        "data.sampling.num_frames=1,2",
        "pooler=max",
    ]
