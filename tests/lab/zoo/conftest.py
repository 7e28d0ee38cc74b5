"""What every network of the zoo must survive."""

from collections.abc import Callable

import pytest
import torch

import foldconv
from foldconv.layers.foldable import Foldable


@pytest.fixture
def folds_back() -> Callable[[torch.nn.Module], None]:
    """Check that a network expanded with DO-Conv, then disturbed, folds to the plain keys and the same logits."""

    def check(net: torch.nn.Module) -> None:
        torch.manual_seed(0)
        shapes = {key: value.shape for key, value in net.state_dict().items()}
        x = torch.randn(2, *foldconv.zoo.input_shape(net), dtype=torch.float64)
        x = x[..., :64, :64]  # the larger ones take any size
        expanded = foldconv.expand(net.double(), "doconv")
        layers = [module for module in expanded.modules() if isinstance(module, Foldable)]
        kernels = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1)]
        assert len(layers) >= len(kernels) > 0
        with torch.no_grad():
            for parameter in expanded.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        expanded(x)  # running statistics other than zero and one
        expanded.eval()
        folded = foldconv.fold(expanded)
        assert {key: value.shape for key, value in folded.state_dict().items()} == shapes
        torch.testing.assert_close(folded(x), expanded(x), rtol=1e-9, atol=1e-9)
        assert torch.std(folded(x)) > 0

    return check
