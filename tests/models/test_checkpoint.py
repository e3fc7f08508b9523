import json
import struct

import pytest

from masq.errors import ModelError
from masq.models import checkpoint
from masq.models.zoo import nano

TYPES = ("qwen2_5_omni",)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A nano_omni in the published layout."""
    folder = tmp_path_factory.mktemp("published")
    nano.save_published("nano_omni", folder, 40_000)
    return folder


@pytest.fixture
def folder(published, tmp_path):
    """A copy that a test may damage."""
    for path in published.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def test_a_published_folder_is_in_order(folder):
    assert checkpoint.check(folder, TYPES)["model_type"] == "qwen2_5_omni"
    assert len(shards(folder)) > 5


def test_headers_cover_all_shards_and_parts(folder):
    names = checkpoint.headers(folder)
    assert names["thinker.lm_head.weight"]["shape"] == [277, 48]
    assert any(name.startswith("talker.") for name in names)
    assert any(name.startswith("token2wav.") for name in names)


def test_a_single_file_needs_no_index(folder):
    first = shards(folder)[0]
    (folder / checkpoint.INDEX).unlink()
    first.rename(folder / checkpoint.WEIGHTS)
    assert checkpoint.headers(folder)


def test_missing_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"must contain config\.json"):
        checkpoint.check(folder, TYPES)


@pytest.mark.parametrize("content", ['{"model_type": "qwen2', "[1]", "{}"])
def test_broken_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json|JSON"):
        checkpoint.check(folder, TYPES)


def test_wrong_family(folder):
    with pytest.raises(ModelError, match=r"'qwen2_5_omni' .*expected qwen2_5_vl"):
        checkpoint.check(folder, ("qwen2_5_vl",))


def test_quantized_checkpoint(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelError, match="float model"):
        checkpoint.check(folder, TYPES)


def test_missing_shard(folder):
    shards(folder)[2].unlink()
    with pytest.raises(ModelError, match="model-00003"):
        checkpoint.check(folder, TYPES)


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=["empty", "in length", "in header", "last byte"])
def test_truncated_shard(folder, kept):
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match="complete") as caught:
        checkpoint.check(folder, TYPES)
    assert "model-00002" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"a": 1}',
    ],
    ids=["git-lfs pointer", "no object", "no entries"],
)
def test_a_file_of_another_kind(folder, content):
    shards(folder)[0].write_bytes(content)
    with pytest.raises(ModelError, match="safetensors format"):
        checkpoint.check(folder, TYPES)


def test_no_weights_but_pickles(folder):
    for path in [*shards(folder), folder / checkpoint.INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*never read"):
        checkpoint.check(folder, TYPES)


def test_index_promises_an_absent_tensor(folder):
    path = folder / checkpoint.INDEX
    weight_map = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map=weight_map | {"thinker.extra.weight": shards(folder)[0].name})
    with pytest.raises(ModelError, match=r"thinker\.extra\.weight is not in"):
        checkpoint.check(folder, TYPES)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}'])
def test_broken_index(folder, content):
    (folder / checkpoint.INDEX).write_text(content)
    with pytest.raises(ModelError, match="index|JSON"):
        checkpoint.check(folder, TYPES)
