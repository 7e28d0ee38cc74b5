"""Public functions refuse arguments of another type than was meant in one line that says what was expected."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

import foldconv
from foldconv import FoldConvError

ODD = [None, True, float("nan"), "no", [1], {"stem.0": 1}, nn.ReLU]


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))


def calls(folder):
    """Each function with good arguments, and those whose odd values are no matter of types (None, patterns, names)."""
    net, rich = network(), foldconv.expand(network(), "doconv")
    foldconv.save(rich, folder / "rich")
    torch.save(net.state_dict(), folder / "plain.pth")
    chosen = {"include": None, "exclude": None, "where": None, "init": "preserve", "inplace": False}
    convert = {"source": folder / "plain.pth", "target": network(), "names": None, "flatten": None}
    return [
        (foldconv.expand, {"model": net, "method": "doconv", **chosen}),
        (foldconv.plan, {"model": net, "method": "doconv", **chosen}),
        (foldconv.fold, {"model": rich, "batchnorm": False, "blocks": None, "inplace": False, "check": True}),
        (foldconv.summary, {"model": net, "inputs": (1, 3, 8, 8)}),
        (foldconv.absorb_permutations, {"model": net, "inplace": False}),
        (foldconv.branches, {"network": rich, "dtype": torch.float64}),
        (foldconv.parameter_groups, {"model": net, "weight_decay": 1e-4}),
        (foldconv.FoldableBlock, {"body": net[:2]}),
        (functools.partial(foldconv.verify, inputs=torch.randn(1, 3, 8, 8)), {"before": rich, "after": rich}),
        (foldconv.import_checkpoint, {"path": folder / "rich", "model": net, "source": "do-conv"}),
        (foldconv.save, {"model": net, "path": folder / "net", "extra": None}),
        (foldconv.load, {"path": folder / "rich", "model": net}),
        (foldconv.convert_weights, {**convert, "source_eps": None, "target_eps": None}),
    ]


def test_arguments_of_other_types_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a path may be "no"
    taken = set()
    for function, arguments in calls(tmp_path):
        called = getattr(function, "__name__", "verify")
        for name in arguments:
            for odd in ODD if name != "inputs" else [True, 3.5, "no", {"a": 1}, [None], (-1, 3, 8, 8)]:
                try:
                    function(**arguments | {name: odd})
                    taken.add((called, name, repr(odd)))
                except (FoldConvError, TypeError, OSError) as error:
                    where = f"{called}({name}={odd!r})"
                    said = str(error)
                    if isinstance(error, TypeError) and (name, odd) != ("where", nn.ReLU):  # which is called
                        assert "expected " in said, where
                        assert "received " in said, where
                    assert said.isprintable(), where
                    assert len(said) < 400, where
    flags = ("inplace", "blocks", "batchnorm", "check", "init", "model", "weight_decay", "dtype")
    assert {f"{f}({n}={odd})" for f, n, odd in taken if n in flags} == {
        *(f"{f}(inplace=True)" for f in ("expand", "plan", "absorb_permutations")),
        *(f"fold({n}=True)" for n in ("batchnorm", "blocks", "inplace", "check")),
        "fold(blocks=None)",
    }


def test_options_of_methods_are_refused_in_one_line():
    net = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2, bias=False), nn.BatchNorm2d(4))
    for method in foldconv.list_methods():
        config = foldconv.get_method(method)
        for field in dataclasses.fields(config):
            for odd in [-1, "no", [1], {"stem.0": 1}]:
                try:
                    foldconv.expand(net, config(**{field.name: odd}))
                except (FoldConvError, TypeError) as error:
                    said = str(error)
                    assert "received" in said, f"{method}({field.name}={odd!r})"


def test_numbers_that_are_none():
    for eps in (float("nan"), -1e-5, float("inf"), 10**400):
        with pytest.raises(foldconv.UnsupportedError, match=r"source_eps: expected a number ≥ 0, received"):
            foldconv.convert_weights(network(), network(), source_eps=eps)
