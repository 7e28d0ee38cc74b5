"""Hugging Face: expanded models through `Trainer`, accelerate and ``save_pretrained``, folds on the hub.

``model.save_pretrained`` writes an expanded model's tensors, and ``from_pretrained`` drops those that the plain model
does not have. What was expanded, and how, stands in the model's own config here, so that every ``save_pretrained``
writes it, `Trainer`'s too; `from_pretrained` of this module expands by it. A fold is an ordinary model of transformers.

`Trainer` decays every parameter that is no bias and no LayerNorm's, scales and gates of some methods too: give it
``optimizers=(torch.optim.AdamW(foldconv.parameter_groups(model, weight_decay)), None)``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..errors import UnsupportedError
from ..files.folders import read_content
from ..files.native import describe_layers, expand_as_described, load_exactly
from ..files.weights import take
from ..methods import Method, get_method
from ..network.expand import expand as expand_network
from ..network.fold import fold as fold_network

KEY = "foldconv"
"""The name in the model's config."""
M = TypeVar("M", bound=nn.Module)


def expand(model: nn.Module, method: str | Method, **options: Any) -> nn.Module:
    """`foldconv.expand`, and the model's config says what was expanded: ``save_pretrained`` keeps it.

    Args:
        model: a model of transformers.
        method, options: as `foldconv.expand`.

    Raises:
        NoMatchError, UnsupportedError: as `foldconv.expand`, or for a model that has no ``save_pretrained``.
    """
    _expect_pretrained(model)
    return describe(expand_network(model, method, **options))


def fold(model: nn.Module, **options: Any) -> nn.Module:
    """`foldconv.fold`, and the config says nothing of foldconv any more.

    Raises:
        FoldMismatchError, UnsupportedError: as `foldconv.fold`, or for a model that has no ``save_pretrained``.
    """
    _expect_pretrained(model)
    return describe(fold_network(model, **options))


def describe(model: M) -> M:
    """Write into the model's config which layers are expanded now, if any; for a model changed in other ways.

    Returns:
        The same model.

    Raises:
        UnsupportedError: for a model that has no config and ``save_pretrained``.
    """
    _expect_pretrained(model)
    config: Any = model.config
    layers = describe_layers(model)
    if layers:
        setattr(config, KEY, layers)
    elif hasattr(config, KEY):
        delattr(config, KEY)
    return model


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """``model.save_pretrained(folder, **options)`` with a config that says what is expanded now.

    Raises:
        UnsupportedError: for a model that has no ``save_pretrained``.
    """
    saved: Any = describe(model)
    saved.save_pretrained(folder, **options)


def from_pretrained(path: str | os.PathLike[str], model_class: Any, **options: Any) -> Any:
    """The model that ``save_pretrained`` wrote, expanded where it was, with all its training state.

    Args:
        path: a folder, or the name of a repository on the hub.
        model_class: the class of the plain model (``ResNetForImageClassification``) or an ``AutoModelFor...``.
        options: for ``huggingface_hub.snapshot_download``, such as ``revision``, where `path` is on the hub.

    Returns:
        The model, in evaluation mode, as transformers' own ``from_pretrained`` gives it. A folder without expanded
        layers gives a plain model.

    Raises:
        CheckpointError: when the folder does not hold what its config describes; the message lists the keys.
    """
    from transformers import AutoConfig  # pyright: ignore[reportMissingImports]

    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(path), **options))
    config = AutoConfig.from_pretrained(folder)
    layers = vars(config).pop(KEY, {})
    build = getattr(model_class, "from_config", None) or model_class._from_config
    plain: Any = build(config)
    tensors = take(read_content(folder), folder, prefix="").tensors
    if tensors.keys() == plain.state_dict().keys():  # folded since, by somebody who left the config as it was
        layers = {}
    model: Any = expand_as_described(plain, layers, folder, tensors) if layers else plain
    load_exactly(model, tensors, folder)
    return describe(model).eval()


def save_fold(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None, text: str = "", **data: Any
) -> nn.Module:
    """Write a folder for the hub: the fold as transformers' own ``from_pretrained`` loads it, and a model card.

    Args:
        model: expanded, or a fold.
        folder: where to.
        name: what the card calls the model; by default as the folder.
        text: Markdown for the card: what the model does, what it was trained on and how well it does.
        data: what ``huggingface_hub.ModelCardData`` takes: ``license``, ``datasets``, ``metrics``, ``base_model``, ...

    Returns:
        The fold.

    Raises:
        FoldMismatchError, UnsupportedError: as `fold`.
    """
    folded: Any = fold(model)
    folded.save_pretrained(folder)
    _card(model, folded, name or Path(folder).name, text, data).save(Path(folder) / "README.md")
    return folded


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    text: str = "",
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a folded model",
    **data: Any,
) -> str:
    """Put the fold of a model on the hub, with a model card; see `save_fold`.

    Args:
        model: expanded, or a fold.
        repo_id: ``"user/name"``; made where it is not there.
        text, data: for the card.
        private, token: as of ``huggingface_hub.HfApi.create_repo``.
        commit_message: of the upload.

    Returns:
        The address of the commit.

    Raises:
        FoldMismatchError, UnsupportedError: as `fold`; nothing was sent.
        huggingface_hub.errors.HfHubHTTPError: what the hub refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_fold(model, folder, name=repo_id.rpartition("/")[2], text=text, **data)
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message))


def _card(trained: nn.Module, folded: nn.Module, name: str, text: str, data: dict[str, Any]) -> Any:
    from huggingface_hub import ModelCard, ModelCardData

    cls, described = type(folded).__name__, describe_layers(trained)
    lines = [f"# {name}", "", f"An ordinary `{cls}` of transformers; it needs nothing else.", ""]
    if described:
        methods = [get_method(each) for each in sorted({description["method"] for description in described.values()})]
        titles = ", ".join(f"{method.title} ({method.paper})" for method in methods)
        count = [sum(p.numel() for p in model.parameters()) for model in (trained, folded)]
        lines += [
            f"It was trained with {len(described)} of its convolutions expanded by foldconv: {titles}. Each was then "
            "folded into the plain convolution that computes the same, and compared with it.",
            "",
            "| | while training | here |",
            "|---|---|---|",
            f"| parameters | {count[0]:,} | {count[1]:,} |",
            "",
        ]
    tags = [*dict.fromkeys([*data.get("tags", []), "foldconv"])]
    header = ModelCardData(**{"library_name": "transformers", **data, "tags": tags}).to_yaml()
    return ModelCard(f"---\n{header}\n---\n\n" + "\n".join([*lines, text]))


def _expect_pretrained(model: Any) -> None:
    if not hasattr(model, "save_pretrained") or not hasattr(getattr(model, "config", None), "save_pretrained"):
        raise UnsupportedError(
            f"expected a model of transformers, received {type(model).__name__}, which has no config of "
            "theirs; use foldconv.expand, fold and save"
        )
