"""``nox`` runs everything that CI runs; ``nox -s tests -- -k fold`` passes arguments on to pytest."""

import contextlib
import os
import sys

import nox

# uv makes environments in seconds; plain virtualenv does as well.
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
# What takes longest, first.
nox.options.sessions = ["keras", "tests", "deploy", "lint", "litert", "ray", "core", "hosts", "docs", "gluon"]
if sys.platform != "linux":  # MXNet and some runtimes have wheels for Linux only
    nox.options.sessions = ["tests", "lint", "core"]

# Two sessions at a time, each shown when it has ended; versions of nox that cannot, run one after the other.
if hasattr(nox.options, "parallel"):
    nox.options.parallel = 2
    nox.options.allow_parallel = True

# Environments come without bytecode, and what a process has imported is there for the next one. Compiling all that is
# installed takes longer; where Python may not write bytecode, every process would compile torch anew.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""

# Processes share the processors; a pool of threads in each would wait for the others.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# Runtimes bring a plugin of pytest that warns when it is loaded, and warnings are errors.
NO_ANYIO = ["-p", "no:anyio"]

# XLA compiles small models longer than they run.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
QUICK += "--xla_cpu_use_fusion_emitters=false"
XLA = {
    "tensorflow": "import tensorflow as tf; tf.function(lambda: tf.zeros(1), jit_compile=True)()",
    "jax": "import jax; jax.devices()",
}

# The examples of the core's rooms, and what must hold without the compiled paths, too.
ROOMS = ["algebra", "ops", "layers", "methods", "blocks", "network", "files", "testing"]
CORE = [*(f"src/foldconv/{room}" for room in ROOMS), "--ignore-glob=*/ops/*_numba*.py"]
CORE += ["tests/test_dependencies.py", "tests/conformance/test_methods.py", "tests/conformance/test_sweep.py"]
CORE += ["tests/files/originals", "--ignore=tests/files/originals/test_blocks.py"]
CORE += ["tests/files/test_native.py", "tests/network/test_verify.py", "tests/network/test_costs.py"]
# Of methods that ask for no compiled path, `tests` has run all checks on the same code.
CORE += ["-k", "not test_conformance or folds_to_a_plain_network or doconv or orepa or mobileone"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and types; the wheel and the source archive."""
    session.install("-e", ".[train,tasks,tensorboard,cpu,test,lint,package]", "nox")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright")
    session.run("pytest", "tests/test_package.py", env={"FOLDCONV_PACKAGE": "1"})


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite, doctests included, by two processes; a file's tests by one of them."""
    session.install(".[train,tasks,tensorboard,cpu,test]")
    session.run("pytest", "-n", "2", "--dist", "loadfile", *session.posargs, env=ONE_THREAD)


@nox.session
def core(session: nox.Session) -> None:
    """The core works with torch and safetensors alone; that it imports nothing else, `tests` reads from the source."""
    session.install(".[test]")
    session.run("pytest", *(session.posargs or CORE), env=ONE_THREAD)


@nox.session
def keras(session: nox.Session) -> None:
    """foldconv.keras on each of Keras' backends, in one environment."""
    # Keras' exporters, and what runs their files; with these, FOLDCONV_ALL_EXPORTS lets no format be passed over.
    exporters = ["ai-edge-litert", "jax2onnx", "onnx", "onnxruntime", "onnxscript", "tf2onnx"]
    # TensorFlow 2.21 cannot read the SavedModels of a newer jax.
    session.install(".[keras,test]", "tensorflow-cpu", "jax<0.12", *exporters)
    paths = session.posargs or ["tests/keras", "src/foldconv/keras"]
    quick = {}
    for backend, first in XLA.items():
        # A release of XLA that has dropped one of the flags ends the process.
        with contextlib.suppress(nox.command.CommandFailed):
            session.run("python", "-c", first, env={"XLA_FLAGS": QUICK}, silent=True)
            quick[backend] = QUICK
    # What is the same on each: files, which h5py reads, and whether the battery's checks can fail. Not on the slowest.
    once = () if session.posargs else ("convert", "checks_fail", "imports", "page", "tutorial")
    for backend in ("tensorflow", "jax", "torch"):
        env = {"KERAS_BACKEND": backend, "FOLDCONV_ALL_EXPORTS": "1", "XLA_FLAGS": quick.get(backend, "")}
        left = [f"--ignore=tests/keras/test_{name}.py" for name in once if backend != "torch"]
        session.run("pytest", *paths, *left, env=env | ONE_THREAD)


@nox.session(python="3.11")
def gluon(session: nox.Session) -> None:
    """foldconv.gluon beside MXNet's last release, which needs an old NumPy; without torch."""
    # The last four are those of GluonCV's requirements that its networks import.
    session.install("mxnet==1.9.1", "numpy<1.24", "pytest>=8", "pillow", "portalocker", "scipy", "tqdm")
    session.install("--no-deps", "gluoncv==0.10.5.post0", ".")
    paths = session.posargs or ["tests/gluon", "src/foldconv/gluon"]
    session.run("pytest", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning", *paths, env=ONE_THREAD)


@nox.session
def deploy(session: nox.Session) -> None:
    """What is exported, in every runtime that fits beside today's torch; none of them may be absent."""
    session.install(".[train,tasks,onnx,openvino,executorch,coreml,ncnn,quantization,test]")
    paths = session.posargs or [
        *(f"tests/deploy/test_{name}.py" for name in ("runtimes", "equalize", "quantize")),
        *("tests/lab/cli/test_quantize.py", "tests/lab/train/test_qat.py"),
        *(f"tests/test_tutorials.py::test_{name}" for name in ("pretrained_to_phone", "a_detector")),
    ]
    runtimes = {"FOLDCONV_RUNTIMES": ".onnx .pt2 .xml .pte .mlpackage .param"}
    session.run("pytest", *NO_ANYIO, *paths, env=runtimes | ONE_THREAD)


@nox.session
def litert(session: nox.Session) -> None:
    """LiteRT, whose converter wants an older torch."""
    session.install(".[test]", "litert-torch>=0.10", "ai-edge-litert>=2.1", "torch<2.15")
    paths = session.posargs or ["tests/deploy/test_runtimes.py", "-k", "tflite"]
    session.run("pytest", *NO_ANYIO, *paths, env={"FOLDCONV_RUNTIMES": ".tflite"} | ONE_THREAD)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, with warnings as errors; its links; its notebooks, executed."""
    session.install(".[train,docs,test]")
    session.run("pytest", *NO_ANYIO, *(session.posargs or ["tests/test_site.py"]), env=ONE_THREAD)


@nox.session
def hosts(session: nox.Session) -> None:
    """Other people's trainers and services, with the real packages: an example of each trainer, to its own loader."""
    hosts = ["accelerate", "mmcv-lite", "mmengine", "segmentation-models-pytorch", "transformers", "ultralytics"]
    # The last two are what MLflow keeps a run's database with; all of MLflow is ten times as large.
    services = ["wandb", "mlflow-skinny", "alembic", "sqlalchemy"]
    session.install(".[train,test]", *hosts, *services)
    # Lightning's are run by `tests`.
    paths = session.posargs or ["tests/integrations", "src/foldconv/integrations", "--ignore-glob=*lightning.py"]
    if not session.posargs:
        logs = "tests/lab/train/test_logs.py::test"
        paths += [f"{logs}_wandb", f"{logs}_a_resumed_run_goes_on_in_its_log[mlflow]"]
    session.run("pytest", *NO_ANYIO, *paths, env=ONE_THREAD)


@nox.session
def ray(session: nox.Session) -> None:
    """Comparisons on a Ray cluster, of two nodes on this machine."""
    session.install(".[train,ray,test]")
    paths = session.posargs or ["tests/lab/compare/test_cluster.py", "tests/test_slurm_examples.py"]
    session.run("pytest", *NO_ANYIO, *paths, env=ONE_THREAD)
