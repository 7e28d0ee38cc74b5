#!/usr/bin/env bash
# torchvision's decode_image(mode=RGB) gives uint16 for a 16-bit PNG where its ImageFolder loader gives uint8 white: one data set, two networks' inputs, and uint16 lacks most operations.
# Guessed before running: both scale to uint8, which is what mode=RGB gives for every other file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 torchvision==0.29.2 pillow==13.0.0 numpy==2.4.6
env/bin/python - <<'PY'
import numpy
import torchvision
from PIL import Image
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_image

values = numpy.linspace(0, 65535, 64 * 64).astype(numpy.uint16).reshape(64, 64)
Image.fromarray(values).save("grey.png")
tensor, image = decode_image("grey.png", mode=ImageReadMode.RGB), numpy.array(default_loader("grey.png"))
white = (image == 255).mean()
print(f"torchvision {torchvision.__version__}: decode_image {tensor.dtype}, ImageFolder's loader {image.dtype}, {white:.0%} of it white")
assert str(tensor.dtype) == "torch.uint16" and white > 0.99
PY
