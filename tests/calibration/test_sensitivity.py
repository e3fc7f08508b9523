"""Gradients at the outputs of blocks: those of plain backpropagation, of each sample alone, and what follows."""

from __future__ import annotations

import pytest
import torch

from masq.calibration.sensitivity import gradient_sums, mean_gradients, relative_sensitivity
from masq.errors import NumericalError
from masq.models.base import EncodedBatch, Modality
from masq.models.zoo import nano
from tests.nano_fixtures import NANO, media_of, nano_adapter

TEXT, VISION, AUDIO = Modality.TEXT, Modality.VISION, Modality.AUDIO


def build(name: str, kind: tuple[str, ...] | None = None, num_samples: int = 3):
    adapter = nano_adapter(name)
    adapter.model.requires_grad_(False)
    return adapter, nano.random_samples(media_of(adapter) if kind is None else kind, num_samples, seed=5)


def plain(adapter, batch: EncodedBatch) -> torch.Tensor:
    """Mean over channels of |dL/dY| by block, sample and token, from one graph of the whole model."""
    outputs: list[torch.Tensor] = []

    def keep(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.retain_grad() if hidden.requires_grad else hidden.requires_grad_()
        outputs.append(hidden)

    handles = [block.module.register_forward_hook(keep) for block in adapter.blocks()]
    logits = adapter.model(**batch.inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    ids, loss = batch.inputs["input_ids"], torch.zeros(())
    for row in range(len(ids)):
        scored = batch.answer_mask[row, 1:]
        loss = loss + torch.nn.functional.cross_entropy(logits[row, :-1][scored], ids[row, 1:][scored])
    loss.backward()
    return torch.stack([output.grad.abs().mean(-1) for output in outputs])


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("kind", [None, ()])
def test_equals_plain_backpropagation(name: str, kind: tuple[str, ...] | None) -> None:
    """Samples of different length, so padding too; head tied or not; modalities that are not there count nothing."""
    adapter, samples = build(name, kind)
    batch = adapter.encode(samples, with_answer=True)
    assert bool((batch.modality < 0).any()) or kind == ()
    sums, counts = gradient_sums(adapter, batch)
    expected = plain(adapter, batch)
    for index, which in enumerate((TEXT, VISION, AUDIO)):
        rows = batch.modality == which
        assert int(counts[index]) == int(rows.sum())
        torch.testing.assert_close(sums[:, index], expected[:, rows].sum(1).double(), rtol=1e-4, atol=1e-9)
    assert not any(parameter.grad is not None for parameter in adapter.model.parameters())


def test_a_sample_s_gradient_does_not_depend_on_its_batch() -> None:
    adapter, samples = build("nano_omni")
    together = gradient_sums(adapter, adapter.encode(samples, with_answer=True))
    alone = [gradient_sums(adapter, adapter.encode([sample], with_answer=True)) for sample in samples]
    torch.testing.assert_close(together[0], sum(sums for sums, _ in alone), rtol=1e-4, atol=1e-9)
    assert torch.equal(together[1], sum(counts for _, counts in alone))


def test_only_predicting_tokens_have_a_gradient_at_the_end() -> None:
    adapter, samples = build("nano_omni")
    sums, _ = gradient_sums(adapter, adapter.encode(samples, with_answer=True))
    assert sums[-1, 1:].tolist() == [0.0, 0.0]
    assert (sums[:-1] > 0).all()
    means = mean_gradients([gradient_sums(adapter, adapter.encode([sample], with_answer=True)) for sample in samples])
    assert means[-1][VISION] == 0.0
    lifted = relative_sensitivity(means, "median")
    assert lifted[-1][VISION] == sorted(one[VISION] / one[TEXT] for one in means)[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_lose_no_small_gradient(dtype: torch.dtype) -> None:
    """A loss scaled down by its long answers would vanish in float16; carried at scale one it does not."""
    adapter, samples = build("nano_vl")
    batch = adapter.encode(samples, with_answer=True)
    expected, _ = gradient_sums(adapter, batch)
    adapter.model.to(dtype)
    batch.inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
    found, _ = gradient_sums(adapter, batch)
    torch.testing.assert_close(found[:, :2], expected[:, :2], rtol=0.1, atol=1e-9)


def test_means_run_over_tokens_of_all_batches() -> None:
    sums = [
        (torch.tensor([[6.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([3, 0, 1])),
        (torch.tensor([[2.0, 0.0, 4.0]], dtype=torch.float64), torch.tensor([1, 0, 1])),
    ]
    assert mean_gradients(sums) == [{TEXT: 2.0, AUDIO: 2.5}]


def test_the_floor_is_the_median_over_blocks() -> None:
    gradients = [{TEXT: 2.0, VISION: value} for value in (1.0, 4.0, 0.0, 0.6)]
    assert [one[VISION] for one in relative_sensitivity(gradients, "none")] == [0.5, 2.0, 0.0, 0.3]
    assert [one[VISION] for one in relative_sensitivity(gradients, "median")] == [0.5, 2.0, 0.4, 0.4]
    assert all(one[TEXT] == 1.0 for one in relative_sensitivity(gradients, "median"))


def test_text_without_a_gradient_is_refused() -> None:
    for bad in ([{TEXT: 0.0, VISION: 1.0}], [{VISION: 1.0}]):
        with pytest.raises(NumericalError, match="relative to text"):
            relative_sensitivity(bad, "median")


def test_nan_is_refused() -> None:
    adapter, samples = build("nano_vl")
    adapter.final_norm().weight.data[0] = float("nan")
    with pytest.raises(NumericalError, match="gradients of the loss"):
        gradient_sums(adapter, adapter.encode(samples, with_answer=True))
