"""What export writes computes what the model did, holds no more than the plain model does, or is not written."""

import errno
import importlib.util
import os

import numpy as np
import pytest

import keras
from foldconv.errors import FoldMismatchError, UnsupportedError
from foldconv.keras import expand, export, exporting

# Converters warn of their own parts.
pytestmark = pytest.mark.filterwarnings("default")

BACKEND = keras.backend.backend()
# What `nox -s keras` runs on each backend. LiteRT from torch needs litert-torch, which brings more than all the rest.
REQUIRED = {
    "tensorflow": {"tf_saved_model", "litert", "onnx"},
    "jax": {"tf_saved_model", "onnx"},
    "torch": {"onnx", "torch"},
}
NAMES = {"tf_saved_model": "net", "litert": "net.tflite", "onnx": "net.onnx", "torch": "net.pt2"}


def need(format):
    """Skip where Keras' backend cannot write the format, or a package for it is absent where it may be."""
    if BACKEND not in exporting.NEEDED[format]:
        pytest.skip(f"Keras on {BACKEND} writes no {format}")
    since = exporting.SINCE.get((format, BACKEND), (3,))
    if tuple(int(part) for part in keras.__version__.split(".")[:2]) < since:
        pytest.skip(f"Keras {keras.__version__} on {BACKEND} writes no {format}")
    missing = [package for package in exporting.NEEDED[format][BACKEND] if importlib.util.find_spec(package) is None]
    if missing and not ("FOLDCONV_ALL_EXPORTS" in os.environ and format in REQUIRED[BACKEND]):
        pytest.skip(f"{format} needs {missing[0]}")


each_format = pytest.mark.parametrize("format", exporting.NEEDED)


def network(groups=None):
    if groups is None:
        groups = 1 if BACKEND == "tensorflow" else 2  # tf2onnx does not know grouped convolutions
    keras.utils.set_random_seed(0)
    x = keras.Input((9, 9, 3), name="image")
    y = keras.layers.Conv2D(8, 3, padding="same", name="first")(x)
    y = keras.layers.ReLU()(keras.layers.BatchNormalization()(y))
    y = keras.layers.Conv2D(8, 3, groups=groups, strides=2, name="second")(y)
    y = keras.layers.DepthwiseConv2D(3, name="per_channel")(y)
    y = keras.layers.GlobalAveragePooling2D()(y)
    return keras.Model(x, keras.layers.Dense(5, name="classes")(y))


def change(rich):
    """Let every D do something, as after training."""
    random = np.random.default_rng(1)
    for layer in rich._flatten_layers():
        if getattr(layer, "D", None) is not None:
            layer.D.assign(0.2 * random.normal(size=layer.D.shape))
    return rich


@pytest.fixture
def rich():
    return change(expand(network(), depth_multiplier=12))


def interpreter(path):
    if importlib.util.find_spec("ai_edge_litert") is None:
        from tensorflow.lite import Interpreter
    else:
        from ai_edge_litert.interpreter import Interpreter
    return Interpreter(str(path))


def numbers(path, format):
    """How many numbers a file holds, found without our code."""
    if format == "tf_saved_model":
        import tensorflow as tf

        shapes = [shape for _, shape in tf.train.list_variables(f"{path}/variables/variables") if shape]
    elif format == "litert":
        shapes = [tensor["shape"] for tensor in interpreter(path).get_tensor_details()]  # activations as well
    elif format == "onnx":
        import onnx

        shapes = [tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer]
    else:
        import torch

        program = torch.export.load(path)
        shapes = [tuple(tensor.shape) for tensor in [*program.state_dict.values(), *program.constants.values()]]
    return sum(int(np.prod(shape)) for shape in shapes)


def run(path, format, x):
    """What a file of one input and one output computes, found without our code."""
    if format == "tf_saved_model":
        import tensorflow as tf

        artefact = tf.saved_model.load(str(path))
        return artefact.serve(x).numpy()
    if format == "litert":
        lite = interpreter(path)
        lite.resize_tensor_input(lite.get_input_details()[0]["index"], x.shape)
        lite.allocate_tensors()
        lite.set_tensor(lite.get_input_details()[0]["index"], x)
        lite.invoke()
        return lite.get_tensor(lite.get_output_details()[0]["index"])
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return session.run(None, {session.get_inputs()[0].name: x})[0]
    import torch

    return torch.export.load(path).module()(torch.from_numpy(x)).detach().numpy()


def test_every_format_runs_somewhere():
    """`nox -s keras` sets FOLDCONV_ALL_EXPORTS, under which nothing of REQUIRED is skipped for want of a package."""
    assert set().union(*REQUIRED.values()) == set(exporting.NEEDED) == set(NAMES)
    assert all(backend in exporting.NEEDED[format] for backend in REQUIRED for format in REQUIRED[backend])


@each_format
def test_the_file_computes_what_the_model_did(format, rich, tmp_path):
    need(format)
    path = tmp_path / NAMES[format]
    exported = export(rich, path, format)
    assert os.listdir(tmp_path) == [path.name]
    x = np.random.default_rng(3).normal(size=(1 if BACKEND == "torch" else 3, 9, 9, 3)).astype("float32")
    expected = keras.ops.convert_to_numpy(rich(x))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(run(path, format, x), expected, rtol=0, atol=1e-5 * scale)
    assert exported.max_error <= 1e-5 * exported.scale
    assert 0.1 * scale < exported.scale < 10 * scale
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert exported.size == sum(len(file.read_bytes()) for file in files)
    assert str(exported).startswith(f"{path}: {format}, {exported.size:,} bytes, within")


@each_format
def test_the_file_holds_what_the_plain_model_does(format, rich, tmp_path):
    need(format)
    plain = network()
    plain(np.zeros((1, 9, 9, 3), "float32"))
    counts = []
    for kind, model in (("ours", rich), ("plain", plain), ("unfolded", rich)):
        (tmp_path / kind).mkdir()
        path = tmp_path / kind / NAMES[format]
        export(model, path, format) if kind == "ours" else model.export(str(path), format=format, verbose=False)
        counts.append(numbers(path, format))
    assert counts[0] == counts[1]
    # Some converters compose constants themselves; where none does, the count sees D.
    assert counts[2] > counts[0] or format in ("litert", "onnx")


@each_format
def test_a_mismatch_is_not_written(format, rich, tmp_path, monkeypatch):
    need(format)

    def wrong(model):
        changed = exporting_fold(model)
        weight = changed.get_layer("first").weights[0]
        weight.assign(keras.ops.convert_to_numpy(weight) * 1.01)
        return changed

    exporting_fold = exporting.fold
    monkeypatch.setattr(exporting, "fold", wrong)
    with pytest.raises(FoldMismatchError, match=r"net.*: expected at most \d.*e-.*, received \d.*e-.*; not written"):
        export(rich, tmp_path / NAMES[format], format)
    assert os.listdir(tmp_path) == []


@each_format
def test_nothing_is_overwritten_and_nothing_left_behind(format, rich, tmp_path, monkeypatch):
    need(format)
    path = tmp_path / NAMES[format]
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"exists, not overwritten; choose another name.*net"):
        export(rich, path, format)
    assert path.read_text() == "precious"
    with pytest.raises(FileNotFoundError, match=r"no such folder to write into"):
        export(rich, tmp_path / "no" / path.name, format)
    path.unlink()

    def interrupted(self, filepath, **options):
        original(self, filepath, **options)
        raise KeyboardInterrupt

    original = keras.Model.export
    monkeypatch.setattr(keras.Model, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(rich, path, format)
    assert os.listdir(tmp_path) == []


def appear(path):
    with exporting._aside(path) as temporary:
        temporary.mkdir()
        path.mkdir()
        (path / "precious").touch()


def test_a_folder_that_appears_meanwhile_stays(tmp_path):
    path = tmp_path / "net"
    with pytest.raises(FileExistsError) as caught:
        appear(path)
    assert caught.value.errno == errno.EEXIST
    assert os.listdir(tmp_path) == ["net"]
    assert os.listdir(path) == ["precious"]


@each_format
@pytest.mark.parametrize("structure", [list, dict])
def test_several_inputs_and_outputs(format, structure, tmp_path):
    need(format)
    if (BACKEND, format, structure) == ("torch", "onnx", dict) and keras.__version__ < "3.15":
        pytest.skip(f"Keras {keras.__version__} on torch writes no {format} with a dictionary of inputs")
    keras.utils.set_random_seed(0)
    # Names in another order than the inputs; twelve outputs, as output_10 sorts before output_2.
    z, a = keras.Input((6, 6, 2), name="z"), keras.Input((6, 6, 2), name="a")
    convs = [keras.layers.Conv2D(2, 3)(x) * (1 + i) for i, x in enumerate([z, a, z] * 4)]
    inputs = [z, a] if structure is list else {"z": z, "a": a}
    outputs = convs if structure is list else {f"y{chr(122 - i)}": conv for i, conv in enumerate(convs)}
    exported = export(change(expand(keras.Model(inputs, outputs))), tmp_path / NAMES[format], format)
    assert exported.max_error <= 1e-5 * exported.scale


@each_format
def test_integers_in(format, tmp_path):
    need(format)
    if (BACKEND, format) == ("torch", "litert"):
        pytest.skip("litert-torch 0.10 passes integers of two kinds on to one function")
    keras.utils.set_random_seed(0)
    x = keras.Input((7,), dtype="int32")
    y = keras.layers.Conv1D(4, 3)(keras.layers.Embedding(5, 3, embeddings_initializer="normal")(x))
    export(change(expand(keras.Model(x, y))), tmp_path / NAMES[format], format)


@each_format
def test_inputs_of_the_user(format, tmp_path):
    need(format)
    keras.utils.set_random_seed(0)
    model = expand(keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(4, 3)]))
    path = tmp_path / NAMES[format]
    with pytest.raises(
        UnsupportedError, match=r"expected sizes, received the shape \(None, None, None, 3\); give `inp"
    ):
        export(model, path, format)
    x = np.random.default_rng(3).normal(size=(3, 6, 5, 3)).astype("float32")
    # JAX cannot derive the gradient at unknown sizes.
    options = {"jax2tf_kwargs": {"with_gradient": False}} if (BACKEND, format) == ("jax", "tf_saved_model") else {}
    exported = export(change(model), path, format, inputs=x, **options)
    np.testing.assert_allclose(
        run(path, format, x), keras.ops.convert_to_numpy(model(x)), rtol=0, atol=1e-5 * exported.scale
    )


@each_format
def test_a_signature_and_a_model_without_foldable_layers(format, tmp_path):
    need(format)
    signature = [keras.layers.InputSpec(shape=(4, 9, 9, 3), dtype="float32")]
    path = tmp_path / NAMES[format]
    plain = network()
    before = plain.get_weights()
    exported = export(plain, path, format, input_signature=signature)
    assert exported.max_error <= 1e-5 * exported.scale
    assert run(path, format, np.zeros((4, 9, 9, 3), "float32")).shape == (4, 5)
    assert all(np.array_equal(a, b) for a, b in zip(before, plain.get_weights()))


def test_options_reach_the_converter(rich, tmp_path):
    if BACKEND != "tensorflow":
        pytest.skip("the option is TensorFlow's")
    need("litert")
    import tensorflow as tf

    wide = keras.Sequential([keras.Input((9, 9, 64)), keras.layers.Conv2D(64, 3), keras.layers.Flatten()])
    options = {"optimizations": [tf.lite.Optimize.DEFAULT]}
    with pytest.raises(FoldMismatchError, match="a larger tolerance for quantization"):
        export(wide, tmp_path / "small.tflite", "tflite", **options)
    small = export(wide, tmp_path / "small.tflite", "tflite", tolerance=0.05, **options)
    whole = export(wide, tmp_path / "whole.tflite", "litert")
    assert small.format == "litert"
    assert small.size < 0.4 * whole.size
    assert small.max_error > 100 * whole.max_error


@each_format
def test_groups(format, tmp_path):
    need(format)
    path, model = tmp_path / NAMES[format], change(expand(network(groups=2)))
    if (BACKEND, format) == ("tensorflow", "onnx"):
        with pytest.raises(UnsupportedError, match=r"net.onnx: this model as 'onnx' from .* cannot be .*; not written"):
            export(model, path, format)
        assert os.listdir(tmp_path) == []
    else:
        exported = export(model, path, format)
        assert exported.max_error <= 1e-5 * exported.scale


@pytest.mark.parametrize("method", ["doconv", "orepa", "repvgg"])
def test_each_method(method, tmp_path):
    format = "torch" if BACKEND == "torch" else "tf_saved_model"
    need(format)
    rich = expand(network(), method)
    random = np.random.default_rng(1)
    for weight in rich.weights:
        weight.assign(np.abs(keras.ops.convert_to_numpy(weight) + 0.1 * random.normal(size=weight.shape)))
    exported = export(rich, tmp_path / NAMES[format], format)
    assert exported.max_error <= 1e-5 * exported.scale


def test_onnx_is_one_file(tmp_path):
    """Some exporters put large weights beside, and refer to them by the name written to."""
    need("onnx")
    model = keras.Sequential([keras.Input((600,)), keras.layers.Dense(1000, name="wide")])
    exported = export(model, tmp_path / "net.onnx", "onnx")
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert exported.size > 4 * 600 * 1000
    assert run(tmp_path / "net.onnx", "onnx", np.ones((2, 600), "float32")).shape == (2, 1000)


def test_an_output_that_shows_nothing_is_named(tmp_path):
    format = "torch" if BACKEND == "torch" else "tf_saved_model"
    need(format)
    model = network()
    model.get_layer("classes").set_weights([np.zeros((8, 5)), np.ones(5)])
    with pytest.warns(UserWarning, match="its outputs are those for zeros, so comparing them shows little; give other"):
        export(model, tmp_path / NAMES[format], format)


def test_what_cannot_be_says_so(rich, tmp_path, monkeypatch):
    with pytest.raises(
        UnsupportedError, match=r"unknown format 'onx'; did you mean 'onnx'.*expected one of: tf_saved_model"
    ):
        export(rich, tmp_path / "net", "onx")
    other = "litert" if BACKEND == "jax" else "tf_saved_model" if BACKEND == "torch" else "torch"
    with pytest.raises(UnsupportedError, match=rf"needs Keras on .*, received {BACKEND}; save the model as .keras"):
        export(rich, tmp_path / NAMES[other], other)
    monkeypatch.setitem(exporting.SINCE, ("onnx", BACKEND), (4, 2))
    with pytest.raises(UnsupportedError, match=rf"needs Keras 4.2, received {keras.__version__}; install it: pip inst"):
        export(rich, tmp_path / "net.onnx", "onnx")
    monkeypatch.delitem(exporting.SINCE, ("onnx", BACKEND))
    monkeypatch.setitem(exporting.NEEDED["onnx"], BACKEND, ())
    with pytest.raises(UnsupportedError, match=r"net.tflite: expected a name that ends in .onnx for 'onnx'"):
        export(rich, tmp_path / "net.tflite", "onnx")
    monkeypatch.setitem(exporting.NEEDED["onnx"], BACKEND, ("no_such_package",))
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package; install it: pip install no-such-package"):
        export(rich, tmp_path / "net.onnx", "onnx")
    assert os.listdir(tmp_path) == []


def test_a_jax_that_tensorflow_cannot_read_is_named(tmp_path, monkeypatch):
    def give_up(*args, **kwargs):
        raise ValueError("Graph execution error:\nCannot deserialize computation: UNKNOWN")

    monkeypatch.setattr(keras.Model, "export", give_up)
    monkeypatch.setitem(exporting.NEEDED["onnx"], BACKEND, ())
    with pytest.raises(UnsupportedError, match=r"not written; TensorFlow is older than .*\"jax<0.12\""):
        export(network(), tmp_path / "net.onnx", "onnx")


def test_what_is_no_built_model_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match=r"own: it has no weights yet; call it, or build it, first"):
        export(keras.Sequential([keras.layers.Conv2D(2, 3)], name="own"), tmp_path / "net")
    with pytest.raises(UnsupportedError, match=r"model: expected a keras.Model, received str; put layers into one"):
        export("net.keras", tmp_path / "net")
    with pytest.raises(TypeError, match=r"path: expected a path, received 3"):
        export(network(), 3)


def test_a_subclassed_model_wants_inputs(tmp_path):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = keras.layers.Conv2D(2, 3)

        def call(self, x):
            return self.conv(x)

    format = "torch" if BACKEND == "torch" else "tf_saved_model"
    need(format)
    model, x = Own(), np.random.default_rng(0).normal(size=(1, 5, 5, 1)).astype("float32")
    model(x)
    with pytest.raises(UnsupportedError, match="the shapes of its inputs are not known; give `inputs`"):
        export(model, tmp_path / NAMES[format], format)
    assert export(model, tmp_path / NAMES[format], format, inputs=x).max_error < 1e-5
