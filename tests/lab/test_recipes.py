"""Recipes by their names: found from anywhere, a file of the user's before them."""

import pytest

from foldconv.errors import UnsupportedError
from foldconv.lab import recipes
from foldconv.lab.train.config import read_yaml


def test_every_name_is_found_with_and_without_its_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder is no configuration
    assert len(recipes.names()) > 50
    for name in recipes.names():
        assert recipes.find(name) == recipes.find(f"{name}.yaml")
    assert read_yaml(recipes.find("gluoncv/resnet50_v1b"))["architecture"] == "gluoncv_resnet50_v1b"


def test_a_file_of_the_users_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("epochs: 2\n")
    assert read_yaml(recipes.find("digits")) == {"epochs": 2}


@pytest.mark.parametrize("name", ["gluoncv/_imagenet", "../recipes/digits", "", "digits.yml", "/digits"])
def test_what_is_no_recipe(name):
    with pytest.raises(UnsupportedError, match="config: no file and unknown recipe"):
        recipes.find(name)
