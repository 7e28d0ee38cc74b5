"""Writes mxnet_resnet_logits.json: what MXNet's ResNets v1 and v2 compute with weights that a formula gives.

Run it where MXNet 1.9 is installed: ``python tests/zoo/mxnet_resnet_logits.py``. Small networks, one block a stage.
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
KINDS = {"gamma": "weight", "beta": "bias"}


def values(shapes):
    """Arrays by torch's names of the tensors, from their shapes: waves, positive and near 1 where a norm wants that."""
    made = {}
    for index, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        wave = np.sin(0.7 * np.arange(int(np.prod(shape))) + index).reshape(shape)
        if len(shape) > 1:
            made[name] = 1.5 * wave / np.sqrt(np.prod(shape[1:]))
        elif name.endswith(("weight", "running_var")):
            made[name] = 1 + 0.4 * wave
        else:
            made[name] = 0.3 * wave
    return made


def image():
    """Two images of 3×64×64."""
    return np.sin(0.05 * np.arange(2 * 3 * 64 * 64) ** 1.1).reshape(2, 3, 64, 64)


def main():
    """Compute and write."""
    import mxnet as mx
    from mxnet.gluon.model_zoo.vision import resnet

    logits = {}
    for version in (1, 2):
        for kind, channels in (("basic_block", [4, 4, 8, 16, 32]), ("bottle_neck", [4, 16, 32, 64, 128])):
            block = resnet.resnet_block_versions[version - 1][kind]
            net = resnet.resnet_net_versions[version - 1](block, [1, 2, 1, 1], channels, classes=3)
            net.initialize()
            net(mx.nd.array(image()))
            named = {}
            for key, parameter in net._collect_params_with_prefix().items():
                name, last = key.rsplit(".", 1)
                if parameter.grad_req != "null" or last.startswith("running"):  # scale and shift of images are fixed
                    named[f"{name}.{KINDS.get(last, last)}"] = parameter
            for name, array in values({name: parameter.shape for name, parameter in named.items()}).items():
                named[name].set_data(mx.nd.array(array))
            logits[f"v{version} {kind}"] = net(mx.nd.array(image())).asnumpy().tolist()
    FILE.write_text(json.dumps(logits, indent=1) + "\n")


if __name__ == "__main__":
    main()
