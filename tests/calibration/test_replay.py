"""Replaying blocks gives what the whole model gives; statistics see every token once."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from masq.calibration.replay import EncodedBatches, advance, capture, collect
from masq.errors import NumericalError
from masq.models.base import GROUPS, Modality, Role
from masq.models.zoo import nano
from tests.nano_fixtures import NANO, Nano, media_of, nano_adapter, nano_model  # noqa: F401


@pytest.mark.parametrize("name", NANO)
def test_blocks_in_turn_equal_the_model_of_every_family(name: str) -> None:
    """Bit for bit at every block, with padding and pictures or sounds of mixed sizes."""
    adapter = nano_adapter(name)
    batch = adapter.encode(nano.random_samples(media_of(adapter), 3), with_answer=True)
    (hidden,), (replay,) = capture(adapter, [batch])
    inputs: list[torch.Tensor] = []
    for block in adapter.blocks():
        block.module.register_forward_pre_hook(
            lambda _m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    adapter.final_norm().register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        adapter.model(**batch.inputs, use_cache=False)
    expected = list(inputs)
    assert len(expected) == 4
    for block, before, after in zip(adapter.blocks(), expected[:-1], expected[1:], strict=True):
        assert torch.equal(hidden, before)
        hidden = advance(block, hidden, replay, "block")
        assert torch.equal(hidden, after)


def test_blocks_in_turn_equal_the_model(nano_model: Nano) -> None:  # noqa: F811
    seen: list[torch.Tensor] = []
    last = nano_model.adapter.blocks()[-1].module
    handle = last.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        nano_model.adapter.model(**nano_model.batches[2].inputs, use_cache=False)
    handle.remove()
    hidden = nano_model.hidden[2]
    for block in nano_model.adapter.blocks():
        hidden = advance(block, hidden, nano_model.replay[2], "block")
    real = nano_model.replay[2].modality >= 0
    torch.testing.assert_close(hidden[real], seen[0][real])


@pytest.mark.parametrize("groups", [("qkv",), ("gate_up",), ("qkv", "down"), tuple(GROUPS)])
def test_statistics_equal_a_plain_hook(nano_model: Nano, groups: tuple[str, ...]) -> None:  # noqa: F811
    block = nano_model.adapter.blocks()[0]
    inputs: dict[str, list[torch.Tensor]] = {group: [] for group in groups}
    handles = [
        block.linear(Role(GROUPS[group][-1])).register_forward_pre_hook(
            lambda _m, args, group=group: inputs[group].append(args[0].detach())
        )
        for group in groups
    ]
    for hidden, batch in zip(nano_model.hidden, nano_model.replay, strict=True):
        advance(block, hidden, batch, "block")
    for handle in handles:
        handle.remove()
    found = collect(block, nano_model.hidden, nano_model.replay, groups=groups, second_moment=groups[:1])
    assert set(found) == set(groups)
    for group in groups:
        for modality in (Modality.TEXT, Modality.VISION, Modality.AUDIO):
            pairs = zip(inputs[group], nano_model.replay, strict=True)
            rows = torch.cat([x[batch.modality == modality] for x, batch in pairs])
            assert found[group].num_tokens[modality] == len(rows)
            assert torch.equal(found[group].abs_max[modality], rows.abs().amax(0))
    rows = torch.cat([x[b.modality == 2] for x, b in zip(inputs[groups[0]], nano_model.replay, strict=True)]).double()
    torch.testing.assert_close(found[groups[0]].second_moment[Modality.AUDIO], rows.t() @ rows / len(rows))
    assert not found[groups[-1]].second_moment or groups[-1] == groups[0]
    assert not any(block.linear(Role(role))._forward_pre_hooks for roles in GROUPS.values() for role in roles)


def test_nothing_wanted_runs_nothing(nano_model: Nano) -> None:  # noqa: F811
    assert collect(nano_model.adapter.blocks()[0], [None], nano_model.replay[:1], groups=()) == {}


def test_nan_names_the_block_but_padding_is_free(nano_model: Nano) -> None:  # noqa: F811
    block, batch = nano_model.adapter.blocks()[0], nano_model.replay[0]
    hidden = nano_model.hidden[0].clone()
    hidden[0, -1, 0] = float("nan")
    with pytest.raises(NumericalError, match="block 7"):
        advance(block, hidden, batch, "block 7")


def test_one_batch_is_encoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next one is encoded nothing holds the one before; and what is captured is the same."""
    adapter = nano_adapter("nano_vl")
    groups = [nano.random_samples(("vision",), 2, seed=seed) for seed in range(3)]
    encode, seen = adapter.encode, []
    wanted, replay = capture(adapter, [encode(group, with_answer=True) for group in groups])

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert [one() for one in seen] == [None] * len(seen)
        batch = encode(*args, **kwargs)
        seen.append(weakref.ref(batch.inputs["pixel_values"]))
        return batch

    monkeypatch.setattr(adapter, "encode", watched)
    batches = EncodedBatches(adapter, groups)
    hidden, again = capture(adapter, batches)
    assert len(batches) == len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(hidden, wanted, strict=True))
    assert all(torch.equal(a.modality, b.modality) for a, b in zip(again, replay, strict=True))
    last = batches[2:]
    assert len(last) == 1
    assert torch.equal(last[0].modality, replay[2].modality)
