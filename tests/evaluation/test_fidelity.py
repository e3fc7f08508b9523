from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from masq.calibration.data import batches
from masq.errors import DataError, NumericalError
from masq.evaluation.fidelity import fidelity, sample_kind, summarize, token_groups
from masq.evaluation.likelihood import ROWS_PER_CHUNK
from masq.models.base import EncodedBatch, Modality, ModelAdapter, Role, Sample
from masq.modules.modality import install
from masq.modules.quant_linear import QuantLinear
from masq.numerics.affine import quantize
from masq.numerics.scheme import Scheme
from tests.evaluation.conftest import naive_nll

Make = Callable[..., ModelAdapter]
KINDS = {"digits": "vision", "speech": "audio", "same": "joint", "prose": "text"}
NAMES = {0: "text", 1: "vision", 2: "audio"}


def numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every number in a result, by path."""
    if not isinstance(value, dict | list):
        yield prefix, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from numbers(inner, f"{prefix}.{key}")


def run_plainly(adapter: ModelAdapter, batch: EncodedBatch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Outputs [T, d] of every block, and log-probabilities [T, V], of one sample in float64."""
    kept: list[Any] = []
    layers = adapter.model.model.language_model.layers
    handles = [layer.register_forward_hook(lambda _m, _a, out: kept.append(out)) for layer in layers]
    with torch.no_grad():
        logits = adapter.model(**batch.inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    outputs = [(out[0] if isinstance(out, tuple) else out)[0].double() for out in kept]
    return outputs, logits[0].double().log_softmax(-1)


def naive(reference: ModelAdapter, quantized: ModelAdapter, samples: list[Sample]) -> dict[str, Any]:
    """The definitions, one unpadded sample at a time, on full logits, with Python sums."""
    sqnr: dict[tuple[str, int], list[float]] = {}
    sums: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        batch = reference.encode([sample], with_answer=True)
        expected, log_p = run_plainly(reference, batch)
        found, log_q = run_plainly(quantized, batch)
        for block, (y, y_q) in enumerate(zip(expected, found, strict=True)):
            for position, modality in enumerate(batch.modality[0].tolist()):
                group = "first" if position == 0 else NAMES[modality]
                noise = (y[position] - y_q[position]).pow(2).sum()
                value = 10 * math.log10(float(y[position].pow(2).sum() / noise))
                sqnr.setdefault((group, block), []).append(value)
        for position in batch.answer_mask[0].nonzero()[:, 0].tolist():
            target = int(batch.inputs["input_ids"][0, position])
            p, q = log_p[position - 1], log_q[position - 1]
            kl = float((p.exp() * (p - q)).sum())
            for name, value in (("nll_float", -float(p[target])), ("nll", -float(q[target])), ("kl", kl)):
                sums.setdefault((name, KINDS[sample.task]), []).append(value)
    return {"sqnr": {key: sum(v) / len(v) for key, v in sqnr.items()}, "sums": sums}


def test_a_model_against_itself(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    adapter = make_model()
    result = fidelity(adapter, adapter, batches(samples, 2), tmp_path)
    assert result["sqnr"] == {"text": 200.0, "vision": 200.0, "audio": 200.0}
    assert result["sqnr_first"] == 200.0
    assert result["kl"] == dict.fromkeys(("text", "vision", "audio", "joint"), 0.0)
    assert result["nll"] == result["nll_float"]
    assert set(result["nll_increase"].values()) == {0.0}
    assert result["num_samples"] == {"text": 3, "vision": 3, "audio": 3, "joint": 3}
    assert result["num_tokens"]["first"] == len(samples)


def test_definitions(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    reference, quantized = make_model(), make_model(noise=0.1)
    result = fidelity(reference, quantized, batches(samples, 2), tmp_path)
    expected = naive(reference, quantized, samples)
    assert len(result["sqnr_by_block"]) == 3
    for (group, block), value in expected["sqnr"].items():
        assert result["sqnr_by_block"][block][group] == pytest.approx(value, abs=1e-3)
    for group in ("text", "vision", "audio"):
        headline = sum(expected["sqnr"][group, block] for block in range(3)) / 3
        assert result["sqnr"][group] == pytest.approx(headline, abs=1e-3)
        assert 0 < result["sqnr"][group] < 40
    assert result["sqnr_first"] == pytest.approx(sum(expected["sqnr"]["first", b] for b in range(3)) / 3, abs=1e-3)
    for (name, kind), values in expected["sums"].items():
        assert result[name][kind] == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert result["num_answer_tokens"][kind] == len(values)
    for kind, value in result["nll_increase"].items():
        assert value == pytest.approx(result["nll"][kind] - result["nll_float"][kind], abs=1e-12)
        assert result["kl"][kind] > 0


def test_padding_and_batch_size_do_not_matter(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    reference, quantized = make_model(), make_model(noise=0.1)
    together = fidelity(reference, quantized, batches(samples, 3), tmp_path / "together")
    one_by_one = fidelity(reference, quantized, batches(samples, 1), tmp_path / "apart")
    widths = {reference.encode([sample], with_answer=True).modality.shape[1] for sample in samples[:3]}
    assert len(widths) > 1, "the batch must mix lengths"
    apart = dict(numbers(one_by_one))
    for path, value in numbers(together):
        assert value == pytest.approx(apart[path], abs=2e-3, rel=1e-3), path


def test_many_rows_are_chunked_without_a_trace(
    make_model: Make, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, quantized = make_model(), make_model(noise=0.1)
    prose = [sample for sample in samples if sample.task == "prose"]
    whole = fidelity(reference, quantized, [prose], tmp_path / "whole")
    assert whole["num_answer_tokens"]["text"] < ROWS_PER_CHUNK
    for module in ("likelihood", "fidelity"):
        monkeypatch.setattr(f"masq.evaluation.{module}.ROWS_PER_CHUNK", 3)
    chunked = fidelity(reference, quantized, [prose], tmp_path / "chunked")
    for path, value in numbers(whole):
        assert value == pytest.approx(dict(numbers(chunked))[path], rel=1e-5), path


def test_standard_errors(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    reference, quantized = make_model(), make_model(noise=0.1)
    result = fidelity(reference, quantized, batches(samples, 2), tmp_path)
    chosen = [sample for sample in samples if sample.task == "digits"]
    values = [naive_nll(quantized, sample) for sample in chosen]
    nll, counts = [sum(own) for own in values], [len(own) for own in values]
    mean = sum(nll) / sum(counts)
    squares = sum((a - mean * b) ** 2 for a, b in zip(nll, counts, strict=True))
    assert result["nll"]["vision"] == pytest.approx(mean, rel=1e-4)
    expected = math.sqrt(3 / 2 * squares) / sum(counts)
    assert result["standard_error"]["nll"]["vision"] == pytest.approx(expected, rel=1e-3)
    assert set(result["standard_error"]) == {"sqnr", "sqnr_first", "nll", "nll_float", "nll_increase", "kl"}
    assert result["standard_error"]["sqnr"]["audio"] > 0


def test_sums_become_means_by_hand() -> None:
    def entry(kind: str, text: list[float], n: int, nll: float, answers: int) -> dict[str, Any]:
        return {
            "kind": kind,
            "sqnr": {"text": text, "first": [1.0, 3.0]},
            "num_tokens": {"text": n, "first": 1},
            **{"nll": nll, "nll_float": 1.0, "kl": 0.5, "num_answer_tokens": answers},
        }

    result = summarize([entry("text", [10.0, 20.0], 1, 4.0, 2), entry("joint", [50.0, 10.0], 2, 9.0, 3)])
    assert result["sqnr"] == {"text": 15.0}
    assert result["sqnr_first"] == 2.0
    assert result["sqnr_by_block"] == [{"text": 20.0, "first": 1.0}, {"text": 10.0, "first": 3.0}]
    assert result["nll"] == {"text": 2.0, "joint": 3.0}
    assert result["nll_increase"] == {"text": 1.5, "joint": pytest.approx(8 / 3)}
    assert result["num_tokens"] == {"text": 3, "first": 2}
    assert result["num_answer_tokens"] == {"text": 2, "joint": 3}
    assert result["standard_error"]["nll"] == {"text": None, "joint": None}


def test_token_groups_leave_out_padding_and_the_first_real_token() -> None:
    groups = token_groups(torch.tensor([[-1, -1, 0, 1, 1, 0], [1, 1, 2, 0, -1, -1]], dtype=torch.int8))
    positions = {name: mask.nonzero().tolist() for name, mask in groups.items()}
    assert positions == {
        "text": [[0, 5], [1, 3]],
        "vision": [[0, 3], [0, 4], [1, 1]],
        "audio": [[1, 2]],
        "first": [[0, 2], [1, 0]],
    }


def test_sample_kinds(samples: list[Sample]) -> None:
    assert {sample.task: sample_kind(sample) for sample in samples} == KINDS
    assert sample_kind(Sample("q", "chat", "why?", "because")) == "text"


def test_choices_count_by_the_right_one(make_model: Make, choices: list[Sample], tmp_path: Path) -> None:
    reference, quantized = make_model(), make_model(noise=0.1)
    result = fidelity(reference, quantized, batches(choices, 2), tmp_path)
    num_tokens = sum(1 + len(sample.answer) for sample in choices)  # one token per byte
    assert result["num_answer_tokens"] == {"text": num_tokens}
    expected = [sum(naive_nll(reference, sample)) for sample in choices]
    assert result["nll_float"]["text"] == pytest.approx(sum(expected) / num_tokens, rel=1e-5)


def test_kept_float_outputs_change_nothing(
    make_model: Make, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference, quantized, other = make_model(), make_model(noise=0.1), make_model(noise=0.2)
    plain = [fidelity(reference, model, batches(samples, 2), tmp_path / str(id(model))) for model in (quantized, other)]
    keep = tmp_path / "kept"
    first = fidelity(reference, quantized, batches(samples, 2), tmp_path / "first", keep=keep)
    files = sorted(keep.iterdir())
    assert len(files) == len(batches(samples, 2))

    def refuse(*_: Any) -> None:
        raise AssertionError("the float model ran although its outputs are kept")

    handle = reference.blocks()[0].module.register_forward_pre_hook(refuse)
    second = fidelity(reference, other, batches(samples, 2), tmp_path / "second", keep=keep)
    handle.remove()
    assert [first, second] == plain
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"?")
    assert fidelity(reference, other, batches(samples, 2), tmp_path / "third", keep=keep) == second
    assert "computed again" in caplog.text


def num_hooks(adapter: ModelAdapter) -> int:
    modules = list(adapter.model.modules())
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def test_hooks_are_removed_also_after_errors(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    reference, quantized = make_model(), make_model(noise=0.1)
    fidelity(reference, quantized, batches(samples, 3), tmp_path / "a")
    assert num_hooks(reference) == num_hooks(quantized) == 0
    with torch.no_grad():
        next(quantized.blocks()[1].linear(Role.DOWN).parameters()).fill_(float("nan"))
    with pytest.raises(NumericalError, match="block 1 of the quantized model must be finite"):
        fidelity(reference, quantized, batches(samples, 3), tmp_path / "b")
    with pytest.raises(NumericalError, match="block 1 of the float model"):
        fidelity(quantized, reference, batches(samples, 3), tmp_path / "c")
    assert num_hooks(reference) == num_hooks(quantized) == 0


def test_infinite_outputs_and_logits_are_errors(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    reference, quantized = make_model(), make_model(noise=0.1)
    with torch.no_grad():
        quantized.head().weight[5].fill_(float("inf"))
    with pytest.raises(NumericalError, match="logits must be finite"):
        fidelity(reference, quantized, batches(samples, 3), tmp_path)

    def explode(_module: Any, _args: Any, output: Any) -> Any:
        return torch.full_like(output[0] if isinstance(output, tuple) else output, float("inf"))

    quantized.blocks()[2].module.register_forward_hook(explode)
    with pytest.raises(NumericalError, match="block 2 of the quantized model"):
        fidelity(reference, quantized, batches(samples, 3), tmp_path)


def test_resume_is_bit_identical(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    reference, quantized = make_model(), make_model(noise=0.1)
    cut = batches(samples, 2)
    undisturbed = fidelity(reference, quantized, cut, tmp_path / "undisturbed")
    files = sorted((tmp_path / "undisturbed").iterdir())
    assert len(files) == len(cut)
    for path in files[::2]:
        path.unlink()
    assert fidelity(reference, quantized, cut, tmp_path / "undisturbed") == undisturbed

    def killed(_stage: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fidelity(reference, quantized, cut, tmp_path / "killed", killed)
    assert len(list((tmp_path / "killed").iterdir())) == 3
    assert fidelity(reference, quantized, cut, tmp_path / "killed") == undisturbed


def test_finished_batches_need_no_model(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    reference, quantized = make_model(), make_model(noise=0.1)
    cut = batches(samples, 2)
    first = fidelity(reference, quantized, cut, tmp_path)
    broken: Any = object()
    assert fidelity(broken, broken, cut, tmp_path) == first


def test_damaged_batch_is_computed_again(
    make_model: Make, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference, quantized = make_model(), make_model(noise=0.1)
    first = fidelity(reference, quantized, batches(samples, 2), tmp_path)
    (tmp_path / "speech-0000.json").write_text('{"key": ')
    assert fidelity(reference, quantized, batches(samples, 2), tmp_path) == first
    assert "speech-0000.json is damaged and is computed again" in caplog.text


def test_result_is_json(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    result = fidelity(make_model(), make_model(noise=0.1), batches(samples, 3), tmp_path)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_absent_kinds_have_no_key(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    chosen = [sample for sample in samples if sample.task in ("digits", "prose")]
    result = fidelity(make_model(), make_model(noise=0.1), batches(chosen, 3), tmp_path)
    assert set(result["sqnr"]) == {"text", "vision"}
    assert set(result["nll"]) == set(result["kl"]) == {"text", "vision"}
    with pytest.raises(DataError, match="at least one sample"):
        fidelity(make_model(), make_model(), [], tmp_path)


def test_quantized_linears_see_the_modality_of_every_token(
    make_model: Make, samples: list[Sample], tmp_path: Path
) -> None:
    reference, quantized = make_model(), make_model()
    context, _ = install(quantized)
    scheme = Scheme.preset("w8a8")
    assert scheme.weight is not None
    seen: set[int] = set()
    for block in quantized.blocks():
        linear: Any = block.linear(Role.GATE)
        weight = quantize(linear.weight.detach(), scheme.weight)
        layer = QuantLinear(
            weights={Modality.TEXT: weight}, bias=linear.bias, activation=scheme.activation, context=context
        )
        layer.register_forward_pre_hook(
            lambda _m, args: seen.update(context.current(*args[0].shape[:2]).unique().tolist())
        )
        block.set_linear(Role.GATE, layer)
    result = fidelity(reference, quantized, batches(samples, 3), tmp_path)
    assert seen == {-1, 0, 1, 2}
    assert all(20 < value < 70 for value in result["sqnr"].values())
