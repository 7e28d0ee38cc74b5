"""Checkpoints in several files: whole or refused, and none of their pickles runs."""

import json
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import _StorageInfo

import foldconv
from foldconv import CheckpointError

STATE = {
    "conv.weight": torch.randn(4, 3, 3, 3),
    "norm.num_batches_tracked": torch.tensor(3),
    "norm.bias": torch.ones(4),
}


def equal(found, state=STATE):
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.filterwarnings("ignore")
def test_what_torch_writes(tmp_path):
    optimizer = {"state": {name: {"exp_avg": value} for name, value in STATE.items()}}
    for number, content in enumerate(
        (STATE, {"model": STATE, "optimizer": optimizer, "epoch": 3}, {"app": {"model": STATE, "optim": optimizer}})
    ):
        dcp.save(content, checkpoint_id=tmp_path / str(number), no_dist=True)
        assert equal(foldconv.read_weights(tmp_path / str(number)))


def pieces(folder, changed=None):
    """A tensor of two pieces, as two processes of FSDP2 write it; `changed` edits what the metadata say."""
    folder.mkdir(exist_ok=True)
    whole, chunks, stored = STATE["conv.weight"], [], {}
    for rank in range(2):
        part, offset = whole[2 * rank : 2 * rank + 2].clone(), torch.Size([2 * rank, 0, 0, 0])
        path = folder / f"__{rank}_0.distcp"
        with open(path, "wb") as file:
            file.write(b"other" * rank)
            torch.save(part, file)
        info = _StorageInfo(path.name, 5 * rank, path.stat().st_size - 5 * rank)
        stored[records.MetadataIndex("model.conv.weight", offset, rank)] = info
        chunks.append(records.ChunkStorageMetadata(offset, part.shape))
    described = records.TensorStorageMetadata(records.TensorProperties(torch.float32), whole.shape, chunks)
    content = records.Metadata(
        {"model.conv.weight": described}, {"model.conv.weight": ("model", "conv.weight")}, stored, records.StorageMeta()
    )
    if changed is not None:
        changed(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    return folder


def test_pieces_are_put_together(tmp_path):
    assert equal(foldconv.read_weights(pieces(tmp_path / "a")), {"conv.weight": STATE["conv.weight"]})


class Evil:
    def __reduce__(self):
        return print, ("code of the file's ran",)


def first(content):
    return next(iter(content.storage_data.values()))


DAMAGE = {
    "code": (lambda c: setattr(c, "version", Evil()), r"\.metadata: refused, .* would run code of builtins\.print; "),
    "a piece less": (lambda c: c.storage_data.pop(next(iter(c.storage_data))), r"pieces of it are missing"),
    "another file": (lambda c: setattr(first(c), "relative_path", "../x"), r"names '\.\./x'; expected a file beside"),
    "no file": (lambda c: setattr(first(c), "relative_path", "x"), r"names 'x', which is not there"),
    "beyond the end": (lambda c: setattr(first(c), "length", 10**12), r"expected 1,000,000,000,000 bytes, found \d"),
    "negative": (lambda c: setattr(first(c), "offset", -1), r"expected places in '__0_0\.distcp'"),
    "huge": (
        lambda c: setattr(c.state_dict_metadata["model.conv.weight"], "size", torch.Size([10**6] * 3)),
        r"its tensors have 4,000,000,000,000,000,000 bytes",
    ),
    "another size": (
        lambda c: setattr(c.state_dict_metadata["model.conv.weight"], "size", torch.Size([4, 3, 3, 2])),
        r"'model\.conv\.weight': a piece of it does not fit",
    ),
    "a size that is none": (
        lambda c: setattr(c.state_dict_metadata["model.conv.weight"], "size", "many"),
        r"\.metadata: not a readable checkpoint \(invalid literal",
    ),
    "no way": (lambda c: c.planner_data.update({"model.conv.weight": ()}), r"\.metadata: not a readable checkpoint"),
    "other things": (lambda c: setattr(c, "state_dict_metadata", [1]), r"\.metadata: not a readable checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_hostile_metadata(damage, tmp_path, capsys):
    change, message = DAMAGE[damage]
    with pytest.raises(CheckpointError, match=message):
        foldconv.read_weights(pieces(tmp_path / "a", change))
    assert capsys.readouterr().out == ""


def test_a_hostile_piece(tmp_path, capsys):
    folder = pieces(tmp_path / "a")
    torch.save(Evil(), folder / "__0_0.distcp")
    pieces_of = (folder / "__0_0.distcp").stat().st_size
    pieces(tmp_path / "b", lambda c: setattr(first(c), "length", pieces_of))
    (tmp_path / "b" / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    with pytest.raises(CheckpointError, match=r"'model\.conv\.weight': refused, .* would run code of builtins\.print;"):
        foldconv.read_weights(tmp_path / "b")
    assert capsys.readouterr().out == ""


def test_files_in_parts(tmp_path):
    names = [*STATE]
    save_file({names[0]: STATE[names[0]]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: STATE[name] for name in names[1:]}, tmp_path / "model-00002-of-00002.safetensors")
    listed = {name: f"model-0000{min(number, 1) + 1}-of-00002.safetensors" for number, name in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    assert equal(foldconv.read_weights(tmp_path))
    assert equal(foldconv.read_weights(index))
    for weight_map, message in (
        (listed | {"more": listed[names[0]]}, "names 'more', which is in none of its files"),
        (listed | {names[0]: "../a.safetensors"}, r"names '\.\./a\.safetensors'; expected a file beside it"),
        (
            {name: file for name, file in listed.items() if name != names[1]},
            f"holds '{names[1]}', which .* does not say",
        ),
        ([], "expected a list of tensors with their files"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            foldconv.read_weights(tmp_path)


def test_a_saved_folder_and_others(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert equal(foldconv.read_weights(tmp_path))
    (tmp_path / "else").mkdir()
    with pytest.raises(
        CheckpointError, match=r"received a folder without last\.ckpt, \.metadata, .*; it holds nothing;"
    ):
        foldconv.read_weights(tmp_path / "else")
    with pytest.raises(CheckpointError, match=r"none\.index\.json: no such file"):
        foldconv.read_weights(tmp_path / "none.index.json")


def test_what_lies_beside_and_may_be_meant(tmp_path):
    """accelerate's second network, an average of the user's, a trainer's file of one."""
    zero = {name: torch.zeros_like(value) for name, value in STATE.items()}
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"state": {}}, tmp_path / "optimizer.bin")
    torch.save(zero, tmp_path / "pytorch_model.bin")
    torch.save({"epoch": 3}, tmp_path / "custom_checkpoint_0.pkl")
    assert equal(foldconv.read_weights(tmp_path))
    for name, content, message in (
        ("model_1.safetensors", zero, "2 dictionaries of tensors, 'model.safetensors', 'model_1.safetensors'; .*--we"),
        ("ema.pt", {"module": zero}, r"'ema\.pt\.module'; .*--weights"),
        (
            "custom_checkpoint_1.pkl",
            {"shadow_params": [*zero.values()]},
            r"in 'custom_checkpoint_1\.pkl\.shadow_params",
        ),
        ("custom_checkpoint_1.pkl", Evil(), r"1\.pkl: refused, .*; to take model\.safetensors, .*: .*/model\.safetens"),
    ):
        path = tmp_path / name
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            foldconv.read_weights(tmp_path)
        assert equal(foldconv.read_weights(tmp_path / "model.safetensors"))
        if not isinstance(content, Evil):
            assert equal(foldconv.read_weights(tmp_path, weights="model.safetensors"))
        path.unlink()
    (tmp_path / "model.safetensors.index.json").write_text("left by an earlier run")
    assert equal(foldconv.read_weights(tmp_path))


def test_folders_of_deepspeed(tmp_path):
    step = tmp_path / "global_step9"
    step.mkdir()
    (tmp_path / "latest").write_text("global_step9")
    torch.save({"module": STATE, "ds_version": "0.16"}, step / "mp_rank_00_model_states.pt")
    for folder in (tmp_path, step):
        assert equal(foldconv.read_weights(folder))
    empty = {name: value.new_empty(0) for name, value in STATE.items()}
    torch.save({"module": empty}, step / "mp_rank_00_model_states.pt")
    for path in (tmp_path, step / "mp_rank_00_model_states.pt"):
        with pytest.raises(CheckpointError, match=r"tensors are in other files \(ZeRO 3\); run the zero_to_fp32\.py"):
            foldconv.read_weights(path)
