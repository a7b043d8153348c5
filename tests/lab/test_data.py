"""Are the parts of a data set apart, scaled by what may be looked at, and the same every time?"""

import random
import urllib.error

import numpy as np
import pytest
import torch

from gradprune.lab import data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One cache for the module: the signals are generated once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cached(monkeypatch, folder):
    monkeypatch.setenv("GRADPRUNE_DATA", str(folder))


def parts(dataset):
    return dataset.train, dataset.validation, dataset.test


def rows(split):
    """The examples as hashable rows of their ranks: shift and scale do not matter."""
    return [row.numpy().tobytes() for row in split.x]


@pytest.mark.parametrize(
    ("name", "sizes", "features"), [("digits", (1150, 288, 359), 64), ("mnist1d", (3200, 800, 1000), 40)]
)
def test_three_parts_share_no_example_and_are_of_the_size_and_type_that_is_said(name, sizes, features):
    loaded = data.load(name)
    assert tuple(map(len, parts(loaded))) == sizes
    assert (loaded.name, loaded.features, loaded.classes) == (name, features, 10)
    for split in parts(loaded):
        assert split.x.dtype == torch.float32
        assert split.y.dtype == torch.int64
        assert split.x.shape == (len(split), features)
        assert set(split.y.tolist()) == set(range(10))
    whole = [rows(split) for split in parts(loaded)]
    assert not set(whole[0]) & set(whole[1])
    assert not set(whole[0]) & set(whole[2])
    assert not set(whole[1]) & set(whole[2])


def test_the_parts_of_digits_together_are_the_digits():
    from sklearn.datasets import load_digits

    loaded, (x, y) = data.load("digits", seed=7), load_digits(return_X_y=True)
    together = torch.cat([split.x for split in parts(loaded)]).double().numpy()
    labels = torch.cat([split.y for split in parts(loaded)]).numpy()
    low, high = together.min(), together.max()
    back = np.rint((together - low) / (high - low) * 16)  # the pixels are whole numbers from 0 to 16
    found = sorted((int(label), *map(int, row)) for row, label in zip(back, labels, strict=True))
    assert found == sorted((int(label), *map(int, row)) for row, label in zip(x, y, strict=True))


@pytest.mark.parametrize("name", ["digits", "mnist1d"])
def test_the_scale_is_that_of_the_training_part_alone(name):
    loaded = data.load(name, seed=1)
    assert loaded.train.x.double().mean().item() == pytest.approx(0, abs=1e-5)
    assert loaded.train.x.double().std(correction=0).item() == pytest.approx(1, abs=1e-5)
    for split in (loaded.validation, loaded.test):
        assert abs(split.x.double().mean().item()) > 1e-4  # near, but not made so


def test_the_seed_decides_which_examples_are_kept_and_nothing_else_does():
    one, again, other = data.load("digits", seed=1), data.load("digits", seed=1), data.load("digits", seed=2)
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(parts(one), parts(again), strict=True))
    assert not torch.equal(one.validation.y, other.validation.y)
    assert not torch.equal(one.test.y, other.test.y)
    first, second = data.load("mnist1d", seed=1), data.load("mnist1d", seed=2)
    assert not torch.equal(first.validation.y, second.validation.y)
    assert torch.equal(first.test.y, second.test.y)  # its test part is fixed


def test_no_global_generator_is_touched(folder):
    (folder / "mnist1d-seed42-5000.npz").unlink(missing_ok=True)  # so that it is generated
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    for name in ("digits", "mnist1d", "mnist1d"):
        data.load(name, seed=5)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


def test_the_signals_are_those_of_the_package_that_publishes_them():
    from mnist1d.data import get_dataset_args, make_dataset

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    made = make_dataset(get_dataset_args())
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    loaded = data.load("mnist1d")
    assert np.array_equal(loaded.test.y.numpy(), made["y_test"])
    shifted = loaded.test.x.double().numpy()
    slope, offset = np.polyfit(made["x_test"].ravel(), shifted.ravel(), 1)
    assert np.allclose(made["x_test"] * slope + offset, shifted, atol=1e-5)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half a file", "first half", "flipped", "other arrays"])
def test_a_damaged_cache_is_made_again(monkeypatch, tmp_path, damage):
    small = {"x": np.eye(20), "y": np.arange(20) % 10, "x_test": np.eye(10, 20), "y_test": np.arange(10)}
    monkeypatch.setenv("GRADPRUNE_DATA", str(tmp_path / "new" / "folder"))
    monkeypatch.setattr(data, "_generate_mnist1d", lambda: small)
    expected = data.load("mnist1d").test.x
    (path,) = (tmp_path / "new" / "folder").iterdir()
    whole = path.read_bytes()
    if damage == "other arrays":
        np.savez(path, x=np.eye(3))
    elif damage == "flipped":
        path.write_bytes(whole[:400] + bytes(byte ^ 255 for byte in whole[400:420]) + whole[420:])
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "first half" else damage)
    assert torch.equal(data.load("mnist1d").test.x, expected)
    with np.load(path) as saved:
        assert np.array_equal(saved["x"], small["x"])


def test_a_cache_is_written_whole_or_not_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADPRUNE_DATA", str(tmp_path))
    monkeypatch.setattr(data, "_generate_mnist1d", lambda: {"x": np.eye(20)})

    def killed(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", killed)
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist1d")
    assert list(tmp_path.iterdir()) == []


def test_a_second_load_reads_the_cache(monkeypatch):
    first = data.load("mnist1d")
    monkeypatch.setattr(data, "_generate_mnist1d", lambda: pytest.fail("it generates again"))
    assert torch.equal(data.load("mnist1d").train.x, first.train.x)


def test_mnist_keeps_its_last_ten_thousand_for_testing(monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        x = np.zeros((70_000, 2), dtype=np.int64)
        x[:, 0] = np.arange(70_000)
        return x, (np.arange(70_000) % 10).astype(str)  # OpenML gives the labels as words

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    loaded = data.load("mnist")
    assert (asked["name"], asked["data_home"]) == ("mnist_784", str(data.cache_folder()))
    assert tuple(map(len, parts(loaded))) == (48_000, 12_000, 10_000)
    assert loaded.test.y.tolist() == [i % 10 for i in range(60_000, 70_000)]
    assert loaded.test.x[:, 0].min() > max(loaded.train.x[:, 0].max(), loaded.validation.x[:, 0].max())
    assert loaded.train.x.mean().item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route"), TimeoutError("slow"), __import__("http.client").client.IncompleteRead(b"")],
)
def test_mnist_without_a_network_says_what_works_without_one(monkeypatch, error):
    def fetch(*args, **options):
        raise error

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    with pytest.raises(
        ConnectionError, match=r"OpenML .* needs a network once .* load\('digits'\) or load\('mnist1d'\)"
    ):
        data.load("mnist")


def test_bad_requests_are_refused_with_what_is_wanted():
    with pytest.raises(ValueError, match="unknown data set 'cifar'; known are 'digits', 'mnist1d', 'mnist'"):
        data.load("cifar")
    for share in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            data.load("digits", validation=share)
    for share in (1e-6, 1 - 1e-6):
        with pytest.raises(ValueError, match="of 1438 training examples leaves a part without any"):
            data.load("digits", validation=share)


def test_the_cache_folder_is_the_one_asked_for_else_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADPRUNE_DATA", "~/here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("GRADPRUNE_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert data.cache_folder() == tmp_path / ".cache" / "gradprune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_folder() == tmp_path / "xdg" / "gradprune"


def test_recall_puts_the_label_in_the_first_value_and_nowhere_else():
    made = data.recall(6, seed=1, examples=4000)
    assert tuple(map(len, parts(made))) == (4000, 2000, 2000)
    assert made.classes == 2
    for split in parts(made):
        assert split.x.shape == (len(split), 6, 1)
        assert torch.equal(split.x[:, 0, 0], 2.0 * split.y - 1)
        noise, sign = split.x[:, 1:, 0], split.x[:, :1, 0]
        assert noise.std().item() == pytest.approx(1, abs=0.05)
        assert ((noise * sign).mean(0).abs() < 0.1).all()
    assert not set(rows(made.train)) & set(rows(made.test))
    assert torch.equal(data.recall(6, seed=1, examples=4000).test.x, made.test.x)
    assert not torch.equal(data.recall(6, seed=2, examples=4000).test.x, made.test.x)
    with pytest.raises(ValueError, match="at least one step, not 0"):
        data.recall(0)


def test_a_split_in_double_precision_has_the_same_examples():
    split = data.load("digits").test
    doubled = split.double()
    assert doubled.x.dtype == torch.float64
    assert torch.equal(doubled.x, split.x.double())
    assert torch.equal(doubled.y, split.y)
