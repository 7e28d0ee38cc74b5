"""`create` finds a name wherever it lives, and says the nearest where it lives nowhere."""

import pytest
import torch

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo


@pytest.mark.parametrize("name", zoo.list_architectures())
def test_every_architecture_runs_on_the_images_it_declares(name):
    # Shapes only: some of them would take gigabytes and minutes.
    with torch.device("meta"):
        model = zoo.create(name, num_classes=7, in_channels=2).eval()
        shape = zoo.input_shape(model)
        assert shape[0] == 2
        assert model(torch.randn(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize("name", zoo.list_architectures())
def test_every_architecture_can_be_summarized(name):
    with torch.device("meta"):
        model = zoo.create(name)
        found = foldconv.summary(model, (1, *zoo.input_shape(model)))
    assert found.parameters_folded == sum(p.numel() for p in model.parameters())
    assert found.macs_folded > 0


def test_names_hide_none_of_the_libraries():
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    theirs = torchvision.models.list_models()
    # is_model knows timm's old names too, such as gluon_resnet50_v1b.
    assert timm.is_model("gluon_resnet50_v1b")
    assert [name for name in zoo.list_architectures() if timm.is_model(name) or name in theirs] == []


def test_options_reach_the_architecture():
    wide = zoo.create("digits_resnet", width=24)
    assert wide.head.in_features == 4 * 24
    assert len(zoo.create("digits_resnet", depth=20).blocks) == 9


def test_timm_and_torchvision_names():
    ours = zoo.create("resnet10t", num_classes=5, in_channels=1)
    assert type(ours).__module__.startswith("timm.")
    assert ours.num_classes == 5
    assert zoo.input_shape(ours) == (1, 176, 176)
    theirs = zoo.create("torchvision/resnet18", num_classes=5)
    assert type(theirs).__module__.startswith("torchvision.")
    assert theirs.fc.out_features == 5
    assert zoo.input_shape(theirs) == (3, 224, 224)
    only_torchvision = zoo.create("squeezenet1_1", num_classes=5)
    assert type(only_torchvision).__module__.startswith("torchvision.")


@pytest.mark.parametrize(
    ("name", "near"),
    [("digits_resnt", "digits_resnet"), ("resnet_18", "resnet18"), ("mobilenet_v22", "mobilenet_v2")],
)
def test_unknown_name_gives_the_nearest(name, near):
    with pytest.raises(UnsupportedError, match=f"unknown architecture '{name}'.*did you mean '{near}'"):
        zoo.create(name)


def test_unknown_option_is_named():
    with pytest.raises(UnsupportedError, match="'digits_resnet': unknown option 'widht'; did you mean 'width'"):
        zoo.create("digits_resnet", widht=3)


def test_torchvision_takes_three_channels():
    with pytest.raises(UnsupportedError, match="3 channels, received 1"):
        zoo.create("torchvision/resnet18", in_channels=1)


@pytest.mark.parametrize("depth", [2, 9, 12])
def test_depth_must_fit_the_family(depth):
    with pytest.raises(UnsupportedError, match=f"6n \\+ 2.*received {depth}"):
        zoo.create("digits_resnet", depth=depth)


def test_own_names_need_neither_library(python):
    code = "import sys, foldconv; foldconv.zoo.create('digits_resnet')"
    code += "; print({'timm', 'torchvision'} & set(sys.modules))"
    assert python(code).stdout.strip() == "set()"
