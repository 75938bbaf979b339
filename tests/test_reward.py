"""Bradley-Terry, what it can't know, reward callables, and the report on a reward model."""

import math

import pytest
import torch
from conftest import random_model, word_counts
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from crlhf import reviews
from crlhf.config import RewardConfig, UserError
from crlhf.engine.checkpoint import Job
from crlhf.engine.files import stream
from crlhf.engine.models import save, scalar_model
from crlhf.evaluate import preference_accuracy
from crlhf.pipeline.rewards import ModelReward
from crlhf.reward import bradley_terry_loss, train_reward_model


@pytest.mark.parametrize("case, center", [("bradley_terry", 0.0), ("bradley_terry_centered", 0.01)])
def test_loss_and_gradient_against_reference(reference, case, center):
    inputs, outputs = reference(case)
    chosen, rejected = inputs["chosen"].requires_grad_(), inputs["rejected"].requires_grad_()
    loss = bradley_terry_loss(chosen, rejected, center)
    loss.backward()
    assert loss.item() == pytest.approx(outputs["loss"], abs=1e-9)
    assert torch.allclose(chosen.grad, outputs["grad_chosen"], atol=1e-9)
    assert torch.allclose(rejected.grad, outputs["grad_rejected"], atol=1e-9)


def test_loss_by_hand():
    loss = bradley_terry_loss(torch.tensor([1.0]), torch.tensor([0.0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_loss_does_not_see_a_constant_of_the_prompt():
    chosen, rejected, b = torch.randn(3, 100, generator=stream(0, "bt"), dtype=torch.float64)
    loss = bradley_terry_loss(chosen, rejected)
    assert bradley_terry_loss(chosen + 5 * b, rejected + 5 * b).item() == pytest.approx(loss.item(), abs=1e-12)
    assert bradley_terry_loss(chosen + 5 * b, rejected).item() != pytest.approx(loss.item(), abs=0.1)


def trained(tokenizer, tmp_path, n=300):
    """A small reward model of a simple taste: raters prefer the longer text."""
    save(tmp_path, random_model(tokenizer), tokenizer)
    model = scalar_model(str(tmp_path), tokenizer.pad_token_id)
    rows = []
    for row in reviews.make_demonstrations(n, 0):
        short = " ".join(row["completion"].split()[:2])
        rows.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": short})
    config = RewardConfig(epochs=2, lr=2e-3)
    metrics = train_reward_model(model, tokenizer, rows[:-50], config, Job("reward", tmp_path / "train"))
    return model, rows[-50:], metrics


def test_training_learns_the_raters_taste_and_saves_for_hugging_face(tokenizer, tmp_path):
    model, held_out, metrics = trained(tokenizer, tmp_path)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # zero head: every first reward is 0
    reward = ModelReward(model, tokenizer, 24)
    assert preference_accuracy(reward, held_out)["labels"] > 0.9

    save(tmp_path / "rm", model, tokenizer)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    row = held_out[0]
    ids = tokenizer(row["prompt"] + " " + row["chosen"], return_tensors="pt")["input_ids"]
    assert again(ids).logits.item() == pytest.approx(reward([row["prompt"]], [row["chosen"]]).item(), abs=1e-4)


def test_scores_do_not_depend_on_the_other_rows_of_the_batch(tokenizer, tmp_path):
    save(tmp_path, random_model(tokenizer), tokenizer)
    model = scalar_model(str(tmp_path), tokenizer.pad_token_id)
    torch.nn.init.normal_(model.score.weight, generator=stream(0, "head"))
    prompts = ["the plot was dull .", "i loved the music . i hated the cast . the script was good ."]
    responses = ["the cast was weak . i liked the story .", "."]
    together = ModelReward(model, tokenizer, 24)(prompts, responses)
    reward = ModelReward(model, tokenizer, 24)
    alone = [reward([x], [y]).item() for x, y in zip(prompts, responses)]
    assert together.tolist() == pytest.approx(alone, abs=1e-4)
    reward.batch_size = 1
    assert reward(prompts, responses).tolist() == pytest.approx(alone, abs=1e-4)


def test_a_classifier_rewards_by_the_log_odds_of_its_label(tokenizer):
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        num_labels=3,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "negative", 1: "neutral", 2: "POSITIVE"},
    )
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.mul_(50)
    x, y = "the plot was dull .", "i loved the cast ."
    probs = model(tokenizer(x + " " + y, return_tensors="pt")["input_ids"]).logits.softmax(-1)[0]
    expected = (probs[2] / (1 - probs[2])).log().item()
    assert ModelReward(model, tokenizer, 24, "positive")([x], [y]).item() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="negative, neutral, POSITIVE"):
        ModelReward(model, tokenizer, 24, "happy")


def test_report_separates_labels_from_gold_and_groups():
    rows = [
        {"prompt": prompt, "chosen": "a a", "rejected": "b", "gold_chosen": chosen, "gold_rejected": rejected}
        for prompt, chosen, rejected in (("x", 1, 0), ("x", 0, 1), ("y", 0, 1), ("y", 0, 1))
    ]
    report = preference_accuracy(word_counts, rows, group_of=lambda prompt: prompt)
    assert report == {"pairs": 4, "labels": 1.0, "gold": 0.25, "gold, x": 0.5, "gold, y": 0.0}
    assert preference_accuracy(word_counts, rows) == {"pairs": 4, "labels": 1.0, "gold": 0.25}
    unknown = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    assert preference_accuracy(word_counts, unknown) == {"pairs": 4, "labels": 1.0}


def test_a_text_longer_than_the_classifier_reads_is_named(tokenizer, tmp_path):
    save(tmp_path, random_model(tokenizer), tokenizer)
    model = scalar_model(str(tmp_path), tokenizer.pad_token_id)
    with pytest.raises(UserError, match="have 104 tokens, but .* reads 96: lower --max-prompt-tokens"):
        ModelReward(model, tokenizer, 24)(["the plot was dull . " * 20], ["i liked it ."])


def test_the_head_learns_at_its_own_rate_also_where_the_model_stands_still(tokenizer, tmp_path):
    save(tmp_path, random_model(tokenizer), tokenizer)
    model = scalar_model(str(tmp_path), tokenizer.pad_token_id)
    trunk = model.transformer.h[0].attn.c_attn.weight.clone()
    rows = [{"prompt": "i liked it .", "chosen": "the cast was good .", "rejected": "the plot was dull ."}] * 64
    config = RewardConfig(epochs=2, batch_size=16, lr=0.0, head_lr=1e-2)
    train_reward_model(model, tokenizer, rows, config, Job("reward", tmp_path / "train"))
    assert model.score.weight.abs().max() > 1e-3
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, trunk)
