"""``foldconv methods``: the registry, and what was written of it."""

import json

import foldconv
from foldconv.lab.cli import _methods
from foldconv.methods import Method, _registry


def test_every_method_with_its_cost_and_evidence(call, call_json):
    values = call_json("methods")
    assert [method["name"] for method in values] == foldconv.list_methods()
    assert list(json.loads(_methods._SAID.read_text(encoding="utf-8"))) == foldconv.list_methods()
    assert all(method["when"] and method["reported_gain"] for method in values)
    (doconv,) = (method for method in values if method["name"] == "doconv")
    assert doconv["steps"]["cifar_resnet20, 32×32²"] > 0
    assert any(each["shown"] == "yes" for each in doconv["evidence"])
    code, out, err = call("methods", "doconv", "dilated")
    assert (code, err) == (0, "")
    head, other = out.rstrip("\n").split("\n\n")
    assert head.startswith("doconv: DO-Conv\n  adds      a depthwise kernel D")
    assert "cifar_resnet20, 32×32²" in head
    assert "not shown" in head
    assert "  step      not measured\n  gain      not measured here\n" in other
    assert max(map(len, out.splitlines())) <= 100


def test_a_method_of_somebody_elses(call, monkeypatch):
    facts = {
        "name": "theirs",
        "title": "Theirs",
        "paper": "none",
        "adds": "a branch",
        "kind": "statistical",
        "gain": "?",
    }
    monkeypatch.setitem(_registry._METHODS, "theirs", type("Theirs", (Method,), facts))
    code, out, _ = call("methods", "theirs")
    assert code == 0
    assert out.startswith("theirs: Theirs\n  adds      a branch (statistical)\n  step      not measured\n")


def test_a_wrong_name(fails):
    assert "unknown method 'doconf'; did you mean 'doconv'?" in fails("methods", "doconf")
