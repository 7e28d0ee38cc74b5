"""`read_weights`: files in the forms that trainers write, and which of their weights are taken."""

import argparse
import collections
import functools
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import foldconv
from foldconv import CheckpointError
from foldconv.files.trainers import FORMS
from foldconv.files.weights import take

NET = nn.Sequential(
    collections.OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2), head=nn.Sequential(nn.Linear(2, 3)))
)
RIGHT = {name: torch.full_like(value, 7) for name, value in NET.state_dict().items()}
WRONG = {name: torch.zeros_like(value) for name, value in RIGHT.items()}
MORE = {name: value + 1 for name, value in RIGHT.items()}
ARGS = argparse.Namespace(lr=0.1, device=torch.device("cpu"))
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(2, 1, 3, 3)}}, "param_groups": [{"lr": 0.1}]}
LIGHTNING = {"pytorch-lightning_version": "2.6.6", "optimizer_states": [OPTIMIZER], "loops": {}, "callbacks": {}}


def under(prefix, values=RIGHT):
    return {prefix + name: value for name, value in values.items()}


def averaged(prefix, values=RIGHT, count="n_averaged"):
    return {count: torch.tensor(3), **under(prefix, values)}


SWA = "StochasticWeightAveraging"
ALONE = {
    # By what is read without a network: the names need none.
    "bare": RIGHT,
    "timm": {"state_dict": RIGHT, "arch": "resnet18", "args": ARGS, "optimizer": OPTIMIZER, "metric": np.float64(1)},
    "timm, average": {"state_dict": WRONG, "state_dict_ema": RIGHT, "args": ARGS, "optimizer": OPTIMIZER},
    "timm, compiled average": {"state_dict": WRONG, "state_dict_ema": under("module._orig_mod.")},
    "timm, no average": {"state_dict": RIGHT, "state_dict_ema": None},
    "torchvision": {"model": RIGHT, "optimizer": OPTIMIZER, "args": ARGS, "scaler": {"scale": 2.0}},
    "torchvision, average": {"model": WRONG, "model_ema": averaged("module."), "args": ARGS},
    "torchvision, parallel average": {"model": WRONG, "model_ema": averaged("module.module.")},
    "mmengine": {
        "meta": {"mmengine_version": "0.10.7"},
        "state_dict": RIGHT,
        "ema_state_dict": averaged("module.", WRONG, "steps"),
        "message_hub": {"runtime_info": {"eta": np.float64(0)}},
    },
    "mmcv 1": {"state_dict": RIGHT | {f"ema_{name.replace('.', '_')}": value for name, value in WRONG.items()}},
    "Lightning, average": {
        "state_dict": under("model."),
        "current_model_state": under("model.", WRONG),
        "averaging_state": {"n_averaged": torch.tensor(3)},
        **LIGHTNING,
    },
    "Lightning, SWA": {
        **LIGHTNING,
        "state_dict": under("net."),
        "callbacks": {SWA: {"average_model_state": under("net.", WRONG), "n_averaged": 2}},
    },
    "Lightning, compiled and parallel": {"state_dict": under("model.module._orig_mod."), **LIGHTNING},
    "RT-DETR": {"model": WRONG, "ema": {"module": RIGHT, "updates": 9}},
    "a network in a dictionary": {"net": RIGHT, "acc": torch.tensor(0.9), "rng": torch.get_rng_state()},
    "DeepSpeed": {"module": RIGHT, "optimizer": {"fp32_groups": [torch.ones(3)]}, "ds_version": "0.16"},
    "DeepSpeed by Lightning": {"module": under("_forward_module.model."), **LIGHTNING},
    "compiled": under("_orig_mod."),
    "compiled, then parallel": {"model": under("module._orig_mod.")},
    "parallel, then compiled": {"state_dict": under("_orig_mod.module.")},
    "Composer": {"state": {"model": under("module."), "optimizers": {"SGD": OPTIMIZER}}, "rng": []},
    "a mean and deviation beside it": {"state_dict": RIGHT, "data": {"mean": torch.ones(3), "std": torch.ones(3)}},
    "DeepSpeed, frozen parts": {"module": RIGHT, "frozen_param_fragments": {"conv.weight": RIGHT["conv.weight"]}},
    "arguments of Lightning's": {
        "state_dict": under("net."),
        **LIGHTNING,
        "hyper_parameters": {
            "optimizer": functools.partial(torch.optim.SGD, lr=0.1),
            "scheduler": torch.optim.lr_scheduler.StepLR,
            "loss": nn.CrossEntropyLoss(weight=torch.ones(3)),
        },
    },
    "schedule-free, evaluating": {
        "model": RIGHT,
        "optimizer": {"param_groups": [{"params": [0], "train_mode": False}]},
    },
    "what optimizers keep by name": {
        "model": RIGHT,
        **dict.fromkeys(("momentum", "grads", "model_optimizer", "optim_state_dict", "random_state"), WRONG),
    },
    "keyed optimizer": {"model": RIGHT, "optim": {"state": {n: {"exp_avg": v} for n, v in RIGHT.items()}}},
}
FITTED = {
    # What only the network tells.
    "Lightning": {"state_dict": {**under("model."), "loss.weight": torch.ones(3)}, **LIGHTNING},
    "a backbone": {"state_dict": {**under("backbone."), "head.fc.weight": torch.ones(3, 3)}},
    "in the middle": under("module.model.backbone.net."),
    "a part of it is parallel": {f"task.module.{name}": value for name, value in RIGHT.items()},
    "two names of one network": {**under("net."), **under("alias.")},
    "an adversary with other layers": {
        "generator": RIGHT,
        "critic": {"a": torch.ones(3, 3)},
    },
    "the same twice": {"best": RIGHT, "last": dict(RIGHT)},
    "no counts": {name: value for name, value in RIGHT.items() if "num_batches" not in name},
}


def read(content, tmp_path, **options):
    torch.save(content, tmp_path / "net.pth")
    return foldconv.read_weights(tmp_path / "net.pth", **options)


def is_right(found):
    counts = [name for name in RIGHT if "num_batches" in name and name not in found]
    return found.keys() | counts == RIGHT.keys() and all(bool((value == 7).all()) for value in found.values())


@pytest.mark.parametrize("form", ALONE)
def test_forms_that_tell_by_themselves(form, tmp_path):
    assert is_right(read(ALONE[form], tmp_path))
    assert is_right(read(ALONE[form], tmp_path, model=NET))


@pytest.mark.parametrize("form", FITTED)
def test_forms_that_the_network_tells(form, tmp_path):
    found = read(FITTED[form], tmp_path, model=NET)
    NET.load_state_dict(found)
    assert is_right({name: value for name, value in found.items() if "num_batches" not in name})


@pytest.mark.parametrize("wrap", [nn.DataParallel, functools.partial(torch.compile, backend="eager")])
def test_a_wrapped_network_tells_as_much(wrap, tmp_path):
    found = read(FITTED["a backbone"], tmp_path, model=wrap(NET))
    assert is_right({name: value for name, value in found.items() if "num_batches" not in name})


def test_every_form_of_the_table_is_tried():
    tried = {found.why for name, content in ALONE.items() if (found := take(content, __file__)).why}
    for form in FORMS:
        if form.trainer != "ultralytics":  # which pickles modules: below
            assert any(form.trainer in why for why in tried), form.trainer


TWO = {
    # Whose trainer nobody knows, and what is said.
    "unknown average": ({"model": RIGHT, "ema": WRONG}, "holds 2 dictionaries of tensors, 'model', 'ema'; .*--weights"),
    "no mark of mmengine": ({"state_dict": RIGHT, "ema_state_dict": WRONG}, "'state_dict', 'ema_state_dict'; .*--w"),
    "DeiT and ConvNeXt, which evaluate the former": (
        {"model": RIGHT, "model_ema": WRONG},
        "'model', 'model_ema'; .*--w",
    ),
    "deep": (
        {"state": {"model": WRONG, "algorithms": [("EMA", {"ema_model": {"named_parameters_dict": RIGHT}})]}},
        r"'state\.model', 'state\.algorithms\.0\.1\.ema_model\.named_parameters_dict'; ",
    ),
    "other names": (
        {"model": RIGHT, "ema": {name.replace(".", "_"): value for name, value in WRONG.items()}},
        "holds 2 dictionaries of tensors, 'model', 'ema'; ",
    ),
    "an optimizer's": (
        {"state_dict": RIGHT, **LIGHTNING, "optimizer_states": [{"opt": OPTIMIZER, "ema": (torch.ones(3),)}]},
        r"holds 'state_dict' and, in .optimizer_states\.0\.ema., an average of weights without names; .*--weights",
    ),
    "schedule-free, training": (
        {"model": RIGHT, "optimizer": {"param_groups": [{"params": [0], "train_mode": True}]}},
        r"in 'optimizer\.param_groups\.0', what turns them into schedule-free .*eval\(\).*; .*--weights model ",
    ),
    "teacher": ({"student": under("module."), "teacher": WRONG}, "'student', 'teacher'; .*--weights"),
    "momentum encoder": ({"encoder": RIGHT, "momentum_encoder": WRONG}, "'encoder', 'momentum_encoder'; .*--weights"),
    "optimized": ({"state_dict": RIGHT, "optimized_model": WRONG}, "'state_dict', 'optimized_model'; .*--weights"),
    "a third": (
        {"state_dict": RIGHT, "state_dict_ema": WRONG, "best": under("", {n: v + 1 for n, v in RIGHT.items()})},
        "holds 3 dictionaries",
    ),
    "inside": (under("model.") | averaged("ema.module.", WRONG), "2 times.*'model.', 'ema.module.'; choose with --pre"),
    "nested": (under("module.q.") | under("module.k.", WRONG), "2 times.*'module.q.', 'module.k.'; choose with --pre"),
    "without names": (
        {"model": RIGHT, "ema": {"shadow_params": [torch.ones(3)]}},
        "in 'ema.shadow_params', an average",
    ),
    "names without dots": (
        under("model.") | {f"model_ema.{name.replace('.', '')}": value for name, value in WRONG.items()},
        "begin with 'model.', and an average by other names, 'model_ema.convweight', .*--prefix model",
    ),
    "callback": (
        {"state_dict": RIGHT, **LIGHTNING, "callbacks": {"EMA": {"ema_state_dict": WRONG}}},
        "'state_dict', 'callbacks.EMA.ema_state_dict'; .*--weights",
    ),
    "timm's names in Lightning": (
        {"state_dict": RIGHT, "state_dict_ema": WRONG, **LIGHTNING},
        "'state_dict_ema'; .*--w",
    ),
    "compiled twice": (RIGHT | under("_orig_mod."), "'_orig_mod.conv.weight' with and without '_orig_mod.'"),
}


@pytest.mark.parametrize("form", TWO)
def test_where_nobody_can_tell_the_option_is_named(form, tmp_path):
    content, message = TWO[form]
    with pytest.raises(CheckpointError, match=rf"net\.pth: .*{message}"):
        read(content, tmp_path, model=NET)


def test_what_the_options_take(tmp_path):
    assert is_right(read(TWO["unknown average"][0], tmp_path, weights="model"))
    assert not read({"model": RIGHT, "ema": WRONG}, tmp_path, weights="ema")["conv.weight"].any()
    assert is_right(read(TWO["callback"][0], tmp_path, weights="state_dict"))
    for entry in ("ema_state_dict", "callbacks.EMA.ema_state_dict"):
        assert not read(TWO["callback"][0], tmp_path, weights=entry)["conv.weight"].any()
    assert is_right(read({"a": {"module": RIGHT}, "b": WRONG}, tmp_path, weights="a"))
    for prefix in ("model", "model."):
        assert is_right(read(TWO["inside"][0], tmp_path, prefix=prefix, model=NET))
        assert is_right(read(TWO["names without dots"][0], tmp_path, prefix=prefix))
    for prefix in ("q", "module._orig_mod.q", "module.q."):
        assert is_right(
            read(under("module._orig_mod.q.") | under("module._orig_mod.k.", WRONG), tmp_path, prefix=prefix)
        )
    assert read(under("module."), tmp_path, prefix="").keys() == under("module.").keys()
    with pytest.raises(CheckpointError, match=r"unknown entry with weights 'modle'; did you mean 'model'\?"):
        read({"model": RIGHT}, tmp_path, weights="modle")
    with pytest.raises(CheckpointError, match=r"none of its names begins with the prefix 'netz'; its own names begin "):
        read(under("net."), tmp_path, prefix="netz")
    for wrong in ({"weights": None}, {"prefix": 3}, {"model": "resnet"}):
        with pytest.raises(TypeError, match=rf"{min(wrong)}: expected "):
            read(RIGHT, tmp_path, **wrong)


def test_many_sets_and_very_large_ones_take_no_time(tmp_path):
    one = torch.ones(1).expand(10**6, 10**6)
    with pytest.raises(CheckpointError, match="holds 2 dictionaries of tensors, 'a', 'b'; save"):
        read({"a": {"w": one}, "b": {"w": torch.ones(1).expand(10**6, 10**6)}}, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"holds 150 dictionaries of tensors, 'layer0', \.\.\.; save the state_dict"
    ):
        read({f"layer{number}": {"weight": torch.ones(2)} for number in range(150)}, tmp_path)


def test_names_that_are_no_wrapper_stay(tmp_path):
    """A network's own attribute may be called so; a file of Lightning is one of a wrapper."""
    assert read(under("model."), tmp_path).keys() == under("model.").keys()
    assert is_right(read({"state_dict": under("model."), **LIGHTNING}, tmp_path))
    own = {"state_dict": RIGHT, **LIGHTNING}
    assert is_right(read(own, tmp_path))
    assert is_right(read(under("backbone."), tmp_path))


def test_one_line_says_what_was_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO, "foldconv.files.weights")
    read({"state_dict": WRONG, "state_dict_ema": under("module._orig_mod.")}, tmp_path)
    left = {name: value for name, value in under("net.").items() if "num_batches" not in name}
    read({"model": left | {"loss.weight": torch.ones(2)}}, tmp_path, model=NET)
    read(RIGHT, tmp_path)
    read({"state_dict": under("model.") | under("model_ema.module.", WRONG), **LIGHTNING}, tmp_path)
    lines = [(record.levelname, record.getMessage().removeprefix(f"{tmp_path}/")) for record in caplog.records]
    assert lines == [
        (
            "WARNING",
            "net.pth: took 'state_dict_ema' (timm's saver: the average of the weights; 9 tensors), not 'state_dict'; "
            "stripped '_orig_mod.', 'module.'",
        ),
        (
            "WARNING",
            "net.pth: took 'model' (8 tensors); stripped 'net.'; left 1 that do not begin so: 'loss.weight'; "
            "no num_batches_tracked in it (1 stay as they are)",
        ),
        ("INFO", "net.pth: took the tensors at its top (9 tensors)"),
        (
            "WARNING",
            "net.pth: took 'state_dict' (18 tensors); its names begin with 'model.' (9), 'model_ema.' (9); --prefix "
            "(prefix=) takes one",
        ),
    ]


class Detector(nn.Module):
    """Pickled under ultralytics' name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Sequential(nn.Linear(2, 3))
        self.register_buffer("anchors", torch.ones(3), persistent=False)
        self.names = {0: "cat"}


def test_pickled_networks_of_ultralytics(tmp_path, monkeypatch):
    import sys
    import types

    for name in ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(Detector, "__module__", "ultralytics.nn.tasks")
    monkeypatch.setattr(sys.modules["ultralytics.nn.tasks"], "Detector", Detector, raising=False)
    right, wrong = Detector(), Detector()
    right.load_state_dict(RIGHT)
    wrong.load_state_dict(WRONG)
    torch.save({"model": right.half(), "ema": None, "train_args": {}, "version": "8"}, tmp_path / "best.pt")
    torch.save({"model": wrong, "ema": right, "train_args": {}, "epoch": 3}, tmp_path / "last.pt")
    endless = Detector()
    endless._modules["a"] = endless._modules["b"] = endless
    torch.save({"model": endless}, tmp_path / "endless.pt")
    for name in ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(CheckpointError, match=r"holds a network of over 100,000 modules or 200 levels"):
        foldconv.read_weights(tmp_path / "endless.pt")
    for name in ("best.pt", "last.pt"):
        found = foldconv.read_weights(tmp_path / name)
        assert is_right(found)
        assert found["conv.weight"].dtype == torch.float16


def test_what_would_run_code_comes_with_the_lines_that_convert_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"would run code of .*Linear; .*: import torch; content = torch\.load\("):
        read({"model": nn.Linear(1, 1)}, tmp_path)


def test_bare_safetensors(tmp_path):
    save_file(under("module."), tmp_path / "net.safetensors")
    assert is_right(foldconv.read_weights(tmp_path / "net.safetensors"))
