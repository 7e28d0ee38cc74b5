import re

import pytest

from foldconv.deploy.formats import FORMATS, described_formats, format_of
from foldconv.errors import UnsupportedError, install


def test_each_format_has_its_runtime_and_a_line():
    lines = described_formats().splitlines()
    assert len(lines) == len(FORMATS)
    for form, line in zip(FORMATS.values(), lines):
        source = form.runtime.read_text(encoding="utf-8")
        assert "def convert(program" in source
        assert "def run(path" in source
        assert "from ." not in source
        assert "foldconv" not in source.partition("import")[2].replace('"foldconv"', "")
        assert form.suffix in line
        assert form.name in line


def test_unknown_formats_are_refused_with_those_there_are():
    with pytest.raises(UnsupportedError, match=r"'.onx'; expected one of: .onnx \(ONNX\), .pt2"):
        format_of("net.onx")
    with pytest.raises(UnsupportedError, match="unknown format 'opnvino'; did you mean 'openvino'"):
        format_of("net.xml", "opnvino")
    with pytest.raises(UnsupportedError, match=r"ends in .onnx for ONNX, received .xml"):
        format_of("net.xml", "onnx")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"ONNX needs onnx; install it: {install('onnx')}")):
        FORMATS[".onnx"].expect_packages()
