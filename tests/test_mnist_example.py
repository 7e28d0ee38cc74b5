"""The MNIST demo in PyTorch, and what all of them share: paired runs, a table and a file that agree."""

import io
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
DEMOS = {"pytorch": ["torch"], "keras": ["keras", "tensorflow-cpu"], "gluon": ["mxnet"]}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def example(import_example):
    return import_example("mnist_pytorch")


@pytest.fixture(scope="module")
def shared(import_example):
    return import_example("_mnist")


def test_the_table_says_what_the_file_says(example, stripes, tmp_path, capsys):
    out = tmp_path / "results.json"
    arguments = ["--layer", "both", "--seeds", "2", "--epochs", "1", "--data", str(stripes), "--out", str(out)]
    report = example.main(arguments)
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written == report
    assert (written["images"], written["held_out"], written["seeds"]) == (500, 100, [0, 1])
    assert set(written["accuracies"]) == {"conv", "doconv"}
    assert written["machine"]["threads"] == torch.get_num_threads()
    assert written["versions"]["torch"] == torch.__version__.split("+")[0]

    printed = capsys.readouterr().out
    rows = {name: (mean, std) for name, mean, std in re.findall(r"\| (\w+) \| ([\d.]+) \| ([\d.]+) \|", printed)}
    for name, values in written["accuracies"].items():
        assert len(values) == 2
        assert all(0 <= value <= 100 and value == round(value) for value in values)  # of 100 images
        assert rows[name] == (f"{sum(values) / 2:.3f}", f"{abs(values[0] - values[1]) / 2**0.5:.3f}")
    differences = [b - a for a, b in zip(*(written["accuracies"][name] for name in ("conv", "doconv")), strict=True)]
    # Of two values Student's interval is the mean ± tan(0.475 π) · half their distance.
    half = np.tan(0.475 * np.pi) * abs(differences[1] - differences[0]) / 2
    mean = statistics.fmean(differences)
    received = [float(value) for value in re.findall(r"[+-]\d+\.\d+", printed.splitlines()[-1])]
    assert received == pytest.approx([mean, mean - half, mean + half], abs=6e-4)


def test_the_same_seed_gives_the_same_weights_and_the_same_start(example):
    conv, doconv, other = example.network("conv", 3), example.network("doconv", 3), example.network("conv", 4)
    for name, value in conv.state_dict().items():
        assert torch.equal(value, doconv.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])
    assert sum(name.endswith(".D") for name in doconv.state_dict()) == 3
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(conv(x), doconv(x))


@pytest.mark.parametrize("layer", ["conv", "doconv"])
def test_the_order_of_the_images_depends_on_the_seed_alone(example, layer, monkeypatch):
    orders, images, labels = [], torch.rand(40, 1, 28, 28), torch.zeros(40, dtype=torch.long)
    draw = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *given, **named: orders.append(draw(*given, **named)) or orders[-1])
    for draws_before in (0, 5):
        net = example.network(layer, 7)
        torch.rand(draws_before)
        example.train(net, images, labels, 7, 2, lambda: None)
    first, second, *again = orders
    assert not torch.equal(first, second)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert torch.equal(first, draw(40, generator=torch.Generator().manual_seed(7)))


def test_orders_are_permutations_that_differ_by_epoch_and_seed(shared):
    np.random.seed(0)
    first, second = shared.orders(40, 7, 2)
    np.random.seed(1)  # a framework's draws do not reach them
    again, _ = shared.orders(40, 7, 2)
    (other,) = shared.orders(40, 8, 1)
    assert sorted(first) == sorted(second) == list(range(40))
    assert (first == again).all()
    assert (first != second).any()
    assert (first != other).any()


def test_training_learns(example, stripes):
    x, y, held_x, held_y = example.load(stripes)
    assert (x.shape, held_x.shape, float(x.max()) <= 1) == ((500, 1, 28, 28), (100, 1, 28, 28), True)
    with np.load(stripes) as file:  # the last of the training images, none of the test images
        assert torch.equal(held_x[:, 0], torch.from_numpy(file["x_train"][500:]) / 255)
    net = example.network("doconv", 0)
    before = example.accuracy(net, held_x, held_y)
    example.train(net, x, y, 0, 8, lambda: None)
    assert example.accuracy(net, held_x, held_y) > max(before, 90)


@pytest.mark.parametrize("rich", [True, False])
def test_progress_counts_to_the_end(shared, rich, monkeypatch):
    if not rich:
        monkeypatch.setattr(shared.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with shared.progress_bar(3) as advance:
        for _ in range(3):
            advance()
    if rich:
        pytest.importorskip("rich")
        assert "100%" in terminal.getvalue()
    else:
        assert terminal.getvalue() == "\repoch 1 of 3\repoch 2 of 3\repoch 3 of 3\n"


def test_one_seed_has_no_spread(example, stripes, capsys):
    report = example.main(["--layer", "conv", "--seeds", "1", "--epochs", "1", "--data", str(stripes)])
    mean = report["accuracies"]["conv"][0]
    assert report["summary"] == {"conv": {"mean": mean, "std": None}}
    assert f"| conv | {mean:.3f} | – |" in capsys.readouterr().out


def test_known_samples(shared):
    samples = {"conv": [10, 10, 10, 10], "doconv": [11, 12, 13, 14]}
    summary = shared.summarize(samples)
    printed = shared.table({"seeds": [0, 1, 2, 3], "accuracies": samples, "summary": summary})
    assert printed.endswith(": +2.500, 95 % interval +0.446 to +4.554")
    assert summary["doconv"] == {"mean": 12.5, "std": pytest.approx(1.290994)}
    assert summary["difference"]["mean"] == 2.5
    assert (summary["difference"]["low"], summary["difference"]["high"]) == pytest.approx((0.446, 4.554), abs=5e-4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "expected arrays x_train, y_train, received x"),
        ({"x_train": np.zeros((6, 28, 28)), "y_train": np.zeros(6, int)}, "received (6, 28, 28) of float64"),
        ({"x_train": np.zeros((6, 28, 28), "u1"), "y_train": np.full(6, 10)}, "of digits"),
    ],
)
def test_other_files_are_refused_in_one_line(example, arrays, message, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(SystemExit) as exit:
        example.main(["--data", str(tmp_path / "other.npz")])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_would_fail_at_the_end_fails_at_the_start(example, stripes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.main(["--data", str(stripes), "--out", str(tmp_path / "absent" / "results.json")])
    assert "--out: no such folder" in capsys.readouterr().err
    (tmp_path / "cut.npz").write_bytes(stripes.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        example.main(["--data", str(tmp_path / "cut.npz")])
    assert "--data: expected an .npz file" in capsys.readouterr().err


def test_threads_come_from_the_environment(shared, monkeypatch):
    for text, threads in {"3": 3, "4,2": None}.items():
        monkeypatch.setenv("SOME_THREADS", text)
        assert shared.threads_of("SOME_THREADS") == threads
    monkeypatch.delenv("SOME_THREADS")
    assert shared.threads_of("SOME_THREADS") is None


@pytest.mark.parametrize("demo", DEMOS)
def test_the_docs_are_the_measurements(shared, demo):
    sections = re.split(r"\n## ", (DOCS / "mnist.md").read_text(encoding="utf-8"))
    (section,) = (section for section in sections if f"examples/mnist_{demo}.py" in section)
    report = json.loads((DOCS / f"results-mnist-{demo}.json").read_text(encoding="utf-8"))
    assert f"--seeds {len(report['seeds'])} " in section
    assert f"--out docs/results-mnist-{demo}.json" in section.replace("\\\n", "").replace("        ", "")
    summary = shared.summarize(report["accuracies"])
    for name, values in report["summary"].items():
        assert summary.pop(name) == pytest.approx(values, rel=1e-12)
    assert not summary
    assert shared.table(report) in section
    assert f"{report['epochs']} epochs" in section
    assert f"The run took {report['seconds']:.0f} s" in section
    assert report["machine"]["threads"] == 1
    assert f"{report['machine']['processor']}, one thread" in section
    for name in ["python", "foldconv", "numpy", *DEMOS[demo]]:
        assert f"{name} {report['versions'][name]}".lower() in section.lower()
