"""Networks of torchvision and segmentation_models_pytorch: a step, a fold and an evaluation of each."""

import pytest
import torch

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab.data import training_loader
from foldconv.lab.train.building import build
from foldconv.lab.train.classification import task_of
from foldconv.lab.train.optimizers import configured_groups, create_optimizer
from foldconv.network.tree import foldable_layers

UNET = {"encoder_name": "resnet18"}
RESNET = "backbone.*layer1.*"  # of a large backbone a part, since copying all of it takes long
NETWORKS = [
    ("torchvision/deeplabv3_mobilenet_v3_large", "repvgg", {}),
    ("torchvision/fcn_resnet50", "orepa", {"include": RESNET}),
    ("smp/unet", "orepa", {"architecture_args": UNET}),
    ("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", "repvgg", {}),
    ("torchvision/retinanet_resnet50_fpn", "doconv", {"include": RESNET}),
]


@pytest.mark.parametrize(("architecture", "method", "more"), NETWORKS)
def test_a_network_is_trained_and_folded(architecture, method, more, short, request):
    detects = "fpn" in architecture
    pytest.importorskip("faster_coco_eval" if detects else "torchvision")
    if architecture.startswith("smp/"):
        pytest.importorskip("segmentation_models_pytorch")
    small = {"image_size": 64} if detects else {"augmentation_args": {"crop": [32, 64]}}
    folder = str(request.getfixturevalue("coco" if detects else "cityscapes"))
    task_name = "detection" if detects else "segmentation"
    config = short(task=task_name, data=folder, architecture=architecture, method=method, **small, **more)
    task = task_of(config.task)
    data = task.open_data(config)
    net, _ = build(config, data)
    assert len(foldable_layers(net)) > 2
    module = task.module(net.train(), config, data)
    optimizer = create_optimizer(configured_groups(net, config), config)
    images, targets = next(iter(training_loader(data, 2, seed=0, epoch=lambda: 0)))
    minimized, shown, _ = module(images, targets)
    minimized.backward()
    optimizer.step()
    assert shown.isfinite()
    learnt = [layer.parameters() for layer in foldable_layers(net).values()]
    assert all(parameter.grad is not None for layer in learnt for parameter in layer)
    folded = foldconv.fold(net.eval(), blocks=False)
    assert not foldable_layers(folded)
    assert task.verify(net, folded, torch.rand(2, *data.input_shape), blocks=False).ok()
    assert 0 <= task.evaluate(folded, data)[task.measure] <= 1


def test_detectors_of_more_than_boxes_are_refused(coco, short):
    architecture = "torchvision/maskrcnn_resnet50_fpn"
    config = short(task="detection", data=str(coco), architecture=architecture, image_size=64)
    with pytest.raises(
        UnsupportedError, match=f"{architecture}: learns masks beside boxes, .*; expected a detector of"
    ):
        build(config, task_of(config.task).open_data(config))
