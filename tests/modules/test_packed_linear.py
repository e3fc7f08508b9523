"""The packed linear computes what the simulated one does, from fewer bytes, and gives its state back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from masq.errors import ConfigError, MasqError
from masq.kernels.base import PreparedFactors
from masq.models.base import Modality
from masq.modules.centres import STORED, Centres
from masq.modules.modality import ModalityContext
from masq.modules.packed_linear import PackedLinear
from masq.modules.quant_linear import QuantLinear
from masq.modules.stack import can_stack, stack
from masq.numerics.affine import quantize
from masq.numerics.low_rank import encode
from masq.numerics.scheme import LinearFormat, Scheme, TensorFormat

TEXT, VISION, AUDIO = Modality.TEXT, Modality.VISION, Modality.AUDIO
IDS = torch.tensor([[-1, 0, 1, 1, 0, 2, 0], [0, 0, 2, 2, 2, 1, 0]], dtype=torch.int8)
SCHEMES = ["w8a8", "w4a8", "w4a6", "w4a4", "w4a16"]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def simulated(d_in: int, d_out: int, scheme: str, context: ModalityContext, *, seed: int = 0, **changes):
    preset = Scheme.preset(scheme)
    fmt = preset.weight
    if fmt.granularity == "per_group":
        fmt = TensorFormat(4, symmetric=False, granularity="per_group", group_size=d_in // 3)
    parts = {
        "weights": {TEXT: quantize(rand(d_out, d_in, seed=seed), fmt)},
        "bias": rand(d_out, seed=seed + 1),
        "activation": preset.activation,
        # Linears of one group share the factors.
        "smoothing": {m: rand(d_in, seed=100 + int(m)).exp() for m in (TEXT, VISION, AUDIO)},
        "corrections": {
            m: (rand(d_in, 3, seed=seed + 2) / 9, rand(3, d_out, seed=seed + 3) / 9) for m in (VISION, AUDIO)
        },
    }
    return QuantLinear(context=context, **{**parts, **changes})


def coded(corrections):
    """Corrections in int8 codes."""
    return {modality: encode(*pair) for modality, pair in corrections.items()}


def codes_of(d_in: int, d_out: int, rank: int = 3, *, seed: int = 0):
    return coded(
        {m: (rand(d_in, rank, seed=seed + 2) / 9, rand(rank, d_out, seed=seed + 3) / 9) for m in (VISION, AUDIO)}
    )


@pytest.fixture
def context() -> ModalityContext:
    found = ModalityContext()
    found.set(IDS)
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_in", "d_out"), [(21, 5), (48, 33), (129, 1)])
def test_equals_the_simulation_bit_for_bit(scheme, dtype, d_in, d_out, context):
    layer = simulated(d_in, d_out, scheme, context, dtype=dtype)
    x = rand(*IDS.shape, d_in, seed=9).to(dtype) * 3
    packed = PackedLinear.from_simulated(layer, "reference")
    assert torch.equal(packed(x), layer(x))
    assert packed(x).dtype == dtype


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(21, 5, 3), (48, 33, 1), (129, 1, 1)])
def test_coded_corrections_equal_the_simulation_bit_for_bit(scheme, dtype, d_in, d_out, rank, context):
    layer = simulated(d_in, d_out, scheme, context, dtype=dtype, corrections=codes_of(d_in, d_out, rank))
    x = rand(*IDS.shape, d_in, seed=9).to(dtype) * 3
    packed = PackedLinear.from_simulated(layer, "reference")
    assert torch.equal(packed(x), layer(x))
    # They are what the codes stand for: as good as the same factors in float32.
    dense = {m: tuple(one.float() for one in codes.dense()) for m, codes in codes_of(d_in, d_out, rank).items()}
    wanted = simulated(d_in, d_out, scheme, context, dtype=dtype, corrections=dense)(x).float()
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    assert float((layer(x).float() - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [("reference", "w4a8"), ("reference", "w4a16"), ("auto", "w4a8"), ("auto", "w4a16"), ("torch", "w8a8")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_of_coded_corrections(kernel, scheme, dtype, context):
    """Different ranks, and modalities that are not corrected; codes stay codes whoever holds them, and come back."""
    vision = {VISION: codes_of(48, 32, 5, seed=50)[VISION]}
    layers = [
        simulated(48, 64, scheme, context, dtype=dtype, corrections=codes_of(48, 64)),
        simulated(48, 32, scheme, context, dtype=dtype, seed=1, bias=None, corrections=vision),
        simulated(48, 3, scheme, context, dtype=dtype, seed=2, corrections=None),
    ]
    packed = [PackedLinear.from_simulated(layer, kernel) for layer in layers]
    before = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in packed]
    stack(packed)
    assert packed[0].stack is packed[2].stack
    x = rand(*IDS.shape, 48, seed=9)
    for own, bound in ((dtype, 2e-6 if dtype == torch.float32 else 4e-3), (torch.float32, 2e-6)):
        for found, wanted in zip(packed, layers, strict=True):
            y, simulation = found(x.to(own)).float(), wanted(x.to(own)).float()
            assert float((y - simulation).norm() / simulation.norm()) < bound
        held = packed[0].stack._prepared
        assert {one.dtype for one in held.left.values()} == {torch.int8}
        for rights in held.right.values():
            tensors = rights.tensors.values() if isinstance(rights, PreparedFactors) else rights
            assert torch.int8 in {one.dtype for one in tensors if one is not None}
            assert not any(one.is_floating_point() for one in tensors if one is not None)
        for layer, plain in zip(packed, before, strict=True):
            state = layer.state_dict()
            assert state.keys() == plain.keys()
            assert all(torch.equal(state[name], plain[name]) for name in plain)
    for layer in packed:
        layer.to(torch.bfloat16)
    assert packed[0].factor_scale_audio.dtype == torch.float32
    assert torch.equal(packed[0].left_audio, before[0]["left_audio"])


def test_codes_and_sixteen_bits_are_not_stacked(context):
    """Not even behind a layer that has neither."""
    layers = [
        simulated(24, 5, "w4a8", context, corrections=None),
        simulated(24, 5, "w4a8", context),
        simulated(24, 5, "w4a8", context, corrections=codes_of(24, 5)),
    ]
    packed = [PackedLinear.from_simulated(layer, "reference") for layer in layers]
    assert not can_stack(packed[1], packed[2])
    stack(packed)
    assert packed[0].stack is packed[1].stack
    assert packed[2].stack is not packed[1].stack
    x = rand(*IDS.shape, 24)
    for found, wanted in zip(packed, layers, strict=True):
        torch.testing.assert_close(found(x), wanted(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("absent", ["bias", "smoothing", "corrections"])
@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_optional_parts(absent, scheme, context):
    layer = simulated(24, 7, scheme, context, **{absent: None})
    x = rand(*IDS.shape, 24)
    assert torch.equal(PackedLinear.from_simulated(layer, "reference")(x), layer(x))


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_a_stack_computes_what_its_members_do(scheme, context):
    """Members with and without bias, with different ranks, and with a modality that one does not correct."""
    others = {VISION: (rand(24, 5, seed=50), rand(5, 4, seed=51))}
    layers = [
        simulated(24, 7, scheme, context),
        simulated(24, 4, scheme, context, seed=1, bias=None, corrections=others),
        simulated(24, 3, scheme, context, seed=2, corrections=None),
    ]
    x = rand(*IDS.shape, 24)
    packed = [PackedLinear.from_simulated(layer, "reference") for layer in layers]
    stack(packed)
    assert packed[0].stack is packed[2].stack
    for found, wanted in zip(packed, layers, strict=True):
        torch.testing.assert_close(found(x), wanted(x), rtol=1e-6, atol=1e-6)
    # The integer part, and so a batch of text alone, is the same to the last bit. Float sums of wider matrices may be
    # taken in another order.
    context.set(torch.zeros_like(IDS))
    tolerance = 0 if scheme == "w4a8" else 1e-6
    for found, wanted in zip(packed, layers, strict=True):
        torch.testing.assert_close(found(x), wanted(x), rtol=tolerance, atol=tolerance)


def test_a_stack_multiplies_once_an_input(context, monkeypatch):
    packed = [
        PackedLinear.from_simulated(simulated(24, 5, "w4a8", context, seed=seed), "reference") for seed in range(3)
    ]
    stack(packed)
    kernel = packed[0].stack.prepare().kernel
    calls = []
    monkeypatch.setattr(type(kernel), "gemm", _counting(type(kernel).gemm, calls))
    x = rand(*IDS.shape, 24)
    first = [layer(x) for layer in packed]
    assert len(calls) == 1
    # The same tensor, changed in place, is another input; so is another tensor; so is a second pass.
    x.mul_(2)
    changed = [layer(x) for layer in packed]
    assert len(calls) == 2
    assert not torch.equal(first[1], changed[1])
    for layer in packed:
        layer(x.clone())
    assert len(calls) == 5
    with torch.inference_mode():
        y = rand(*IDS.shape, 24)
        for layer in packed:
            layer(y)
    assert len(calls) == 6
    assert packed[0].stack._outputs == {}


def _counting(function, calls):
    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize("tokens", [1, 7])
def test_corrections_of_a_half_precision_model(tokens, context):
    """A kernel may multiply them itself; the stored factors stay what they were, float32 rows get them as before."""
    halves = {"dtype": torch.bfloat16}
    layers = [simulated(64, rows, "w4a8", context, seed=rows, **halves) for rows in (64, 32, 5)]
    for layer in layers:
        for name in ("left_vision", "right_vision", "left_audio", "right_audio"):
            layer.register_buffer(name, getattr(layer, name).bfloat16())
    packed = [PackedLinear.from_simulated(layer) for layer in layers]
    before = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in packed]
    stack(packed)
    context.set(IDS[:, -tokens:].contiguous() if tokens > 1 else torch.tensor([[1], [0]], dtype=torch.int8))
    x = rand(2, tokens, 64, seed=9)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float32, 1e-6)):
        for found, wanted in zip(packed, layers, strict=True):
            y, simulation = found(x.to(dtype)).float(), wanted(x.to(dtype)).float()
            assert float((y - simulation).norm() / simulation.norm()) < bound
        for layer, plain in zip(packed, before, strict=True):
            state = layer.state_dict()
            assert state.keys() == plain.keys()
            assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_only_equal_layers_are_stacked(context):
    base = PackedLinear.from_simulated(simulated(24, 5, "w4a8", context), "reference")
    other = ModalityContext()
    different = [
        simulated(24, 5, "w4a6", context),
        simulated(24, 5, "w8a8", context),
        simulated(24, 5, "w4a8", context, smoothing=None),
        simulated(24, 5, "w4a8", context, smoothing={TEXT: rand(24).exp()}),
        simulated(24, 5, "w4a8", other),
        simulated(48, 5, "w4a8", context),
    ]
    for layer in different:
        assert not can_stack(base, PackedLinear.from_simulated(layer, "reference"))
    assert not can_stack(base, PackedLinear.from_simulated(simulated(24, 9, "w4a8", context), "torch"))
    assert can_stack(base, PackedLinear.from_simulated(simulated(24, 9, "w4a8", context, seed=4), "reference"))


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_is_plain_whoever_holds_the_weight(scheme, kernel, context):
    layers = [simulated(24, rows, scheme, context, seed=rows, dtype=torch.bfloat16) for rows in (6, 3)]
    before = [PackedLinear.from_simulated(layer, kernel).state_dict() for layer in layers]
    packed = [PackedLinear.from_simulated(layer, kernel) for layer in layers]
    stack(packed)
    x = rand(*IDS.shape, 24)
    wanted = [layer(x) for layer in packed]
    assert packed[0].codes is None
    for layer, plain in zip(packed, before, strict=True):
        found = layer.state_dict()
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)
        assert all(found[name].dtype == plain[name].dtype for name in plain)
    # Equal tensors of two layers share no memory: a file keeps one of those that do.
    states = [layer.state_dict() for layer in packed]
    places = [{tensor.untyped_storage().data_ptr() for tensor in state.values()} for state in states]
    assert not places[0] & places[1]
    # Moved and cast, a layer is whole again, and scales and factors keep their precision.
    for layer in packed:
        layer.to(torch.bfloat16)
    assert packed[0].scale.dtype == torch.float32
    assert packed[1].inverse_smoothing.dtype == torch.float32
    for layer, plain in zip(packed, before, strict=True):
        assert all(torch.equal(layer.state_dict()[name], plain[name]) for name in ("codes", "scale"))
    for found, w in zip(packed, wanted, strict=True):
        torch.testing.assert_close(found(x), w, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_loaded_state_replaces_what_a_kernel_holds(kernel, context):
    one, two = (PackedLinear.from_simulated(simulated(24, 6, "w4a8", context, seed=seed), kernel) for seed in (1, 2))
    x = rand(*IDS.shape, 24)
    wanted = two(x)
    assert not torch.equal(one(x), wanted)
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(x), wanted)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a6", "w4a16"])
@pytest.mark.parametrize("factors", [torch.float32, torch.int8])
def test_empty_layers_are_filled_by_name(scheme, factors, context):
    changes = {"corrections": codes_of(24, 6)} if factors == torch.int8 else {}
    layer = simulated(24, 6, scheme, context, dtype=torch.bfloat16, **changes)
    packed = PackedLinear.from_simulated(layer, "reference")
    fmt = LinearFormat(layer.weight_format, layer.activation)
    with torch.device("meta"):
        empty = PackedLinear.empty(
            24,
            6,
            fmt,
            context=context,
            bias=torch.bfloat16,
            num_rows=(3, 0),
            ranks={m: (3, factors) for m in (VISION, AUDIO)},
            kernel="reference",
        )
    state = packed.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in state.items()
    }
    empty.load_state_dict(state, assign=True)
    x = rand(*IDS.shape, 24)
    assert torch.equal(empty(x), packed(x))


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_copies_are_independent(kernel, context):
    packed = [PackedLinear.from_simulated(simulated(24, 6, "w4a8", context, seed=seed), kernel) for seed in (1, 2)]
    stack(packed)
    both = nn.ModuleList(packed)
    x = rand(*IDS.shape, 24)
    wanted = [layer(x) for layer in both]
    twin = copy.deepcopy(both)
    twin[0].context.set(IDS)
    assert twin[0].stack is twin[1].stack
    assert twin[0].stack is not packed[0].stack
    for layer, w in zip(twin, wanted, strict=True):
        assert torch.equal(layer(x), w)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_all_text_never_touches_an_adapter(kernel, context, monkeypatch):
    packed = PackedLinear.from_simulated(simulated(24, 6, "w4a8", context), kernel)
    bare = PackedLinear.from_simulated(simulated(24, 6, "w4a8", context, corrections=None), kernel)
    context.set(torch.zeros_like(IDS))
    monkeypatch.setattr(type(packed.stack), "_up", lambda *_: pytest.fail("an adapter was read"))
    x = rand(*IDS.shape, 24)
    assert torch.equal(packed(x), bare(x))


def test_memory_is_what_is_stored(context):
    """Packed codes, and the kernel keeps nothing besides its own layout."""
    layers = [simulated(128, rows, "w4a8", context, seed=rows) for rows in (64, 32)]
    packed = [PackedLinear.from_simulated(layer, "reference") for layer in layers]
    stack(packed)
    codes, scales = 96 * 128 // 2, 4 * 96
    smoothing, bias = 3 * 128 * 4 + 3 * 8, 4 * 96
    adapters = 2 * 4 * (128 * 3 * 2 + 3 * 96)
    assert packed[0].stack.num_bytes == codes + scales + smoothing + bias + adapters
    assert packed[0].codes is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_coded_corrections(dtype, context):
    """A byte a code and a float32 scale a component, in a float32 model, and where a kernel multiplies them itself."""
    layers = [simulated(128, rows, "w4a8", context, corrections=codes_of(128, rows, 32)) for rows in (64, 32)]
    bare = [simulated(128, rows, "w4a8", context, corrections=None) for rows in (64, 32)]
    sizes = []
    for group in (layers, bare):
        packed = [PackedLinear.from_simulated(layer) for layer in group]
        stack(packed)
        packed[0](rand(*IDS.shape, 128).to(dtype))
        sizes.append(packed[0].stack.num_bytes)
    assert sizes[0] - sizes[1] == 2 * (128 * 64 + 32 * 96 + 4 * 64)


def test_refusals(context):
    fmt = Scheme.preset("w4a8").weight
    weights = {m: quantize(rand(6, 24, seed=int(m)), fmt) for m in (TEXT, VISION)}
    with pytest.raises(MasqError, match="one weight for all modalities"):
        PackedLinear.from_simulated(simulated(24, 6, "w4a8", context, weights=weights, corrections=None))
    with pytest.raises(ConfigError, match="Did you mean"):
        PackedLinear.from_simulated(simulated(24, 6, "w4a8", context), "refrence")(rand(*IDS.shape, 24))
    packed = PackedLinear.from_simulated(simulated(24, 6, "w4a8", context), "reference")
    context.clear()
    with pytest.raises(MasqError, match="modality"):
        packed(rand(*IDS.shape, 24))


def centres(d_in: int, d_out: int, modalities: tuple[Modality, ...] = (TEXT, VISION), *, seed: int = 0) -> Centres:
    """Centres of the group are shared, biases are the linear's own."""
    points = {m: 3 * rand(d_in, seed=200 + int(m)).to(STORED) for m in modalities}
    return Centres.of(points, {m: rand(d_out, seed=300 + seed + int(m)) for m in modalities})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modalities", [(TEXT,), (TEXT, VISION), (TEXT, VISION, AUDIO)])
def test_centred_rows_equal_the_simulation(scheme, dtype, modalities, context):
    layer = simulated(48, 33, scheme, context, dtype=dtype, bias=centres(48, 33, modalities))
    packed = PackedLinear.from_simulated(layer, "reference")
    x = 3 * rand(*IDS.shape, 48, seed=9).to(dtype)
    assert torch.equal(packed(x), layer(x))
    context.set(torch.zeros_like(IDS))
    difference = (packed(x).float() - layer(x).float()).abs().max()
    assert float(difference) <= (1e-5 if dtype == torch.float32 else 0.06) * float(layer(x).abs().max())


def test_centres_survive_their_state_a_cast_and_a_stack(context):
    layers = [simulated(48, out, "w4a8", context, seed=out, bias=centres(48, out, seed=out)) for out in (5, 9)]
    x = 3 * rand(*IDS.shape, 48, seed=9)
    expected = [layer(x) for layer in layers]
    packed = [PackedLinear.from_simulated(layer, "reference") for layer in layers]
    stack(packed)
    assert packed[0].stack is packed[1].stack
    assert all(torch.equal(one(x), wanted) for one, wanted in zip(packed, expected, strict=True))
    again = QuantLinear.from_state(
        layers[0].state_dict(), weight=layers[0].weight_format, activation=layers[0].activation, context=context,
        dtype=torch.float32,
    )  # fmt: skip
    assert torch.equal(again(x), expected[0])
    states = [one.state_dict() for one in packed]
    assert states[1]["centre"].data_ptr() != states[0]["centre"].data_ptr()
    assert all(torch.equal(states[0][key], value) for key, value in layers[0].state_dict().items() if "centre" in key)
    cast = packed[0].to(torch.float16)
    assert cast.centre is not None
    assert cast.centre.dtype == STORED
    other = PackedLinear.from_simulated(simulated(48, 9, "w4a8", context), "reference")
    assert not can_stack(packed[0], other)
