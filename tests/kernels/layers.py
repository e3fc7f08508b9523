"""Layers of a model that share an input, and how a kernel must run them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from masq import kernels
from masq.kernels.base import Kernel, Norm
from masq.models.base import Modality
from masq.modules import stack as modules
from masq.modules.modality import ModalityContext
from masq.modules.packed_linear import PackedLinear
from masq.modules.quant_linear import QuantLinear
from masq.numerics.affine import quantize
from masq.numerics.low_rank import Factors, store
from masq.numerics.scheme import TensorFormat


def layer(
    inner: int,
    out: int,
    ranks: Mapping[Modality, int],
    activation: TensorFormat,
    context: ModalityContext,
    generator: torch.Generator,
    stored: torch.dtype = torch.bfloat16,
) -> QuantLinear:
    """A random layer in bfloat16 with a bias, smoothing by modality, and corrections of these ranks."""
    weight = quantize(torch.randn(out, inner, generator=generator), TensorFormat(4))

    def factors(rank: int) -> Factors:
        left, right = (torch.randn(*shape, generator=generator) / 9 for shape in ((inner, rank), (rank, out)))
        return store(left, right, stored)

    return QuantLinear(
        weights={Modality.TEXT: weight},
        bias=torch.randn(out, generator=generator),
        activation=activation,
        smoothing={m: torch.full((inner,), 1.5) ** int(m) for m in Modality if m >= 0},
        corrections={modality: factors(rank) for modality, rank in ranks.items()} or None,
        context=context,
        dtype=torch.bfloat16,
    )


def check_layers_that_share_an_input(
    kernel: Kernel, device: str, activation: TensorFormat, coded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill of three modalities and decoding of text, against the reference.

    Args:
        kernel: taken for every layer where ``device`` is no GPU, else chosen by its name.
        device: of the tensors.
        activation: format of the input.
        coded: factors of corrections are int8 codes, not bfloat16.
        monkeypatch: of the test.
    """
    if device == "cpu":
        monkeypatch.setattr(modules, "select", lambda *_: kernel)
    context, generator = ModalityContext(), torch.Generator().manual_seed(0)
    corrected, stored = (Modality.VISION, Modality.AUDIO), torch.int8 if coded else torch.bfloat16
    sizes = (64, 40), (32, 0), (17, 3)
    layers = [
        layer(130, out, {m: rank for m in corrected if rank}, activation, context, generator, stored)
        for out, rank in sizes
    ]
    for ids in (torch.tensor([[-1, 0, 1, 1, 0, 2, 0] * 3]), torch.tensor([[0]]), torch.tensor([[2]])):
        x = torch.randn(*ids.shape, 130, generator=generator).bfloat16()
        found = []
        for name, where in (("reference", "cpu"), (kernel.name, device)):
            context.set(ids.to(torch.int8).to(where))
            with monkeypatch.context() as patch:
                if name == "reference":
                    patch.setattr(modules, "select", kernels.select)
                packed = [PackedLinear.from_simulated(layer, name).to(where) for layer in layers]
                modules.stack(packed)
                on_device = x.to(where)
                found.append(torch.cat([layer(on_device) for layer in packed], dim=-1).float().cpu())
            assert packed[0].stack.prepare().kernel.name == name
        text = ids[0] <= 0
        assert torch.equal(found[0][:, text], found[1][:, text])
        assert float((found[0] - found[1]).norm() / found[0].norm()) < 4e-3


def check_layers_behind_a_norm_and_a_gate(
    kernel: Kernel, device: str, activation: TensorFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A feed-forward of packed layers, prefill of three modalities and decoding of text, against the reference.

    Args:
        kernel: taken for every layer where ``device`` is no GPU, else chosen by its name.
        device: of the tensors.
        activation: format of the inputs.
        monkeypatch: of the test.
    """
    if device == "cpu":
        monkeypatch.setattr(modules, "select", lambda *_: kernel)
    context, generator = ModalityContext(), torch.Generator().manual_seed(0)
    gamma = torch.rand(130, generator=generator).bfloat16()

    vision, made = Modality.VISION, (activation, context, generator)
    layers = [layer(130, 48, {vision: 17}, *made), layer(130, 48, {vision: 3}, *made), layer(48, 33, {}, *made)]
    for ids in (torch.tensor([[-1, 0, 1, 1, 0, 2, 0] * 3]), torch.tensor([[0]]), torch.tensor([[1]])):
        x = torch.randn(*ids.shape, 130, generator=generator).bfloat16()
        found = []
        for name, where in (("reference", "cpu"), (kernel.name, device)):
            context.set(ids.to(torch.int8).to(where))
            with monkeypatch.context() as patch:
                if name == "reference":
                    patch.setattr(modules, "select", kernels.select)
                gate, up, down = (PackedLinear.from_simulated(one, name).to(where) for one in layers)
                modules.stack([gate, up])
                rows = gate.stack.normalized(x.to(where), Norm(gamma.to(where), 1e-6))
                found.append(down.stack.gated(*gate.stack.together(rows)).float().cpu())
            assert down.stack.prepare().kernel.name == name
        assert found[0].shape == (*ids.shape, 33)
        assert float((found[0] - found[1]).norm() / found[0].norm()) < 2e-2
