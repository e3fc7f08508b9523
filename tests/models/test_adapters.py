"""The contract of ``BlockAdapter`` and ``ModelAdapter``, the same for every family."""

import pytest
import torch
from torch import nn

from masq.calibration.replay import capture
from masq.errors import ModelError
from masq.models.base import GROUPS, Modality, Role
from masq.models.zoo import nano
from tests.nano_fixtures import NANO, media_of

NEVER_TIED = ("nano_qwen2_audio",)
UNBIASED = ("nano_qwen3_vl",)
WIDE_HEADS = ("nano_qwen3_vl",)


def batch_of(adapter, num_samples=2):
    return adapter.encode(nano.random_samples(media_of(adapter), num_samples), with_answer=True)


def logits(adapter, batch):
    with torch.no_grad():
        return adapter.model(**batch.inputs).logits


@pytest.mark.parametrize("name", NANO)
def test_every_role_is_a_linear_of_the_expected_shape(make_adapter, name):
    adapter, head_dim = make_adapter(name), 16 if name in WIDE_HEADS else 8
    shapes = {
        Role.QUERY: (6 * head_dim, 48),
        Role.KEY: (2 * head_dim, 48),
        Role.VALUE: (2 * head_dim, 48),
        Role.OUTPUT: (48, 6 * head_dim),
        Role.GATE: (88, 48),
        Role.UP: (88, 48),
        Role.DOWN: (48, 88),
    }
    blocks = adapter.blocks()
    assert len(blocks) == 3
    for block in blocks:
        assert {role: tuple(block.linear(role).weight.shape) for role in Role} == shapes
        biases = [block.linear(role).bias for role in GROUPS["qkv"]]
        assert all(bias is None if name in UNBIASED else bias.abs().min() > 0 for bias in biases)
        assert (block.num_heads, block.num_kv_heads, block.head_dim) == (6, 2, head_dim)
    linears = {id(block.linear(role)) for block in blocks for role in Role}
    assert len(linears) == 21


def test_set_linear_takes_part_in_the_model(adapter):
    batch = batch_of(adapter)
    before = logits(adapter, batch)
    for role in Role:
        block = adapter.blocks()[1]
        old = block.linear(role)
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        block.set_linear(role, new)
        assert adapter.blocks()[1].linear(role) is new
        assert not torch.equal(logits(adapter, batch), before), role
        block.set_linear(role, old)
    assert torch.equal(logits(adapter, batch), before)


def test_norm_feeds_exactly_its_group(adapter):
    """What comes out of the norm is what the group's linears, and only they, are given."""
    block = adapter.blocks()[0]
    given = {}
    for role in Role:
        block.linear(role).register_forward_pre_hook(lambda _m, args, role=role: given.__setitem__(role, args[0]))
    written = {}
    for group in ("qkv", "gate_up"):
        norm = block.norm(group)
        norm.register_forward_hook(lambda _m, _a, output, group=group: written.__setitem__(group, output))
    logits(adapter, batch_of(adapter))
    for group, roles in GROUPS.items():
        if block.norm(group) is None:
            assert group in ("output", "down")
            continue
        fed = {role for role in Role if given[role] is written[group]}
        assert fed == set(roles)
    with pytest.raises(ModelError, match="qkv, output, gate_up, down"):
        block.norm("mlp")


def test_block_forward_replays_the_model(adapter):
    """Captured keyword arguments of the first block serve all blocks; norm and head then give the model's logits."""
    batch = batch_of(adapter, 3)
    caught = {}

    def keep(_module, args, kwargs):
        caught.update(hidden=args[0] if args else kwargs.pop("hidden_states"), kwargs=dict(kwargs))

    handle = adapter.blocks()[0].module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        expected = adapter.model(**batch.inputs, use_cache=False).logits
        handle.remove()
        hidden = caught["hidden"]
        for block in adapter.blocks():
            hidden = block.forward(hidden, caught["kwargs"])
            assert isinstance(hidden, torch.Tensor)
        assert torch.equal(adapter.head()(adapter.final_norm()(hidden)), expected)


def test_block_forward_unpacks_a_tuple(adapter):
    class Layer(nn.Module):
        def forward(self, hidden, scale):
            return hidden * scale, "attention weights"

    block = adapter.blocks()[0]
    block._layer = Layer()
    assert block.forward(torch.ones(1, 2, 3), {"scale": 2}).tolist() == [[[2.0] * 3] * 2]


@torch.no_grad()
def rotate(adapter, orthogonal, skipped=None):
    """Rotate the residual stream by ``orthogonal`` after folding the norms; ``skipped`` modules are left out."""
    for block in adapter.blocks():
        for group in ("qkv", "gate_up"):
            fold(block.norm(group), [block.linear(role) for role in GROUPS[group]])
    fold(adapter.final_norm(), [adapter.head()])
    # By storage: a module may be made anew around the parameter each time.
    left_out = None if skipped is None else skipped.weight.data_ptr()
    for writer in adapter.residual_writers():
        if writer.weight.data_ptr() != left_out:
            rotate_output(writer, orthogonal)
    for reader in adapter.residual_readers():
        if reader.weight.data_ptr() != left_out:
            reader.weight.copy_(reader.weight @ orthogonal)


def rotate_output(writer, orthogonal):
    if isinstance(writer, nn.Embedding):
        writer.weight.copy_(writer.weight @ orthogonal)
        return
    writer.weight.copy_(orthogonal.T @ writer.weight)
    if writer.bias is not None:
        writer.bias.copy_(writer.bias @ orthogonal)


def fold(norm, linears):
    for linear in linears:
        linear.weight.mul_(norm.weight)
    norm.weight.fill_(1)


@pytest.mark.parametrize("name", NANO)
def test_writers_and_readers_are_complete_and_each_needed(make_adapter, name):
    """A rotation of the residual stream leaves the model alone iff no writer and no reader is left out."""
    orthogonal, _ = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(1)))
    reference = make_adapter(name, tied=False)
    batch = batch_of(reference)
    before = logits(reference, batch)
    num_modules = len(reference.residual_writers()) + len(reference.residual_readers())
    assert num_modules == 1 + len(tower_writers(reference)) + 2 * 3 + 5 * 3 + 1
    real = batch.inputs["attention_mask"].bool()
    for index in (None, *range(num_modules)):
        adapter = make_adapter(name, tied=False)
        modules = [*adapter.residual_writers(), *adapter.residual_readers()]
        rotate(adapter, orthogonal, None if index is None else modules[index])
        error = (logits(adapter, batch) - before)[real].abs().max()
        assert error < 1e-4 if index is None else error > 1e-2, index


def tower_writers(adapter):
    """The writers of the residual stream that are neither embeddings nor in a block."""
    linears = {id(block.linear(role)) for block in adapter.blocks() for role in Role}
    others = [one for one in adapter.residual_writers() if one is not adapter.embeddings()]
    return [one for one in others if id(one) not in linears]


@torch.no_grad()
def block_inputs(adapter, batch):
    caught = []
    handles = [
        block.module.register_forward_pre_hook(
            lambda _m, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in adapter.blocks()
    ]
    logits(adapter, batch)
    for handle in handles:
        handle.remove()
    return caught


def test_tower_writers_write_the_media_tokens(adapter):
    """What they add alone moves tokens of one modality, wherever it enters; at the first block they move all media."""
    batch = batch_of(adapter)
    before = block_inputs(adapter, batch)
    written = torch.zeros_like(batch.modality, dtype=torch.bool)
    writers = tower_writers(adapter)
    assert len({id(one) for one in writers}) == len(writers) >= len(adapter.projectors())
    for writer in writers:
        offset = writer.weight if isinstance(writer, nn.Embedding) else writer.bias
        assert offset.shape[-1] == 48
        with torch.no_grad():
            offset += 1
        after = block_inputs(adapter, batch)
        with torch.no_grad():
            offset -= 1
        moved = [(new - old).abs().amax(-1) > 0.5 for new, old in zip(after, before, strict=True)]
        entry = next(index for index, tokens in enumerate(moved) if tokens.any())
        assert batch.modality[moved[entry]].unique().tolist() in ([Modality.VISION], [Modality.AUDIO])
        written |= moved[entry] if entry == 0 else torch.zeros_like(written)
    assert torch.equal(written, batch.modality > 0)


@pytest.mark.parametrize("name", NANO)
def test_tied_heads_share_their_weight(make_adapter, name):
    for tied in (True, False):
        adapter = make_adapter(name, tied=tied)
        assert (adapter.head().weight is adapter.embeddings().weight) == (tied and name not in NEVER_TIED)


def test_2d_image_positions_need_mm_token_type_ids(make_adapter):
    """transformers drops an image's rows and columns without a word when Qwen2.5-VL does not get them."""
    adapter = make_adapter("nano_vl")
    batch = adapter.encode(nano.random_samples(("vision",), 2), with_answer=False)
    positions = []
    adapter.model.model.language_model.register_forward_pre_hook(
        lambda _m, _args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    right = logits(adapter, batch)
    vision = batch.modality == Modality.VISION
    _time, rows, columns = positions[0]
    assert not torch.equal(rows[vision], columns[vision])

    del batch.inputs["mm_token_type_ids"]
    assert not torch.allclose(logits(adapter, batch), right, atol=1e-3)
    assert positions[1] is None
    with pytest.raises(ModelError, match="mm_token_type_ids"):
        adapter.modality_of(batch.inputs)
    adapter.modality_of({**batch.inputs, "pixel_values": None})


def test_omni_numbers_image_rows_and_columns(make_adapter):
    adapter = make_adapter("nano_omni")
    batch = adapter.encode(nano.random_samples(("vision", "audio"), 2), with_answer=False)
    positions = []
    adapter.model.model.language_model.register_forward_pre_hook(
        lambda _m, _args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    logits(adapter, batch)
    vision = batch.modality == Modality.VISION
    assert not torch.equal(positions[0][1][vision], positions[0][2][vision])


def test_visual_features_of_several_depths_enter_after_the_first_blocks(make_adapter):
    """DeepStack: what a block's replay adds is the merger's output, at the picture's tokens alone, and no more."""
    adapter = make_adapter("nano_qwen3_vl")
    batch = batch_of(adapter, 3)
    merged = []
    mergers = adapter.model.model.visual.deepstack_merger_list
    for merger in mergers:
        merger.register_forward_hook(lambda _m, _a, output: merged.append(output))
    hidden, replay = capture(adapter, [batch])
    inputs = block_inputs(adapter, batch)
    vision = batch.modality == Modality.VISION
    with torch.no_grad():
        for index, (block, before) in enumerate(zip(adapter.blocks(), inputs, strict=True)):
            kwargs = {name: value for name, value in replay[0].kwargs.items() if name != "masq_deepstack"}
            added = block.forward(before, replay[0].kwargs) - block.forward(before, kwargs)
            assert added[~vision].abs().max() == 0
            if index < len(mergers):
                torch.testing.assert_close(added[vision], merged[index], rtol=0, atol=1e-5)
            else:
                assert added.abs().max() == 0
    assert torch.equal(hidden[0], inputs[0])
    text = adapter.encode(nano.random_samples((), 2), with_answer=True)
    assert "masq_deepstack" not in capture(adapter, [text])[1][0].kwargs
