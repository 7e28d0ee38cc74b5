"""The errors' hierarchy, and each message with its values filled in, unless another file already matches it."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import foldconv
from foldconv import errors


def matches(text):
    return re.escape(text)


@pytest.mark.parametrize("name", ["NoMatchError", "UnsupportedError", "CheckpointError"])
def test_errors_of_the_callers_making_are_value_errors(name):
    assert issubclass(getattr(foldconv, name), foldconv.FoldConvError)
    assert issubclass(getattr(foldconv, name), ValueError)


def test_a_wrong_fold_is_not_the_callers_fault():
    assert issubclass(foldconv.FoldMismatchError, foldconv.FoldConvError)
    assert not issubclass(foldconv.FoldMismatchError, ValueError)


def test_nearest_takes_the_closest_and_nothing_far():
    assert errors.nearest("doconf", ["orepa", "doconv"]) == "; did you mean 'doconv'?"
    assert errors.nearest("zzz", ["orepa", "doconv"]) == ""
    assert errors.nearest("doconv", []) == ""


def test_unknown_lists_what_is_known_up_to_a_bound():
    known = [f"name{n}" for n in range(99)]
    assert errors.unknown("layer", 3, []) == "unknown layer 3; expected none"
    assert errors.unknown("layer", "x", known[:24]) == f"unknown layer 'x'; expected one of: {', '.join(known[:24])}"
    bounded = f"; expected one of: {', '.join(known[:24])}, ..."
    assert errors.unknown("layer", "name77", known) == f"unknown layer 'name77'; did you mean 'name77'?{bounded}"


def test_messages_are_one_short_line_whatever_is_in_them():
    bomb = ["lol"]
    for _ in range(40):
        bomb = [bomb] * 9
    for value in (bomb, "x" * 10**6, 16**5000, {"k" * 9999: 1}, "a\x1b[31m\n\ud800b"):
        text = str(foldconv.CheckpointError(f"net.pth: {errors.unknown('layer', value, ['a', 'b'])}"))
        assert len(text) < 300, text
        assert text.isprintable()
        text.encode()
    assert str(errors.FoldConvError("a\x1b[31m\n\ud800b")) == r"a\x1b[31m \ud800b"
    assert str(foldconv.CheckpointError("a" * 5000 + "b" * 5000)) == "a" * 997 + " ... " + "b" * 998


def test_unknown_method_names_the_nearest():
    text = "unknown method 'doconf'; did you mean 'doconv'?; expected one of: "
    with pytest.raises(foldconv.UnsupportedError, match=matches(text)):
        foldconv.expand(nn.Conv2d(1, 1, 3), "doconf")


def test_method_of_a_wrong_type():
    with pytest.raises(TypeError, match=matches("expected a name or a config such as foldconv.DOConv(), received 3")):
        foldconv.expand(nn.Conv2d(1, 1, 3), 3)


def test_wrong_init():
    text = "init: expected 'preserve' or 'paper', received 'zeros'"
    with pytest.raises(foldconv.UnsupportedError, match=matches(text)):
        foldconv.expand(nn.Conv2d(1, 1, 3), "doconv", init="zeros")


def test_model_without_convolutions():
    text = "nothing to expand with 'doconv' in Linear: expected convolutions (nn.Conv1d ... "
    with pytest.raises(foldconv.NoMatchError, match=matches(text)):
        foldconv.expand(nn.Linear(2, 2), "doconv")


def test_pattern_without_a_match_names_the_nearest_and_some_that_exist():
    net = nn.ModuleDict({"stem": nn.Conv2d(1, 1, 3), "head": nn.Sequential(nn.Conv2d(1, 1, 3))})
    text = (
        "the pattern 'stm' matches no convolution of ModuleDict; did you mean 'stem'?; expected a glob on names such as"
    )
    with pytest.raises(foldconv.NoMatchError, match=matches(f"{text} 'stem', 'head.0'")):
        foldconv.expand(net, "doconv", include="stm")


def test_pattern_that_names_a_container_is_told_about_the_glob():
    net = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(1, 1, 3)), "x": nn.Conv2d(1, 1, 3)})
    with pytest.raises(foldconv.NoMatchError, match=matches("did you mean 'backbone.*'?")):
        foldconv.expand(net, "doconv", exclude="backbone")


def test_nothing_selected():
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3))
    with pytest.raises(
        foldconv.NoMatchError, match="none of its 2 convolutions is selected by include, exclude and where"
    ):
        foldconv.expand(net, "doconv", where=lambda name, module: False)


def test_nothing_replaceable_says_why():
    with pytest.raises(foldconv.NoMatchError, match=r"2 convolutions selected, none of them replaceable; 0: .*one tap"):
        foldconv.expand(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)), "doconv")


def test_root_is_called_the_root():
    with pytest.raises(foldconv.NoMatchError, match=r"the root: .*one tap"):
        foldconv.expand(nn.Conv2d(1, 1, 1), "doconv")


def test_method_error_names_the_layer():
    with pytest.raises(foldconv.UnsupportedError, match=r"^0\.0: depth_multiplier: .* ≥ 9.*received 3"):
        foldconv.expand(nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 3))), foldconv.DOConv(depth_multiplier=3))


class Uncopyable(nn.Sequential):
    def __deepcopy__(self, memo):
        raise RuntimeError("holds a socket")


@pytest.mark.parametrize("act", [lambda m: foldconv.expand(m, "doconv"), foldconv.fold])
def test_model_that_cannot_be_copied(act):
    text = "Uncopyable cannot be copied (RuntimeError: holds a socket); pass inplace=True"
    with pytest.raises(foldconv.UnsupportedError, match=matches(text)):
        act(Uncopyable(nn.Conv2d(1, 1, 3)))


def test_model_that_cannot_be_copied_cannot_be_followed_either():
    model = Uncopyable(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))
    with pytest.raises(foldconv.UnsupportedError, match=r"holds a socket.*to fold without: batchnorm=False"):
        foldconv.fold(model, batchnorm=True, inplace=True)


def test_forward_replaced_on_a_foldable_layer():
    net = foldconv.expand(nn.Sequential(nn.Conv2d(1, 1, 3)), "doconv")
    net[0].forward = lambda x: x
    with pytest.raises(foldconv.UnsupportedError, match=r"^0: its forward was replaced on the instance"):
        foldconv.fold(net, inplace=True)


def test_not_finite_counts_and_names():
    net = foldconv.expand(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 3)), "doconv")
    with torch.no_grad():
        net[1].weight[0, 0, 0, 0] = float("inf")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        foldconv.FoldMismatchError, match=r"^1: expected a finite kernel, found \d of 9 not finite; the layer's"
    ):
        foldconv.fold(net, inplace=True)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("model", [None, "resnet18", {}])
def test_what_is_no_module(model):
    calls = [
        lambda: foldconv.expand(model, "doconv"),
        lambda: foldconv.expand(model, "repvgg"),
        lambda: foldconv.fold(model),
        lambda: foldconv.fold(model, batchnorm=True, inplace=True),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module, received {type(model).__name__}"):
            call()


def test_an_extras_command_is_right_where_foldconv_stands(monkeypatch, tmp_path):
    wheel, checkout = tmp_path / "site-packages" / "foldconv", tmp_path / "a copy" / "src" / "foldconv"
    checkout.mkdir(parents=True)
    (tmp_path / "a copy" / "pyproject.toml").touch()
    for folder, command in (
        (wheel, 'pip install "foldconv[train]"'),
        (checkout, f'pip install -e "{tmp_path / "a copy"}[train]"'),
    ):
        monkeypatch.setattr(errors, "__file__", str(folder / "errors.py"))
        assert errors.install("train") == command


def test_hints_have_one_home_for_there_is_no_index_to_name():
    source = Path(foldconv.__file__).parent
    told = [path for path in source.rglob("*.py") if re.search(r"install [\"']*foldconv", path.read_text("utf-8"))]
    assert told == [source / "errors.py"]
