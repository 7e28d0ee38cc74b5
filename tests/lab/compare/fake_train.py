"""Stands in for ``foldconv train``: writes the same files from numbers that follow from method and seed alone.

Called with ``MODE FOLDER CONFIG|resume``. Accuracy and time are 90 + seed (plain) and one more for any other method.
"""

import json
import pathlib
import signal
import sys
import time

import yaml


def main():
    mode, folder, config = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    continued = config == "resume"
    values = yaml.safe_load((folder / "config.yaml" if continued else pathlib.Path(config)).read_text())
    if not continued:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
    plain = values["method"] == "plain"
    if mode == "fail" and not plain and values["seed"] == 0:
        sys.exit("a first line\nfoldconv: error: the weights diverged\n")
    (folder / "last.ckpt").write_text("continued" if continued else "first")
    if mode == "wait" and not continued:
        time.sleep(600)
    share = (90 + values["seed"] + (0 if plain else 1)) / 100
    lines = [f"{epoch},{share - 0.1 / epoch}" for epoch in range(1, values["epochs"] + 1)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,test_accuracy", *lines]) + "\n")
    result = {"data": "digits", "architecture": "digits_resnet", "epochs": values["epochs"], "device": "cpu"}
    result |= {"accuracy_folded": share, "accuracy_expanded": share, "max_output_difference": 1e-6}
    result |= {
        "parameters_training": 10 if plain else 30,
        "parameters_folded": 10,
        "macs_training": 7,
        "macs_folded": 7,
    }
    result |= {"training_seconds": 2.0 if plain else 3.0, "peak_memory": 2**20}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
