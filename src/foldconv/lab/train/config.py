"""`TrainConfig`: everything that decides how a network is trained, as plain values that survive YAML and JSON."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from pathlib import Path
from typing import Any, Literal

from ...errors import UnsupportedError, shown, unknown
from ...files.atomic import atomic_path
from ._values import RANGES, convert, expect_in_range
from ._values import Patterns as Patterns

if typing.TYPE_CHECKING:
    from ..data import ImageData

PLAIN = "plain"
"""The method that expands nothing: the baseline."""


def _about(group: str, help: str) -> dict[str, str]:
    return {"group": group, "help": help}


def _option(default: Any, group: str, help: str) -> Any:
    return dataclasses.field(default=default, metadata=_about(group, help))


_OLD_DATA = re.compile(r"(.+?):((?:holdout(?:=[1-9]\d*)?|unit)(?:,(?:holdout(?:=[1-9]\d*)?|unit))*)")
"""How runs of earlier versions say `holdout` and `normalize`: behind the data set's name."""

_DATA, _NETWORK, _LOOP, _OPTIMIZER, _LOSS, _MACHINE, _RUN = (
    "data",
    "network",
    "training",
    "optimizer and schedule",
    "loss and regularization",
    "machine",
    "run folder",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults train the embedded digits in well under a minute on two cores.

    Raises:
        UnsupportedError: an unknown key (the nearest is given), or a value of the wrong type or range.

    >>> TrainConfig(epochs=3).run_name
    'digits-digits_resnet-doconv'
    >>> TrainConfig.from_dict({"epochs": 3, "lr": "1e-2"}).lr
    0.01
    >>> TrainConfig.from_dict({"epoch": 3})
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: unknown config key 'epoch'; did you mean 'epochs'?; expected one of: data, ...
    """

    data: str = _option(
        "digits",
        _DATA,
        "data set: a name such as digits, an .npz file, a folder of images, or a package.module:LightningDataModule",
    )
    task: Literal["classification", "segmentation", "detection"] = _option(
        "classification",
        _DATA,
        "what the network is for; segmentation: data in Cityscapes' format, detection: in COCO's (other defaults: "
        "lr 0.02 and 0.01, batch_size 8, architecture lraspp_mobilenet_v3_large and ssdlite320_mobilenet_v3_large)",
    )
    data_folder: str = _option("data", _DATA, "where data sets lie or are downloaded to")
    download: bool = _option(True, _DATA, "download a data set that is not there")
    image_size: int | None = _option(
        None, _DATA, "height and width the images are resized to; none: as they are, folders: 224"
    )
    augmentation: str = _option(
        "default", _DATA, "random changes of the training images: none, flip, crop, or for folders a policy of timm"
    )
    augmentation_args: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata=_about(_DATA, "for folders of images: color_jitter, lighting, random_erasing, crop_scale"),
    )
    corrupt_images: Literal["error", "skip"] = _option(
        "error", _DATA, "images that cannot be read: stop, or count them"
    )
    holdout: bool | int = _option(
        False,
        _DATA,
        "test on the last training images, as many as the test split has or so many, and train on the rest",
    )
    split: float = _option(
        0.2, _DATA, "for a folder with one folder per class and no train/ and val/: the share of each class to test on"
    )
    normalize: bool = _option(True, _DATA, "normalize pixels to mean 0 and deviation 1; no: they stay in [0, 1]")
    workers: int = _option(0, _DATA, "processes that decode images; 0: none but the training's own")

    architecture: str = _option(
        "digits_resnet",
        _NETWORK,
        "network: a name of the zoo, of timm or of torchvision, or your own package.module:Class",
    )
    architecture_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_about(_NETWORK, "the network's options")
    )
    pretrained: bool | str = _option(
        False, _NETWORK, "start from trained weights: the library's own (true), or a checkpoint; needs init: preserve"
    )
    pretrained_weights: str = _option(
        "auto",
        _NETWORK,
        "which of the checkpoint's sets of weights, such as state_dict_ema; auto: what its trainer validates",
    )
    pretrained_prefix: str | None = _option(
        None, _NETWORK, "what stands before the network's names in the checkpoint; none: what fits"
    )
    method: str = _option("doconv", _NETWORK, "method that expands the convolutions; 'plain' for none")
    method_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_about(_NETWORK, "the method's options")
    )
    include: Patterns = dataclasses.field(
        default=None, metadata=_about(_NETWORK, "layers to expand, by glob patterns such as 'layer1.*'; none: all")
    )
    exclude: Patterns = dataclasses.field(
        default=None, metadata=_about(_NETWORK, "layers to leave plain, by glob patterns")
    )
    init: Literal["paper", "preserve"] = _option(
        "paper", _NETWORK, "initialization: the paper's, or preserve the function"
    )

    epochs: int = _option(20, _LOOP, "passes over the training images")
    batch_size: int = _option(64, _LOOP, "images per step, of all devices together")
    accumulate: int = _option(
        1, _LOOP, "batches over which gradients are averaged for a step; an epoch's last: those left"
    )
    patience: int = _option(0, _LOOP, "stop when the test accuracy has not risen for so many epochs; 0: train them all")
    qat: bool = _option(
        False, _LOOP, "train through int8's rounding of kernels and activations (needs the extra executorch)"
    )
    seed: int = _option(0, _LOOP, "seed of initialization, order of images and augmentation")

    optimizer: str = _option("sgd", _OPTIMIZER, "sgd (with Nesterov's momentum), or another name of timm.optim")
    optimizer_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_about(_OPTIMIZER, "the optimizer's options")
    )
    lr: float = _option(0.1, _OPTIMIZER, "highest learning rate of the schedule")
    momentum: float = _option(0.9, _OPTIMIZER, "momentum, for optimizers that have one")
    weight_decay: float = _option(
        5e-4, _OPTIMIZER, "weight decay, where it belongs (decay): not on biases, norms, gates"
    )
    schedule: Literal["onecycle", "cosine", "poly", "step", "constant"] = _option(
        "onecycle", _OPTIMIZER, "learning rate over the run, step by step"
    )
    schedule_args: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata=_about(
            _OPTIMIZER,
            "the schedule's options: step: milestones (epochs), factor; cosine: final (share of lr); poly: power, "
            "final; onecycle: those of torch's OneCycleLR",
        ),
    )
    warmup_epochs: float = _option(0.0, _OPTIMIZER, "epochs in which the learning rate rises from 0 (not onecycle)")
    stem_lr_factor: float = _option(1.0, _OPTIMIZER, "learning rate of the first convolution relative to the others'")
    bias_lr_factor: float = _option(1.0, _OPTIMIZER, "learning rate of the biases of convolutions and linear layers")
    norm_bias_lr_factor: float = _option(1.0, _OPTIMIZER, "learning rate of the biases of norms")
    decay: Literal["kernels", "scales", "all"] = _option(
        "kernels",
        _OPTIMIZER,
        "what weight_decay is for; scales: OREPA's of its branches, too; all: norms and biases, too",
    )
    clip_gradient: float = _option(0.0, _OPTIMIZER, "largest norm of the gradient; 0: any")

    label_smoothing: float = _option(0.0, _LOSS, "share of each label that is spread over all classes")
    mixup: float = _option(0.0, _LOSS, "mixup: alpha of the beta distribution; 0: off")
    cutmix: float = _option(0.0, _LOSS, "CutMix: alpha of the beta distribution; 0: off; with mixup: either by chance")
    ema: float = _option(
        0.0, _LOSS, "decay per step of the average of the weights, which is evaluated and folded; 0: off"
    )

    precision: str = _option("32-true", _MACHINE, "Lightning's name: 32-true, 16-mixed, bf16-mixed, bf16-true, 64-true")
    channels_last: bool = _option(False, _MACHINE, "keep images and kernels with their channels last in memory")
    compile: bool = _option(False, _MACHINE, "compile the network with torch.compile")
    accelerator: str = _option("auto", _MACHINE, "where to train: auto, cpu, gpu, mps")
    devices: int = _option(1, _MACHINE, "how many devices of one machine (on a CPU: processes); -1: all")
    strategy: str = _option(
        "auto",
        _MACHINE,
        "how devices share the work: auto, ddp, ddp_find_unused_parameters_true; fsdp: torch's fully_shard, on CPUs, "
        "too",
    )
    nodes: int = _option(1, _MACHINE, "machines")
    sync_batchnorm: bool = _option(False, _MACHINE, "batch norms see the images of all devices (GPUs only)")
    threads: int = _option(0, _MACHINE, "processor threads; 0: one for images below 32x32 pixels, else torch decides")

    track_branches: bool = _option(False, _RUN, "write what the branches of each layer do per epoch: branches.csv")
    logger: Literal["none", "csv", "tensorboard", "wandb", "mlflow"] = _option(
        "none", _RUN, "also log by this one of Lightning's loggers; its package has to be there"
    )
    baseline: bool = _option(
        False,
        _RUN,
        "foldconv train: train the plain network beside it, under the same seed, in baseline/ of the folder",
    )
    keep: int = _option(2, _RUN, "checkpoints kept: last.ckpt, previous.ckpt, previous-2.ckpt, ...")
    best: bool = _option(
        True, _RUN, "also keep best.ckpt, of the epoch with the highest test accuracy; what is folded is the last"
    )
    out: str | None = _option(
        None,
        _RUN,
        "run folder, new; default: runs/DATA-ARCHITECTURE-METHOD, numbered when it exists; needed where torchrun, "
        "Slurm or several machines start the processes",
    )

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, convert(name, getattr(self, name), hint))
        for name in ("data", "data_folder", "pretrained", "out"):  # no shell does it in YAML, nor in --data=~/photos
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, os.path.expanduser(value))
        data = "mnist:holdout,unit" if self.data == "mnist-50k" else self.data
        if old := _OLD_DATA.fullmatch(data):
            object.__setattr__(self, "data", old[1])
            for option, _, count in (each.partition("=") for each in old[2].split(",")):
                if option == "unit":
                    object.__setattr__(self, "normalize", False)
                else:
                    object.__setattr__(self, "holdout", int(count) if count else True)
        for name in RANGES:
            expect_in_range(name, getattr(self, name))
        if self.devices == 0:
            raise UnsupportedError("devices: expected how many, or -1 for all, received 0")
        if self.warmup_epochs and self.schedule == "onecycle":
            raise UnsupportedError(
                "warmup_epochs: onecycle warms up itself (schedule_args: pct_start); expected 0, or another schedule, "
                f"received {self.warmup_epochs}"
            )
        if self.pretrained and self.init == "paper" and self.method != PLAIN:
            raise UnsupportedError(
                "pretrained: init 'paper' would draw the weights anew; expected init: preserve with it"
            )
        if self.ema and self.strategy.startswith("fsdp"):
            raise UnsupportedError("ema: an average of weights that fsdp has split is not supported; use strategy: ddp")
        if self.qat:
            usual = {"compile": False, "precision": "32-true", "devices": 1, "nodes": 1, "strategy": "auto"}
            for name, value in usual.items():
                if getattr(self, name) != value:
                    received = shown(getattr(self, name))
                    raise UnsupportedError(f"qat: expected {name}: {str(value).lower()} with it, received {received}")

    @property
    def run_name(self) -> str:
        """What the run folder is called unless `out` says otherwise."""
        data = Path(self.data).stem if os.sep in self.data or self.data.endswith(".npz") else self.data
        return f"{data}-{self.architecture}-{self.method}".replace("/", "-").replace(":", "-")

    def open_data(self) -> ImageData:
        """The set that the config names, with its options; raises what `create_data` does."""
        from ..data import create_data

        return create_data(
            self.data,
            folder=self.data_folder,
            download=self.download,
            image_size=self.image_size,
            augmentation=self.augmentation,
            augmentation_args=self.augmentation_args,
            corrupt_images=self.corrupt_images,
            holdout=self.holdout,
            normalize=self.normalize,
            split=self.split,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """A config from plain values; what is absent gets its default."""
        known = [field.name for field in dataclasses.fields(cls)]
        if isinstance(old := values.get("tensorboard"), bool):  # runs of earlier versions
            values = {"logger": "tensorboard" if old else "none", **values}
            del values["tensorboard"]
        for key in values:
            if key not in known:
                raise UnsupportedError(unknown("config key", key, known))
        return cls(**{**_OTHER_DEFAULTS.get(str(values.get("task")), {}), **values})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as YAML. `out` is left out: the same file can start another run."""
        import yaml

        values = self.to_dict()
        del values["out"]
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a YAML (or JSON, which is YAML) file."""
        return cls.from_dict(read_yaml(path))


def over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Settings in the place of a base's.

    A value is replaced as a whole, a mapping such as `method_args` too. Options of one method, schedule or architecture
    mean nothing to another: where that is replaced, they go with it.

    >>> over({"schedule": "step", "schedule_args": {"factor": 0.1}, "lr": 0.1}, {"schedule": "cosine"})
    {'schedule': 'cosine', 'lr': 0.1}
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    named = {**defaults, **base}
    replaced = {f"{name}_args" for name, value in values.items() if value != named.get(name)}
    return {**{name: value for name, value in base.items() if name not in replaced}, **values}


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A mapping from a YAML file, as plain values; never runs code.

    The key ``base`` names another such file, relative to the one that names it, whose values stand where this one has
    none (`over`). The key itself is not among the values.

    Raises:
        FileNotFoundError: no such file, or no such base.
        UnsupportedError: not YAML, not a mapping, or files that are each other's base.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "long.yaml").write_text("epochs: 100\\nlr: 0.4")
    ...     _ = Path(folder, "short.yaml").write_text("base: long.yaml\\nepochs: 5")
    ...     read_yaml(Path(folder, "short.yaml"))
    {'epochs': 5, 'lr': 0.4}
    """
    values: dict[str, Any] = {}
    read: list[str] = []
    file: Path | None = Path(path)
    while file is not None:
        mapping = _read_mapping(file)
        read.append(os.path.realpath(file))
        base = mapping.pop("base", None)
        values = over(mapping, values)
        file = None if base is None else _base_of(file, base, read)
    return values


def _base_of(file: Path, base: Any, read: list[str]) -> Path:
    """The file that another one names as its base, after those that were read on the way to it."""
    if not isinstance(base, str) or not base:
        raise UnsupportedError(f"{file}: base: expected the path of a YAML file, received {shown(base)}")
    found = file.parent / base
    if not found.is_file():
        raise FileNotFoundError(
            f"{file}: base: expected a YAML file, found none at {found}; give its path from the folder {file.parent}"
        )
    if os.path.realpath(found) in read:
        names = " -> ".join(Path(name).name for name in [*read, os.path.realpath(found)])
        raise UnsupportedError(f"{file}: base: expected a file without this one as its base, received a loop: {names}")
    return found


def _read_mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_size(text)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers that there are not
        raise UnsupportedError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UnsupportedError(f"{path}: expected a mapping such as 'epochs: 3', received {type(values).__name__}")
    return values


def _check_size(text: str) -> None:
    """PyYAML takes the square of the depth of brackets, and a second for a hundred kilobytes."""
    if len(text) > _LONGEST:
        raise ValueError(f"expected a configuration of at most {_LONGEST:,} characters, received {len(text):,}")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > _DEEPEST:
            raise ValueError(f"nested over {_DEEPEST} levels deep")


_OTHER_DEFAULTS: dict[str, dict[str, Any]] = {
    "segmentation": {"architecture": "lraspp_mobilenet_v3_large", "lr": 0.02, "batch_size": 8},
    "detection": {"architecture": "ssdlite320_mobilenet_v3_large", "lr": 0.01, "batch_size": 8},
}
"""Of the tasks whose networks and images are larger."""
_LONGEST, _DEEPEST = 1 << 18, 50
