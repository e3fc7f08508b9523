"""Steps that are replayed: the answers of plain decoding, and nothing in a step that a CUDA graph cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from masq.compose import compose
from masq.config import RunConfig
from masq.errors import ConfigError, ModelError
from masq.identity import identity
from masq.models import generation
from masq.models.base import EncodedBatch, ModelAdapter
from masq.models.step_graph import WARM_UP, Step, StepReplay, cuda_graph, replayed_steps
from masq.modules.fused import fuse_blocks
from tests.models.test_generation import samples_of
from tests.modules.test_fused import packed, splits  # noqa: F401
from tests.nano_fixtures import NANO, nano_adapter

NEW_TOKENS = 8
KINDS = ("eager", "graphed")
# What makes the processor wait for a GPU, or sends it what Python knows: neither can be captured.
HOST = ("_local_scalar_dense", "nonzero", "aten.equal.", "lift_fresh", "unique", "masked_select")


class OnlyTheGpu(TorchDispatchMode):
    """Fails on operations of which a GPU alone does not know what they do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        indices = args[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
        masks = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)
        assert not masks, f"{name} with a mask"
        assert not any(part in name for part in HOST), name
        return func(*args, **(kwargs or {}))


def repeated(step: Step) -> Step:
    """What a graph is to a GPU: the same work on the same tensors, nothing else asked of the processor."""

    def again() -> Any:
        with OnlyTheGpu():
            return step()

    return again


def answers(
    adapter: ModelAdapter, batch: EncodedBatch, capture: Callable[[Step], Step] = repeated
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


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["rtn", "masquant"])
def test_the_answers_of_packed_models(splits, tmp_path, method, fused):  # noqa: F811
    adapter = packed(splits, tmp_path, "reference", method)
    if fused:
        assert fuse_blocks(adapter.blocks())
    batch = adapter.encode(samples_of(adapter), with_answer=False)
    # The oracle is not written for GPUs: what it does is not asked.
    found, replay = answers(adapter, batch, capture=lambda step: step)
    assert found == adapter.generate(batch, NEW_TOKENS)
    assert replay.num_replayed > 0


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


def test_it_is_part_of_what_a_run_is_called():
    keys = [identity(on_gpu(**more), {}) for more in ({}, *({"evaluation__decoding": one} for one in KINDS))]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NANO)
def test_graphs_of_a_gpu(name):
    adapter = nano_adapter(name)
    adapter.model.cuda()
    batch = adapter.encode(samples_of(adapter), with_answer=False)
    found, replay = answers(adapter, batch, capture=cuda_graph)
    assert found == adapter.generate(batch, NEW_TOKENS)
    assert replay.num_replayed > 0
