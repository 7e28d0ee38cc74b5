#!/usr/bin/env bash
# timm's RandAugment asks Pillow's posterize for 0 bits, which Pillow 13 refuses and 12 painted black: the policy of its own recipes ends a training run at a random image.
# Guessed before running: levels are bounded by what Pillow takes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 torchvision==0.29.2 timm==1.0.31
env/bin/python - <<'PY'
import subprocess
import sys

CODE = """
import random, numpy, PIL, timm
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

random.seed(0), numpy.random.seed(0)
image = Image.fromarray(numpy.random.randint(0, 255, (16, 16, 3), dtype=numpy.uint8))
policy, refused = rand_augment_transform("rand-m9-mstd0.5-inc1", {}), 0
for _ in range(3000):
    try:
        policy(image)
    except ValueError:
        refused += 1
print(PIL.__version__, timm.__version__, refused)
"""
for pillow in ("12.0.0", "13.0.0"):
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", sys.executable, f"pillow=={pillow}"], check=True)
    seen, library, refused = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout.split()
    print(f"Pillow {seen}, timm {library}: {refused} of 3000 images end in an error")
    assert (int(refused) > 0) == (pillow == "13.0.0")
PY
