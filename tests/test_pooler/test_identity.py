from lightning_crosslmm.pooler import NoPooler
from tests.tiny import token_set


def test_every_token_stays():
    tokens = token_set()
    assert NoPooler()(tokens) is tokens
    assert NoPooler().tokens_per_frame((3, 4)) == 12
