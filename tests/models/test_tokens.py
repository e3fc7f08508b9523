import pytest
import torch

from masq.errors import ModelError
from masq.models.sample import Modality
from masq.models.tokens import TokenModalities, real_tokens

LOWEST = torch.finfo(torch.float32).min


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


def causal(padding, past, capacity):
    """Bool mask [B, 1, T, S] of rows that see no padding and nothing after themselves."""
    real = torch.tensor(padding, dtype=torch.bool)
    num_tokens = real.shape[1] - past
    columns = torch.arange(capacity)
    rows = torch.arange(past, past + num_tokens)[:, None]
    known = torch.nn.functional.pad(real, (0, capacity - real.shape[1]))
    return ((columns <= rows) & known[:, None, :])[:, None]


PADDING = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_no_mask_means_no_padding():
    assert real_tokens(None, 2, 3, None) is None
    assert real_tokens({"full_attention": None}, 2, 3, None) is None


@pytest.mark.parametrize(("num_tokens", "expected"), [(5, PADDING), (3, [[1] * 3] * 2), (1, [[1], [1]])])
def test_the_last_columns_of_a_2d_mask_belong_to_the_call(num_tokens, expected):
    """With a KV cache the mask covers past and present tokens."""
    assert real_tokens(torch.tensor(PADDING), 2, num_tokens, Cache(5 - num_tokens)).int().tolist() == expected


def test_a_chunk_may_end_inside_the_padding():
    assert real_tokens(torch.tensor(PADDING)[:, :3], 2, 2, Cache(1)).int().tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("past", [0, 1, 3])
@pytest.mark.parametrize("capacity", [5, 9])
@pytest.mark.parametrize("additive", [False, True])
def test_4d_masks_of_dynamic_and_static_caches(past, capacity, additive):
    mask = causal(PADDING, past, capacity)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, LOWEST)
    expected = [row[past:] for row in PADDING]
    assert real_tokens(mask, 2, 5 - past, Cache(past)).int().tolist() == expected
    assert real_tokens({"full_attention": mask}, 2, 5 - past, Cache(past)).int().tolist() == expected
    if capacity == 5:
        assert real_tokens(mask, 2, 5 - past, None).int().tolist() == expected


def test_one_4d_mask_may_serve_the_whole_batch():
    assert real_tokens(causal([[1, 1, 1]], 0, 3), 4, 3, None).tolist() == [[True] * 3] * 4


@pytest.mark.parametrize("shape", [(2, 2), (2, 3, 3), (2, 1, 2, 3), (2, 1, 3, 2)])
def test_a_mask_that_does_not_cover_the_tokens_is_refused(shape):
    with pytest.raises(ModelError, match=r"cover the tokens .*for 3 tokens"):
        real_tokens(torch.ones(shape), 2, 3, None)


def test_modalities_are_looked_up_by_id():
    """Ids beyond the table, and negative ones that some models put in place of a picture, are text."""
    tokens = TokenModalities({7: Modality.VISION, 5: Modality.AUDIO})
    ids = torch.tensor([[5, 6, 7, 8], [10**6, -1, 7, 0]])
    assert tokens.of({"input_ids": ids}).tolist() == [[2, 0, 1, 0], [0, 0, 1, 0]]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert tokens.of({"input_ids": ids, "attention_mask": mask}).tolist() == [[-1, 0, 1, 0], [0, 0, 1, 0]]
    assert TokenModalities({}).of({"input_ids": ids}).tolist() == [[0] * 4] * 2
    with pytest.raises(ModelError, match="input_ids"):
        tokens.of({"inputs_embeds": ids})
