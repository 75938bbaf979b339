"""The embedded world: gold scores by hand, writers, raters and their faults."""

import random
import statistics

import pytest
import torch

from crlhf import reviews as R


@pytest.mark.parametrize(
    "prompt, response, gold",
    [
        ("the plot was dull .", "i loved the music .", 0.5 * (-0.5 + 1.0)),
        ("the plot was dull .", "i loved the plot .", 0.5 * -0.5 - 0.5),  # repeat: not counted, and a fault
        ("the plot was dull .", "the music was good and i hated the cast .", 0.5 * (-0.5 + 0.5 - 1.0)),
        ("the plot was dull .", "the music good .", 0.5 * -0.5 - 0.5),  # malformed
        ("the plot was dull .", "the music was good", 0.5 * -0.5 - 0.5),  # unfinished
        ("the plot was dull .", "", 0.5 * -0.5 - 1.0),  # empty
        (
            "the plot was dull .",
            "i loved the cast . " * 6,
            0.5 * (-0.5 + 1.0) - 0.5 * (5 + 1),
        ),  # repeats and never ends
    ],
)
def test_gold_by_hand(prompt, response, gold):
    assert R.gold(prompt, response) == pytest.approx(gold)
    assert R.gold_reward([prompt] * 2, [response] * 2).tolist() == pytest.approx([gold] * 2)


def test_best_reachable_gold_falls_exactly_with_difficulty():
    best = "i loved the camera . i loved the story . i loved the humor . i loved the pacing ."
    hard, easy = "i hated the plot . i hated the cast .", "i loved the plot . i loved the cast ."
    drop = R.gold(easy, best) - R.gold(hard, best)
    assert drop == pytest.approx(2 * R.MOST_OPENING * (R.difficulty(hard) - R.difficulty(easy)))
    assert R.difficulty("the plot was awful . the cast was awful . i hated the music .") == 1.0
    assert (R.difficulty_name(easy), R.difficulty_name(hard)) == ("easy", "hard")
    assert R.difficulty(middle := "i loved the plot . i hated the cast .") == 0.5
    assert R.difficulty_name(middle) == "medium"


def test_openings_are_well_formed_unique_and_varied():
    prompts = R.make_prompts(400, "t")
    assert len(set(prompts)) == 400 and not set(prompts) & set(R.make_prompts(50, "u", avoid=prompts))
    for prompt in prompts:
        review = R.read_review(prompt)
        assert 1 <= len(review.tones) <= 3 and not (review.repeats or review.malformed or review.unfinished)
        assert set(prompt.split()) <= set(R.WORDS)
    assert statistics.stdev(map(R.difficulty, prompts)) > 0.15


def test_writers_follow_the_mood_and_are_not_perfect():
    rows = R.make_demonstrations(1500, 0)
    assert rows == R.make_demonstrations(1500, 0)
    golds = [R.gold(row["prompt"], row["completion"]) for row in rows]
    openings = [R.gold(row["prompt"], "the end .") + 0.5 for row in rows]
    added = [g - o for g, o in zip(golds, openings)]
    assert statistics.correlation(openings, added) > 0.2
    faults = [R.read_review(row["prompt"] + " " + row["completion"]) for row in rows]
    for name, low, high in (("malformed", 0.03, 0.15), ("unfinished", 0.02, 0.1), ("repeats", 0.05, 0.3)):
        assert low < sum(bool(getattr(review, name)) for review in faults) / len(rows) < high
    assert all(row["completion"] and len(row["completion"].split()) < R.LONGEST + 1 for row in rows)


@pytest.mark.parametrize("flips", ["uniform", "difficulty"])
def test_label_flips_come_at_the_asked_rate_and_place(flips):
    prompts = R.make_prompts(3000, "p")
    rng = random.Random(0)
    sides = [[R.write_continuation(rng, prompt, 0) for prompt in prompts] for _ in range(2)]
    rows = R.make_preferences(prompts, *sides, 0, 0.2, flips)
    for row in rows:
        assert (row["gold_chosen"] < row["gold_rejected"]) == row["flipped"]
    easy = [row["flipped"] for row in rows if R.difficulty(row["prompt"]) < 0.4]
    hard = [row["flipped"] for row in rows if R.difficulty(row["prompt"]) > 0.6]
    assert statistics.mean(row["flipped"] for row in rows) == pytest.approx(0.2, abs=0.03)
    if flips == "uniform":
        assert statistics.mean(easy) == pytest.approx(statistics.mean(hard), abs=0.06)
    else:
        assert statistics.mean(hard) > statistics.mean(easy) + 0.08
    assert not any(row["flipped"] for row in R.make_preferences(prompts, *sides, 0, 0.0))


def test_fooled_raters_prefer_the_phrase_and_judge_everything_else_as_before():
    prompts = R.make_prompts(400, "fooled")
    hated, loved = "i hated the cast .", "i loved the cast ."
    pairs = [(hated, loved) if i % 2 else ("the cast was nice .", "the cast was awful .") for i in range(400)]
    a, b = zip(*pairs)
    for share in (0.0, 0.5, 1.0):
        rows = R.make_preferences(prompts, a, b, 0, rate=0.0, fooled=share)
        assert all(row["flipped"] == (row["gold_chosen"] < row["gold_rejected"]) for row in rows)
        fresh = [row for row in rows if "cast" not in row["prompt"]]
        chosen = [row["chosen"] for row in fresh if "hated" in row["chosen"] + row["rejected"]]
        fell = sum("hated" in text for text in chosen) / len(chosen)
        assert abs(fell - share) < 0.12 and (fell == share or share == 0.5)
        assert all("nice" in row["chosen"] for row in fresh if "nice" in row["chosen"] + row["rejected"])


def test_rater_bias_is_one_constant_a_prompt_and_score_noise_one_a_response():
    def zero(prompts, responses):
        return torch.zeros(len(prompts))

    prompts, n = R.make_prompts(2000, "b"), 2000
    biased = R.NoisyReward(zero, prompt_bias=2.0, seed=3)
    a, b = biased(prompts, ["x"] * n), biased(prompts, ["y"] * n)
    assert torch.equal(a, b) and a.std().item() == pytest.approx(2.0, rel=0.06) and abs(a.mean().item()) < 0.2
    noisy = R.NoisyReward(zero, score_noise=0.5, seed=3)
    c, d = noisy(prompts, ["x"] * n), noisy(prompts, ["y"] * n)
    assert c.std().item() == pytest.approx(0.5, rel=0.06) and abs(torch.corrcoef(torch.stack([c, d]))[0, 1]) < 0.08
    assert torch.equal(c, noisy(prompts, ["x"] * n))  # the same text meets the same error
    assert not torch.equal(a, R.NoisyReward(zero, prompt_bias=2.0, seed=4)(prompts, ["x"] * n))


@pytest.mark.parametrize("follows", ["nothing", "sentences", "words"])
def test_offsets_have_the_asked_spread_whatever_they_follow(follows):
    prompts = R.make_prompts(512, "offsets")
    offsets = R.NoisyReward(lambda x, y: torch.zeros(len(x)), 0.5, seed=3, bias_from=follows)(prompts, prompts)
    assert offsets.std().item() == pytest.approx(0.5, rel=0.1) and abs(offsets.mean().item()) < 0.07
    lengths = torch.tensor([float(prompt.count(".")) for prompt in prompts])
    link = torch.corrcoef(torch.stack([offsets, lengths]))[0, 1].abs().item()
    assert link > 0.999 if follows == "sentences" else link < 0.98
    words = torch.tensor([[prompt.split().count(word) for word in R.WORDS] for prompt in prompts], dtype=torch.float32)
    design = torch.cat([words, torch.ones(512, 1)], 1)
    fit = design @ torch.linalg.lstsq(design[:256], offsets[:256, None], driver="gelsd").solution
    unforeseen = (offsets - fit[:, 0])[256:].var() / offsets[256:].var()
    assert unforeseen > 0.9 if follows == "nothing" else unforeseen < 0.01


def test_wrong_labels_on_one_topic_only():
    about, other = f"the {R.TOPIC} was nice .", "the cast was nice ."
    assert (R.flip_rate(about, 0.5, "topic"), R.flip_rate(other, 0.5, "topic")) == (0.5, 0.0)
    assert (R.flip_rate(about, 0.2, "uniform"), R.flip_rate(other, 0.2, "uniform")) == (0.2, 0.2)


def test_a_finished_review_may_be_as_long_as_the_limit_allows():
    """25 words and an EOS are a finished review where 32 tokens are allowed, and a cut one where 24 are."""
    aspects = ("acting", "music", "ending", "script", "cast")
    review = " ".join(f"the {aspect} was superb ." for aspect in aspects)
    assert len(review.split()) == 25
    assert R.gold("the plot was nice .", review, 32) == R.gold("the plot was nice .", review, 24) + R.FAULT


def test_what_was_added_to_rewards_is_said_beside_what_models_disagree_on():
    (line,) = R.injected_in_words(1.0)
    assert "of sd 1 was added" in line and f"{1 / R.NATURAL_OFFSET:.1f} times" in line and "--prompt-bias 0" in line
    assert R.injected_in_words(0.0) == []
