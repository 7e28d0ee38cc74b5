"""segmentation_models_pytorch in a plain loop, with the real package: ``nox -s hosts``."""

import pytest

pytest.importorskip("segmentation_models_pytorch")


@pytest.mark.filterwarnings("ignore")  # of smp
def test_the_example(import_example, tmp_path):
    """Train, save, resume, evaluate, fold, and smp's own loader."""
    done = import_example("train_smp").main(tmp_path)
    assert done["error"] < 1e-6
    assert done["IoU"] == pytest.approx(done["IoU of the fold"], abs=1e-3)
    assert done["IoU"] > 0.2
