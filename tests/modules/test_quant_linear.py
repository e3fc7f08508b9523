"""The quantized linear against a float64 reference, its modality rules, and its stored state."""

from __future__ import annotations

import pytest
import torch

from masq.errors import MasqError
from masq.models.base import Modality
from masq.modules.modality import ModalityContext
from masq.modules.quant_linear import QuantLinear
from masq.numerics.affine import quantize
from masq.numerics.low_rank import encode, factors_of
from masq.numerics.scheme import Scheme, TensorFormat

TEXT, VISION, AUDIO = Modality.TEXT, Modality.VISION, Modality.AUDIO
IDS = torch.tensor([[-1, 0, 1, 1, 0, 2, 0], [0, 0, 2, 2, 2, 1, 0]], dtype=torch.int8)


def make(d_in: int, d_out: int, scheme: str = "w4a8", *, seed: int = 0, **kwargs):
    """A layer with everything on, the pieces it was made of, and its context."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    preset = Scheme.preset(scheme)
    weight_format = preset.weight
    if weight_format.granularity == "per_group":
        weight_format = TensorFormat(bits=4, symmetric=False, granularity="per_group", group_size=d_in // 3)
    weight = rand(d_out, d_in)
    smoothing = {m: rand(d_in).exp() for m in (TEXT, VISION, AUDIO)}
    corrections = {m: (rand(d_in, 3) / 9, rand(3, d_out) / 9) for m in (VISION, AUDIO)}
    parts = {
        "weights": {TEXT: quantize(weight, weight_format)},
        "bias": rand(d_out),
        "activation": preset.activation,
        "smoothing": smoothing,
        "corrections": corrections,
        **kwargs,
    }
    context = ModalityContext()
    context.set(IDS)
    return QuantLinear(context=context, **parts), parts, context, rand(*IDS.shape, d_in) * 3


def reference(parts, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Token by token in float64."""
    rows = []
    for token, modality in zip(x.reshape(-1, x.shape[-1]), ids.reshape(-1).tolist(), strict=True):
        which = Modality(max(modality, 0))
        a = token
        if parts["smoothing"] is not None:
            a = token * parts["smoothing"][which].double().reciprocal().float()
        weight = parts["weights"].get(which, parts["weights"][TEXT]).dequantize(torch.float64)
        quantized = (
            a.double() if parts["activation"] is None else quantize(a, parts["activation"]).dequantize(torch.float64)
        )
        y = weight @ quantized
        if which in (parts["corrections"] or {}) and modality > 0:
            left, right = factors_of(parts["corrections"][which]).dense()
            y = y + a.double() @ left @ right
        rows.append(y if parts["bias"] is None else y + parts["bias"].double())
    return torch.stack(rows).view(*ids.shape, -1)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a6", "w4a4", "w4a16"])
@pytest.mark.parametrize(("d_in", "d_out"), [(21, 5), (48, 33), (129, 1)])
def test_equals_float64_reference(scheme: str, d_in: int, d_out: int) -> None:
    layer, parts, _, x = make(d_in, d_out, scheme)
    expected = reference(parts, x, IDS)
    torch.testing.assert_close(layer(x).double(), expected, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
@pytest.mark.parametrize(("d_in", "d_out"), [(21, 5), (48, 33), (129, 1)])
def test_coded_corrections_equal_float64_reference(scheme: str, d_in: int, d_out: int) -> None:
    layer, parts, context, x = make(d_in, d_out, scheme, corrections=coded(d_in, d_out))
    torch.testing.assert_close(layer(x).double(), reference(parts, x, IDS), rtol=2e-6, atol=2e-5)
    rebuilt = QuantLinear.from_state(
        layer.state_dict(),
        weight=parts["weights"][TEXT].format,
        activation=parts["activation"],
        context=context,
        dtype=torch.float32,
    )
    assert torch.equal(rebuilt(x), layer(x))
    assert rebuilt.state_dict().keys() == layer.state_dict().keys()
    y = make(d_in, d_out, scheme, corrections=coded(d_in, d_out), dtype=torch.bfloat16)[0](x.bfloat16())
    expected = reference(parts, x.bfloat16().float(), IDS)
    assert float((y.double() - expected).norm() / expected.norm()) < 8e-3


def coded(d_in: int, d_out: int):
    generator = torch.Generator().manual_seed(4)
    sizes = (d_in, 3), (3, d_out)
    return {m: encode(*(torch.randn(size, generator=generator) / 9 for size in sizes)) for m in (VISION, AUDIO)}


@pytest.mark.parametrize("absent", ["bias", "smoothing", "corrections"])
def test_optional_parts(absent: str) -> None:
    layer, parts, _, x = make(24, 7, **{absent: None})
    torch.testing.assert_close(layer(x).double(), reference(parts, x, IDS), rtol=2e-6, atol=2e-5)


def test_one_weight_per_modality() -> None:
    fmt = Scheme.preset("w4a8").weight
    weights = {
        m: quantize(torch.randn(6, 18, generator=torch.Generator().manual_seed(int(m))), fmt)
        for m in (TEXT, VISION, AUDIO)
    }
    layer, parts, _, x = make(18, 6, weights=weights, corrections=None)
    torch.testing.assert_close(layer(x).double(), reference(parts, x, IDS), rtol=2e-6, atol=2e-5)


def test_exact_on_representable_values() -> None:
    """Weights and activations that lie on their grids lose nothing."""
    scheme = Scheme.preset("w4a8")
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-7, 8, (9, 32), generator=generator).float() * 0.25
    weight[:, 0] = 7 * 0.25
    x = torch.randint(-127, 128, (*IDS.shape, 32), generator=generator).float() * 0.5
    x[..., 3] = 127 * 0.5
    context = ModalityContext()
    context.set(IDS)
    layer = QuantLinear(
        weights={TEXT: quantize(weight, scheme.weight)}, bias=None, activation=scheme.activation, context=context
    )
    assert torch.equal(layer(x), x @ weight.t())


def test_without_modality_it_raises() -> None:
    layer, _, context, x = make(12, 4)
    context.clear()
    with pytest.raises(MasqError):
        layer(x)
    context.set(IDS[:, :3])
    with pytest.raises(MasqError):
        layer(x)


def test_text_never_touches_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, parts, context, x = make(12, 4)
    calls = []
    monkeypatch.setattr(layer, "low_rank", lambda rows, modality: calls.append(modality))
    context.set(torch.zeros_like(IDS))
    assert torch.isfinite(layer(x)).all()
    assert not calls
    expected = reference(parts, x, torch.zeros_like(IDS))
    torch.testing.assert_close(layer(x).double(), expected, rtol=2e-6, atol=2e-5)


def test_rows_do_not_depend_on_each_other() -> None:
    layer, _, context, x = make(12, 4)
    together = layer(x)
    for row in range(IDS.shape[0]):
        context.set(IDS[row : row + 1, 2:])
        torch.testing.assert_close(layer(x[row : row + 1, 2:]), together[row : row + 1, 2:])


def test_unseen_modality_uses_the_factor_of_text() -> None:
    _, parts, context, x = make(12, 4)
    parts["smoothing"] = {TEXT: parts["smoothing"][TEXT], VISION: parts["smoothing"][VISION]}
    parts["corrections"] = {VISION: parts["corrections"][VISION]}
    layer = QuantLinear(context=context, **parts)
    context.set(torch.full_like(IDS, int(AUDIO)))
    as_audio = layer(x)
    context.set(torch.zeros_like(IDS))
    assert torch.equal(as_audio, layer(x))


def test_equal_factors_are_stored_once() -> None:
    _, parts, context, x = make(12, 4)
    own = parts["smoothing"]
    context.set(IDS)
    for smoothing, count in (
        ({TEXT: own[TEXT], VISION: own[TEXT].clone(), AUDIO: own[TEXT]}, 1),
        ({TEXT: own[TEXT], VISION: own[VISION], AUDIO: own[VISION]}, 2),
        ({TEXT: own[TEXT], AUDIO: own[AUDIO]}, 2),
        (own, 3),
    ):
        layer = QuantLinear(context=context, **{**parts, "smoothing": smoothing})
        assert layer.inverse_smoothing is not None
        assert layer.inverse_smoothing.shape == (count, 12)
        with_a_row_each = QuantLinear(context=context, **parts)
        with_a_row_each.inverse_smoothing.copy_(
            torch.stack([1 / smoothing.get(m, own[TEXT]).double() for m in (TEXT, VISION, AUDIO)]).float()
        )
        assert torch.equal(layer(x), with_a_row_each(x))


def test_weight_for_text_is_required() -> None:
    fmt = Scheme.preset("w4a8").weight
    with pytest.raises(MasqError, match="text"):
        make(8, 4, weights={VISION: quantize(torch.randn(4, 8), fmt)})


@pytest.mark.parametrize("scheme", ["w4a6", "w4a16"])
@pytest.mark.parametrize("absent", [None, "bias", "smoothing", "corrections"])
def test_state_round_trip(scheme: str, absent: str | None) -> None:
    layer, parts, context, x = make(24, 7, scheme, **({absent: None} if absent else {}))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    weight_format = parts["weights"][TEXT].format
    rebuilt = QuantLinear.from_state(
        state, weight=weight_format, activation=parts["activation"], context=context, dtype=torch.float32
    )
    assert torch.equal(rebuilt(x), layer(x))
    assert rebuilt.state_dict().keys() == layer.state_dict().keys()


def test_half_precision_model() -> None:
    layer, parts, _, x = make(24, 7, dtype=torch.bfloat16)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    parts["corrections"] = {m: (a.bfloat16(), b.bfloat16()) for m, (a, b) in parts["corrections"].items()}
    parts["bias"] = parts["bias"].bfloat16()
    expected = reference(parts, x.bfloat16().float(), IDS)
    assert float((y.double() - expected).norm() / expected.norm()) < 8e-3
