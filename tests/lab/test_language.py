"""Is the language model that travels with the book what its page says, and are its bits counted right?"""

import math

import pytest
import torch
from torch import nn

from gradprune import lab
from gradprune.lab import language

pytest.importorskip("transformers")


class Indifferent(nn.Module):
    """Gives every token the same score."""

    def forward(self, input_ids):
        """Map (texts, tokens) to scores of (texts, tokens, vocabulary)."""
        self.logits = torch.zeros(*input_ids.shape, language.VOCABULARY)
        return self


def test_a_model_that_knows_nothing_needs_eleven_bits_a_token():
    tokens = language.text("test")[: 3 * language.LENGTH + 20]
    scored = tokens[1 : 3 * language.LENGTH + 1]
    assert language.bits(Indifferent(), tokens) == pytest.approx(11 * len(scored), rel=1e-5)
    wanted = math.log2(language.VOCABULARY) * len(scored) / language.bytes_of(scored)
    assert language.bits_per_byte(Indifferent(), tokens) == pytest.approx(wanted, rel=1e-5)


def test_windows_score_each_token_once_after_the_one_before_it():
    tokens = torch.arange(2 * language.LENGTH + 1)
    rows = language.windows(tokens)
    assert torch.equal(rows[:, 1:].flatten(), tokens[1:])
    assert torch.equal(rows[:, :-1].flatten(), tokens[:-1])


@pytest.mark.parametrize("part", ["test", "train"])
def test_tokens_stand_for_as_many_bytes_as_the_text_they_are_of(part):
    tokens = language.text(part)[:5_000]
    tokens = tokens[tokens != language.END]
    text = language.tokenizer().decode(tokens.tolist())
    assert "Python" in language.tokenizer().decode(language.text(part).tolist())
    assert len(text.encode()) == language.bytes_of(tokens)
    again = language.tokenizer().encode(text, add_special_tokens=False).ids
    assert language.tokenizer().decode(again) == text


def test_the_stored_model_is_tied_and_as_good_as_the_result_says():
    model = language.model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 1_943_232
    assert not model.training
    rows = {row["method"]: row["bits"] for row in lab.experiment.load("reconstruct")["rows"] if row["tokens"] == 0}
    tokens = language.text("test")[: lab.experiment.script("reconstruct").TEST]
    assert language.bits_per_byte(model, tokens) == pytest.approx(rows["dense"], abs=0.002)


def test_the_language_model_is_better_than_n_grams_and_compressors_by_the_stored_result():
    model, *others = lab.experiment.load("language_model")["rows"]
    assert all(model["test"] < other["test"] for other in others)


def test_calibration_is_training_text_and_follows_from_its_seed():
    one, again, other = (language.calibration(512, seed=seed) for seed in (0, 0, 1))
    rows = torch.cat([batch["input_ids"] for batch in one])
    assert rows.shape == (4, language.LENGTH)
    assert torch.equal(rows, again[0]["input_ids"])
    assert not torch.equal(rows, other[0]["input_ids"])
    stream = language.text("train").unfold(0, language.LENGTH, 1)
    assert all(bool((stream == row).all(1).any()) for row in rows)
