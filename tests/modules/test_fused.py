"""Blocks whose norms and gates are computed in the pass that quantizes what they feed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masq import kernels
from masq.errors import ConfigError, ModelError
from masq.export import checkpoint
from masq.finished import load_finished
from masq.kernels.base import Kernel
from masq.kernels.build import BuildError
from masq.kernels.cpu import best_isa
from masq.models.base import ModelAdapter, Role
from masq.models.zoo import nano
from masq.modules.fused import _is_rms_norm, fuse_blocks
from masq.modules.packed_linear import PackedLinear
from masq.numerics.scheme import Scheme
from masq.run import run
from tests.test_run import METHODS, config, splits  # noqa: F401

NUM_BLOCKS = 3
MEDIA = {"all": ("vision", "audio"), "vision": ("vision",), "text": ()}
CENTRED = {"centring": {"kind": "modality"}, "smoothing": {"kind": "modality"}}


@pytest.fixture(params=["reference", "cpu"])
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        try:
            best_isa()
        except BuildError as error:
            pytest.skip(str(error))
    return request.param


def packed(splits, root: Path, kernel: str, method: str = "masquant", **changes: Any) -> ModelAdapter:  # noqa: F811
    """A packed nano_omni."""
    evaluation = {"score": False, "samples_per_task": 1, "source": str(splits["evaluation"])}
    given = {"evaluation": evaluation, "execution": "packed", "kernel": kernel} | changes
    record = run(config(splits, root, method, **given))
    return load_finished(next(root.glob(f"*-{record.identity[:10]}")))


class NearlySilu(torch.nn.Module):
    """Another gate of its kind."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.05 * x)


def logits(adapter: ModelAdapter, media: tuple[str, ...]) -> torch.Tensor:
    batch = adapter.encode(nano.random_samples(media, 3), with_answer=False)
    with torch.no_grad():
        return adapter.model(**batch.inputs).logits[batch.modality >= 0]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("method", ["rtn", "masquant", "smoothquant"])
def test_the_same_numbers_but_for_rounding(splits, tmp_path, kernel, method):  # noqa: F811
    adapter = packed(splits, tmp_path, kernel, method)
    wanted = {name: logits(adapter, media) for name, media in MEDIA.items()}
    assert fuse_blocks(adapter.blocks()) == NUM_BLOCKS * 3
    for name, media in MEDIA.items():
        # In float32 a code moves only where a value lay within rounding of the middle of two.
        assert distance(logits(adapter, media), wanted[name]) < 2e-3


def test_centres_are_subtracted(splits, tmp_path, kernel, monkeypatch):  # noqa: F811
    monkeypatch.setitem(METHODS, "centred", CENTRED)
    adapter = packed(splits, tmp_path, kernel, "centred")
    assert any(adapter.blocks()[0].linear(role).centre is not None for role in Role)
    wanted = logits(adapter, MEDIA["all"])
    assert fuse_blocks(adapter.blocks()) == NUM_BLOCKS * 3
    assert distance(logits(adapter, MEDIA["all"]), wanted) < 2e-3


def test_only_the_output_of_attention_is_quantized_by_itself(splits, tmp_path, kernel, monkeypatch):  # noqa: F811
    """Norms and gates hand over codes, and the rows that corrections read."""
    adapter, plain, taken = packed(splits, tmp_path, kernel), [], []
    used = type(adapter.blocks()[0].linear(Role.QUERY).stack.prepare().kernel)
    real, normed = used.quantize, used.quantize_norm

    def counted(self: Kernel, x: torch.Tensor, *rest: Any) -> Any:
        plain.append(x.shape[1])
        return real(self, x, *rest)

    def seen(self: Kernel, *given: Any) -> Any:
        made = normed(self, *given)
        taken.append(made.taken is not None)
        return made

    wanted = {name: logits(adapter, media) for name, media in MEDIA.items()}
    fuse_blocks(adapter.blocks())
    monkeypatch.setattr(used, "quantize", counted)
    monkeypatch.setattr(used, "quantize_norm", seen)
    for name, media in MEDIA.items():
        plain.clear(), taken.clear()
        assert distance(logits(adapter, media), wanted[name]) < 2e-3
        assert len(plain) == NUM_BLOCKS
        assert taken == [bool(media)] * NUM_BLOCKS * 2


def test_a_model_in_sixteen_bits(splits, tmp_path, kernel):  # noqa: F811
    """As near to the float32 model with the same stored weights; see ``test_fused_rows`` for what is not rounded."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = config(splits, tmp_path, "rtn").model
        own = {"name": "nano_omni", "family": model.family, "source": model.source, "modalities": [*model.modalities]}
        adapter = packed(splits, tmp_path / dtype, kernel, "rtn", model={**own, "dtype": dtype})
        found[dtype] = logits(adapter, MEDIA["all"]).float()
        fuse_blocks(adapter.blocks())
        found[f"{dtype} fused"] = logits(adapter, MEDIA["all"]).float()
    plain, fused = (distance(found[name], found["float32"]) for name in ("bfloat16", "bfloat16 fused"))
    assert distance(found["float32 fused"], found["float32"]) < 2e-3
    assert distance(found["bfloat16 fused"], found["bfloat16"]) > 1e-3
    assert fused < 1.1 * plain


def test_what_stands_between_is_left_alone(splits, tmp_path):  # noqa: F811
    """A rotation before ``down``, inputs in float, a kernel without such a pass."""
    adapter = packed(splits, tmp_path, "reference", "quarot_gptq")
    wanted = logits(adapter, MEDIA["all"])
    assert fuse_blocks(adapter.blocks()) == NUM_BLOCKS * 2
    assert distance(logits(adapter, MEDIA["all"]), wanted) < 2e-3
    adapter = packed(splits, tmp_path, "torch", "rtn")
    assert fuse_blocks(adapter.blocks()) == 0
    scheme = replace(Scheme.preset("w4a8"), name="w4", activation=None)
    floats = replace(config(splits, tmp_path, execution="packed", kernel="reference"), scheme=scheme)
    record = run(floats)
    adapter = load_finished(next(tmp_path.glob(f"*-{record.identity[:10]}")))
    assert fuse_blocks(adapter.blocks()) == 0


def test_only_what_is_rmsnorm_and_silu(splits, tmp_path):  # noqa: F811
    adapter = packed(splits, tmp_path, "reference", "rtn")
    [first, second, third] = adapter.blocks()
    first.gated()[0].act_fn = torch.nn.GELU()
    third.gated()[0].act_fn = NearlySilu()

    class Offset(type(second.norm("qkv"))):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + 1 / self.weight)

    second.norm("qkv").__class__ = Offset
    third.norm("gate_up").register_parameter("bias", torch.nn.Parameter(torch.ones(len(third.norm("qkv").weight))))
    wanted = logits(adapter, MEDIA["all"])
    assert [fuse_blocks([block]) for block in adapter.blocks()] == [2, 2, 1]
    assert distance(logits(adapter, MEDIA["all"]), wanted) < 2e-3


def test_a_model_that_no_kernel_fuses_any_longer(splits, tmp_path, monkeypatch):  # noqa: F811
    """Asked anew in every call: after a move the norm computes for itself."""
    adapter = packed(splits, tmp_path, "reference", "rtn")
    wanted = logits(adapter, MEDIA["all"])
    fuse_blocks(adapter.blocks())
    for module in adapter.model.modules():
        if isinstance(module, PackedLinear):
            module.stack.release()
            module.kernel = "torch"
    monkeypatch.setattr(kernels.KERNELS.get("torch"), "quantize_norm", lambda *_: pytest.fail("asked to fuse"))
    assert distance(logits(adapter, MEDIA["all"]), wanted) < 1e-5


@pytest.mark.parametrize("width", [48, 256, 3584])
def test_a_norm_that_takes_the_mean_away_is_another(width):
    norm = torch.nn.LayerNorm(width, bias=False)
    assert not _is_rms_norm(norm, norm.eps)
    assert _is_rms_norm(torch.nn.RMSNorm(width, eps=1e-6).bfloat16(), 1e-6)


def test_rows_of_a_norm_are_read_once(splits, tmp_path, kernel):  # noqa: F811
    adapter = packed(splits, tmp_path, kernel, "rtn")
    block = adapter.blocks()[0]
    fuse_blocks([block])
    query: Any = block.linear(Role.QUERY)
    query.context.set(torch.zeros(1, 5, dtype=torch.int8))
    x = torch.randn(1, 5, query.in_features)
    rows = block.norm("qkv")(x)
    wanted = query(torch.nn.functional.rms_norm(x, x.shape[-1:], block.norm("qkv").weight, 1e-6))
    rows = block.norm("qkv")(x)
    assert distance(query(rows), wanted) < 1e-2
    with pytest.raises(ModelError, match="rows that a norm has quantized are read once"):
        query(rows)


def test_where_nothing_can_be_fused_the_record_says_so(splits, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("masq.modules.stack.select", lambda *_: kernels.KERNELS.get("torch")())
    record = run(config(splits, tmp_path, "rtn", execution="fused"))
    assert "execution=fused: nothing could be fused on kernel torch" in record.warnings
    adapter = load_finished(next(tmp_path.glob(f"*-{record.identity[:10]}")))
    checkpoint.save(adapter, tmp_path / "out", {})
    with pytest.raises(ModelError, match="a model to be fused needs integer activations and a kernel"):
        checkpoint.load(tmp_path / "out", fused=True)


def test_copies_are_independent(splits, tmp_path):  # noqa: F811
    adapter = packed(splits, tmp_path, "reference", "rtn")
    fuse_blocks(adapter.blocks())
    block, twin = adapter.blocks()[0], copy.deepcopy(adapter.blocks()[0].module)
    assert list(twin.state_dict()) == list(block.module.state_dict())
    calls = twin.input_layernorm.forward, twin.mlp.forward
    assert calls[0].module is twin.input_layernorm
    assert calls[0].layers[0] is twin.self_attn.q_proj
    assert calls[1].module is twin.mlp
    assert calls[1].down is twin.mlp.down_proj


def test_a_run(splits, tmp_path, kernel):  # noqa: F811
    """Scores of what would be deployed, and a record that says how they came about."""
    found = {
        how: run(config(splits, tmp_path, "masquant", execution=how, kernel=kernel)) for how in ("packed", "fused")
    }
    assert found["packed"].identity != found["fused"].identity
    assert "fused" not in found["packed"].provenance
    assert found["fused"].provenance["fused"] == NUM_BLOCKS * 3
    assert found["fused"].provenance["kernels"] == found["packed"].provenance["kernels"]
    assert found["fused"].effective_bits == found["packed"].effective_bits
    for name in ("nll", "kl"):
        assert found["fused"].fidelity[name] == pytest.approx(found["packed"].fidelity[name], rel=1e-2)
    again = load_finished(next(tmp_path.glob(f"*-{found['fused'].identity[:10]}")))
    assert type(again.blocks()[0].norm("qkv").forward).__name__ == "_FusedNorm"


def test_a_checkpoint(splits, tmp_path):  # noqa: F811
    adapter = packed(splits, tmp_path, "reference")
    checkpoint.save(adapter, tmp_path / "out", {})
    model = checkpoint.load(tmp_path / "out", kernel="reference", fused=True)
    batch = adapter.encode(nano.random_samples(MEDIA["all"], 3), with_answer=False)
    with torch.no_grad():
        found, wanted = (one(**batch.inputs).logits[batch.modality >= 0] for one in (model, adapter.model))
    assert type(model.model.language_model.layers[0].mlp.forward).__name__ == "_FusedGate"
    assert distance(found, wanted) < 2e-3
    answer = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**batch.inputs, **answer), adapter.model.generate(**batch.inputs, **answer))


def test_kernels_without_it_are_refused(splits, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="fused execution needs integer activations and a kernel"):
        config(splits, tmp_path, "rtn", execution="fused", kernel="torch")
    floats = config(splits, tmp_path), replace(Scheme.preset("w4a8"), name="w4", activation=None)
    with pytest.raises(ConfigError, match="fused execution needs integer activations and a kernel"):
        replace(floats[0], scheme=floats[1], execution="fused")
    with pytest.raises(ConfigError, match="fused execution has one weight for all modalities"):
        config(splits, tmp_path, "mas", execution="fused")
