import torch

from lightning_crosslmm.objective import answer_loss


def test_the_mean_over_answer_tokens_in_nats():
    logits_YW = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    expected = -(logits_YW.softmax(-1)[[0, 1], [0, 1]].log()).mean()
    torch.testing.assert_close(answer_loss(logits_YW, torch.tensor([0, 1])), expected)


def test_half_precision_logits_are_summed_in_single():
    logits_YW = torch.randn(5, 300).bfloat16()
    target_Y = torch.arange(5)
    loss = answer_loss(logits_YW, target_Y)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, answer_loss(logits_YW.float(), target_Y))


def test_no_answer_is_no_loss_and_a_gradient_of_zero():
    logits_YW = torch.zeros(0, 7, requires_grad=True)
    weight = torch.ones(7, requires_grad=True)
    loss = answer_loss(logits_YW * weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and weight.grad.tolist() == [0] * 7
