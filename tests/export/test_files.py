"""Every damaged checkpoint is refused before anything is built from it, with an error that says what is wrong."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5OmniThinkerForConditionalGeneration

from masq.errors import MasqError, ModelError
from masq.export import assemble, checkpoint, files
from masq.export.describe import listing
from masq.export.description import VERSIONS
from masq.files import canonical_hash

WEIGHTS = "model.safetensors"
NUM_MUTATIONS = 240
Mutation = Callable[[Path, random.Random], None]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def seal(folder: Path, config: dict[str, Any]) -> None:
    """Write a configuration with checksums that fit: what is wrong with it must be found by itself."""
    about = config.get("quantization_config")
    if isinstance(about, dict):
        about["config_sha256"] = files.config_digest(config)
        about["sha256"] = canonical_hash({key: value for key, value in about.items() if key != "sha256"})
    (folder / "config.json").write_text(json.dumps(config))


def change_config(edit: Callable[[dict[str, Any], random.Random], None]) -> Mutation:
    def mutation(folder: Path, rng: random.Random) -> None:
        config = read(folder)
        edit(config, rng)
        seal(folder, config)

    return mutation


def change_tensors(edit: Callable[[dict[str, torch.Tensor], random.Random], None]) -> Mutation:
    """Change tensors and bring every checksum up to date."""

    def mutation(folder: Path, rng: random.Random) -> None:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        edit(tensors, rng)
        found = listing(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", files.LISTING: files.listing_text(found)})
        config = read(folder)
        config["quantization_config"]["tensors_sha256"] = files.tensors_digest(found)
        seal(folder, config)

    return mutation


def linear_of(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return rng.choice(list(config["quantization_config"]["linears"].values()))


def truncate(name: str) -> Mutation:
    def mutation(folder: Path, rng: random.Random) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: rng.randrange(len(content))])

    return mutation


def flip(name: str, where: str) -> Mutation:
    """Flip one bit of the header or the data of a weight file, or of any other file."""

    def mutation(folder: Path, rng: random.Random) -> None:
        content = bytearray((folder / name).read_bytes())
        header = 8 + struct.unpack("<Q", content[:8])[0] if name == WEIGHTS else 0
        start, end = {"header": (0, header), "data": (header, len(content)), "any": (0, len(content))}[where]
        content[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(content)

    return mutation


def rewrite_header(edit: Callable[[dict[str, Any], random.Random], None]) -> Mutation:
    """Change the header of the weight file, data untouched."""

    def mutation(folder: Path, rng: random.Random) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        edit(header, rng)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return mutation


def entry_of(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return header[rng.choice(sorted(name for name in header if name != "__metadata__"))]


def huge_header(folder: Path, rng: random.Random) -> None:
    content = (folder / WEIGHTS).read_bytes()
    length = rng.choice([1 << 63, (1 << 64) - 1, 1 << 40, len(content), 100_000_001])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])


def deep_json(name: str) -> Mutation:
    def mutation(folder: Path, rng: random.Random) -> None:
        depth = rng.randrange(100_000, 300_000)
        text = "[" * depth
        if name == WEIGHTS:
            (folder / name).write_bytes(struct.pack("<Q", depth) + text.encode())
        else:
            (folder / name).write_text('{"quantization_config": ' + text)

    return mutation


def delete(name: str) -> Mutation:
    return lambda folder, _rng: (folder / name).unlink()


def other_type(value: Any, rng: random.Random) -> Any:
    """A JSON value of another type."""
    others = [None, True, 7, 1.5, "text", [], {}, [[1]], -1, 10**30]
    return rng.choice([one for one in others if type(one) is not type(value) and one != value])


def wrong_type(config: dict[str, Any], rng: random.Random) -> None:
    about = config["quantization_config"]
    key = rng.choice(["version", "quant_method", "formats", "linears", "rotation", "placeholders", "made_by"])
    about[key] = other_type(about[key], rng)


def wrong_linear(config: dict[str, Any], rng: random.Random) -> None:
    entry = linear_of(config, rng)
    key = rng.choice(["in_features", "out_features", "format", "smoothing", "ranks", "group"])
    entry[key] = other_type(entry[key], rng)


def wrong_size(config: dict[str, Any], rng: random.Random) -> None:
    entry = linear_of(config, rng)
    key = rng.choice(["in_features", "out_features"])
    entry[key] = rng.choice([0, -1, entry[key] + 1, entry[key] * 2, 1 << 40])


def wrong_format(config: dict[str, Any], rng: random.Random) -> None:
    weight = config["quantization_config"]["formats"][0]["weight"]
    weight |= rng.choice(
        [{"bits": 8}, {"bits": 9}, {"symmetric": False}, {"granularity": "per_token"}, {"group_size": 5}]
    )


def wrong_name(config: dict[str, Any], rng: random.Random) -> None:
    linears = config["quantization_config"]["linears"]
    name = rng.choice(sorted(linears))
    linears[rng.choice(["nowhere", "model.visual.patch_embed.proj", name + "x", "../" + name])] = linears.pop(name)


def wrong_rest(config: dict[str, Any], rng: random.Random) -> None:
    """Keys that must be there, no others, and values that fit each other."""
    about = config["quantization_config"]
    edits = [
        lambda: about.pop(rng.choice(sorted(set(about) - {"sha256", "config_sha256"}))),
        lambda: about.update(extra=1),
        lambda: linear_of(config, rng).update(bias="float64"),
        lambda: linear_of(config, rng).update(factor_dtype=None),
        lambda: linear_of(config, rng)["ranks"].update(smell=3),
        lambda: linear_of(config, rng)["ranks"].update(vision=1 << 30),
        lambda: linear_of(config, rng).update(smoothing=2),
        lambda: about["placeholders"].update(audio=about["placeholders"]["vision"]),
        lambda: about["placeholders"].update(audio=[-5]),
        lambda: about["rotation"].update(inputs=["model.language_model.layers.0.mlp.down_proj"]),
        lambda: about.update(linears={}),
        lambda: about.update(formats=[]),
    ]
    rng.choice(edits)()


def unsealed(config: dict[str, Any], rng: random.Random) -> None:
    """A number of the model's own configuration, after which the checksum does not fit."""
    config["text_config"]["rms_norm_eps"] *= 1 + rng.random()


def edit_unsealed(folder: Path, rng: random.Random) -> None:
    config = read(folder)
    unsealed(config, rng)
    (folder / "config.json").write_text(json.dumps(config))


def old_version(config: dict[str, Any], rng: random.Random) -> None:
    config["quantization_config"]["version"] = rng.choice([0, 2, 99, -1, "1", 1.0, None, True])


def pick(tensors: dict[str, torch.Tensor], rng: random.Random, *endings: str) -> str:
    return rng.choice(sorted(name for name in tensors if name.endswith(endings)))


def not_finite(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = pick(tensors, rng, ".scale", ".inverse_smoothing", ".left_vision", ".right_audio")
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])


def negative_scale(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    tensors[pick(tensors, rng, ".scale")][0] *= -1


def no_such_row(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    tensors[pick(tensors, rng, ".smoothing_rows")][1] = rng.choice([3, -1, 1 << 40])


def missing_tensor(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    del tensors[pick(tensors, rng, ".codes", ".scale", ".left_audio")]


def additional_tensor(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = pick(tensors, rng, ".codes")
    tensors[name.replace("codes", "zero_point")] = torch.zeros(2, 2, dtype=torch.uint8)


def swapped_dtype(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = pick(tensors, rng, ".codes", ".scale", ".smoothing_rows")
    dtype = rng.choice([torch.int8, torch.float64, torch.float16, torch.int32])
    tensors[name] = tensors[name].to(dtype)


def wrong_shape(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = pick(tensors, rng, ".codes", ".scale", ".left_vision")
    value = tensors[name]
    tensors[name] = rng.choice([value[:-1], value.flatten(), value.unsqueeze(0)]).contiguous()


MUTATIONS: dict[str, Mutation] = {
    "truncated weights": truncate(WEIGHTS),
    "truncated config": truncate("config.json"),
    "bit flipped in the header": flip(WEIGHTS, "header"),
    "bit flipped in the data": flip(WEIGHTS, "data"),
    "bit flipped in the config": flip("config.json", "any"),
    "huge header": huge_header,
    "deep JSON in the header": deep_json(WEIGHTS),
    "deep JSON in the config": deep_json("config.json"),
    "weights gone": delete(WEIGHTS),
    "config gone": delete("config.json"),
    "wrong version": change_config(old_version),
    "wrong type": change_config(wrong_type),
    "wrong type of a linear": change_config(wrong_linear),
    "wrong size of a linear": change_config(wrong_size),
    "wrong format": change_config(wrong_format),
    "wrong name of a linear": change_config(wrong_name),
    "wrong rest": change_config(wrong_rest),
    "config edited": edit_unsealed,
    "shape in the header": rewrite_header(lambda header, rng: entry_of(header, rng).update(shape=[3, 1 << 62])),
    "negative shape": rewrite_header(lambda header, rng: entry_of(header, rng).update(shape=[-1])),
    "dtype in the header": rewrite_header(lambda header, rng: entry_of(header, rng).update(dtype="F8_E4M3")),
    "other dtype of a size": rewrite_header(lambda header, rng: entry_of(header, rng).update(dtype="I32")),
    "overlap": rewrite_header(lambda header, rng: entry_of(header, rng).update(data_offsets=[0, 8])),
    "offsets past the end": rewrite_header(lambda h, rng: entry_of(h, rng).update(data_offsets=[0, 1 << 50])),
    "no listing": rewrite_header(lambda header, rng: header.pop("__metadata__")),
    "not finite": change_tensors(not_finite),
    "negative scale": change_tensors(negative_scale),
    "no such row": change_tensors(no_such_row),
    "missing tensor": change_tensors(missing_tensor),
    "additional tensor": change_tensors(additional_tensor),
    "swapped dtype": change_tensors(swapped_dtype),
    "wrong shape": change_tensors(wrong_shape),
}


@pytest.fixture(scope="module")
def intact(cell) -> Path:
    return cell("masquant").folder


def damaged(intact: Path, folder: Path, name: str, seed: int) -> Path:
    shutil.copytree(intact, folder, copy_function=shutil.copyfile)
    MUTATIONS[name](folder, random.Random(seed))
    return folder


def test_the_intact_one_is_accepted(intact, tmp_path):
    """And resealed without a change it is still: so each refusal below is of its mutation alone."""
    for mutation in (change_config(lambda *_: None), change_tensors(lambda *_: None)):
        folder = tmp_path / "copy"
        shutil.copytree(intact, folder)
        mutation(folder, random.Random(0))
        assert checkpoint.load(folder) is not None
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_every_mutation_is_refused(intact, tmp_path, name, monkeypatch):
    """In all more than 200, by masq's own load; nothing is built."""
    monkeypatch.setattr(assemble, "assemble", lambda *_: pytest.fail("a model was built"))
    monkeypatch.setattr("masq.export.transformers_quantizer.assemble", assemble.assemble)
    for seed in range(-(-NUM_MUTATIONS // len(MUTATIONS))):
        folder = damaged(intact, tmp_path / str(seed), name, seed)
        with pytest.raises(MasqError) as caught:
            checkpoint.load(folder)
        assert len(str(caught.value)) < 400
        shutil.rmtree(folder)


FOUND_BY_TRANSFORMERS = {"truncated config", "deep JSON in the config", "config gone", "weights gone"}


@pytest.mark.parametrize("name", sorted(MUTATIONS.keys() - {"bit flipped in the config", "wrong type"}))
def test_transformers_refuses_it_too(intact, tmp_path, name):
    """from_pretrained itself: it finds some damage before it asks masq, with an error of its own.

    It never asks where quant_method is not masq any more, which two mutations may do: it warns of a method that it does
    not know and goes on. ``checkpoint.load`` does not.
    """
    folder = damaged(intact, tmp_path / "copy", name, 1)
    with pytest.raises((ValueError, OSError, RecursionError)) as caught:
        AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(caught.value, MasqError) == (name not in FOUND_BY_TRANSFORMERS)


def without(tensors: dict[str, torch.Tensor], _rng: random.Random) -> None:
    del tensors["model.language_model.norm.weight"]


def longer(tensors: dict[str, torch.Tensor], _rng: random.Random) -> None:
    tensors["lm_head.weight"] = torch.zeros(278, 48)


def more(tensors: dict[str, torch.Tensor], _rng: random.Random) -> None:
    tensors["model.language_model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize("edit", [without, longer, more])
def test_tensors_that_are_not_quantized_must_be_those_of_the_model(intact, tmp_path, edit):
    """transformers makes up what is missing and leaves out what it does not know: not here."""
    shutil.copytree(intact, tmp_path / "copy")
    change_tensors(edit)(tmp_path / "copy", random.Random(0))
    for attempt in (checkpoint.load, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(ModelError, match="must be those of the model"):
            attempt(tmp_path / "copy")


def test_a_damaged_index_is_refused(cell, tmp_path):
    made = cell("masquant")
    checkpoint.save(made.adapter, tmp_path / "shards", {}, max_shard_bytes=30_000)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = sorted(good["weight_map"])[0]
    for weight_map in (
        {},
        [],
        {**good["weight_map"], first: "../../etc/passwd"},
        {**good["weight_map"], first: 3},
        {**good["weight_map"], first: "model-00099-of-00099.safetensors"},
        {**good["weight_map"], "more": good["weight_map"][first]},
        {name: place for name, place in good["weight_map"].items() if name != first},
    ):
        index.write_text(json.dumps({**good, "weight_map": weight_map}))
        with pytest.raises(ModelError):
            checkpoint.load(tmp_path / "shards")
    index.write_text(json.dumps(good))
    assert checkpoint.check(tmp_path / "shards")
    # A weight file of another checkpoint fits in name and size, not in content.
    checkpoint.save(cell("float32_factors").adapter, tmp_path / "other", {}, max_shard_bytes=30_000)
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    shutil.copyfile(tmp_path / "other" / sorted(path.name for path in (tmp_path / "other").glob("*.sa*"))[0], shard)
    with pytest.raises(ModelError):
        checkpoint.load(tmp_path / "shards")


def test_signs_and_zero_points_have_their_range(cell, tmp_path):
    def half(tensors, rng):
        tensors[pick(tensors, rng, ".signs")][3] = 0.5

    def large(tensors, rng):
        tensors[pick(tensors, rng, ".zero_point")][0] = 16

    for name, edit in (("quarot", half), ("w4a16", large)):
        shutil.copytree(cell(name).folder, tmp_path / name)
        change_tensors(edit)(tmp_path / name, random.Random(0))
        with pytest.raises(ModelError, match="in their range"):
            checkpoint.load(tmp_path / name)


def no_scale(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    del tensors[pick(tensors, rng, ".factor_scale_vision", ".factor_scale_audio")]


def bad_scale(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    tensors[pick(tensors, rng, ".factor_scale_vision")][0] = rng.choice([torch.nan, torch.inf, -1.0])


def bad_code(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    tensors[pick(tensors, rng, ".left_vision", ".right_audio")][0, 0] = -128


def sixteen_bits(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = pick(tensors, rng, ".left_vision", ".right_audio")
    tensors[name] = tensors[name].bfloat16()


def two_scales(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = pick(tensors, rng, ".factor_scale_vision")
    tensors[name] = tensors[name].repeat(2)


CODED_MUTATIONS = {
    "no scale": change_tensors(no_scale),
    "bad scale": change_tensors(bad_scale),
    "bad code": change_tensors(bad_code),
    "sixteen bits": change_tensors(sixteen_bits),
    "two scales": change_tensors(two_scales),
    "version of others": change_config(lambda config, _: config["quantization_config"].update(version=1)),
    "another dtype": change_config(lambda config, rng: linear_of(config, rng).update(factor_dtype="bfloat16")),
    "a bias in codes": change_config(lambda config, rng: linear_of(config, rng).update(bias="int8")),
}


@pytest.mark.parametrize("name", list(CODED_MUTATIONS))
def test_damaged_coded_factors_are_refused(cell, tmp_path, name):
    for seed in range(4):
        folder = tmp_path / str(seed)
        shutil.copytree(cell("int8_factors").folder, folder)
        assert checkpoint.check(folder).version == 2
        CODED_MUTATIONS[name](folder, random.Random(seed))
        with pytest.raises(MasqError):
            checkpoint.load(folder)


def test_a_newer_version_says_so(intact, tmp_path):
    shutil.copytree(intact, tmp_path / "copy")
    change_config(lambda config, _: config["quantization_config"].update(version=VERSIONS[-1] + 1))(
        tmp_path / "copy", random.Random(0)
    )
    with pytest.raises(ModelError, match=f"version {VERSIONS[-1] + 1}.*the masq that wrote it"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "copy")


def test_a_model_too_deep_to_build_is_refused(intact, tmp_path):
    """A model on the meta device takes time and memory for every layer, before any tensor is looked at."""
    shutil.copytree(intact, tmp_path / "copy")
    change_config(lambda config, _: config["vision_config"].update(depth=10**9))(tmp_path / "copy", random.Random(0))
    with pytest.raises(ModelError, match="must lie between 0 and 4096"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "copy")


def test_code_in_the_folder_is_never_run(intact, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(intact, folder)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = read(folder)
    config["auto_map"] = {"AutoModelForImageTextToText": "modeling_evil.Model", "AutoConfig": "modeling_evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="as it was exported"):
        checkpoint.load(folder)
    with pytest.raises(ModelError, match="as it was exported"):
        AutoModelForImageTextToText.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_without_a_folder_are_refused(intact):
    with pytest.raises(ModelError, match="read from its folder"):
        Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(None, config=_config(intact), state_dict={})


def test_another_config_than_that_of_the_folder_is_refused(intact, cell):
    with pytest.raises(ModelError, match="of one checkpoint"):
        AutoModelForImageTextToText.from_pretrained(cell("rtn").folder, config=_config(intact))


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder)
