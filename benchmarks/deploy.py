"""What folding and checking cost and save at the exported file; writes results/deploy.json.

    pip install ".[onnx]" timm torchvision
    python benchmarks/deploy.py                  # all rows, some minutes
    python benchmarks/deploy.py --only latency   # or windows, or export; the others' rows stay as they are

*Latency*: ONNX Runtime on one thread, one image of 224²; the folded network's file by `foldconv.export` against the
unfolded one's by torch's exporter, call by call in one process, CPU time, medians. *Export*: `foldconv.export` of
torchvision's ResNet-50, with its folding, its check and the processes that it starts, against torch's exporter alone,
CPU time, the smaller of two runs each (the first run of either also imports). *Windows*: milliseconds that RepVGG-A0's
files spend in convolutions of each window, by ONNX Runtime's own profile. It merges norms and additions into
convolutions, in the unfolded file, too, whose rest is cheap: without its 1×1 convolutions 0.87 of the time is left
(29.9 of 34.3 ms), which no fold can fall below; the folded file takes 0.89 (30.4 ms).
"""

import argparse
import collections
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

import foldconv

RESULTS = Path(__file__).with_name("results") / "deploy.json"
CALLS = 100


def cpu_seconds():
    """Of this process and those that it started and that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def images(count=2):
    return torch.randn(count, 3, 224, 224)


def bare(network, path):
    """What a user of torch's exporter writes."""
    options = {"external_data": False, "verbose": False, "dynamo": True}
    torch.onnx.export(network.eval(), (images(),), path, dynamic_shapes=({0: "batch"},), **options)


def latency(networks=("repvgg_a0", "mobilenetv3_small_100"), calls=CALLS):
    """Rows: milliseconds of a call, unfolded and folded."""
    import onnxruntime
    import timm

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    rows = []
    for name in networks:
        torch.manual_seed(0)
        network = timm.create_model(name)
        # timm's RepVGG has its branches; another network gets them.
        rich = network if "repvgg" in name else foldconv.expand(network, "repvgg", example_inputs=images())
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, f"{state}.onnx") for state in ("unfolded", "folded")]
            bare(rich, paths[0])
            error = foldconv.export(rich, paths[1], images()).error
            sessions = [onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"]) for path in paths]
        x = images(1).numpy()
        seconds = [[], []]
        for call in range(calls + 10):
            for kept, session in zip(seconds, sessions):
                start = time.process_time()
                session.run(None, {session.get_inputs()[0].name: x})
                if call >= 10:
                    kept.append(time.process_time() - start)
        unfolded, folded = (1000 * statistics.median(kept) for kept in seconds)
        ratio = statistics.median(b / a for a, b in zip(*seconds))
        row = {"network": name, "unfolded_ms": unfolded, "folded_ms": folded, "ratio": ratio, "error": error}
        rows.append(row)
        print(row, flush=True)
    return rows


def windows(calls=25):
    """Rows: of each state, milliseconds in convolutions by window, and in all; each call's least, added."""
    import onnx
    import onnxruntime
    import timm

    torch.manual_seed(0)
    network, rows = timm.create_model("repvgg_a0").eval(), []
    with tempfile.TemporaryDirectory() as folder:
        paths = {state: Path(folder, f"{state}.onnx") for state in ("unfolded", "folded")}
        bare(network, paths["unfolded"])
        foldconv.export(network, paths["folded"], images())
        for state, path in paths.items():
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.enable_profiling, options.profile_file_prefix = True, str(path)
            options.optimized_model_filepath = str(path.with_suffix(".optimized"))
            session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
            for _ in range(calls):
                session.run(None, {session.get_inputs()[0].name: images(1).numpy()})
            least = {}
            for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
                name, ending, _ = event["name"].rpartition("_kernel_time")
                if ending:
                    least[name] = min(least.get(name, event["dur"]), event["dur"])
            graph = onnx.load(options.optimized_model_filepath).graph
            shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
            row = {"state": state, "all_ms": sum(least.values()) / 1000, "windows_ms": collections.Counter()}
            for node in graph.node:
                if node.op_type == "Conv":
                    row["windows_ms"]["x".join(map(str, shapes[node.input[1]][2:]))] += least[node.name] / 1000
            rows.append(row)
            print(row, flush=True)
    return rows


def export():
    """The row: CPU seconds of torch's exporter and of `foldconv.export`."""
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.resnet50().eval()
    seconds = {"bare": [], "checked": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            for name, write in (("bare", bare), ("checked", lambda n, p: foldconv.export(n, p, images()))):
                start = cpu_seconds()
                write(network, Path(folder, f"{name}{turn}.onnx"))
                seconds[name].append(cpu_seconds() - start)
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    least = {name: min(kept) for name, kept in seconds.items()}
    return {"network": "resnet50", "seconds": seconds, "ratio": least["checked"] / least["bare"]}


ROWS = {"latency": latency, "windows": windows, "export": export}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS, help="these rows; the others stay as they are")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in [only] if only else ROWS:
        results[name] = ROWS[name]()
    packages = ("torch", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime")
    results["with"] = {package: version(package) for package in packages} | {"machine": platform.machine()}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
