"""`foldconv.convert_weights` between Keras and torch: the function survives, the order of layers is not guessed."""

import json
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import foldconv
import keras
from foldconv.errors import CheckpointError, UnsupportedError
from foldconv.files.convert._keras_files import read_file
from foldconv.files.convert._keras_graph import Graph
from foldconv.keras import DOConv2D, DODepthwiseConv2D, expand
from keras import layers, ops

RANDOM = np.random.default_rng(0)


def stir(model):
    """Random values everywhere; variances positive, D small."""
    for variable in model.weights:
        drawn = RANDOM.normal(size=variable.shape) * 0.3
        variable.assign(np.abs(drawn) + 0.2 if "variance" in variable.name or "gamma" in variable.name else drawn)
    return model


def small(rich):
    """conv, norm, depthwise, norm, grouped, separable, transposed, Flatten, dense, norm, dense."""
    conv = layers.Conv2D if not rich else lambda *a, **k: DOConv2D(*a, depth_multiplier=12, **k)
    x = given = keras.Input((9, 9, 3))
    x = conv(8, 3, name="stem", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization(name="stem_norm")(x))
    x = (DODepthwiseConv2D if rich else layers.DepthwiseConv2D)(3, depth_multiplier=2, name="depthwise")(x)
    x = layers.BatchNormalization(scale=False, epsilon=2e-3, name="unscaled")(x)
    x = conv(8, 3, groups=2, name="grouped")(x)
    x = layers.SeparableConv2D(6, 2, name="separable")(x)
    x = layers.Conv2DTranspose(4, 2, strides=2, name="up")(x)
    x = layers.Dropout(0.5)(layers.Flatten()(x))
    x = layers.BatchNormalization(center=False, name="flat_norm")(x)
    x = layers.Dense(7, name="hidden", activation="relu")(x)
    return keras.Model(given, layers.Dense(5, name="head")(x))


class Small(nn.Module):
    """The same in torch."""

    def __init__(self, rich):
        super().__init__()
        conv, more = (foldconv.DOConv2d, {"depth_multiplier": 12}) if rich else (nn.Conv2d, {})
        self.stem, self.n1 = conv(3, 8, 3, bias=False, **more), nn.BatchNorm2d(8)
        self.depthwise, self.n2 = conv(8, 16, 3, groups=8), nn.BatchNorm2d(16)
        self.grouped = conv(16, 8, 3, groups=2, **more)
        self.cut, self.mix = nn.Conv2d(8, 8, 2, groups=8, bias=False), nn.Conv2d(8, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.n3, self.hidden, self.head = nn.BatchNorm1d(4 * 4 * 4), nn.Linear(4 * 4 * 4, 7), nn.Linear(7, 5)

    def forward(self, x):
        x = self.n2(self.depthwise(self.n1(self.stem(x)).relu()))
        x = self.up(self.mix(self.cut(self.grouped(x))))
        return self.head(self.hidden(self.n3(x.flatten(1))).relu())


def outputs(net, x):
    """Of a network of either framework, for an input in channels_last."""
    if not isinstance(net, keras.Model):  # which is an nn.Module too, on torch
        with torch.no_grad():
            y = net.eval()(torch.tensor(x).permute(0, 3, 1, 2))
        return (y.permute(0, 2, 3, 1) if y.ndim == 4 else y).numpy()
    return ops.convert_to_numpy(net(x))


def same(received, wanted, tolerance=1e-5):
    np.testing.assert_allclose(received, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


X = RANDOM.normal(size=(2, 9, 9, 3)).astype("float32")


@pytest.mark.parametrize("rich_target", [False, True])
@pytest.mark.parametrize("rich_source", [False, True])
def test_a_network_goes_to_torch_and_back(tmp_path, rich_source, rich_target):
    ours, theirs = stir(small(rich_source)), Small(rich_target)
    wanted = outputs(ours, X)
    found = foldconv.convert_weights(ours, theirs)
    assert found.layers["cut"] == "separable/depthwise"
    assert found.layers["n2"] == "unscaled"
    same(outputs(theirs, X), wanted)

    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    stir(again := small(rich_source))
    foldconv.convert_weights(tmp_path / "net.pth", again)
    same(outputs(again, X), wanted)


def test_files_to_files(tmp_path):
    ours, theirs = stir(small(True)), Small(True)
    wanted = outputs(ours, X)
    ours.save(tmp_path / "ours.keras")
    torch.save(theirs.state_dict(), tmp_path / "made.pth")
    foldconv.convert_weights(tmp_path / "ours.keras", tmp_path / "net.pth", like=tmp_path / "made.pth")
    theirs.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    same(outputs(theirs, X), wanted)

    made = small(False)
    made.save(tmp_path / "made.keras")
    for name, like in (("a.keras", tmp_path / "made.keras"), ("b.keras", made), ("c.weights.h5", made)):
        foldconv.convert_weights(tmp_path / "net.pth", tmp_path / name, like=like)
        back = small(False) if name.endswith("h5") else keras.models.load_model(tmp_path / name)
        if name.endswith("h5"):
            back.load_weights(tmp_path / name)
        same(outputs(back, X), wanted)
    with zipfile.ZipFile(tmp_path / "a.keras") as one, zipfile.ZipFile(tmp_path / "made.keras") as other:
        assert one.read("config.json") == other.read("config.json")
    with pytest.raises(FileExistsError):
        foldconv.convert_weights(tmp_path / "net.pth", tmp_path / "a.keras", like=made)
    stir(small(True)).save(tmp_path / "rich.keras")
    foldconv.convert_weights(tmp_path / "net.pth", tmp_path / "d.keras", like=tmp_path / "rich.keras")
    same(outputs(keras.models.load_model(tmp_path / "d.keras"), X), wanted)
    keras.Sequential([keras.Input((9, 9, 3)), layers.Conv2D(4, 3)]).save_weights(tmp_path / "one.weights.h5")
    one = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(CheckpointError, match=r"e.keras: expected a name ending in .weights.h5 \(a .keras file needs"):
        foldconv.convert_weights(one, tmp_path / "e.keras", like=tmp_path / "one.weights.h5")
    assert not (tmp_path / "e.keras").exists()


def branched(order):
    """Two ways from 4 to 8 channels as `order` makes them, summed; named like the torch network below."""
    given = keras.Input((9, 9, 3))
    stem = layers.Conv2D(4, 3, name="k_stem")(given)
    ways = {}
    for way in order:
        ways[way] = layers.BatchNormalization(name=f"k_{way}_norm")(layers.Conv2D(8, 1, name=f"k_{way}")(stem))
    both = layers.Add()([ways["main"], layers.ReLU()(ways["side"])])
    return keras.Model(given, layers.Conv2D(8, 3, name="k_last")(both))


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.main, self.main_norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.side, self.side_norm, self.last = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.main_norm(self.main(x)) + self.side_norm(self.side(x)).relu())


@pytest.mark.parametrize("order", [("main", "side"), ("side", "main")])
def test_branches_of_equal_shapes_have_to_be_named_and_their_norms_follow(order):
    theirs, ours = Branched(), stir(branched(order))
    with pytest.raises(CheckpointError, match=r"k_(main|side) \(conv 8×4×1×1\), .* could each be any of main \(conv"):
        foldconv.convert_weights(ours, theirs)
    found = foldconv.convert_weights(ours, theirs, names={"k_side": "side"}).layers
    assert found["side_norm"] == "k_side_norm"
    same(outputs(theirs, X), outputs(ours, X))


class Bottleneck(nn.Module):
    """torchvision's, in its order of definition."""

    def __init__(self, inputs, width, stride, shortcut):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, stride=stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if shortcut:
            down = nn.Conv2d(inputs, 4 * width, 1, stride=stride), nn.BatchNorm2d(4 * width)
            self.downsample = nn.Sequential(*down)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x)).relu()


class ResNet50(nn.Module):
    """Keras': strides in the first 1×1, biases."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2), nn.BatchNorm2d(64)
        inputs = 64
        for i, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
            stage = []
            for j in range(blocks):
                stage.append(Bottleneck(inputs, width, 2 if i and not j else 1, not j))
                inputs = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x):
        x = self.bn1(self.conv1(nn.functional.pad(x, (3, 3, 3, 3)))).relu()
        x = nn.functional.max_pool2d(nn.functional.pad(x, (1, 1, 1, 1)), 3, 2)
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="files are the same on every backend, this one is large")
def test_resnet50_needs_one_name(tmp_path):
    ours, theirs = (
        keras.applications.ResNet50(weights=None, classifier_activation=None, input_shape=(64, 64, 3)),
        ResNet50().eval(),
    )
    for variable in ours.weights:
        if "moving" in variable.name:
            variable.assign(np.abs(RANDOM.normal(size=variable.shape)) * 0.3 + 0.5)
    torch.save(theirs.state_dict(), tmp_path / "made.pth")
    with pytest.raises(CheckpointError) as caught:
        foldconv.convert_weights(ours, tmp_path / "net.pth", like=tmp_path / "made.pth")
    for name in ("conv2_block1_0_conv", "conv2_block1_3_conv", "layer1.0.conv3", "layer1.0.downsample.0"):
        assert name in str(caught.value)
    names = {"conv2_block1_0_conv": "layer1.0.downsample.0"}
    found = foldconv.convert_weights(ours, tmp_path / "net.pth", like=tmp_path / "made.pth", names=names).layers
    theirs.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    x = RANDOM.normal(size=(1, 64, 64, 3)).astype("float32")
    same(outputs(theirs, x), outputs(ours, x), 1e-4)
    assert found["layer3.0.downsample.1"] == "conv4_block1_0_bn"


def test_mobilenet_goes_through_its_weights_file(tmp_path):
    made = {"input_shape": (32, 32, 3), "alpha": 0.35, "classes": 7, "weights": None}
    one, other = (keras.applications.MobileNetV2(**made) for _ in range(2))
    for variable in one.weights:
        if "moving" in variable.name:
            variable.assign(np.abs(RANDOM.normal(size=variable.shape)) * 0.1 + 0.9)
    one.save_weights(tmp_path / "one.weights.h5")
    other.save_weights(tmp_path / "made.weights.h5")
    found = foldconv.convert_weights(
        tmp_path / "one.weights.h5", tmp_path / "out.weights.h5", like=tmp_path / "made.weights.h5"
    )
    assert len(found.layers) == 105
    other.load_weights(tmp_path / "out.weights.h5")
    x = RANDOM.normal(size=(1, 32, 32, 3)).astype("float32")
    same(outputs(other, x), outputs(one, x), 1e-7)
    rich = expand(one)
    foldconv.convert_weights(one, stir(rich))
    same(outputs(rich, x), outputs(one, x))


def flattened(tmp_path):
    model = stir(keras.Sequential([keras.Input((5, 6, 2)), layers.Conv2D(3, 2), layers.Flatten(), layers.Dense(4)]))
    torch_net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(60, 4))
    model.save_weights(tmp_path / "net.weights.h5")
    return model, torch_net, tmp_path / "net.weights.h5"


def test_a_weights_file_does_not_tell_a_flattened_map(tmp_path):
    model, net, path = flattened(tmp_path)
    x = RANDOM.normal(size=(2, 5, 6, 2)).astype("float32")
    message = r"dense.* whether its 60 inputs are a flattened map is not told; say flatten=\{'dense.*': \(height"
    with pytest.raises(UnsupportedError, match=message):
        foldconv.convert_weights(path, net)
    (name,) = (layer.name for layer in model.layers if isinstance(layer, layers.Dense))
    with pytest.raises(UnsupportedError, match="with a product of 60, its inputs, received"):
        foldconv.convert_weights(path, net, flatten={name: (5, 6, 3)})
    foldconv.convert_weights(path, net, flatten={name: (4, 5, 3)})
    same(outputs(net, x), outputs(model, x))
    foldconv.convert_weights(path, net, flatten={name: None})
    assert np.abs(outputs(net, x) - outputs(model, x)).max() > 1e-2
    foldconv.convert_weights(model, net)  # a model tells
    same(outputs(net, x), outputs(model, x))


def test_nested_models_keep_their_order_and_have_paths_for_names(tmp_path):
    inner = keras.Sequential(
        [keras.Input((None, None, 4)), layers.Conv2D(4, 3), layers.BatchNormalization()], name="in"
    )
    model = keras.Sequential([keras.Input((9, 9, 3)), layers.Conv2D(4, 3, name="first"), inner, layers.Conv2D(4, 3)])
    stir(model)
    model.save(tmp_path / "net.keras")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    found = foldconv.convert_weights(tmp_path / "net.keras", net).layers
    assert found["0"] == "first"
    assert found["2"].startswith("in/batch_normalization")
    same(outputs(net, X), outputs(model, X))
    foldconv.convert_weights(model, net)
    same(outputs(net, X), outputs(model, X))
    model.save_weights(tmp_path / "net.weights.h5")
    with pytest.raises(CheckpointError, match=r"or give the model or its .keras file, which tells the order"):
        foldconv.convert_weights(tmp_path / "net.weights.h5", net)


def test_a_norm_behind_a_nested_model_belongs_to_its_last_kernel():
    inner = keras.Sequential([keras.Input((None, None, 4)), layers.Conv2D(4, 3, name="conv")], name="in")
    parts = [layers.Conv2D(4, 3), inner, layers.BatchNormalization(name="norm"), layers.ReLU()]
    given = keras.Input((9, 9, 3))
    x = given
    for part in parts:
        x = part(x)
    for model in (keras.Sequential([keras.Input((9, 9, 3)), *parts]), keras.Model(given, x)):
        assert Graph.of(json.loads(model.to_json())).norm_after("in/conv") == "norm"


def test_a_subclassed_model_converts_itself_not_its_file(tmp_path):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = DOConv2D(4, 3), layers.BatchNormalization()

        def call(self, x):
            return self.b(self.a(x))

    model = Own()
    model(X)
    stir(model)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    foldconv.convert_weights(model, net)
    same(outputs(net, X), outputs(model, X))
    with pytest.raises(UnsupportedError, match=r"it has no weights yet; call it, or build it, before converting"):
        foldconv.convert_weights(Own(), net)


class Conv3x3(layers.Conv2D):
    """Only a constructor of its own, and a `get_config` that tells no groups."""

    def __init__(self, filters, **kwargs):
        super().__init__(filters, 3, groups=2, use_bias=False, **kwargs)

    def get_config(self):
        return {"filters": self.filters, "name": self.name}


class Doubled(Conv3x3):
    def call(self, inputs):
        return 2 * super().call(inputs)


def test_subclasses_with_a_constructor_of_their_own_are_what_they_derive_from():
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype("float32")
    target = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    source = keras.Sequential([keras.Input((8, 8, 4)), Conv3x3(6)])
    foldconv.convert_weights(source, target)
    expected = ops.convert_to_numpy(source(x))
    received = target(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(received.detach().numpy(), expected, atol=1e-5)
    with torch.no_grad():
        target.weight.mul_(3)
    foldconv.convert_weights(target, source)
    np.testing.assert_allclose(ops.convert_to_numpy(source(x)), 3 * expected, atol=1e-4)
    with pytest.raises(UnsupportedError, match="no rule to convert Doubled"):
        foldconv.convert_weights(keras.Sequential([keras.Input((8, 8, 4)), Doubled(6)]), target)


def test_what_cannot_be_read_says_so(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    model = stir(keras.Sequential([keras.Input((9, 9, 3)), layers.Conv2D(4, 3), layers.PReLU(name="odd")]))
    model.save(tmp_path / "odd.keras")
    for source in (model, tmp_path / "odd.keras"):
        with pytest.raises(UnsupportedError, match="odd: no rule to convert PReLU; expected convolutions, doconv"):
            foldconv.convert_weights(source, net)
    whole = (tmp_path / "odd.keras").read_bytes()
    (tmp_path / "half.keras").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"half.keras: damaged: not a whole zip archive"):
        foldconv.convert_weights(tmp_path / "half.keras", net)
    (tmp_path / "text.weights.h5").write_text("no")
    with pytest.raises(CheckpointError, match=r"text.weights.h5: not a readable HDF5 file"):
        foldconv.convert_weights(tmp_path / "text.weights.h5", net)
    norm = keras.Sequential([keras.Input((9, 9, 3)), layers.BatchNormalization(scale=False, name="half")])
    norm.save_weights(tmp_path / "norm.weights.h5")
    with pytest.raises(UnsupportedError, match="half: has a scale or a shift, not both, and the file does not tell"):
        foldconv.convert_weights(tmp_path / "norm.weights.h5", net)


def test_reading_a_keras_file_needs_no_keras(tmp_path):
    model = stir(small(True))
    model.save(tmp_path / "net.keras")
    torch.save(Small(False).state_dict(), tmp_path / "made.pth")
    code = (
        "import foldconv, json, sys\n"
        f"foldconv.convert_weights({str(tmp_path / 'net.keras')!r}, {str(tmp_path / 'net.pth')!r}, "
        f"like={str(tmp_path / 'made.pth')!r})\n"
        "print(json.dumps([name for name in ('keras', 'tensorflow', 'jax', 'mxnet', 'h5py') if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == ["h5py"]


def test_bfloat16_is_read_and_written(tmp_path):
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(4, 3, dtype="bfloat16", name="conv")])
    model.set_weights([RANDOM.normal(size=w.shape) for w in model.weights])
    model.save(tmp_path / "half.keras")
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    foldconv.convert_weights(tmp_path / "half.keras", net)
    exact = np.array(ops.convert_to_numpy(ops.cast(model.layers[0].kernel, "float32")))
    np.testing.assert_array_equal(net[0].weight.detach().numpy(), exact.transpose(3, 2, 0, 1))
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight * 1.001)
    foldconv.convert_weights(net, tmp_path / "back.keras", like=tmp_path / "half.keras")
    back = keras.models.load_model(tmp_path / "back.keras").layers[0].kernel
    assert keras.backend.standardize_dtype(back.dtype) == "bfloat16"
    rounded = net[0].weight.detach().to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(back, "float32")).transpose(3, 2, 0, 1), rounded)


def test_damaged_and_lying_files_end_in_one_line(tmp_path):
    """Bytes changed, and parts of the config and of the HDF5 file replaced: an error of ours, or a network."""
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(4, 3, name="c"), layers.BatchNormalization()])
    keras.Sequential([model, layers.Flatten(), layers.Dense(2)]).save(tmp_path / "whole.keras")
    with zipfile.ZipFile(tmp_path / "whole.keras") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    random, seen = np.random.default_rng(3), set()

    def read(name, content=None, **changed):
        if content is None:
            with zipfile.ZipFile(tmp_path / name, "w") as made:
                for part, data in {**parts, **changed}.items():
                    made.writestr(part.replace("_json", ".json").replace("_h5", ".h5"), data)
        else:
            (tmp_path / name).write_bytes(content)
        try:
            read_file(str(tmp_path / name))
            seen.add("read")
        except (CheckpointError, UnsupportedError) as error:
            seen.add(str(error))

    for suffix, content in (
        (".weights.h5", parts["model.weights.h5"]),
        (".keras", (tmp_path / "whole.keras").read_bytes()),
    ):
        for _ in range(60):
            damaged = bytearray(content)
            for place in random.integers(0, len(content), 3):
                damaged[place] ^= 1 << int(random.integers(0, 8))
            read(f"damaged{suffix}", bytes(damaged))
            read(f"damaged{suffix}", content[: int(random.integers(0, len(content)))])
    config = json.loads(parts["config.json"])
    for value in (None, 7, -1, "x" * 10**5, [], {}, [[]], True, 1e400):
        for change in range(len(list(places(config)))):
            copy = json.loads(parts["config.json"])
            holder, key = list(places(copy))[change]
            holder[key] = value
            if random.random() < 0.1:
                read("config.keras", **{"config.json": json.dumps(copy)})
    for text in ("", "[" * 10**5, "{}", "[]", "null", "\ud800"):
        read("config.keras", **{"config.json": text.encode("utf8", "surrogatepass")})
    for change in H5:
        (tmp_path / "changed.h5").write_bytes(parts["model.weights.h5"])
        with h5py.File(tmp_path / "changed.h5", "r+") as file:
            group = file["layers/sequential/layers/conv2d/vars"]
            del group["0"]
            change(group, tmp_path)
        with pytest.raises(CheckpointError, match=r"changed.weights.h5: .*(expected|damaged|holds)"):
            read_file(str((tmp_path / "changed.h5").rename(tmp_path / "changed.weights.h5")))
    assert len(seen) > 20
    assert all(len(text) <= 1000 and "\n" not in text for text in seen)


def places(value):
    """All entries of a config."""
    for key, inner in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


H5 = [
    lambda group, folder: group.create_dataset("0", data=np.zeros((3, 3, 3, 4), "int8")),
    lambda group, folder: group.create_dataset("0", data=np.zeros((3, 3, 3, 4), "V1")).attrs.update(
        dtype="float8_e4m3fn"
    ),
    lambda group, folder: group.create_dataset("0", data=np.zeros((3, 3, 3, 4), "complex64")),
    lambda group, folder: group.create_dataset("0", data=np.zeros((3, 4), "float32")),
    lambda group, folder: group.create_dataset("0", data=np.zeros((3, 3, 0, 4), "float32")),
    lambda group, folder: group.create_dataset("0", shape=(10**5, 10**5, 3, 4), chunks=(8, 8, 3, 4), dtype="float32"),
    lambda group, folder: group.create_dataset(
        "0", shape=(3, 3, 3, 4), dtype="float32", external=[(str(folder / "whole.keras"), 0, 432)]
    ),
    lambda group, folder: group.__setitem__("0", h5py.ExternalLink(str(folder / "damaged.weights.h5"), "x")),
    lambda group, folder: group.__setitem__("0", h5py.SoftLink("/nowhere")),
    lambda group, folder: group.create_group("0"),
]
