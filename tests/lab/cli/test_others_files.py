"""Files of other people's trainers at the command line: read, told of in one line, or refused with the option."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import foldconv
from foldconv.lab import zoo
from foldconv.lab.train import TrainConfig, create_data
from foldconv.lab.train.building import build
from foldconv.network.verify import verify

NETWORK = ("--architecture", "digits_resnet", "--architecture-args", "width=4")


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return zoo.create("digits_resnet", width=4)


def under(prefix, values):
    return {prefix + name: value for name, value in values.items()}


def test_eval_takes_what_the_trainer_validates_and_says_so(call, plain, tmp_path):
    right = plain.state_dict()
    wrong = {name: torch.zeros_like(value) for name, value in right.items()}
    path = tmp_path / "x.pth"
    torch.save(right, path)
    expected = call("eval", path, *NETWORK, "--data", "digits", "--json")[1]
    for content, options, line in (
        (
            {"state_dict": wrong, "state_dict_ema": under("module.", right)},
            (),
            "took 'state_dict_ema' (timm's saver: the",
        ),
        ({"model": right, "model_ema": wrong}, ("--weights", "model"), "took 'model' (as asked for; 56 tensors), not "),
        (
            under("model.", right) | under("old.", wrong),
            ("--prefix", "model"),
            "stripped 'model.'; left 56 that do not",
        ),
    ):
        torch.save(content, path)
        code, out, err = call("eval", path, *NETWORK, "--data", "digits", "--json", *options)
        assert (code, out) == (0, expected)
        assert err.count("\n") == 1
        assert line in err


def test_what_does_not_fit_lists_the_files_names(fails, plain, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(
        {"state_dict": {f"layers.{name}": value[:1] for name, value in plain.state_dict().items() if value.dim()}}, path
    )
    error = fails("eval", path, *NETWORK, "--data", "digits")
    assert "its own names begin with 'layers.' (47), such as 'layers.stem.0.weight'" in error
    assert error.endswith(
        "or name another network; if it is an expanded network's, name what expanded it with --method"
    )
    torch.save(under("a.", plain.state_dict()) | under("b.", {n: v + 1 for n, v in plain.state_dict().items()}), path)
    assert "by names that begin with 'a.', 'b.'; choose with --prefix" in fails(
        "eval", path, *NETWORK, "--data", "digits"
    )
    foldconv.save(plain, tmp_path / "own", extra={"architecture": "digits_resnet", "architecture_args": {"width": 4}})
    error = fails("eval", tmp_path / "own", "--data", "digits", "--weights", "model")
    assert error.endswith("own: a file of foldconv says itself what is in it; leave weights out (--weights)")


@pytest.mark.parametrize("method", ["doconv", "repvgg", "orepa"])
def test_a_plain_save_of_an_expanded_network_folds(call_json, fails, plain, tmp_path, method):
    rich = foldconv.expand(plain, method, exclude=["stem*"], example_inputs=torch.randn(2, 1, 8, 8)).eval()
    with torch.no_grad():
        for parameter in rich.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"state_dict": under("module.", rich.state_dict())}, tmp_path / "rich.pth")
    fails("fold", tmp_path / "rich.pth", tmp_path / "out.safetensors", *NETWORK)
    call_json("fold", tmp_path / "rich.pth", tmp_path / "out.safetensors", *NETWORK, "--method", method)
    folded = foldconv.load(tmp_path / "out.safetensors", plain)
    assert verify(rich, folded.eval(), torch.randn(2, 1, 8, 8)).max_error < 1e-4
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    error = fails("fold", tmp_path / "plain.pth", tmp_path / "b.safetensors", *NETWORK, "--method", method)
    assert f"no layer in it is expanded with {method}; leave --method out" in error


def test_method_args(call_json, plain, tmp_path):
    rich = foldconv.expand(plain, foldconv.DOConv(depth_multiplier=12))
    torch.save(rich.state_dict(), tmp_path / "rich.pth")
    arguments = ("fold", tmp_path / "rich.pth", tmp_path / "a.safetensors", *NETWORK, "--method", "doconv")
    call_json(*arguments, "--method-args", "depth_multiplier=12")
    folded = load_file(tmp_path / "a.safetensors")
    assert all(torch.allclose(folded[name], value, atol=1e-6) for name, value in plain.state_dict().items())


def test_training_starts_from_others_files(plain, tmp_path):
    data = create_data("digits")
    changed = {name: value + 1 for name, value in plain.state_dict().items()}
    path = tmp_path / "bare.safetensors"
    for content, options in (
        (changed, {}),
        (under("net.", changed) | {"loss.weight": torch.ones(3)}, {}),
        (under("a.", changed) | under("b.", plain.state_dict()), {"pretrained_prefix": "a."}),
    ):
        save_file(content, path)
        config = TrainConfig(
            architecture_args={"width": 4}, method="plain", init="preserve", pretrained=str(path), **options
        )
        network, _ = build(config, data)
        assert torch.equal(network.stem[0].weight, plain.stem[0].weight + 1)
