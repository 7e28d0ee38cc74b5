"""A config survives YAML and JSON, and says what is wrong with it."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from foldconv.errors import UnsupportedError
from foldconv.lab import recipes
from foldconv.lab.train import TrainConfig
from foldconv.lab.train.config import over, read_yaml

CONFIGS = sorted(Path(recipes.__file__).parent.rglob("*.yaml"))
UNUSUAL = TrainConfig(
    architecture="timm/resnet18",
    architecture_args={"drop_rate": 0.1},
    method_args={"depth_multiplier": 12},
    init="preserve",
    epochs=3,
    lr=1e-5,
    schedule="cosine",
    seed=7,
)


def test_survives_yaml_and_json(tmp_path):
    UNUSUAL.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == UNUSUAL
    (tmp_path / "config.json").write_text(json.dumps(UNUSUAL.to_dict()))
    assert TrainConfig.load(tmp_path / "config.json") == UNUSUAL


def test_saved_config_starts_another_run(tmp_path):
    dataclasses.replace(UNUSUAL, out=str(tmp_path)).save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml").out is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_config_of_the_repository_loads(path):
    TrainConfig.load(path)


def test_digits_config_is_the_default():
    written = TrainConfig.load(next(path for path in CONFIGS if path.name == "digits.yaml"))
    assert dataclasses.replace(written, architecture_args={}) == TrainConfig()


@pytest.mark.parametrize(
    ("data", "values"),
    [
        ("mnist.npz:holdout,unit", {"data": "mnist.npz", "holdout": True, "normalize": False}),
        ("sets/mnist.npz:holdout=5000", {"data": "sets/mnist.npz", "holdout": 5000}),
        ("mnist:unit", {"data": "mnist", "normalize": False}),
        ("mnist-50k", {"data": "mnist", "holdout": True, "normalize": False}),
        ("module.path:ClassName", {"data": "module.path:ClassName"}),
    ],
)
def test_configs_of_before_with_options_in_the_name_of_the_data(tmp_path, data, values):
    (tmp_path / "config.yaml").write_text(f"data: {data}\nepochs: 3\n")
    read = TrainConfig.load(tmp_path / "config.yaml")
    assert read == TrainConfig(**values, epochs=3)
    assert type(read.holdout) is type(values.get("holdout", False))  # 1 == True
    read.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == read


def test_home_is_where_the_user_is_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = TrainConfig(data="~/photos", data_folder="~", pretrained="~/net.pth", init="preserve", out="~/runs/~")
    home = Path(tmp_path)
    assert [Path(config.data), Path(config.data_folder)] == [home / "photos", home]
    assert [Path(config.pretrained), Path(config.out)] == [home / "net.pth", home / "runs" / "~"]


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_numbers_that_yaml_reads_as_text():
    assert yaml.safe_load("1e-2") == "1e-2"  # the trap
    assert TrainConfig.from_dict({"lr": "1e-2"}).lr == 0.01
    assert isinstance(TrainConfig.from_dict({"lr": 1}).lr, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown config key 'epoch'; did you mean 'epochs'"),
        ({"zzzz": 3}, "unknown config key 'zzzz'; expected one of: data, "),
        ({"epochs": 0}, "epochs: expected a number ≥ 1, received 0"),
        ({"epochs": 2.5}, "epochs: expected an integer, received 2.5"),
        ({"epochs": True}, "epochs: expected an integer, received True"),
        ({"lr": "fast"}, "lr: expected a number, received 'fast'"),
        ({"lr": float("inf")}, "lr: expected a number ≥ 0, received inf"),
        ({"lr": float("nan")}, "lr: expected a number, received nan"),
        ({"batch_size": 1}, "batch_size: expected a number ≥ 2, received 1"),
        ({"data": None}, "data: expected text, received None"),
        ({"architecture_args": [1]}, r"architecture_args: expected KEY: VALUE pairs, received \[1\]"),
        ({"init": "papr"}, "init: expected one of paper, preserve, received 'papr'"),
        ({"holdout": "some"}, "holdout: expected true, false or how many images, received 'some'"),
        ({"holdout": -1}, "holdout: expected a number ≥ 0, received -1"),
        ({"out": 3}, "out: expected text, received 3"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(UnsupportedError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs: [", "not a YAML file"),
        (b"\xff\xfe\x00", "not a YAML file"),
        (b"epochs: " + b"9" * 5000, "not a YAML file: Exceeds the limit"),
        (b"seed: 2026-02-30", "not a YAML file: day is out of range"),
        (b"epochs: " + b"[" * 100_000, "not a YAML file: nested over 50 levels deep"),
        (b"data: " + b"x" * 300_000, "not a YAML file: expected a configuration of at most 262,144 characters"),
        (b"- 1", "expected a mapping .*, received list"),
        (b"!!python/object/apply:os.system ['true']", "not a YAML file: could not determine a constructor"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UnsupportedError, match=rf"config\.yaml: {message}"):
        TrainConfig.load(path)


def test_values_that_would_fill_a_message(tmp_path):
    aliases = ["x"]
    for _ in range(30):
        aliases = [aliases] * 9
    for content, received in ((yaml.safe_dump({"epochs": aliases}), r"\[\[\["), ("epochs: 0x" + "f" * 5000, "int$")):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(UnsupportedError, match=f"epochs: expected an integer, received {received}") as caught:
            TrainConfig.load(tmp_path / "config.yaml")
        assert len(str(caught.value)) < 300


def test_empty_file_is_the_default(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert TrainConfig.load(tmp_path / "config.yaml") == TrainConfig()


def chain(folder, **files):
    """Write files named after the arguments; their paths."""
    paths = []
    for name, values in files.items():
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(values))
    return paths


def test_a_base_gives_what_the_file_leaves_out(tmp_path):
    (tmp_path / "family").mkdir()
    chain(tmp_path, root={"epochs": 7, "lr": 0.5, "method_args": {"rate": 2, "chain": "CL"}})
    chain(tmp_path / "family", middle={"base": "../root.yaml", "epochs": 8, "seed": 3})
    (path,) = chain(tmp_path, own={"base": "family/middle.yaml", "seed": 4, "method_args": {"chain": "CK"}})
    assert read_yaml(path) == {"epochs": 8, "lr": 0.5, "seed": 4, "method_args": {"chain": "CK"}}
    assert TrainConfig.load(path) == TrainConfig(epochs=8, lr=0.5, seed=4, method_args={"chain": "CK"})


@pytest.mark.parametrize("name", ["augmentation", "architecture", "method", "optimizer", "schedule"])
def test_options_go_with_what_they_are_for(tmp_path, name):
    base, other = {name: "one", f"{name}_args": {"a": 1}, "epochs": 7}, {"base": "base.yaml", name: "other"}
    _, same, anew, own = chain(
        tmp_path, base=base, same=other | {name: "one"}, anew=other, own=other | {f"{name}_args": {"b": 2}}
    )
    assert read_yaml(same) == base
    assert read_yaml(anew) == {name: "other", "epochs": 7}
    assert read_yaml(own) == {name: "other", f"{name}_args": {"b": 2}, "epochs": 7}
    default = getattr(TrainConfig(), name)  # which a base that does not name it means
    assert over({f"{name}_args": {"a": 1}}, {name: default}) == {name: default, f"{name}_args": {"a": 1}}
    assert over({f"{name}_args": {"a": 1}}, {name: "other"}) == {name: "other"}


def test_a_saved_config_has_no_base(tmp_path):
    _, path = chain(tmp_path, root={"epochs": 7}, own={"base": "root.yaml"})
    TrainConfig.load(path).save(tmp_path / "saved.yaml")
    (tmp_path / "root.yaml").unlink()
    assert "base:" not in (tmp_path / "saved.yaml").read_text()
    assert TrainConfig.load(tmp_path / "saved.yaml").epochs == 7


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"a": {"base": "b.yaml"}}, FileNotFoundError, r"a\.yaml: base: expected a YAML file, found none at .*b\.yaml"),
        ({"a": {"base": "."}}, FileNotFoundError, "expected a YAML file, found none at"),
        ({"a": {"base": "a.yaml"}}, UnsupportedError, r"received a loop: a\.yaml -> a\.yaml$"),
        (
            {"a": {"base": "b.yaml"}, "b": {"base": "c.yaml"}, "c": {"base": "./b.yaml"}},
            UnsupportedError,
            r"c\.yaml: base: .* a loop: a\.yaml -> b\.yaml -> c\.yaml -> b\.yaml$",
        ),
        ({"a": {"base": 3}}, UnsupportedError, "base: expected the path of a YAML file, received 3"),
        ({"a": {"base": ["b.yaml"]}}, UnsupportedError, r"base: expected the path of a YAML file, received \['b"),
        ({"a": {"base": "b.yaml"}, "b": [1]}, UnsupportedError, r"b\.yaml: expected a mapping"),
        ({"a": {"base": "b.yaml"}, "b": {"epoch": 1}}, UnsupportedError, "unknown config key 'epoch'"),
    ],
)
def test_bases_that_cannot_be_are_refused_in_one_line(tmp_path, files, error, message):
    path, *_ = chain(tmp_path, **files)
    with pytest.raises(error, match=message) as caught:
        TrainConfig.load(path)
    assert "\n" not in str(caught.value)
