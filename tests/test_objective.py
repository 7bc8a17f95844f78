"""Loss and penalty against plain autograd."""

import copy

import pytest
import torch
from export_models import BASE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from prosparse_pipe.objective import ActivationPenalty, FFNInputs, count_penalty, hidden_loss, token_loss
from prosparse_pipe.relu import find_ffns, substitute_relu


def tiny_model(family="llama"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BASE)).double()
    return model, substitute_relu(model)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("ce_weight", "distill"), [(1.0, 0.0), (0.1, 1.0), (0.0, 2.0)])
def test_token_loss_is_cross_entropy_and_kl(chunk, ce_weight, distill):
    torch.manual_seed(1)
    logits = torch.randn(2, 9, 50, requires_grad=True)
    teacher = torch.randn(2, 9, 50) * 2
    labels = torch.randint(0, 50, (2, 9))
    loss, ce, kl = token_loss(logits, teacher, labels, ce_weight, distill, chunk)
    (gradient,) = torch.autograd.grad(loss * 3, logits)

    log_p = torch.log_softmax(logits[:, :-1].double(), -1)
    log_q = torch.log_softmax(teacher[:, :-1].double(), -1)
    expected_ce = nn.functional.nll_loss(log_p.reshape(-1, 50), labels[:, 1:].reshape(-1))
    expected_kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected = ce_weight * expected_ce + distill * expected_kl
    (expected_gradient,) = torch.autograd.grad(expected * 3, logits)
    torch.testing.assert_close(ce.double(), expected_ce, rtol=1e-5, atol=1e-6)
    if distill:
        torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def explicit_l1(ffn, x):
    return (torch.relu(ffn.gate_proj(x)) * ffn.up_proj(x)).abs().mean()


def explicit_count(ffn, x):
    gate = torch.relu(ffn.gate_proj(x))
    return (1 - 0.05 / (gate + 0.05)).mean()


def explicit_penalty(model, ffns, ids, of_layer):
    """Sum over layers of `of_layer` from the layers' own inputs, in plain autograd."""
    found = []
    handles = [ffn.module.register_forward_pre_hook(lambda m, args: found.append(of_layer(m, args[0]))) for ffn in ffns]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(found).sum()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("regularizer", "of_layer"), [("l1", explicit_l1), ("count", explicit_count)])
def test_penalty_and_its_gradient(checkpointing, family, regularizer, of_layer):
    model, ffns = tiny_model(family)
    reference = copy.deepcopy(model)
    ids = torch.randint(0, 300, (3, 16))
    expected_penalty = explicit_penalty(reference, substitute_relu(reference), ids, of_layer)
    expected_penalty.backward()

    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    penalty = ActivationPenalty(ffns, regularizer, 0.05)
    with penalty.collect():
        logits = model(input_ids=ids, use_cache=False).logits
    value, rates = penalty.take()
    assert value.item() == pytest.approx(expected_penalty.item(), rel=1e-5)
    (value + 0.0 * logits.sum()).backward()
    assert rates.shape == (2,)
    assert all(0 < rate < 1 for rate in rates)
    for (name, expected), actual in zip(reference.named_parameters(), model.parameters(), strict=True):
        if "gate" in name or ("up_proj" in name and regularizer == "l1"):
            assert expected.grad.abs().max() > 0
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-9)
    penalty.close()


def test_the_count_is_of_neurons_not_of_their_size():
    r = torch.tensor([[0.0, 0.1, 10.0, 1000.0]])
    assert count_penalty(r, 0.1).item() == pytest.approx((0.5 + 10 / 10.1 + 1000 / 1000.1) / 4)
    with pytest.raises(ValueError, match="l1 or count"):
        ActivationPenalty([], "l2")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_loss_and_its_gradient(checkpointing):
    model, ffns = tiny_model()
    dense = copy.deepcopy(model)
    dense_ffns = find_ffns(dense)
    with torch.no_grad():
        for ffn in ffns:
            ffn.down.weight.mul_(1.3)
    reference = copy.deepcopy(model)
    ids = torch.randint(0, 300, (3, 16))
    seen = []
    for m in (reference, dense):
        handles = [f.module.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for f in find_ffns(m)]
        m(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
    expected = sum(
        ((x - y.detach()) ** 2).sum() / (y.detach() ** 2).sum() for x, y in zip(seen[:2], seen[2:], strict=True)
    )
    (expected / 2).backward()

    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs, dense_inputs = FFNInputs(ffns), FFNInputs(dense_ffns)
    with inputs.collect():
        logits = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad(), dense_inputs.collect():
        dense(input_ids=ids, use_cache=False)
    loss = hidden_loss(inputs.take(), dense_inputs.take())
    assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-5)
    assert loss.item() > 1e-4
    (loss + 0.0 * logits.sum()).backward()
    first = ffns[0]
    wanted = dict(reference.named_parameters())[f"{first.name}.down_proj.weight"].grad
    assert wanted.abs().max() > 0
    torch.testing.assert_close(first.down.weight.grad, wanted, rtol=1e-4, atol=1e-8)
    with pytest.raises(KeyError):
        inputs.take()
    inputs.close()


def test_rates_are_the_share_of_non_zeros():
    model, ffns = tiny_model()
    ids = torch.randint(0, 300, (2, 8))
    seen = []
    handle = ffns[1].down.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    penalty = ActivationPenalty(ffns)
    with penalty.collect():
        model(input_ids=ids, use_cache=False)
    l1, rates = penalty.take()
    handle.remove()
    assert rates[1].item() == pytest.approx((seen[0] != 0).double().mean().item(), abs=1e-6)
    with pytest.raises(RuntimeError, match="did not run"):
        penalty.take()
    penalty.close()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert l1.item() > 0
