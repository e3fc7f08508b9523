"""Laws of learned modality-aware smoothing."""

from __future__ import annotations

import math

import pytest
import torch

from masq.calibration.replay import BlockData, ReplayBatch, collect
from masq.errors import NumericalError
from masq.models.base import GROUPS, Modality, Role
from masq.numerics.affine import fake_quantize
from masq.numerics.scheme import Scheme, TensorFormat
from masq.transforms.config import LearnedModalitySmoothing
from masq.transforms.fake_quantized import _SmoothedLinear, fake_quantized, run_fake_quantized
from masq.transforms.learned import learn_factors, weighted_error
from masq.transforms.stages import fit_modality
from tests.nano_fixtures import Nano, make_nano, nano_model  # noqa: F401

SCHEME = Scheme.preset("w4a6")
CONFIG = LearnedModalitySmoothing(epochs=4, learning_rate=0.02)


def learn(nano: Nano, replay: list[ReplayBatch] | None = None, *, seed: int = 0, config=CONFIG, scheme=SCHEME):
    """Learn the factors of the first block."""
    block = nano.adapter.blocks()[0]
    targets, replay = nano.targets(), replay or nano.replay
    initial = fit_modality(block, collect(block, nano.hidden, replay), config).factors
    data = BlockData(nano.hidden, targets, replay)
    return learn_factors(block, "block 0", initial, data, scheme, config, seed=seed), initial


def logarithms(factors):
    return {g: {m: f.log() for m, f in by.items()} for g, by in factors.items()}


def outputs(nano: Nano, logs, replay=None) -> list[torch.Tensor]:
    block = nano.adapter.blocks()[0]
    return run_fake_quantized(block, "block 0", logs, nano.hidden, replay or nano.replay, SCHEME)


def row_errors(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).abs().mean(-1)


def test_learning_lowers_the_loss(nano_model: Nano) -> None:  # noqa: F811
    outcome, initial = learn(nano_model)
    assert outcome.final_loss < outcome.initial_loss
    assert not outcome.reverted
    weights = dict.fromkeys((Modality.TEXT, Modality.VISION, Modality.AUDIO), 1.0)

    def loss(logs) -> float:
        parts = zip(outputs(nano_model, logs), nano_model.targets(), nano_model.replay, strict=True)
        return sum(float(weighted_error(row_errors(y, target), b.modality, weights)) for y, target, b in parts) / 4

    assert loss(logarithms(initial)) == pytest.approx(outcome.initial_loss, rel=1e-5)
    assert loss(outcome.log_factors) == pytest.approx(outcome.final_loss, rel=1e-5)


def test_a_worse_end_is_reverted(nano_model: Nano) -> None:  # noqa: F811
    outcome, initial = learn(nano_model, config=LearnedModalitySmoothing(epochs=3, learning_rate=5.0))
    assert outcome.reverted
    assert outcome.final_loss == outcome.initial_loss
    starting = logarithms(initial)
    assert all(torch.equal(outcome.log_factors[g][m], log) for g, by in starting.items() for m, log in by.items())
    for kept, again in zip(outcome.outputs, outputs(nano_model, starting), strict=True):
        assert torch.equal(kept, again)


def test_same_seed_same_bits_other_seed_other_order(nano_model: Nano) -> None:  # noqa: F811
    first, second, other = learn(nano_model)[0], learn(nano_model)[0], learn(nano_model, seed=1)[0]
    pairs = [
        (first.log_factors[g][m], second.log_factors[g][m], other.log_factors[g][m])
        for g in first.log_factors
        for m in first.log_factors[g]
    ]
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_gauge_invariance(nano_model: Nano) -> None:  # noqa: F811
    """Scaling every s_m by a constant of its own changes nothing (a power of two: not even the rounding)."""
    _, initial = learn(nano_model, config=LearnedModalitySmoothing(epochs=0))
    constants = {Modality.TEXT: 4.0, Modality.VISION: 0.5, Modality.AUDIO: 16.0}
    scaled = {g: {m: f * constants[m] for m, f in by.items()} for g, by in initial.items()}
    after = outputs(nano_model, logarithms(scaled))
    for y, z, target in zip(outputs(nano_model, logarithms(initial)), after, nano_model.targets(), strict=True):
        # exp(log s) is not exactly s, hence not torch.equal: a code may flip at a tie, which others then carry on. How
        # many do depends on the machine's exp; each is a small part of what quantization itself costs.
        assert float((y - z).norm()) < 0.1 * float((y - target).norm())


def test_one_modality_is_learned_smoothquant() -> None:
    """If every token is of one modality its factor is what shared learned smoothing gives, whichever it is called."""
    nano = make_nano(kinds=((), ()))
    as_text = learn(nano)[0].log_factors
    relabelled = [
        ReplayBatch(b.kwargs, torch.where(b.modality == 0, 1, b.modality).to(torch.int8)) for b in nano.replay
    ]
    as_vision = learn(nano, relabelled)[0].log_factors
    for group in as_text:
        assert set(as_text[group]) == {Modality.TEXT}
        assert set(as_vision[group]) == {Modality.VISION}
        assert torch.equal(as_text[group][Modality.TEXT], as_vision[group][Modality.VISION])


class SharedLinear(torch.nn.Module):
    """The reference: quantized linear with one learned factor for all tokens, straight from the definitions."""

    def __init__(self, linear: torch.nn.Linear, log_factor: torch.Tensor | None) -> None:
        super().__init__()
        self.inner, self.log_factor = linear, log_factor

    @staticmethod
    def rounded(x: torch.Tensor, qmax: int) -> torch.Tensor:
        scale = (x.abs().amax(-1, keepdim=True) / qmax).clamp(min=1e-12)
        z = x / scale
        return (z + (z.round() - z).detach()) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = 1.0 if self.log_factor is None else self.log_factor.exp()
        return torch.nn.functional.linear(
            self.rounded(x / s, 31), self.rounded(self.inner.weight * s, 7), self.inner.bias
        )


def test_one_modality_alone_equals_learned_smoothquant() -> None:
    """On text alone the factors are those of an independent learner that knows of no modality."""
    nano = make_nano(kinds=((),))
    config = LearnedModalitySmoothing(epochs=5, learning_rate=0.02)
    found, initial = learn(nano, config=config)
    block, target = nano.adapter.blocks()[0], nano.targets()[0]
    logs = {g: by[Modality.TEXT].log().requires_grad_() for g, by in initial.items()}
    originals = {role: block.linear(role) for roles in GROUPS.values() for role in roles}
    for group, roles in GROUPS.items():
        for role in roles:
            block.set_linear(role, SharedLinear(originals[role], logs.get(group)))
    real = nano.replay[0].modality >= 0
    optimizer = torch.optim.Adam(logs.values(), lr=0.02)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 + math.cos(math.pi * step / 5)) / 2
        optimizer.zero_grad()
        loss = (block.forward(nano.hidden[0], nano.replay[0].kwargs) - target)[real].abs().mean()
        loss.backward()
        optimizer.step()
    assert loss < found.initial_loss
    for group, log in logs.items():
        torch.testing.assert_close(found.log_factors[group][Modality.TEXT], log.detach(), rtol=0, atol=2e-3)
        moved = (log.detach() - initial[group][Modality.TEXT].log()).abs().max()
        assert moved > 0.03, "the comparison must be of factors that learned"


def test_a_modality_learns_from_its_own_rows(nano_model: Nano) -> None:  # noqa: F811
    """With weight on audio alone the factors of vision and text see no direct loss of theirs."""
    only_audio = LearnedModalitySmoothing(
        epochs=2, learning_rate=0.02, loss_weights={"audio": 1.0, "text": 0.0, "vision": 0.0}
    )
    outcome, initial = learn(nano_model, config=only_audio)
    # gate and up act on each token alone: without loss on vision rows nothing moves their factor there.
    assert torch.allclose(outcome.log_factors["gate_up"][Modality.VISION], initial["gate_up"][Modality.VISION].log())
    assert not torch.allclose(outcome.log_factors["gate_up"][Modality.AUDIO], initial["gate_up"][Modality.AUDIO].log())


def test_nan_names_the_block(nano_model: Nano) -> None:  # noqa: F811
    block = nano_model.adapter.blocks()[0]
    initial = fit_modality(block, collect(block, nano_model.hidden, nano_model.replay), CONFIG).factors
    targets = nano_model.targets()
    nano_model.hidden[0][0, -1, 0] = float("nan")
    data = BlockData(nano_model.hidden, targets, nano_model.replay)
    with pytest.raises(NumericalError, match="block 0"):
        learn_factors(block, "block 0", initial, data, SCHEME, CONFIG, seed=0)
    assert isinstance(block.linear("query"), torch.nn.Linear)


def test_linears_come_back(nano_model: Nano) -> None:  # noqa: F811
    block = nano_model.adapter.blocks()[0]
    before = {role: block.linear(role) for role in SCHEME.roles}
    weights = {role: linear.weight.clone() for role, linear in before.items()}
    learn(nano_model)
    for role, linear in before.items():
        assert block.linear(role) is linear
        assert torch.equal(linear.weight, weights[role])
        assert linear.weight.grad is None
        assert not linear._forward_pre_hooks


def test_loss_is_a_sum_of_means_per_modality() -> None:
    modality = torch.tensor([[-1, 0, 0, 1]], dtype=torch.int8)
    output = torch.tensor([[[9.0, 9], [1, 3], [2, 2], [5, 7]]])
    weights = {Modality.TEXT: 1.0, Modality.VISION: 0.5, Modality.AUDIO: 1.0}
    error = row_errors(output, torch.zeros_like(output))
    assert float(weighted_error(error, modality, weights)) == pytest.approx(2.0 + 0.5 * 6.0)
    assert float(weighted_error(error, modality, weights, "token")) == pytest.approx((2 + 2 + 0.5 * 6.0) / 3)


def test_both_means_agree_on_one_modality(nano_model: Nano) -> None:  # noqa: F811
    error = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    modality = torch.tensor([[-1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.int8)
    weights = {Modality.TEXT: 1.0, Modality.VISION: 0.7, Modality.AUDIO: 1.0}
    assert float(weighted_error(error, modality, weights, "token")) == pytest.approx(
        float(weighted_error(error, modality, weights, "modality"))
    )


def test_errors_of_linears_are_those_of_each_linear_alone(nano_model: Nano) -> None:  # noqa: F811
    """Equation 14: on the input it gets, whatever the linears before it did."""
    block, batch = nano_model.adapter.blocks()[0], nano_model.replay[0]
    logs = logarithms(fit_modality(block, collect(block, nano_model.hidden, nano_model.replay), CONFIG).factors)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    floats = {role: block.linear(role) for role in Role}

    def keep(role):
        return lambda _m, args, output: found.__setitem__(role, (args[0], output))

    with torch.no_grad(), fake_quantized(block, logs, SCHEME, alone=True) as rows:
        for role in Role:
            block.linear(role).register_forward_hook(keep(role))
        rows.set(batch.modality)
        block.forward(nano_model.hidden[0], batch.kwargs)
        errors = list(rows.errors)
    assert len(errors) == len(Role)
    for (role, (x, y)), error in zip(found.items(), errors, strict=True):
        torch.testing.assert_close(error, (y - floats[role](x)).abs().mean(-1), atol=1e-5, rtol=1e-4)


def test_learning_each_linear_lowers_their_errors(nano_model: Nano) -> None:  # noqa: F811
    config = LearnedModalitySmoothing(epochs=4, learning_rate=0.02, objective="linear")
    outcome, initial = learn(nano_model, config=config)
    assert outcome.final_loss < outcome.initial_loss
    assert not outcome.reverted
    other = learn(nano_model)[0]
    assert any(
        not torch.equal(outcome.log_factors[g][m], other.log_factors[g][m]) for g, by in initial.items() for m in by
    )


def test_no_gradient_passes_from_one_linear_to_another(nano_model: Nano) -> None:  # noqa: F811
    block, batch = nano_model.adapter.blocks()[0], nano_model.replay[0]
    factors = fit_modality(block, collect(block, nano_model.hidden, nano_model.replay), CONFIG).factors
    logs = {g: {m: f.log().requires_grad_() for m, f in by.items()} for g, by in factors.items()}
    with fake_quantized(block, logs, SCHEME, alone=True) as rows:
        rows.set(batch.modality)
        block.forward(nano_model.hidden[0], batch.kwargs)
        # down is not smoothed: nothing before it may learn from its error; query is the first to read its group's.
        assert not rows.errors[-1].requires_grad
        rows.errors[0].sum().backward()
    assert {g for g, by in logs.items() for log in by.values() if log.grad is not None} == {"qkv"}


@pytest.mark.parametrize(
    "fmt",
    [
        TensorFormat(4),
        TensorFormat(4, symmetric=False),
        TensorFormat(3, granularity="per_group", group_size=5),
        TensorFormat(4, granularity="per_token", clip=0.8),
    ],
    ids=["symmetric", "asymmetric", "group", "clip"],
)
def test_rounding_again_changes_no_bit(fmt: TensorFormat) -> None:
    """Values and gradients are those that autograd finds when it keeps W s and fq(W s)."""
    torch.manual_seed(0)
    weight, upstream = torch.randn(7, 15), torch.randn(11, 7)

    def results(linear):
        leaves = torch.randn(11, 15, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 15)
        rows, log_factor = (one.clone().requires_grad_() for one in leaves)
        y = linear(rows, torch.exp(log_factor))
        y.backward(upstream)
        return y.detach(), rows.grad, log_factor.grad

    def kept(rows, factor):
        return torch.nn.functional.linear(rows, fake_quantize(weight * factor, fmt))

    found = results(lambda rows, factor: _SmoothedLinear.apply(rows, weight, factor, fmt))
    for one, wanted in zip(found, results(kept), strict=True):
        assert torch.equal(one, wanted)


def test_the_graph_keeps_no_rounded_weight(nano_model: Nano) -> None:  # noqa: F811
    """Between the passes of a block only its weights, as they are, lie in memory beside its activations."""
    block = nano_model.adapter.blocks()[0]
    logs = {
        group: {m: torch.zeros(block.linear(GROUPS[group][0]).in_features).requires_grad_() for m in Modality}
        for group in GROUPS
    }
    matrices = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 2 and tuple(tensor.shape) in shapes:
            matrices.add(tensor.data_ptr())
        return tensor

    with fake_quantized(block, logs, SCHEME) as rows, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        linears = [block.linear(Role(role)) for role in SCHEME.formats]
        shapes = {tuple(linear.weight.shape) for linear in linears}
        rows.set(nano_model.replay[0].modality)
        output = block.forward(nano_model.hidden[0], nano_model.replay[0].kwargs)
        assert output.requires_grad
        assert matrices <= {linear.weight.data_ptr() for linear in linears}
        assert len(matrices) == len(linears)
