"""DO-Conv in NumPy and float64, straight from the paper's sums; writes tests/fixtures/parity.npz.

    python tests/parity/write_parity.py

Nothing here is foldconv's nor a framework's, so PyTorch, Keras and Gluon are each compared with the same third party:
kernel, output, the gradient of every parameter and of the input. Layouts are torch's.
"""

import sys
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parent.parent / "fixtures" / "parity.npz"
# Keras pads by 'same' or not at all, and takes a stride or a dilation: there the input is padded beforehand.
SHARED = {"channels": 4, "out": 8, "kernel": (3, 2), "padding": (1, 1), "stride": 1, "dilation": 1, "bias": True}
CASES = {
    "dense": {"groups": 1, "multiplier": 6},
    "dense_surplus_stride": {"groups": 1, "multiplier": 9, "stride": 2},
    "dense_dilated_no_bias": {"groups": 1, "multiplier": 6, "dilation": 2, "padding": (0, 0), "bias": False},
    "two_groups_stride": {"groups": 2, "multiplier": 6, "stride": 2},
    "two_groups_surplus": {"groups": 2, "multiplier": 8},
    "depthwise": {"groups": 4, "multiplier": 6},
    "depthwise_surplus_stride": {"groups": 4, "multiplier": 7, "stride": 2, "bias": False},
}


def numbers(random, *shape):
    """Normal numbers that float32 holds exactly, but not their products: single precision shows."""
    return random.normal(size=shape).astype(np.float32).astype(np.float64)


def parameters(random, channels, out, kernel, groups, multiplier, bias, **_):
    """``weight``, ``D`` and, where there are such, ``weight_extra`` and ``bias``."""
    taps = kernel[0] * kernel[1]
    found = {"weight": numbers(random, out, channels // groups, *kernel)}
    found["D"] = numbers(random, channels, taps, multiplier) / 2
    if bias:
        found["bias"] = numbers(random, out)
    if multiplier > taps:
        found["weight_extra"] = numbers(random, out, channels // groups, multiplier - taps)
    return found


def compose(weight, D, extra, groups):
    """``K[o, i, m] = W[o, i, m] + Σ_s D[c, m, s] · W[o, i, s]``, c the input channel that o reads as its i-th."""
    out, per_group, *_ = weight.shape
    W = weight.reshape(out, per_group, -1)
    taps = W.shape[2]
    W = W if extra is None else np.concatenate([W, extra], axis=2)
    K = W[:, :, :taps].copy()
    for o in range(out):
        for i in range(per_group):
            K[o, i] += D[o // (out // groups) * per_group + i] @ W[o, i]
    return K.reshape(weight.shape), W


def patches(padded, kernel, stride, dilation, size):
    """For each tap the slice of the input that it reads, one entry per output position."""
    for tap, (row, column) in enumerate(np.ndindex(*kernel)):
        y, x = row * dilation, column * dilation
        yield tap, (slice(None), slice(y, y + stride * size[0], stride), slice(x, x + stride * size[1], stride))


def evaluate(values, x, probe, groups, stride, dilation, padding):
    """Output, composed kernel, and the gradients of ``(output * probe).sum()``."""
    weight, D, extra = values["weight"], values["D"], values.get("weight_extra")
    K, W = compose(weight, D, extra, groups)
    out, per_group, *kernel = K.shape
    K = K.reshape(out, per_group, -1)
    taps, outputs = K.shape[2], out // groups
    padded = np.pad(x, [(0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2])
    size = [(padded.shape[2 + a] - dilation * (kernel[a] - 1) - 1) // stride + 1 for a in (0, 1)]
    y = np.zeros((len(x), out, *size))
    dK, dx = np.zeros_like(K), np.zeros_like(padded)
    for o in range(out):
        for i in range(per_group):
            c = o // outputs * per_group + i
            for tap, where in patches(padded[:, c], kernel, stride, dilation, size):
                y[:, o] += K[o, i, tap] * padded[:, c][where]
                if probe is not None:
                    dK[o, i, tap] += (probe[:, o] * padded[:, c][where]).sum()
                    dx[:, c][where] += K[o, i, tap] * probe[:, o]
        y[:, o] += values["bias"][o] if "bias" in values else 0
    found = {"output": y, "kernel": K.reshape(weight.shape)}
    if probe is None:
        return found
    dW, dD = np.zeros_like(W), np.zeros_like(D)
    dW[:, :, :taps] = dK
    for o in range(out):
        for i in range(per_group):
            c = o // outputs * per_group + i
            dW[o, i] += D[c].T @ dK[o, i]
            dD[c] += np.outer(dK[o, i], W[o, i])
    bottom, right = padded.shape[2] - padding[0], padded.shape[3] - padding[1]
    found["grad.input"] = dx[:, :, padding[0] : bottom, padding[1] : right]
    found |= {"grad.weight": dW[:, :, :taps].reshape(weight.shape), "grad.D": dD}
    if extra is not None:
        found["grad.weight_extra"] = dW[:, :, taps:]
    if "bias" in values:
        found["grad.bias"] = probe.sum((0, 2, 3))
    return found


def compute():
    """Every array of the fixture by ``case/name``."""
    random = np.random.default_rng(0)
    found = {}
    for case, given in CASES.items():
        settings = SHARED | given
        values = parameters(random, **settings)
        x = numbers(random, 2, settings["channels"], 6, 5)
        geometry = {name: settings[name] for name in ("groups", "stride", "dilation", "padding")}
        probe = numbers(random, *evaluate(values, x, None, **geometry)["output"].shape)
        arrays = {f"state.{name}": value for name, value in values.items()}
        arrays |= {"input": x, "probe": probe, **evaluate(values, x, probe, **geometry)}
        found |= {f"{case}/{name}": value for name, value in arrays.items()}
    return found


def read(case):
    """The committed arrays of a case, and its settings."""
    with np.load(TARGET) as file:
        values = {name.partition("/")[2]: file[name] for name in file if name.startswith(f"{case}/")}
    return values, SHARED | CASES[case]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    from foldconv.files.atomic import atomic_path

    with atomic_path(TARGET) as temporary:
        np.savez_compressed(temporary, **compute())
