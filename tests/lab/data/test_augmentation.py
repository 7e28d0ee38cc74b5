"""What training images of folders go through: timm's policies, colours, lighting, erasing, the crop's area."""

import numpy as np
import pytest
import torch
from PIL import Image

from foldconv.errors import UnsupportedError
from foldconv.lab.data import create_data, evaluation_loader, training_loader
from foldconv.lab.data.augmentation import PCALighting, image_options, image_transform, operations
from foldconv.lab.train import TrainConfig

SIZE = 16


@pytest.fixture
def folder(tmp_path):
    """Sixteen images of noise per split, in two classes."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for n in range(16):
            path = tmp_path / "set" / split / ("cat" if n % 2 else "dog") / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "set"


def batch(folder, **options):
    """All training images of epoch 0, seed 0."""
    data = create_data(str(folder), image_size=SIZE, **options)
    ((images, _),) = training_loader(data, 16, 0, lambda: 0)
    return images


@pytest.mark.parametrize(
    "options",
    [
        {"augmentation": "rand-m9-mstd0.5-inc1"},
        {"augmentation": "augmix-m3-w3"},
        {"augmentation": "original"},
        {"augmentation": "v0-mstd0.5"},
        {"augmentation_args": {"color_jitter": 0.4}},
        {"augmentation_args": {"lighting": 0.1}},
        {"augmentation_args": {"random_erasing": 1.0}},
        {"augmentation_args": {"crop_scale": 0.9}},
    ],
    ids=str,
)
def test_each_option_changes_training_images_repeatably_and_no_test_image(folder, options):
    images = batch(folder, **options)
    assert images.shape == (16, 3, SIZE, SIZE)
    assert images.dtype == torch.float32
    assert torch.equal(images, batch(folder, **options))
    assert not torch.equal(images, batch(folder))
    plain, changed = (create_data(str(folder), image_size=SIZE, **each) for each in ({}, options))
    ((expected, _),), ((found, _),) = evaluation_loader(plain), evaluation_loader(changed)
    assert torch.equal(expected, found)


POLICIES = ["rand-m9-inc0", "rand-m9-mstd0.5-inc1", "rand-m9-mmax20-inc1", "rand-t3aw", "augmix-m3"]
POLICIES += ["original", "originalr", "v0", "v0r", "3a"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_operation_of_a_policy_at_every_magnitude_with_both_signs(policy, monkeypatch):
    image = Image.effect_noise((SIZE, SIZE), 60).convert("RGB")
    found = {each.name: each for each in operations(image_transform(SIZE, policy, image_options({}), []).transforms[2])}
    assert found
    for draw in (0.0, 1 - 2**-53):
        monkeypatch.setattr("random.random", lambda draw=draw: draw)
        for operation in found.values():
            operation.prob = 1.0
            for operation.magnitude in range(21):
                for operation.magnitude_std in (0.0, 0.5, float("inf")):
                    assert operation(image).size == (SIZE, SIZE)


@pytest.mark.parametrize("increasing", [0, 1])
def test_posterize_keeps_one_bit_at_least(increasing):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    policy = image_transform(SIZE, f"rand-m9-inc{increasing}", image_options({}), []).transforms[2]
    (operation,) = (each for each in operations(policy) if each.name.startswith("Posterize"))
    operation.prob = 1.0
    for operation.magnitude in range(11):
        kept = int(operation.magnitude / 10 * 4)  # of 4 bits at the strongest, as timm has it
        bits = max(1, 4 - kept if increasing else kept)
        assert np.asarray(operation(image)).max() == 256 - 2 ** (8 - bits)


def broken(operation):
    """A policy of which this operation always fails."""
    transform = image_transform(SIZE, "rand-m9-mstd0.5-inc1", image_options({}), [])
    policy = transform.transforms[2]
    (wrong,) = policy.ops = [each for each in policy.ops if each.name == operation]
    wrong.prob, wrong.hparams = 1.0, {}
    wrong.kwargs["fillcolor"] = "no colour"
    return transform


@pytest.mark.parametrize("skip", [False, True])
def test_an_error_in_a_transform_names_the_image_and_the_operation(folder, skip):
    data = create_data(str(folder), image_size=SIZE, corrupt_images="skip" if skip else "error")
    data.train._transform = broken("Rotate")
    message = r"set/train/\w+/\d+.png: expected an image that Rotate can change, received: .*no colour"
    message += ".*; nor can the 15 images before it be used" if skip else ".*corrupt_images: skip"
    with pytest.raises(UnsupportedError, match=message) as told:
        list(training_loader(data, 16, 0, lambda: 0))
    assert "\n" not in str(told.value)
    with pytest.raises(UnsupportedError, match="expected an image that Rotate can change"):
        data.train[0]


def test_a_policy_that_cannot_be_drawn_is_named(folder):
    """Of 14 weighted operations no 15 can be drawn."""
    with pytest.raises(UnsupportedError, match=r"\d+.png: expected an image that RandAugment can change, received: .+"):
        batch(folder, augmentation="rand-m9-n15-t3aw")


def grey(options, level=128, size=64):
    """A grey image after a transform without crop and flip."""
    torch.manual_seed(0)
    image = Image.fromarray(np.full((size, size, 3), level, np.uint8))
    return image_transform(size, "none", image_options(options), [])(image)


def test_colour_jitter_scales_the_brightness_within_its_bounds():
    means = []
    transform = image_transform(4, "none", image_options({"color_jitter": 0.4}), [])
    torch.manual_seed(0)
    for _ in range(200):
        means.append(transform(Image.new("RGB", (4, 4), (100, 100, 100))).float().mean().item())
    assert 59 <= min(means) < 65
    assert 135 < max(means) <= 141


def test_colour_jitter_changes_contrast_and_saturation_too():
    transform = image_transform(4, "none", image_options({"color_jitter": 0.4}), [])
    torch.manual_seed(0)
    factors = []
    for _ in range(200):
        red, green, blue = transform(Image.new("RGB", (4, 4), (120, 60, 60)))[:, 0, 0].tolist()
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        factors.append((red - grey) / grey / (120 / 77.94 - 1))
    # Of one colour, either blends with its grey by 0.6 to 1.4, and brightness leaves the ratio: more only by both.
    assert min(factors) < 0.55
    assert max(factors) > 1.5


def test_lighting_shifts_the_colours_by_the_published_covariance():
    torch.manual_seed(0)
    image = torch.full((3, 1, 1), 128, dtype=torch.uint8)
    shifts = torch.stack([PCALighting(0.1)(image).flatten().float() for _ in range(4000)]) - 128
    # most of ImageNet's variance is brightness, so the channels move together
    assert torch.corrcoef(shifts.T).min() > 0.9
    values, vectors = torch.tensor(PCALighting.eigenvalues), torch.tensor(PCALighting.components)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), atol=1e-3, rtol=0)
    expected = (25.5**2) * vectors @ torch.diag(values**2) @ vectors.T
    # rounding to integers adds a twelfth to each variance; the rest is the error of 4000 draws
    torch.testing.assert_close(torch.cov(shifts.T), expected + torch.eye(3) / 12, atol=1.0, rtol=0)


def test_lighting_does_not_wrap_around():
    torch.manual_seed(0)
    for level in (0, 255):
        image = torch.full((3, 1, 1), level, dtype=torch.uint8)
        assert all(abs(int(each) - level) < 100 for _ in range(50) for each in PCALighting(0.1)(image).flatten())


def test_erasing_paints_one_rectangle_in_the_mean_colour():
    image = grey({"random_erasing": 1.0}, level=0)
    changed = (image != 0).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    rectangle = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].flatten(1)
    assert rectangle.shape[1] == int(changed.sum()) > 0
    assert rectangle.unique(dim=1).flatten().tolist() == [123, 116, 103]
    assert not grey({"random_erasing": 0.0}, level=0).any()


def test_crop_scale_is_the_smallest_share_that_is_seen():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (64, 64, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    spans = {}
    for scale in (0.08, 0.9):
        torch.manual_seed(0)
        transform = image_transform(64, "crop", image_options({"crop_scale": scale}), [])
        seen = [transform(image) for _ in range(50)]
        spans[scale] = min(int(each.max()) - int(each.min()) for each in seen) / 252
    assert spans[0.08] < 0.45  # the crop's height: root of the area times 0.87 to 1.15
    assert spans[0.9] > 0.8


def test_a_config_hands_them_over(folder):
    config = TrainConfig(data=str(folder), image_size=SIZE, augmentation_args={"color_jitter": 0.4})
    ((images, _),) = training_loader(config.open_data(), 16, 0, lambda: 0)
    assert torch.equal(images, batch(folder, augmentation_args={"color_jitter": 0.4}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": "rand-m9"}, "digits: augmentation: 'rand-m9' is for folders of images; expected one of: def"),
        (
            {"augmentation_args": {"lighting": 0.1}},
            "digits: augmentation_args: for folders of images only, received li",
        ),
        ({"augmentation_args": {"lightning": 1}}, "unknown option 'lightning'; did you mean 'lighting'"),
        ({"augmentation_args": {"random_erasing": 2}}, "random_erasing: expected a number from 0 to 1, received 2"),
        ({"augmentation_args": {"color_jitter": "much"}}, "color_jitter: expected a number from 0 to 10, received 'mu"),
        ({"augmentation_args": {"lighting": True}}, "lighting: expected a number .* received True"),
        (
            {"augmentation": "flip", "augmentation_args": {"crop_scale": 0.5}},
            "crop_scale: expected an augmentation with a crop, received 'flip'",
        ),
        ({"augmentation": "rand-x9"}, "timm makes no policy of 'rand-x9': Unknown RandAugment config section"),
        ({"augmentation": "rnd-m9"}, "unknown augmentation 'rnd-m9'.*; or a policy of timm such as rand-m9"),
        ({"augmentation": "rand-foo"}, "unknown augmentation 'rand-foo'"),
    ],
)
def test_what_does_not_apply_is_refused(options, message):
    with pytest.raises(UnsupportedError, match=message):
        create_data("digits", **options)
