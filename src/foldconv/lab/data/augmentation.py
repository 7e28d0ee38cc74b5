"""What happens to a training image of a folder before it joins a batch: crop, mirror, policies, colours, erasing."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...errors import UnsupportedError, unknown
from .transforms import AUGMENTATIONS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_POLICY = re.compile(r"(rand|augmix|original|originalr|v0|v0r|3a)(-(t\w*|[a-z]+\d[\d.]*))*")
_BOUNDS = {
    "color_jitter": (0.0, 10.0),
    "lighting": (0.0, 10.0),
    "random_erasing": (0.0, 1.0),
    "crop_scale": (1e-6, 1.0),
}


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """What `augmentation_args` may hold.

    Args:
        color_jitter: brightness, contrast and saturation are each multiplied by a number from [1 - this, 1 + this].
        lighting: standard deviation of `PCALighting`.
        random_erasing: for which share of the images a rectangle is painted over with the mean colour.
        crop_scale: smallest share of the image's area that a random crop shows.
    """

    color_jitter: float = 0.0
    lighting: float = 0.0
    random_erasing: float = 0.0
    crop_scale: float = 0.08


def image_options(given: Mapping[str, Any], augmentation: str = "default") -> ImageOptions:
    """The options that a config gives.

    Args:
        given: `augmentation_args` of the config.
        augmentation: the config's, which says whether there is a crop at all.

    Raises:
        UnsupportedError: an unknown option (the nearest is given), or a value out of range.

    >>> image_options({"color_jitter": 0.4}).color_jitter
    0.4
    >>> image_options({"color_jiter": 0.4})
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: augmentation_args: unknown option 'color_jiter'; did you mean 'color_jitter'?; ...
    """
    known, values = [field.name for field in dataclasses.fields(ImageOptions)], {}
    for key, value in given.items():
        if key not in known:
            raise UnsupportedError(f"augmentation_args: {unknown('option', key, known)}")
        low, high = _BOUNDS[key]
        number = None if isinstance(value, bool) or not isinstance(value, int | float | str) else _number(value)
        if number is None or not low <= number <= high:
            raise UnsupportedError(
                f"augmentation_args: {key}: expected a number from {low:g} to {high:g}, received {value!r}"
            )
        values[key] = number
    if "crop_scale" in values and not _has("crop", augmentation):
        raise UnsupportedError(
            f"augmentation_args: crop_scale: expected an augmentation with a crop, received {augmentation!r}; "
            "use augmentation: crop, or leave crop_scale out"
        )
    return ImageOptions(**values)


def _number(value: Any) -> float | None:
    try:  # YAML reads 1e-1 as text
        return float(value)
    except ValueError:
        return None


def is_policy(name: str) -> bool:
    """Whether this is the name of a policy as timm writes them.

    >>> is_policy("rand-m9-mstd0.5-inc1"), is_policy("flip")
    (True, False)
    """
    return _POLICY.fullmatch(str(name)) is not None


def check_augmentation(name: str) -> None:
    """Refuse an augmentation that nobody knows.

    >>> check_augmentation("flp")
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: unknown augmentation 'flp'; did you mean 'flip'?; expected one of: ...
    """
    if is_policy(name):
        _timm_steps(224, name, ImageOptions())
    elif name not in AUGMENTATIONS:
        policies = "or a policy of timm such as rand-m9-mstd0.5, augmix-m3-w3, original, v0"
        raise UnsupportedError(f"{unknown('augmentation', name, AUGMENTATIONS)}; {policies}")


def check_for_folders_only(name: str, augmentation: str, given: Mapping[str, Any]) -> None:
    """Refuse what only a folder of images has, for any other set.

    >>> check_for_folders_only("digits", "rand-m9", {})
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: digits: augmentation: 'rand-m9' is for folders of images; expected one of: ...
    """
    if is_policy(augmentation):
        expected = f"expected one of: {', '.join(AUGMENTATIONS)}"
        raise UnsupportedError(f"{name}: augmentation: {augmentation!r} is for folders of images; {expected}")
    if given:
        which = ", ".join(map(str, given))
        raise UnsupportedError(
            f"{name}: augmentation_args: for folders of images only, received {which}; leave it out, "
            "or choose among the values of augmentation"
        )


def image_transform(size: int, augmentation: str, options: ImageOptions, middle: list[Any]) -> Any:
    """From a PIL image to uint8 (3, size, size); random choices come from torch's, NumPy's and Python's generators.

    Args:
        size: height and width in pixels.
        augmentation: one of `AUGMENTATIONS`, or a policy of timm, which crops and flips, too.
        options: colours, erasing, the crop's area.
        middle: the steps that give this size without a crop.
    """
    from torchvision import transforms

    steps = _timm_steps(size, augmentation, options)
    if not _has("crop", augmentation):
        steps[:1] = middle
    steps.append(transforms.PILToTensor())
    if options.lighting:
        steps.append(PCALighting(options.lighting))
    if options.random_erasing:
        colour = tuple(255 * mean for mean in IMAGENET_MEAN)
        steps.append(transforms.RandomErasing(options.random_erasing, value=colour))  # pyright: ignore[reportArgumentType]
    return Steps(steps)


def _has(what: str, augmentation: str) -> bool:
    return what in augmentation or augmentation == "default" or is_policy(augmentation)


def _timm_steps(size: int, augmentation: str, options: ImageOptions) -> list[Any]:
    """timm's own steps on a PIL image: crop, flip, policy, colours."""
    from timm.data.transforms_factory import transforms_imagenet_train

    policy = augmentation if is_policy(augmentation) else None
    try:
        geometry, colours, _ = transforms_imagenet_train(  # pyright: ignore[reportGeneralTypeIssues]
            size,
            scale=(options.crop_scale, 1.0),
            hflip=0.5 if _has("flip", augmentation) else 0.0,
            color_jitter=options.color_jitter or None,  # pyright: ignore[reportArgumentType]
            force_color_jitter=True,
            auto_augment=policy,
            interpolation="bilinear",
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split()) or "it has no such part"
        raise UnsupportedError(f"augmentation: timm makes no policy of {augmentation!r}: {reason}") from error
    for operation in operations(colours.transforms[0]) if policy else ():
        operation.aug_fn = functools.partial(_apply, operation.name, operation.aug_fn)
    return [*geometry.transforms, *colours.transforms]


def operations(policy: Any) -> list[Any]:
    """The operations that a policy of timm draws from."""
    return policy.ops if hasattr(policy, "ops") else [each for several in policy.policy for each in several]


def _apply(name: str, function: Callable[..., Any], image: Any, *level: Any, **options: Any) -> Any:
    """One operation of timm's. At its strongest it asks posterize for 0 bits (fewer with mmax), which was black in
    some releases of Pillow and is refused in others; 1 bit in all of them here.
    """
    if name.startswith("Posterize"):
        level = (max(level[0], 1),)
    return _named(name, function, image, *level, **options)


def _named(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the function gives; an error says which step of an augmentation it comes from."""
    try:
        return function(*args, **options)
    except UnsupportedError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedError(f"expected an image that {name} can change, received: {reason}") from error


class Steps:
    """Transforms one after the other; an error names the one that failed, or the operation of its policy.

    >>> Steps([str.upper, len])("ab")
    2
    """

    def __init__(self, transforms: list[Any]):
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        """The image after all of them."""
        for step in self.transforms:
            image = _named(getattr(step, "__name__", type(step).__name__), step, image)
        return image


class PCALighting:
    """Shift all pixels along the principal components of ImageNet's colours, as other lights would.

    Source: A. Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", NeurIPS 2012,
    section 4.1; components and eigenvalues as in fb.resnet.torch and MXNet, of pixels in [0, 1].

    Args:
        deviation: standard deviation of the three factors; 0.1 in the paper.

    Shapes:
        uint8 (3, H, W), red first, to the same.

    >>> PCALighting(0.0)(torch.full((3, 1, 1), 7, dtype=torch.uint8)).flatten()
    tensor([7, 7, 7], dtype=torch.uint8)
    """

    eigenvalues = (0.2175, 0.0188, 0.0045)
    components = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

    def __init__(self, deviation: float):
        self.deviation = deviation

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """One image, shifted and clipped."""
        factors = torch.randn(3) * self.deviation * torch.tensor(self.eigenvalues)
        shift = 255 * torch.tensor(self.components) @ factors
        return (image + shift.view(3, 1, 1)).round_().clamp_(0, 255).to(torch.uint8)
