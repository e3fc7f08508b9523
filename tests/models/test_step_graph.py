"""Steps that are replayed: the answers of plain decoding, and nothing in a step that a CUDA graph cannot hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from transformers import StaticCache

from masq import kernels
from masq.compose import compose
from masq.config import RunConfig
from masq.errors import ConfigError, ModelError
from masq.finished import load_finished
from masq.identity import identity
from masq.models import generation
from masq.models.base import EncodedBatch, ModelAdapter
from masq.models.step_graph import WARM_UP, Step, StepReplay, replayed_steps
from masq.modules.fused import fuse_blocks
from masq.numerics import hadamard
from tests.models.capturing import OnOneDevice, graph_of
from tests.models.test_generation import samples_of
from tests.modules.test_fused import packed, splits  # noqa: F401
from tests.nano_fixtures import NANO, nano_adapter

NEW_TOKENS = 8
KINDS = ("eager", "graphed")


def answers(
    adapter: ModelAdapter, batch: EncodedBatch, capture: Callable[[Step], Step] | None = graph_of
) -> tuple[list[list[int]], StepReplay]:
    """Answers of steps that are captured so, and what replayed them."""
    made: list[StepReplay] = []

    @contextmanager
    def steps(model: Any, is_text: Any) -> Iterator[None]:
        with replayed_steps(model, is_text, capture) as replay:
            made.append(replay)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "replayed_steps", steps)
        patch.setattr(adapter, "decoding", "graphed")
        found = adapter.generate(batch, NEW_TOKENS)
    [replay] = made
    return found, replay


@pytest.mark.parametrize("name", NANO)
def test_the_answers_of_plain_decoding(name):
    """Of every family, in one padded batch; twice, for a model remembers its cache and its offsets."""
    adapter = nano_adapter(name)
    forward = adapter.model.forward
    for samples in (samples_of(adapter), samples_of(adapter)[1:]):
        batch = adapter.encode(samples, with_answer=False)
        wanted = adapter.generate(batch, NEW_TOKENS)
        found, replay = answers(adapter, batch)
        assert found == wanted
        assert replay.num_steps == max(map(len, wanted)) - 1 > WARM_UP
        assert replay.num_replayed == replay.num_steps - WARM_UP
    assert adapter.model.forward == forward
    adapter.model.forward = own = functools.partial(forward)
    with replayed_steps(adapter.model, lambda _: True, graph_of):
        assert adapter.model.forward is not own
    assert adapter.model.forward is own


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["rtn", "masquant", "quarot_gptq"])
def test_the_answers_of_packed_models(splits, tmp_path, method, fused):  # noqa: F811
    adapter = packed(splits, tmp_path, "reference", method)
    assert adapter.context is not None
    if fused:
        assert fuse_blocks(adapter.blocks())
    for samples in (samples_of(adapter), samples_of(adapter)[2:]):
        batch = adapter.encode(samples, with_answer=False)
        found, replay = answers(adapter, batch)
        assert found == adapter.generate(batch, NEW_TOKENS)
        assert replay.num_replayed > 0


@pytest.mark.parametrize("name", NANO)
def test_a_step_on_a_gpu_without_data(name):
    """Nothing in it lies elsewhere or is sent there: every tensor of a second step is on the device of the model."""
    check_on_gpu(nano_adapter(name))


@pytest.mark.parametrize("method", ["masquant", "quarot_gptq"])
def test_a_step_of_a_packed_model_on_a_gpu_without_data(splits, tmp_path, monkeypatch, method):  # noqa: F811
    """By the Triton kernels, as far as their operations say what they make of such tensors."""
    adapter = packed(splits, tmp_path, "reference", method)
    assert fuse_blocks(adapter.blocks())
    monkeypatch.setattr("masq.modules.stack.select", lambda *_: kernels.KERNELS.get("triton")())
    check_on_gpu(adapter)


def check_on_gpu(adapter: ModelAdapter) -> None:
    """What decoding calls a model with, twice, where all lies on a GPU; the first may fill what is made once."""
    _, replay = answers(adapter, adapter.encode(samples_of(adapter), with_answer=False), capture=lambda step: step)
    assert replay._held is not None
    leaves, form = replay._held
    length = next(one for one in leaves if hasattr(one, "get_seq_length")).get_max_length()
    hadamard._paley_like.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), overwritten_parameters():
            model = adapter.model.to("cuda")
            cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
            given = [one.to("cuda") if isinstance(one, torch.Tensor) else one for one in leaves]
            given = [cache if hasattr(one, "get_seq_length") else one for one in given]
            inputs = pytree.tree_unflatten(given, form)
            if adapter.context is not None:
                context: Any = adapter.context
                context.set(torch.zeros(inputs["input_ids"].shape, dtype=torch.int8, device="cuda"))
                context._derived["text_only"] = True
            model.forward(**inputs)
            with OnOneDevice():
                model.forward(**inputs)
    finally:
        hadamard._paley_like.cache_clear()


@contextmanager
def overwritten_parameters() -> Iterator[None]:
    """A parameter that moves becomes another: one without data cannot take the place of another's."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_what_is_no_step_of_text_runs_as_it_is():
    adapter = nano_adapter("nano_omni")
    calls: list[int] = []

    def forward(**inputs: Any) -> int:
        calls.append(inputs["input_ids"].shape[1])
        return len(calls)

    def is_text(inputs: Any) -> bool:
        return not bool((adapter.modality_of(inputs) > 0).any())

    replay = StepReplay(forward, is_text, capture=lambda step: step)
    image = next(iter(adapter.placeholders()))
    for ids in ([[1, 2, 3]], *[[[5]]] * (WARM_UP + 1), [[image]]):
        replay(input_ids=torch.tensor(ids))
    assert calls == [3, *[1] * (WARM_UP + 2)]
    assert (replay.num_steps, replay.num_replayed) == (WARM_UP + 1, 1)


def test_a_replayed_step_reads_what_it_is_called_with():
    """Into the tensors of the captured call: a graph knows no others."""
    places: set[int] = set()

    def forward(*, input_ids: torch.Tensor, scale: dict[str, torch.Tensor], factor: int) -> torch.Tensor:
        places.add(input_ids.data_ptr())
        return input_ids * scale["by"] * factor

    replay = StepReplay(forward, lambda _: True, capture=lambda step: step)
    given: dict[str, Any] = {}
    for number in range(WARM_UP + 4):
        given = {"input_ids": torch.tensor([[number]]), "scale": {"by": torch.tensor(number + 1)}, "factor": 2}
        assert int(replay(**given)) == number * (number + 1) * 2
        if number == WARM_UP:
            places.clear()
    assert len(places) == 1
    for change in ({"factor": 3}, {"scale": {"by": torch.ones(2)}}, {"scale": {}}, {"factor": torch.tensor(2)}):
        with pytest.raises(ModelError, match="all steps of an answer must be called alike"):
            replay(**{**given, **change})


def on_gpu(**more: Any) -> RunConfig:
    """Packed on a GPU; ``group__key=value`` for further settings."""
    given = {"model__device": "cuda", "execution": "packed", **more}
    return compose([f"{key.replace('__', '.')}={value}" for key, value in given.items()])


@pytest.mark.parametrize("change", [{"model__device": "cpu"}, {"model__weights": "auto"}, {"execution": "simulated"}])
def test_what_cannot_be_captured_is_refused_before_any_work(change):
    assert on_gpu(evaluation__decoding="graphed").evaluation.decoding == "graphed"
    with pytest.raises(ConfigError, match="graphs replay steps of models that lie on an NVIDIA GPU"):
        on_gpu(evaluation__decoding="graphed", **change)


def test_windows_are_refused():
    adapter = nano_adapter("nano_vl")
    batch = adapter.encode(samples_of(adapter), with_answer=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "block_attention_kinds", lambda: ("sliding_attention",) * 3)
        with pytest.raises(ModelError, match="windows move where no graph looks"):
            answers(adapter, batch)


def test_a_step_that_reads_what_it_computes_fails_here():
    """So that the tests above can."""
    x = torch.ones(3)
    for step in (lambda: float(x.sum()), lambda: x[x > 0], lambda: x.tolist(), lambda: torch.tensor([1.0]) + x):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            graph_of(step)
    total = torch.zeros(3)
    replay = graph_of(lambda: total.add_(x).mul(2))
    assert not total.any()
    for number in (1, 2):
        assert replay().tolist() == [2.0 * number] * 3


def test_it_is_part_of_what_a_run_is_called():
    keys = [identity(on_gpu(**more), {}) for more in ({}, *({"evaluation__decoding": one} for one in KINDS))]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NANO)
def test_graphs_of_a_gpu(name):
    adapter = nano_adapter(name)
    adapter.model.cuda()
    check_graphs(adapter)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["rtn", "masquant", "quarot_gptq"])
def test_graphs_of_packed_models_of_a_gpu(splits, tmp_path, method):  # noqa: F811
    packed(splits, tmp_path, "auto", method)
    adapter = load_finished(next(tmp_path.glob("*/record.json")).parent, device="cuda")
    check_graphs(adapter)
    assert fuse_blocks(adapter.blocks())
    check_graphs(adapter)


def check_graphs(adapter: ModelAdapter) -> None:
    for samples in (samples_of(adapter), samples_of(adapter)[1:]):
        batch = adapter.encode(samples, with_answer=False)
        found, replay = answers(adapter, batch, capture=None)
        assert found == adapter.generate(batch, NEW_TOKENS)
        assert replay.num_replayed > 0
