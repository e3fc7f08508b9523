"""The walk over the blocks: every method, its laws, its stores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from masq.calibration.replay import ReplayBatch, advance, collect
from masq.compensation.config import WhitenedLowRank
from masq.errors import DataError, NumericalError
from masq.models.base import GROUPS, Modality, Role
from masq.modules.footprint import footprint
from masq.modules.quant_linear import QuantLinear
from masq.numerics.scheme import Scheme, TensorFormat
from masq.numerics.sqnr import token_sqnr
from masq.pipeline import loop
from masq.pipeline.store import ALL_ROLES, BlockStore, block_tensors
from masq.rounding.config import GptqRounding
from masq.transforms.config import (
    LearnedModalitySmoothing,
    LearnedSharedSmoothing,
    ModalitySmoothing,
    NoSmoothing,
    SharedSmoothing,
)
from masq.transforms.stages import SmoothingPlan, apply_folds, fit_shared
from tests.nano_fixtures import METHODS, Nano, killed_after, make_nano, nano_model, stages  # noqa: F401

FAST = {"smoothing": LearnedModalitySmoothing(epochs=1)}


def quantize(nano: Nano, folder: Path, method: str, scheme: str | Scheme = "w4a6", **changes):
    """Run the pipeline with stores under ``folder``."""
    if method in ("mas", "masquant"):
        changes = {**FAST, **changes}
    stores = {"blocks": BlockStore(folder / "blocks"), "factors": BlockStore(folder / "factors")}
    return loop.quantize(nano.adapter, nano.batches, stages(method, scheme, **changes), nano.context, **stores)


def state(nano: Nano) -> dict[str, torch.Tensor]:
    """Every tensor of the decoder blocks."""
    return {
        f"{index}.{key}": value.clone()
        for index, block in enumerate(nano.adapter.blocks())
        for key, value in block_tensors(block).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method(nano_model: Nano, tmp_path: Path, method: str) -> None:  # noqa: F811
    report = quantize(nano_model, tmp_path, method)
    assert [block["index"] for block in report.blocks] == [0, 1, 2]
    for block in report.blocks:
        assert set(block["sqnr"]) == {"text", "vision", "audio"}
        assert all(0 < value < 60 for value in block["sqnr"].values())
    for block in nano_model.adapter.blocks():
        for role in ALL_ROLES:
            layer = block.linear(role)
            assert isinstance(layer, QuantLinear)
            assert bool(layer.correction_modalities) == (method in ("masquant", "qera") and role is not Role.DOWN)
        assert not block.module._forward_hooks
        assert not block.module._forward_pre_hooks


@pytest.mark.parametrize("method", ["smoothquant", "masquant"])
def test_more_bits_are_better(tmp_path: Path, method: str) -> None:
    sqnr = {}
    for scheme in ("w8a8", "w4a8", "w4a4"):
        blocks = quantize(make_nano(num_samples=2), tmp_path / scheme, method, scheme).blocks
        sqnr[scheme] = blocks[-1]["sqnr"]
    for modality in ("text", "vision", "audio"):
        assert sqnr["w8a8"][modality] > sqnr["w4a8"][modality] > sqnr["w4a4"][modality]


def test_corrections_help_the_other_modalities(tmp_path: Path) -> None:
    """At 4-bit weights and float activations only the weight error is left, and the correction works on that."""
    scheme = Scheme("w4", Scheme.preset("w4a8").weight, None)
    none = quantize(make_nano(), tmp_path / "none", "smoothquant", scheme, smoothing=SharedSmoothing(source="text"))
    low = quantize(make_nano(), tmp_path / "low", "qera", scheme)
    rank = WhitenedLowRank(rank_ratio=1.0, damping=1e-9, dtype="float32")
    full = quantize(make_nano(), tmp_path / "full", "qera", scheme, compensation=rank)
    first = [report.blocks[0]["sqnr"] for report in (none, low, full)]
    for modality in ("vision", "audio"):
        assert first[0][modality] < first[1][modality] < first[2][modality]
    assert first[0]["text"] == pytest.approx(first[2]["text"], abs=3.0)


def test_full_rank_leaves_only_down(tmp_path: Path) -> None:
    """Full rank and float activations: vision and audio rows are exact in every corrected linear."""
    scheme = Scheme("w4", Scheme.preset("w4a8").weight, None, roles=("gate", "up"))
    nano = make_nano()
    report = quantize(
        nano, tmp_path, "masquant", scheme, compensation=WhitenedLowRank(rank_ratio=1.0, damping=1e-9, dtype="float32")
    )
    # Attention stays float here, so the error of text cannot leak into the first block's other rows.
    assert report.blocks[0]["sqnr"]["text"] < 40
    assert report.blocks[0]["sqnr"]["vision"] > 80
    assert report.blocks[0]["sqnr"]["audio"] > 80


@pytest.mark.parametrize("groups", [("qkv",), ("output",), ("gate_up",), ("qkv", "output", "gate_up")])
def test_folding_is_exact_in_float64(nano_model: Nano, groups: tuple[str, ...]) -> None:  # noqa: F811
    block = nano_model.adapter.blocks()[1]
    block.module.double()
    replay = nano_model.replay[2]
    kwargs = {k: tuple(t.double() for t in v) if k == "position_embeddings" else v for k, v in replay.kwargs.items()}
    hidden = nano_model.hidden[2].double()
    forward = torch.no_grad()(block.forward)
    before = forward(hidden, kwargs)
    config = SharedSmoothing(groups=groups)
    plan = fit_shared(block, collect(block, [hidden], [ReplayBatch(kwargs, replay.modality)]), config)
    assert plan.folded == set(groups)
    apply_folds(block, plan)
    changed = forward(hidden, kwargs)
    assert float((changed - before).abs().max()) > 1e-3
    for group in groups:
        for role in GROUPS[group]:
            block.linear(role).weight.data.mul_(plan.factors[group][Modality.TEXT].double())
    torch.testing.assert_close(forward(hidden, kwargs), before, rtol=1e-12, atol=1e-12)


def test_folded_equals_run_time_smoothing(tmp_path: Path) -> None:
    """Folding only moves the division; with qkv alone nothing is tied, so both ways agree to rounding ties."""
    nanos = make_nano(), make_nano()
    for nano, fold in zip(nanos, (True, False), strict=True):
        quantize(
            nano, tmp_path / str(fold), "smoothquant", "w8a8", smoothing=SharedSmoothing(fold=fold, groups=("qkv",))
        )
    a, b = (n.adapter.blocks()[0] for n in nanos)
    assert torch.equal(a.linear(Role.QUERY).codes_text, b.linear(Role.QUERY).codes_text)
    assert a.linear(Role.QUERY).inverse_smoothing is None
    assert b.linear(Role.QUERY).inverse_smoothing is not None
    outputs = []
    for nano in nanos:
        nano.context.set(nano.replay[0].modality)
        outputs.append(advance(nano.adapter.blocks()[0], nano.hidden[0], nano.replay[0], "block 0"))
    mask = nanos[0].replay[0].modality >= 0
    assert float(token_sqnr(outputs[0][mask], outputs[1][mask]).mean()) > 45


def test_text_only_masquant_is_mas(tmp_path: Path) -> None:
    """With one modality the single weight is the per-modality weight and nothing is left to correct."""
    results = []
    for method in ("mas", "masquant"):
        nano = make_nano(kinds=((),))
        quantize(nano, tmp_path / "shared", method, compensation=stages(method).compensation)
        results.append(state(nano))
        (tmp_path / "shared" / "blocks").rename(tmp_path / method)
    assert same(*results)


def test_text_only_masquant_is_learned_smoothquant(tmp_path: Path) -> None:
    """With one modality, modality-aware smoothing is learned shared smoothing."""
    results = []
    for smoothing in (LearnedModalitySmoothing(epochs=2), LearnedSharedSmoothing(epochs=2)):
        nano = make_nano(kinds=((),))
        quantize(nano, tmp_path / smoothing.kind, "masquant", smoothing=smoothing)
        results.append(state(nano))
    assert same(*results)


def test_learned_shared_smoothing_is_one_factor_that_lowers_the_loss(tmp_path: Path) -> None:
    nano = make_nano()
    report = quantize(nano, tmp_path, "rtn", smoothing=LearnedSharedSmoothing(epochs=3))
    assert all(block["final_loss"] < block["initial_loss"] for block in report.blocks)
    table = nano.adapter.blocks()[0].linear(Role.QUERY).inverse_smoothing
    assert len(table) == 1
    modality_aware = quantize(make_nano(), tmp_path / "mas", "mas", smoothing=LearnedModalitySmoothing(epochs=3))
    assert modality_aware.blocks[0]["final_loss"] < report.blocks[0]["final_loss"]


def test_mas_and_masquant_share_factors(tmp_path: Path) -> None:
    quantize(make_nano(), tmp_path, "mas")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "factors").iterdir()}
    (tmp_path / "blocks").rename(tmp_path / "mas")
    nano = make_nano()
    quantize(nano, tmp_path, "masquant")
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "factors").iterdir()}
    layer = nano.adapter.blocks()[1].linear(Role.QUERY)
    stored = BlockStore(tmp_path / "factors").load(1)
    assert stored is not None
    torch.testing.assert_close(layer.inverse_smoothing[1].reciprocal().log(), stored[0]["qkv.vision"])


# smoothquant saves three blocks; masquant the factors of three blocks, then the blocks.
@pytest.mark.parametrize(
    ("method", "after"), [("smoothquant", 1), ("smoothquant", 2), *(("masquant", n) for n in (1, 2, 4, 5))]
)
def test_resume_is_bit_identical(tmp_path: Path, method: str, after: int) -> None:
    undisturbed = make_nano()
    expected = quantize(undisturbed, tmp_path / "a", method)
    with killed_after(after):
        quantize(make_nano(), tmp_path / "b", method)
    resumed = make_nano()
    report = quantize(resumed, tmp_path / "b", method)
    assert same(state(resumed), state(undisturbed))
    assert report.blocks == expected.blocks


def test_damaged_block_is_an_error(tmp_path: Path) -> None:
    quantize(make_nano(), tmp_path, "rtn")
    path = BlockStore(tmp_path / "blocks").path(1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="block-001"):
        quantize(make_nano(), tmp_path, "rtn")


def test_flipped_bit_is_an_error(tmp_path: Path) -> None:
    quantize(make_nano(), tmp_path, "rtn")
    path = BlockStore(tmp_path / "blocks").path(1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="block-001"):
        quantize(make_nano(), tmp_path, "rtn")


def test_corrections_are_qera_of_each_modality(tmp_path: Path) -> None:
    """Without smoothing, the walk stores QERA-exact (arXiv 2410.06040, theorem 1) of each modality's own tokens."""
    nano = make_nano()
    block = nano.adapter.blocks()[0]
    weight, inputs = block.linear(Role.GATE).weight.detach().double(), []
    handle = block.linear(Role.GATE).register_forward_pre_hook(lambda _m, args: inputs.append(args[0].double()))
    nano.targets()
    handle.remove()
    quantize(
        nano,
        tmp_path,
        "qera",
        smoothing=NoSmoothing(),
        compensation=WhitenedLowRank(rank_ratio=None, rank=5, damping=1e-10, dtype="float32"),
    )
    layer = block.linear(Role.GATE)
    error = weight - layer.codes_text.double() * layer.scale_text.double()

    for modality in (Modality.VISION, Modality.AUDIO):
        rows = torch.cat([x[b.modality == modality] for x, b in zip(inputs, nano.replay, strict=True)])
        _, singular, basis = torch.linalg.svd(rows / len(rows) ** 0.5, full_matrices=False)
        root = basis.t() @ torch.diag(singular) @ basis
        u, s, vh = torch.linalg.svd(root @ error.t(), full_matrices=False)
        expected = torch.linalg.pinv(root) @ u[:, :5] @ torch.diag(s[:5]) @ vh[:5]
        name = modality.name.lower()
        found = getattr(layer, f"left_{name}").double() @ getattr(layer, f"right_{name}").double()
        # Compared where the modality lives: beyond the span of its tokens a correction is free.
        torch.testing.assert_close(rows @ found, rows @ expected, rtol=1e-3, atol=1e-4)


def test_overflow_names_the_block(tmp_path: Path) -> None:
    nano = make_nano()
    norm = nano.adapter.blocks()[1].norm("qkv")
    norm.weight.data.fill_(float("inf"))
    with pytest.raises(NumericalError, match="block 1"):
        quantize(nano, tmp_path, "smoothquant")


def test_nan_names_the_linear_and_keeps_finished_blocks(tmp_path: Path) -> None:
    nano = make_nano()
    nano.adapter.blocks()[1].linear(Role.UP).weight.data[3, 4] = float("nan")
    with pytest.raises(NumericalError, match="block 1"):
        quantize(nano, tmp_path, "rtn")
    assert BlockStore(tmp_path / "blocks").load(0) is not None
    assert BlockStore(tmp_path / "blocks").load(1) is None


def test_roles_left_in_float(tmp_path: Path) -> None:
    """A role outside the scheme keeps its function, folded factors included."""
    scheme = Scheme(
        "w8a8_some", Scheme.preset("w8a8").weight, Scheme.preset("w8a8").activation, roles=("query", "gate", "down")
    )
    nano = make_nano()
    report = quantize(nano, tmp_path, "smoothquant", scheme)
    assert isinstance(nano.adapter.blocks()[0].linear(Role.UP), torch.nn.Linear)
    assert report.blocks[0]["sqnr"]["text"] > 25


def test_decoding_uses_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nano = make_nano(kinds=(("vision", "audio"),))
    quantize(nano, tmp_path, "masquant")
    calls: list[int] = []
    lengths: list[int] = []
    real = QuantLinear.low_rank
    monkeypatch.setattr(QuantLinear, "low_rank", lambda self, rows, m: calls.append(lengths[-1]) or real(self, rows, m))
    nano.adapter.blocks()[0].linear(Role.QUERY).register_forward_pre_hook(
        lambda _m, args: lengths.append(args[0].shape[1])
    )
    nano.adapter.generate(nano.adapter.encode(nano.samples[0], with_answer=False), 4)
    assert len(lengths) > 1
    assert set(lengths[1:]) == {1}
    assert calls
    assert 1 not in calls


def test_float_activations_behind_the_corrections(tmp_path: Path) -> None:
    """The option changes the fit of every block but the first, whose inputs are the same in both chains."""
    states = {}
    for activations in ("quantized", "float"):
        nano = make_nano()
        config = WhitenedLowRank(rank_ratio=0.1, activations=activations)
        quantize(nano, tmp_path / activations, "qera", compensation=config)
        states[activations] = state(nano)
    pairs = {key: (states["quantized"][key], states["float"][key]) for key in states["float"] if "left_audio" in key}
    assert torch.equal(*pairs["0.query.left_audio"])
    assert not torch.equal(*pairs["2.query.left_audio"])


def test_missing_modality_is_a_warning(tmp_path: Path) -> None:
    report = quantize(make_nano(kinds=(("vision",), ())), tmp_path, "masquant")
    assert any("audio" in warning for warning in report.warnings)


def test_empty_plan_folds_nothing(nano_model: Nano) -> None:  # noqa: F811
    before = state(nano_model)
    apply_folds(nano_model.adapter.blocks()[0], SmoothingPlan())
    assert same(before, state(nano_model))


def test_corrections_are_stored_in_16_bits_whatever_the_model_is(tmp_path: Path) -> None:
    outputs, bits = [], []
    for dtype in ("bfloat16", "float32"):
        nano = make_nano()
        report = quantize(nano, tmp_path / dtype, "qera", compensation=WhitenedLowRank(rank_ratio=0.3, dtype=dtype))
        assert nano.adapter.blocks()[0].linear(Role.QUERY).left_vision.dtype == getattr(torch, dtype)
        outputs.append(report.blocks[0]["sqnr"]["vision"])
        bits.append(footprint(nano.adapter.blocks()).adapters)
    assert bits[1] == 2 * bits[0]
    assert outputs[0] == pytest.approx(outputs[1], abs=0.2)


def test_coded_corrections_are_nearly_as_good_for_half_the_bits(tmp_path: Path) -> None:
    """Counted by the byte; the record says what codes capture; a finished walk gives the same layers back."""
    found, notes, adapters = {}, {}, {}
    for dtype in ("bfloat16", "int8"):
        nano = make_nano()
        changes = {"compensation": WhitenedLowRank(rank_ratio=0.3, dtype=dtype)}
        report = quantize(nano, tmp_path / dtype, "qera", **changes)
        found[dtype], notes[dtype] = state(nano), report.blocks
        adapters[dtype] = footprint(nano.adapter.blocks()).adapters
        layer = nano.adapter.blocks()[0].linear(Role.QUERY)
        assert layer.left_vision.dtype == layer.right_audio.dtype == getattr(torch, dtype)
        again = make_nano()
        quantize(again, tmp_path / dtype, "qera", **changes)
        assert same(state(again), found[dtype])
    scales = [name for name in found["int8"] if ".factor_scale_" in name]
    assert scales
    assert not [name for name in found["bfloat16"] if ".factor_scale_" in name]
    assert adapters["int8"] == adapters["bfloat16"] // 2 + 32 * sum(found["int8"][name].numel() for name in scales)
    for modality in ("vision", "audio"):
        sixteen, eight = (notes[dtype][0]["captured"][modality] for dtype in ("bfloat16", "int8"))
        assert 0 < sixteen - eight < 0.02
        sqnr = [notes[dtype][0]["sqnr"][modality] for dtype in ("bfloat16", "int8")]
        assert sqnr[0] == pytest.approx(sqnr[1], abs=0.3)


def test_rank_zero_has_no_codes(tmp_path: Path) -> None:
    nano = make_nano()
    quantize(nano, tmp_path, "qera", compensation=WhitenedLowRank(rank_ratio=None, rank=0, dtype="int8"))
    assert footprint(nano.adapter.blocks()).adapters == 0


def test_gptq_lowers_its_error_and_the_chain_s(tmp_path: Path) -> None:
    """At 3-bit weights alone, on calibration tokens: less error in every block than rounding to nearest."""
    scheme = Scheme("w3", TensorFormat(3), None)
    nearest = quantize(make_nano(num_samples=6), tmp_path / "rtn", "rtn", scheme)
    rounded = quantize(make_nano(num_samples=6), tmp_path / "gptq", "rtn", scheme, rounding=GptqRounding())
    for plain, better in zip(nearest.blocks, rounded.blocks, strict=True):
        assert better["rounding_gain"] < 1
        assert better["rounding_fallbacks"] == {}
        assert {role: one["damping"] for role, one in better["rounding"].items()} == dict.fromkeys(ALL_ROLES, 0.01)
        assert sum(better["sqnr"].values()) > sum(plain["sqnr"].values())
    assert rounded.warnings == []


def test_what_gptq_could_not_do_is_in_the_record(tmp_path: Path) -> None:
    """A channel that is always silent, and an input that is: named by block, role and number, and warned about."""
    nano = make_nano()
    nano.adapter.blocks()[1].norm("qkv").weight.data[5] = 0
    nano.adapter.blocks()[2].norm("gate_up").weight.data.zero_()
    report = quantize(nano, tmp_path, "rtn", "w4a8", rounding=GptqRounding())
    assert report.blocks[1]["rounding"]["query"]["dead_channels"] == 1
    for role in ("gate", "up", "down"):
        assert report.blocks[2]["rounding"][role]["fallback"] == "rounded to nearest, singular Hessian"
        assert f"block 2.{role}: rounded to nearest, singular Hessian" in report.warnings
    assert "block 1.key: 1 input channels never active, rounded to nearest" in report.warnings


def test_gptq_combines_with_smoothing_and_corrections(tmp_path: Path) -> None:
    """The Hessian is that of the smoothed rows, so corrections have less left to do and every slot still acts."""
    nano = make_nano(num_samples=6)
    report = quantize(nano, tmp_path, "masquant", rounding=GptqRounding(tokens="text"))
    layer = nano.adapter.blocks()[0].linear(Role.QUERY)
    assert layer.correction_modalities == (Modality.VISION, Modality.AUDIO)
    assert all(set(block) >= {"captured", "rounding_gain", "initial_loss"} for block in report.blocks)


def test_the_gauge_of_corrections_spares_their_rank(tmp_path: Path) -> None:
    """Learned factors of wildly different scale: brought to text's, the weight error to correct shrinks."""
    shares = {}
    for gauge in ("given", "text"):
        config = WhitenedLowRank(rank_ratio=0.1, gauge=gauge)
        quantize(make_nano(), tmp_path / gauge, "masquant", compensation=config, smoothing=ModalitySmoothing())
        shares[gauge] = BlockStore(tmp_path / gauge / "blocks").load(0)
    assert shares["given"] is not None and shares["text"] is not None
    same_codes = [torch.equal(shares["given"][0][k], shares["text"][0][k]) for k in shares["text"][0] if "codes" in k]
    assert all(same_codes), "the stored weight is that of text in either gauge"
    table = [s[0]["query.inverse_smoothing"] for s in shares.values()]
    ratio = table[1] / table[0]
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5, atol=0)
    assert torch.equal(table[0][0], table[1][0])
