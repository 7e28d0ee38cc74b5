"""What converting imports, and what it says where that is missing; fresh interpreters."""

import json
import re
import subprocess
import sys
import zipfile

import pytest
from torch import nn

import foldconv
from foldconv.errors import UnsupportedError, install


def printed(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_no_framework_before_it_is_needed():
    found = printed(
        "import foldconv, json, sys; foldconv.convert_weights\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert "foldconv" in found
    assert not {"torch", "safetensors", "keras", "h5py", "mxnet"} & set(found)


def test_keras_files_without_h5py_say_what_to_install(monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as file:
        file.writestr("config.json", "{}")
        file.writestr("model.weights.h5", b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UnsupportedError, match=re.escape(f"needs h5py; install it: {install('keras')}")):
        foldconv.convert_weights(tmp_path / "net.keras", nn.Sequential(nn.Linear(1, 1)))


def test_torchs_files_without_torch_say_so(tmp_path):
    (tmp_path / "net.pth").write_bytes(b"")
    code = (
        "import json, sys; sys.modules['torch'] = None; from foldconv import convert_weights\n"
        f"try: convert_weights({str(tmp_path / 'net.pth')!r}, 'out.params', like='made.params')\n"
        "except ValueError as error: print(json.dumps(str(error)))"
    )
    assert "net.pth: reading it needs torch; convert where that is installed" in printed(code)
