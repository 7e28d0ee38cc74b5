"""Reading other people's files: what is taken, and what is refused in one line."""

import argparse
import collections
import datetime
import functools
import pathlib
import pickle
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foldconv import CheckpointError
from foldconv.files.reading import is_safetensors, read_metadata, read_safely, read_safetensors
from foldconv.files.weights import read_weights

READERS = [is_safetensors, read_weights, read_metadata, read_safely, read_safetensors]


@pytest.fixture
def weights(tmp_path):
    save_file({"weight": torch.arange(3.0)}, tmp_path / "net.pth", {"from": "here"})  # the name proves nothing
    return tmp_path / "net.pth"


def test_safetensors_are_known_by_content(weights, tmp_path):
    assert is_safetensors(weights)
    assert read_metadata(weights) == {"from": "here"}
    for read in (read_safetensors, read_safely, read_weights):
        assert read(weights)["weight"].tolist() == [0, 1, 2]
    torch.save({"weight": torch.ones(1)}, tmp_path / "net.bin")
    assert not is_safetensors(tmp_path / "net.bin")
    assert read_weights(tmp_path / "net.bin")["weight"].tolist() == [1]


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", None])
def test_wrappers_and_prefixes_are_understood(wrapper, tmp_path):
    tensors = {"module.a": torch.ones(1), "module.b": torch.zeros(1), "epoch": 3}
    torch.save({wrapper: tensors, "epoch": 4} if wrapper else tensors, tmp_path / "net.pth")
    assert sorted(read_weights(tmp_path / "net.pth")) == ["a", "b"]


def test_a_prefix_of_some_names_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.zeros(1)}, tmp_path / "net.pth")
    assert sorted(read_weights(tmp_path / "net.pth")) == ["b", "module.a"]


def forms():
    """What trainers write, by what is particular to it; the weights are ones where others are zeros."""
    state = {"a.weight": torch.ones(2), "a.bias": torch.ones(1)}
    other = {name: tensor * 0 for name, tensor in state.items()}

    def under(prefix, values=state):
        return {prefix + name: tensor for name, tensor in values.items()}

    return {
        "compiled": under("_orig_mod."),
        "compiled and distributed": under("module._orig_mod."),
        "distributed and compiled": under("_orig_mod.module."),
        "a compiled part": {"a._orig_mod.weight": torch.ones(2), "a.bias": torch.ones(1)},
        "FSDP": under("_fsdp_wrapped_module."),
        "another name": {"generator": state, "epoch": 3},
        "two levels": {"net": {"state_dict": state}},
        "timm's average": {"state_dict": other, "state_dict_ema": state},
        "torchvision's average": {"model": other, "model_ema": {"n_averaged": torch.tensor(3), **under("module.")}},
        "a distributed model's average": {"n_averaged": torch.tensor(3), **under("module.module.")},
        "mmengine's average": {"state_dict": state, "ema_state_dict": {"steps": torch.tensor(3), **under("module.")}},
        "a default dictionary": collections.defaultdict(dict, state),
    }


@pytest.mark.parametrize("form", forms())
def test_forms_that_trainers_write(form, tmp_path):
    torch.save(forms()[form], tmp_path / "net.pth")
    found = read_weights(tmp_path / "net.pth")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a.weight": [1, 1], "a.bias": [1]}


def test_values_beside_the_tensors_do_nothing(tmp_path):
    beside = {
        "scalars": [np.float64(1), np.float32(2), np.int64(3), np.bool_(True)],
        "arrays": (np.ones(3), np.arange(3), np.array(["a"]), np.random.get_state()),
        "types": [np.dtype("float32"), np.float32, torch.float16, torch.device("cpu"), torch.Size([1])],
        "namespace": argparse.Namespace(lr=0.1, out=pathlib.Path("runs"), nested=argparse.Namespace(a=np.float64(1))),
        "simple": types.SimpleNamespace(a=1),
        "versions": torch.__version__,
        "when": [datetime.datetime(2026, 1, 1), datetime.timedelta(1), datetime.UTC],
        "others": [collections.deque([1]), functools.partial(int, "1"), {1, 2}, frozenset([1]), 2j, slice(1), range(3)],
        np.float64(1): 1,
    }
    torch.save({"state_dict": {"weight": torch.ones(1)}, **beside}, tmp_path / "net.pth")
    assert read_weights(tmp_path / "net.pth")["weight"].tolist() == [1]
    torch.save({"weight": torch.ones(1), **beside}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.pth")["weight"].tolist() == [1]


EIGHT = torch.ones(8)
OTHER_THAN_TENSORS = {
    "list": (lambda: [1.0, 2.0], "expected a tensor, received list"),
    "number": (lambda: 0.5, "expected a tensor, received float"),
    "nothing": (lambda: None, "expected a tensor, received NoneType"),
    "array": (lambda: np.ones(3), "expected a tensor, received NumPy array"),
    "sparse": (EIGHT.to_sparse, r"expected plain values, received a sparse_coo tensor; save its to_dense\(\)"),
    "quantized": (
        lambda: torch.quantize_per_tensor(EIGHT, 0.1, 0, torch.qint8),
        r"expected plain values, received a quantized tensor; save it before it is quantized, or its dequantize",
    ),
    "meta": (lambda: EIGHT.to("meta"), "expected plain values, received a meta tensor; it has a shape only"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", OTHER_THAN_TENSORS)
def test_what_is_no_plain_tensor(what, tmp_path):
    make, message = OTHER_THAN_TENSORS[what]
    for name in ("a.bias", "bias"):
        torch.save({"state_dict": {"a.weight": torch.ones(3), name: make()}}, tmp_path / "net.pth")
        with pytest.raises(CheckpointError, match=rf"net\.pth: '{name}': {message}"):
            read_weights(tmp_path / "net.pth")


def test_more_values_than_the_file_has(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"its tensors have 4,000,000,000,000 bytes, the file [\d,]+; is it a"):
        read_weights(tmp_path / "net.pth")


def test_which_of_several(tmp_path):
    torch.save({"generator": {"a": torch.ones(1)}, "critic": {"a": torch.ones(1)}}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="holds 2 dictionaries of tensors, 'generator', 'critic'; save the one"):
        read_weights(tmp_path / "net.pth")
    torch.save({"a": torch.ones(1), "_orig_mod.a": torch.ones(1)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"holds '_orig_mod\.a' with and without '_orig_mod\.'"):
        read_weights(tmp_path / "net.pth")
    holds_itself = {}
    holds_itself["model"] = holds_itself
    torch.save(holds_itself, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="found dict without any"):
        read_weights(tmp_path / "net.pth")


def test_nested_beyond_any_use(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "net.pth")
    with zipfile.ZipFile(tmp_path / "net.pth") as given, zipfile.ZipFile(tmp_path / "deep.pth", "w") as deep:
        for info in given.infolist():
            levels = b"\x80\x02" + b"]" * 300 + b"a" * 299 + b"."
            deep.writestr(info.filename, levels if info.filename.endswith("data.pkl") else given.read(info))
    with pytest.raises(CheckpointError, match=r"deep\.pth: nested over 200 levels deep"):
        read_safely(tmp_path / "deep.pth")


def test_a_whole_model_is_refused_by_name(tmp_path):
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"would run code of torch\.nn\.modules\.linear\.Linear; where"):
        read_safely(tmp_path / "net.pth")


def test_archives_of_other_kinds_are_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / "scripted.pt", "w") as archive:  # the names that torch.jit.save gives
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"scripted/{name}", b"")
    np.savez(tmp_path / "arrays.npz", weight=np.ones(1))
    torch.save({"weight": torch.ones(1)}, tmp_path / "new.pt", pickle_protocol=5)
    for name, words in {
        "scripted.pt": "a TorchScript program; save its weights alone: torch.save",
        "arrays.npz": "a zip archive, but none of torch.save's; it holds 'weight.npy'",
        "new.pt": "pickled by another protocol .* without pickle_protocol=",
    }.items():
        with pytest.raises(CheckpointError, match=rf"{name}: {words}"):
            read_weights(tmp_path / name)


def test_a_class_that_the_caller_allows(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "own": Own()}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"would run code of .*test_reading\.Own; where that is trusted, load it"):
        read_weights(tmp_path / "net.pth")
    with torch.serialization.safe_globals([Own]):
        assert list(read_weights(tmp_path / "net.pth")) == ["a"]


class Own:
    pass


@pytest.mark.parametrize("read", READERS)
def test_a_missing_file(read, tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth: no such file; expected a checkpoint \(\.pth, "):
        read(tmp_path / "none.pth")


@pytest.mark.parametrize("read", [read_safetensors, read_metadata, read_safely, read_weights])
def test_truncated_safetensors(read, weights):
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"net\.pth: not a readable safetensors file \(.*\); is it whole"):
        read(weights)


class Evil:
    def __reduce__(self):
        return print, ("code of the file's ran",)


@pytest.mark.parametrize("read", [read_safely, read_weights])
def test_code_is_refused_and_does_not_run(read, tmp_path, capsys):
    for save in (lambda path: torch.save({"a": Evil()}, path), lambda path: path.write_bytes(pickle.dumps(Evil(), 2))):
        save(tmp_path / "evil.pth")
        with pytest.raises(CheckpointError, match=r"evil\.pth: refused, .* would run code of builtins\.print;"):
            read(tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(1)], {}, torch.ones(1)])
def test_no_tensors_by_name(content, tmp_path):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=f"expected a dictionary of tensors, found {type(content).__name__}"):
        read_weights(tmp_path / "net.pth")


def test_what_the_user_allowed_does_not_stand_in_the_way(tmp_path):
    """Of several things allowed by one name torch takes any; what resumes mmengine's runs allows NumPy's own types."""
    torch.save({"weight": torch.ones(2), "metrics": np.arange(3.0), "best": np.float64(0.5)}, tmp_path / "net.pth")
    others = [(type(f"Other{number}", (), {}), "numpy.dtype") for number in range(50)]
    with torch.serialization.safe_globals([np.ndarray, np.dtype, Own, *others]):
        before = set(torch.serialization.get_safe_globals())
        assert torch.equal(read_safely(tmp_path / "net.pth")["weight"], torch.ones(2))
        assert set(torch.serialization.get_safe_globals()) == before
