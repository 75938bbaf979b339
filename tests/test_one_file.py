"""one_file.py computes what the library computes, runs to its end, and stays a file that can be read."""

import ast
import io
import sys
import tokenize
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import GPT2ForSequenceClassification

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from crlhf import contrastive, policy, ppo, reward
from crlhf.config import PPOConfig, RewardConfig
from crlhf.engine.text import Batch
from tests.conftest import random_model
from tutorials import one_file

FILE = ROOT / "tutorials" / "one_file.py"
LENGTHS = torch.tensor([6, 4, 1, 5, 2, 6])
B, T = len(LENGTHS), 6
MASK = torch.arange(T) < LENGTHS[:, None]  # (B, T)

TINY = {"width": 16, "sft_steps": 12, "pairs": 60, "reward_steps": 3, "n_prompts": 12, "k": 2}
TINY |= {"max_tokens": 12, "iterations": 3, "batch_size": 8, "minibatch_size": 4}


@pytest.fixture
def settings(monkeypatch):
    """The file's settings, made tiny; a test may change them."""
    tiny = one_file.Settings(**TINY)
    monkeypatch.setattr(one_file, "settings", tiny)
    monkeypatch.setattr(one_file, "progress", lambda name, steps: (1 - step / steps for step in range(steps)))
    return tiny


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(a, b):
    torch.testing.assert_close(a.double(), b.double(), atol=1e-6, rtol=0, check_dtype=False)


# ------------------------------------------------------------------------------------- each formula, and the library's


class Says:
    """A policy whose logits are given."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, **inputs):
        return self


def random_batch(vocabulary):
    """Prompts of different lengths and responses of LENGTHS, as the file's Batch; PAD stands everywhere else."""
    draw = torch.Generator().manual_seed(1)
    prompt_mask = torch.arange(5) >= torch.tensor([0, 2, 4, 1, 0, 3])[:, None]
    prompt_ids = torch.randint(3, vocabulary, (B, 5), generator=draw) * prompt_mask
    response_ids = torch.randint(3, vocabulary, (B, T), generator=draw) * MASK
    return one_file.Batch(prompt_ids, prompt_mask, response_ids, MASK)


def test_log_probs():
    batch = random_batch(9)
    logits = 3 * random(B, 5 + T, 9)
    mine = one_file.response_log_probs(Says(logits), batch, 0.7)
    agree(mine, policy.log_probs_of(logits[:, 4:-1], batch.response_ids, 0.7))


def test_token_rewards():
    log_probs, ref_log_probs = random(B, T), random(B, T, seed=1)
    arguments = random(B, seed=2), log_probs, ref_log_probs, MASK, 0.3
    agree(one_file.token_rewards(*arguments), ppo.token_rewards(*arguments))


def test_gae():
    arguments = random(B, T) * MASK, random(B, T, seed=1), MASK, 0.9, 0.8
    for mine, library in zip(one_file.gae(*arguments), ppo.gae(*arguments)):
        agree(mine, library)


def test_whitening():
    agree(one_file.whiten(3 + 2 * random(B, T), MASK), ppo.whiten(3 + 2 * random(B, T), MASK))


def test_policy_loss():
    arguments = random(B, T), random(B, T, seed=1), random(B, T, seed=2), MASK, 0.2
    agree(one_file.policy_loss(*arguments), ppo.policy_loss(*arguments)[0] / MASK.sum())


def test_value_loss():
    arguments = random(B, T), random(B, T, seed=1), random(B, T, seed=2), MASK, 0.2
    agree(one_file.value_loss(*arguments), ppo.value_loss(*arguments) / MASK.sum())


def test_bradley_terry_loss():
    chosen, rejected = random(20), random(20, seed=1)
    agree(
        one_file.bradley_terry_loss(chosen, rejected),
        reward.bradley_terry_loss(chosen, rejected, RewardConfig.center_coef),
    )


def test_contrastive_rewards():
    rewards, baseline_rewards = random(B), random(B, 4, seed=1)
    library = contrastive.contrast(rewards, contrastive.aggregate(baseline_rewards))
    agree(one_file.contrast(rewards, baseline_rewards), library)


# ------------------------------------------------------------------------------------------ the networks, and an update


def twins(tokenizer):
    """The same networks twice: (policy, critic) for the file, and for the library."""
    torch.manual_seed(0)
    actor = random_model(tokenizer)
    critic = one_file.ScalarModel(random_model(tokenizer, seed=1))
    torch.nn.init.normal_(critic.score.weight)
    actor.config.num_labels = 1
    library_critic = GPT2ForSequenceClassification(actor.config).eval()
    library_critic.transformer.load_state_dict(critic.transformer.state_dict())
    library_critic.score.load_state_dict(critic.score.state_dict())
    return (actor, critic), (random_model(tokenizer), library_critic)


def test_what_networks_say_of_a_batch(tokenizer):
    (actor, critic), (library_actor, library_critic) = twins(tokenizer)
    batch = random_batch(len(tokenizer))
    library_batch = Batch(**vars(batch))
    with torch.no_grad():
        log_probs = one_file.response_log_probs(actor, batch, 0.7)
        values = one_file.response_values(critic, batch)
        scores = one_file.response_scores(critic, batch)
        after_last = policy.response_values(library_critic, longer(library_batch))[range(B), LENGTHS]
        library_log_probs = policy.response_log_probs(library_actor, library_batch, 0.7)
        library_values = policy.response_values(library_critic, library_batch)
        torch.testing.assert_close(log_probs[MASK], library_log_probs[MASK])
        torch.testing.assert_close(values[MASK], library_values[MASK])
        torch.testing.assert_close(scores, after_last)


def longer(batch):
    """The batch with one more column of padding: the value before column t of it is what is said after column t - 1."""
    more = torch.zeros(B, 1)
    response_ids = torch.cat([batch.response_ids, more.long()], 1)
    return Batch(batch.prompt_ids, batch.prompt_mask, response_ids, torch.cat([batch.response_mask, more.bool()], 1))


@pytest.mark.parametrize("scale, is_bounded", [(1.0, True), (0.02, False)], ids=["bounded", "short"])
def test_gradient_of_a_whole_update(scale, is_bounded, tokenizer, settings):
    """One step of plain gradient descent: what the weights lose is the gradient, its norm bounded where it is long."""
    settings.batch_size, settings.minibatch_size, settings.epochs, settings.temperature = B, B, 1, 0.7
    (actor, critic), (library_actor, library_critic) = twins(tokenizer)
    batch = random_batch(len(tokenizer))
    with torch.no_grad():
        log_probs = one_file.response_log_probs(actor, batch, 0.7)
        values = one_file.response_values(critic, batch)
    old_log_probs = log_probs + 0.2 * random(B, T).float()
    old_values = values + 0.2 * scale * random(B, T, seed=1).float()
    advantages = scale * random(B, T, seed=2).float()
    returns = values + scale * random(B, T, seed=3).float()
    lr = 1.0 if is_bounded else 0.2

    rollout = one_file.Rollout(*vars(batch).values(), old_log_probs, old_values, advantages, returns)
    optimizers = [torch.optim.SGD(network.parameters()) for network in (actor, critic)]
    one_file.update(actor, critic, optimizers, rollout, lr)

    config = PPOConfig(batch_size=B, minibatches=1, epochs=1, temperature=0.7)
    library_batch = Batch(**vars(batch))
    minibatches = ppo.split_into_minibatches(library_batch, 1, 0, torch.Generator())
    library_rollout = ppo.Rollout(
        [], [], None, library_batch, minibatches, old_log_probs, None, old_values, None, advantages, returns
    )
    models = ppo.Models(library_actor, None, library_critic, tokenizer)
    networks = {"policy": library_actor, "critic": library_critic}
    library_optimizers = {name: torch.optim.SGD(network.parameters()) for name, network in networks.items()}
    ppo.update(models, library_optimizers, dict.fromkeys(networks, lr), library_rollout, config, torch.Generator())

    start, _ = twins(tokenizer)
    for before, mine, library in zip(start, (actor, critic), networks.values()):
        library = library.state_dict()
        moved = [(new - old).detach().flatten() for new, old in zip(mine.parameters(), before.parameters())]
        length = torch.cat(moved).norm().item() / lr
        assert length == pytest.approx(1.0, abs=1e-3) if is_bounded else 0.0 < length < 1.0
        for name, weight in mine.state_dict().items():
            agree(weight, library[name])


def test_same_defaults_as_the_library():
    mine, library = one_file.Settings(), PPOConfig()
    names = {field.name for field in fields(mine)} & {field.name for field in fields(library)}
    assert names >= {"clip_range", "lam", "value_coef", "epochs", "temperature"}
    for name in ("clip_range", "lam", "value_coef", "epochs", "temperature"):
        assert getattr(mine, name) == getattr(library, name)


def test_sampling_with_the_cache_writes_what_the_library_writes(settings, tokenizer, monkeypatch):
    """At a temperature near 0 both take the likeliest token, until EOS. The file's vocabulary has no <unk>."""
    monkeypatch.setattr(one_file, "encode", lambda text: tokenizer(text)["input_ids"])
    settings.temperature, settings.max_tokens = 1e-4, 16
    prompts = ["the plot was good .", "i loved the music . the cast was awful .", "i hated the ending ."]
    ended = 0
    for seed in range(4):
        actor = random_model(tokenizer, seed)
        mine = one_file.sample(actor, prompts)
        _, has_ended, library = policy.generate(actor, tokenizer, prompts, 16, temperature=1e-4)
        longest = library.response_ids.shape[1]
        assert torch.equal(mine.response_mask[:, :longest], library.response_mask)
        assert (
            torch.equal(mine.response_ids[:, :longest], library.response_ids)
            and not mine.response_mask[:, longest:].any()
        )
        ended += int(has_ended.sum())
    assert ended > 0


# -------------------------------------------------------------------------------------------------- from end to end


@pytest.fixture
def start(settings):
    return one_file.prepare()


def test_runs_to_its_end(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one_file.main()
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["gold", "plain", "contrastive"]
    assert (tmp_path / "runs" / "one_file.png").stat().st_size > 5_000
    assert out.count("\n  SFT") == out.count("\n  plain PPO") == out.count("\n  contrastive PPO") == 3


def test_contrastive_ppo_is_blind_to_a_constant_of_each_prompt_and_plain_ppo_is_not(start, settings):
    kl = {}
    for size in (0.0, 5.0):
        start.bias = size * torch.arange(12.0)
        torch.manual_seed(0)
        baseline_rewards = one_file.sample_baselines(start)
        for name, baselines in (("plain", None), ("contrastive", baseline_rewards)):
            _, log = one_file.train_ppo(name, start, baselines)
            kl[name, size] = [row["kl"] for row in log]
    assert kl["contrastive", 0.0][-1] > 0.01
    assert kl["contrastive", 5.0] == pytest.approx(kl["contrastive", 0.0], abs=1e-3)
    assert kl["plain", 5.0] != pytest.approx(kl["plain", 0.0], abs=1e-3)


def test_each_prompt_gets_its_own_baselines(start, settings):
    start.bias = 100 * torch.arange(12.0)
    baseline_rewards = one_file.sample_baselines(start)
    assert baseline_rewards.shape == (12, 2)
    assert torch.equal((baseline_rewards / 100).round(), torch.arange(12.0)[:, None].expand(12, 2))


def test_masks_come_from_positions(start, settings, monkeypatch):
    """Where PAD is EOS, as in many vocabularies, training is the same."""
    _, log = one_file.train_ppo("", start)
    monkeypatch.setattr(one_file, "PAD", one_file.EOS)
    assert one_file.train_ppo("", start)[1] == log


def test_nothing_is_dropped_out(start):
    assert not any(module.training for module in start.policy.modules())


# ------------------------------------------------------------------------------------------------ a file to be read


def test_imports_only_what_a_reader_knows():
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in imported if name.startswith(("crlhf", "tutorials", "figures"))}
    others = {name.split(".")[0] for name in imported - ours}
    assert ours == {"crlhf.reviews"}
    assert others - sys.stdlib_module_names == {"torch", "transformers", "matplotlib"}


def test_is_short_and_loosely_set():
    """At most 3,000 tokens (names, operators, numbers, strings) and 10 a code line, docstrings aside."""
    source = FILE.read_text()
    tree = ast.parse(source)
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    prose = set()
    for node in documented:
        if ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    n_tokens, lines, inside_f_string = 0, set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        inside_f_string -= kind == "FSTRING_END"  # Python 3.12 cuts an f-string into tokens; it counts as one
        counts = kind in ("NAME", "OP", "NUMBER", "STRING", "FSTRING_START") and not inside_f_string
        inside_f_string += kind == "FSTRING_START"
        if counts and token.start[0] not in prose:
            n_tokens += 1
            lines |= set(range(token.start[0], token.end[0] + 1))
    assert n_tokens <= 3000 and n_tokens / len(lines) <= 10
    for node in documented:
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) else node.body[0]
            assert node.end_lineno - first.lineno < 40, node.name
