"""Training through each backend's compiler gives what training without it gives."""

import numpy as np
import pytest

import keras
from foldconv.keras import expand
from keras import layers


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch's compiler takes minutes on Keras' trainer")
@pytest.mark.parametrize("method", ["doconv", "orepa", "repvgg"])
def test_compiled_and_eager_training_agree(method):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 6, 6, 4)).astype("float32"), random.normal(size=(8, 1)).astype("float32")
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6, 6, 4)), layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization()])
    for layer in (layers.DepthwiseConv2D(3, strides=2, padding="same"), layers.Flatten(), layers.Dense(1)):
        model.add(layer)
    # The new branches are drawn at random, so both start from one expansion.
    first = expand(model, method)
    second = keras.models.clone_model(first)
    second.set_weights([np.array(value) for value in first.get_weights()])
    losses = []
    for net, compiled in ((first, True), (second, False)):
        net.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=compiled)
        assert net.jit_compile == compiled
        losses.append(net.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert losses[0][2] < losses[0][0]
    np.testing.assert_allclose(first.predict(x, verbose=0), second.predict(x, verbose=0), rtol=1e-2, atol=1e-3)
