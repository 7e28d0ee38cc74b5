"""Quantization-aware training: a network trains through int8's rounding of its kernels and activations.

torch.export writes the expanded network down as one graph, and torchao puts fake quantizers into it where ExecuTorch's
XNNPACK would compute in int8: they round, and let gradients pass (B. Jacob et al.: Quantization and training of neural
networks for efficient integer-arithmetic-only inference, CVPR 2018, section 3). A composed kernel gets its fake
quantizer behind the composition, times the following norm's factor: that is the kernel which is deployed.

Graph and network hold the very same parameters and norm statistics, so that nothing has to be copied back; the network
is saved, folded and exported as any other.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...errors import UnsupportedError, install
from ...layers import BranchedConv, FoldableBlock
from ...network.tree import walk
from .config import TrainConfig

_QUANTIZER = "activation_post_process_"
"""How torchao names each fake quantizer, before its number."""
_NEWEST = 0.1
"""The newest batch's share in the running range of activations. Kernels are rounded within their range as it is: their
norm's factor changes by multiples in the first steps, which torchao's share of 0.01 would follow hundreds of steps
later; a network that was trained for 69 steps lost 12 points of accuracy without the rounding that it had learnt with.
"""
TOLERANCE = 1e-4
"""Largest difference in 32 bits, relative to the output's largest value, of the graph that rounds nothing."""


def check_packages(config: TrainConfig) -> None:
    """Refuse a config that asks for what is not installed, before anything is loaded or written.

    Raises:
        ModuleNotFoundError: naming the package and the extra that brings it.
    """
    for package in ("torchao", "executorch") if config.qat else ():
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"qat: true needs {package}; install it: {install('executorch')}", name=package)


class QuantizationAware:
    """A network's graph with fake quantizers; it is called in the network's place, in the mode that that one is in.

    Args:
        network: on the device where it trains.
        shape: channels, height and width of its images.

    Raises:
        UnsupportedError: the network cannot be traced, with the reason in one line, or its graph computes other values.
    """

    def __init__(self, network: nn.Module, shape: Sequence[int]):
        _refuse_branches(network)
        from torchao.quantization.pt2e import move_exported_model_to_eval

        self._network = network
        with _quiet():
            self._graph: Any = _prepared(network, shape)
            # The same modules and tensors in another order; to turn one graph into the other takes seconds.
            self._evaluation: Any = fx.GraphModule(self._graph, copy.deepcopy(self._graph.graph))
            move_exported_model_to_eval(self._evaluation)
            _count_nothing(self._evaluation)
        quantizers = [each for name, each in self._graph.named_children() if name.startswith(_QUANTIZER)]
        self._of_activations = [each for each in quantizers if not each.is_per_channel]
        for each in quantizers:
            each.activation_post_process.averaging_constant = _NEWEST if each in self._of_activations else 1.0
        self._check(shape)

    def __call__(self, images: Tensor) -> Tensor:
        """What the network gives for images (batch, channels, height, width), with what int8 rounds."""
        training = self._network.training
        for each in self._of_activations:  # test images set no range
            each.enable_observer(training)
        return (self._graph if training else self._evaluation)(images)

    def state(self) -> dict[str, Tensor]:
        """What the quantizers have seen: ranges, scales and zero points, by name."""
        return {name: value for name, value in self._graph.state_dict().items() if name.startswith(_QUANTIZER)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: it is not of this graph.
        """
        own = self.state()
        if own.keys() != state.keys():
            raise ValueError(f"expected the state of {len(own)} tensors of quantizers, received {len(state)} of others")
        for name, value in own.items():
            value.resize_(state[name].shape).copy_(state[name])  # ranges per channel are empty before the first batch

    @torch.no_grad()
    def _check(self, shape: Sequence[int]) -> None:
        """The graph, rounding nothing, against the network, as both evaluate."""
        from torchao.quantization.pt2e import disable_fake_quant, enable_fake_quant

        device = next(self._network.parameters()).device
        images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        flags = [(module, module.training) for module in self._network.modules()]
        self._network.eval()
        self._graph.apply(disable_fake_quant)
        expected, received = self._network(images), self(images)
        self._graph.apply(enable_fake_quant)
        for module, flag in flags:
            module.training = flag
        error, largest = float((expected - received).abs().max()), float(expected.abs().max())
        if not error <= TOLERANCE * largest:
            raise UnsupportedError(
                f"qat: the traced network evaluates differently: expected at most {TOLERANCE * largest:.1e}, received "
                f"{error:.1e}; something in it acts by the mode it is in (stochastic depth does); switch that off"
            )


def _refuse_branches(network: nn.Module) -> None:
    """Refuse a network that has no kernel to quantize before it is folded."""
    for name, layer in walk(network):
        if isinstance(layer, (BranchedConv, FoldableBlock)):
            method = layer.method.name if layer.method else type(layer).__name__
            raise UnsupportedError(
                f"qat: {name or 'the root'}: {method} runs branches with norms of their own while it trains, so the "
                "kernel that is deployed is nowhere to be quantized; train without qat, then go on from that run: "
                "--qat --method plain --pretrained RUN --init preserve"
            )


def _prepared(network: nn.Module, shape: Sequence[int]) -> nn.Module:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    network.train()
    images = torch.zeros(2, *shape, device=next(network.parameters()).device)
    try:
        batch = torch.export.Dim("batch", min=2)
        graph = torch.export.export(network, (images,), dynamic_shapes=({0: batch},)).module()
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
        return prepare_qat_pt2e(graph, quantizer.set_filter_function(_OfImages()))
    except Exception as error:
        from ...deploy.export import reason

        raise UnsupportedError(f"qat: the network cannot be traced for training: {reason(error)}") from error


def _count_nothing(evaluation: fx.GraphModule) -> None:
    """Test images are no batches that a norm has followed; torchao leaves the counting in."""
    for node in list(evaluation.graph.nodes):
        if node.target is torch.ops.aten.add_.Tensor and str(node.args[0].target).endswith("num_batches_tracked"):
            evaluation.graph.erase_node(node)
    evaluation.recompile()


class _OfImages:
    """Which nodes of a graph a quantizer looks at: what computes with images, and the weights that it computes with.

    What composes those weights is not done in int8. Convolutions are asked for first, and a weight belongs to its
    convolution from then on.
    """

    def __init__(self) -> None:
        self._graph: fx.Graph | None = None
        self._nodes: set[fx.Node] = set()

    def __call__(self, node: fx.Node) -> bool:
        if node.graph is not self._graph:
            self._graph, self._nodes = node.graph, set()
            for each in node.graph.nodes:
                if each.op == "placeholder" or not self._nodes.isdisjoint(each.all_input_nodes):
                    self._nodes.add(each)
        return node in self._nodes or not self._nodes.isdisjoint(node.users)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What torchao and torch.export tell about themselves is nobody's."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
