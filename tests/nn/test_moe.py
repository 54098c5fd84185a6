import pytest
import torch
import torch.nn.functional as F

from llmcore.nn import MoE
from llmcore.testing import assert_accurate


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return MoE(**{"hidden_size": 16, "intermediate_size": 24, "num_experts": 6, "top_k": 2, **options})


def plain(moe, x):
    """The same layer in plain PyTorch, expert by expert, in the dtype of x."""
    logits = F.linear(x, moe.gate.weight.to(x.dtype))
    scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
    ranked = scores if moe.bias is None else scores + moe.bias
    _, indices = ranked.topk(moe.top_k)
    weights = scores.gather(-1, indices)
    weights = moe.scale * (weights / weights.sum(-1, keepdim=True) if moe.normalize else weights)
    y = torch.zeros_like(x)
    for e in range(moe.num_experts):
        gate, up = (x @ moe.experts.gate_up_proj[e].T.to(x.dtype)).chunk(2, -1)
        weight = (weights * (indices == e)).sum(-1, keepdim=True)
        y = y + weight * ((F.silu(gate) * up) @ moe.experts.down_proj[e].T.to(x.dtype))
    if moe.shared_experts is not None:
        shared = moe.shared_experts
        gate, up, down = (p.weight.to(x.dtype) for p in (shared.gate_proj, shared.up_proj, shared.down_proj))
        y = y + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_shared_experts": 2},
        {"scoring": "sigmoid", "scale": 2.5, "bias_rate": 0.1},
        {"normalize": False, "top_k": 1},
        {"top_k": 6},
    ],
    ids=str,
)
def test_output_and_gradients(options):
    moe = layer(**options)
    if moe.bias is not None:
        moe.bias.copy_(torch.linspace(-0.3, 0.3, 6))
    x = torch.randn(2, 5, 16, requires_grad=True)
    assert_accurate(lambda x: moe(x)[0], lambda x: plain(moe, x), {"x": x})
    for mine, theirs in zip(
        torch.autograd.grad(moe(x)[0].square().sum(), list(moe.parameters())),
        torch.autograd.grad(plain(moe, x).square().sum(), list(moe.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_the_papers():
    moe = layer(balance_loss=0.5, z_loss=0.25).train()
    x = torch.randn(40, 16)
    logits = moe.gate(x)
    scores, chosen = logits.softmax(-1), logits.topk(2).indices
    share = torch.bincount(chosen.flatten(), minlength=6) / 80
    balance = 6 * (share * scores.mean(0)).sum()
    _, routing = moe(x)
    torch.testing.assert_close(routing.loss, 0.5 * balance + 0.25 * logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(routing.load, torch.bincount(chosen.flatten(), minlength=6).float())
    assert moe.eval()(x)[1] == (None, None) and layer().train()(x)[1].loss is None


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_an_even_load_costs_the_coefficient(scoring):
    moe = layer(balance_loss=0.5, scoring=scoring).train()
    with torch.no_grad():
        moe.gate.weight.copy_(torch.eye(6, 16))
    x = 3 * torch.eye(6, 16) + 2 * torch.eye(6, 16)[torch.arange(6).roll(1)]
    _, routing = moe(x)
    assert routing.load.tolist() == [2] * 6
    torch.testing.assert_close(routing.loss, torch.tensor(0.5))


def test_the_bias_evens_out_the_load():
    """Loss-free balancing: a router that prefers some experts spreads its tokens after some steps."""
    moe = layer(bias_rate=0.005, num_experts=8, scoring="sigmoid").train()
    x = torch.randn(512, 16) + 1.0

    def unevenness():
        load = moe(x)[1].load
        return (load.max() / load.mean()).item()

    before = unevenness()
    for _ in range(300):
        moe.balance(moe(x)[1].load)
    assert before > 1.7 and unevenness() < 1.15
    assert not any(p.grad is not None for p in moe.parameters())


def test_jitter_is_in_training_only():
    moe, x = layer(jitter=0.5), torch.randn(30, 16)
    torch.testing.assert_close(moe.eval()(x)[0], moe(x)[0], rtol=0, atol=0)
    moe.train()
    assert not torch.equal(moe(x)[0], moe(x)[0])


def test_the_router_stays_in_float32():
    moe = layer(bias_rate=0.1, balance_loss=0.1).bfloat16().train()
    assert moe.bias.dtype == moe.load.dtype == torch.float32
    x = torch.randn(9, 16).bfloat16()
    y, routing = moe(x)
    assert y.dtype == torch.bfloat16 and routing.loss.dtype == routing.load.dtype == torch.float32
    moe = layer(balance_loss=0.1).train()
    exact = moe(x.float())[1]
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(routing.loss, exact.loss, rtol=0, atol=0)


def test_one_token_and_none():
    moe = layer(num_shared_experts=1)
    assert moe(torch.randn(16))[0].shape == (16,)
    y, routing = moe(torch.randn(0, 16))
    assert y.shape == (0, 16) and routing.load.sum() == 0 and routing.loss is None
    _, routing = layer(balance_loss=0.1)(torch.randn(0, 16))
    assert routing.loss == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    moe = layer(balance_loss=0.1, num_shared_experts=1, scale=1.5).train()
    torch._dynamo.reset()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (12, 7, 33):
        results = []
        for call in (moe, compiled):
            torch.manual_seed(tokens)
            x = torch.randn(tokens, 16, requires_grad=True)
            y, routing = call(x)
            wanted = [x, *moe.parameters()]
            results.append((y, *routing, *torch.autograd.grad(y.square().sum() + routing.loss, wanted)))
        torch.testing.assert_close(results[1], results[0])


def test_built_without_memory_first():
    with torch.device("meta"):
        moe = layer(bias_rate=0.1)
    moe = moe.to_empty(device="cpu")
    moe.experts.reset_parameters()
    moe.gate.reset_parameters()
    moe.bias.zero_()
    assert moe.load.tolist() == [0] * 6 and moe(torch.randn(3, 16))[0].isfinite().all()


def test_the_router_is_a_module_that_can_be_hooked_and_replaced():
    moe, seen = layer(), []
    moe.gate.register_forward_hook(lambda module, args, logits: seen.append(logits))
    moe(torch.randn(3, 16))
    assert len(seen) == 1 and seen[0].shape == (3, 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 9}, "MoE: top_k is 9; allowed: 1 to the 6 experts to choose from."),
        ({"top_k": 0}, "MoE: top_k is 0; allowed: whole numbers from 1."),
        ({"num_experts": 0}, "MoE: num_experts is 0; allowed: whole numbers from 1."),
        ({"hidden_size": 64.0}, "MoE: hidden_size is 64.0; allowed: whole numbers from 1."),
        ({"num_shared_experts": -1}, "MoE: num_shared_experts is -1; allowed: whole numbers from 0."),
        ({"scoring": "x"}, "MoE: scoring is 'x'; allowed: 'softmax', 'sigmoid'."),
        ({"num_groups": 4}, "MoE: num_groups is 4; allowed: a divisor of the 6 experts."),
        ({"jitter": 1.5}, "MoE: jitter is 1.5; allowed: numbers from 0 to below 1."),
        ({"z_loss": -1.0}, "MoE: z_loss is -1.0; allowed: numbers from 0."),
        ({"bias_rate": -0.1}, "MoE: bias_rate is -0.1; allowed: numbers from 0."),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError) as caught:
        layer(**options)
    assert str(caught.value) == words


def test_bad_inputs():
    moe = layer(bias_rate=0.1)
    with pytest.raises(ValueError, match=r"^MoE: x must be \(\.\.\., 16\), but its shape is \(2, 15\)\.$"):
        moe(torch.randn(2, 15))
    for load, given in (
        (torch.zeros(5), r"\(5,\) of torch.float32"),
        (torch.zeros(6).long(), r"\(6,\) of torch.int64"),
        (moe(torch.randn(2, 16))[1], "a Routing"),
    ):
        with pytest.raises(ValueError, match=rf"^MoE: balance takes a load \(E,\) = \(6,\) .* but it is {given}\.$"):
            moe.balance(load)
