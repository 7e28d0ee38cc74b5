"""int8 against float32: a folded ResNet-18 in ONNX Runtime and OpenVINO, one image, one thread, calls in turn.

    python benchmarks/int8_latency.py [--runs N] [--only .onnx|.xml]

Needs the extras onnx, openvino and quantization. Writes benchmarks/results/int8_latency.json: medians of the processor
time of a call, and their ratio, in the same process.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
from importlib import metadata
from pathlib import Path

import torch

import foldconv
from foldconv.deploy.formats import FORMATS
from foldconv.deploy.quantize import quantize
from foldconv.deploy.running import measure_files

RESULT = Path(__file__).with_name("results") / "int8_latency.json"
REACH = {".onnx": 0.6, ".xml": 0.4}


def processor() -> dict[str, object]:
    """What decides how fast int8 is."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "")
    return {"machine": platform.machine(), "avx2": " avx2" in flags, "vnni": "_vnni" in flags}


def main() -> None:
    """Fold, quantize, run both files in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="processes for each runtime; the median counts")
    parser.add_argument("--only", choices=REACH, help="one runtime; the other's row stays as it was measured")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.resnet18().train()
    images = torch.randn(16, 3, 224, 224)
    with torch.no_grad():
        network(images)
    network = foldconv.expand(network.eval(), "doconv")
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    rows = [row for row in found["rows"] if options.only and row["runtime"] != FORMATS[options.only].name]
    for suffix in [options.only] if options.only else REACH:
        form = FORMATS[suffix]
        with tempfile.TemporaryDirectory() as folder:
            plain, target = (Path(folder, name + suffix) for name in ("float", "int8"))
            foldconv.export(network, plain, images[:2], check=False)
            found = quantize(network, target, images)
            seconds = []
            for _ in range(options.runs):
                seconds.append(measure_files(form.runtime, plain, target, [[images[:1].numpy()]], threads=1)[2])
        ratios = sorted(float(each[1, 1] / each[0, 1]) for each in seconds)
        middle = sorted(seconds, key=lambda each: each[1, 1] / each[0, 1])[len(seconds) // 2]
        rows.append(
            {
                "runtime": form.name,
                "versions": {package: metadata.version(package) for package in form.packages},
                "float_ms": round(1e3 * float(middle[0, 1]), 2),
                "int8_ms": round(1e3 * float(middle[1, 1]), 2),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "reach": REACH[suffix],
                "bytes": [found.size_before, found.size],
                "output_error": round(found.error, 4),
                "float_layers": list(found.float_layers),
                "notes": list(found.notes),
            }
        )
        print(json.dumps(rows[-1]))
    RESULT.write_text(
        json.dumps({"processor": processor(), "network": "resnet18, 224²", "rows": rows}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
