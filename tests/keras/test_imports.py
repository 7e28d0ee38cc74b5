"""foldconv.keras brings in Keras and its backend alone; each shown in a fresh interpreter."""

import json
import subprocess
import sys

import keras

LOADED = "import json, sys; print(json.dumps(sorted(m for m in sys.modules)))"


def modules_after(code):
    result = subprocess.run([sys.executable, "-c", f"{code}; {LOADED}"], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_foldconv_keras_loads_none_of_torchs_parts():
    loaded = modules_after("import foldconv.keras")
    ours = {name for name in loaded if name.partition(".")[0] == "foldconv"}
    shared = {"keras", "formulas", "errors", "files", "deploy", "_selection", "_arguments", "_lazy"}
    assert {name.split(".")[1] for name in ours if "." in name} <= shared


def test_importing_foldconv_keras_loads_no_other_backend():
    # Compared with Keras itself, which may look at what else is installed.
    assert "torch" in modules_after("import foldconv.keras") or keras.backend.backend() != "torch"
    extra = modules_after("import foldconv.keras") - modules_after("import keras, numpy")
    assert not {name for name in extra if name.partition(".")[0] in ("torch", "tensorflow", "jax")}


def test_importing_foldconv_never_loads_keras():
    names = "import foldconv; [getattr(foldconv, name) for name in foldconv.__all__]"
    assert "keras" not in {name.partition(".")[0] for name in modules_after(names)}
