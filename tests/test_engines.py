"""Exports in the hands of the engines themselves, where these versions are installed: pytest -m engines.

Each engine wants an environment of its own: TRL 1.16.0; TRL 1.12.0; OpenRLHF 0.11.2 (without its dependencies, but with
ray, peft, aiohttp, pylatexenc and what those ask for; deepspeed, vLLM and flash-attn are stood in for); verl 0.9.1.
Everything runs on a CPU, with models of a few thousand random weights.
"""

import ast
import asyncio
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from test_export import FUNCTION, TINY, batch, load, rows_of

from crlhf.__main__ import main
from tutorials import advantages

pytestmark = pytest.mark.engines


def needs(package, version):
    try:
        there = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        there = "none"
    return pytest.mark.skipif(there != version, reason=f"needs {package} {version}, has {there}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["baselines", *TINY, "--prompt-bias", "0", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def exported(run):
    """Exports of the run, or of one whose reward differs much between prompts; for one GPU, which a CPU stands for."""
    judge, levels = run.with_name("judge.py"), run.with_name("levels")
    judge.write_text(FUNCTION)
    given = ["--reward", f"{judge}:score", "--ppo-critic", "zero_head", "--prompt-bias", "0"]
    assert main(["baselines", *TINY, *given, "--out", str(levels)]) == 0

    def export(engine, source=run):
        out = run.with_name(f"{source.name}-{engine}")
        assert main(["export", str(source), "--to", engine, "--out", str(out), "--gpus", "1"]) == 0
        return out

    export.levels = levels

    return export


def arguments_of(folder, tmp_path):
    """The arguments with which launch.sh would start the engine, through stand-ins that print them."""
    for name in ("python3", "accelerate"):
        (tmp_path / name).write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", folder / "launch.sh"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


# ------------------------------------------------------------------------------------------------- TRL 1.16.0


@needs("trl", "1.16.0")
def test_trl_runs_the_exported_command(exported, tmp_path):
    from trl.scripts.grpo import make_parser

    folder = exported("trl")
    arguments = arguments_of(folder, tmp_path)
    arguments = arguments[arguments.index("-m") :]
    on_a_cpu = ["--use_cpu", "true", "--bf16", "false"]
    script, training, *_ = make_parser().parse_args_and_config([*arguments[2:], *on_a_cpu], fail_with_unknown_args=True)
    assert script.reward_funcs == ["reward.reward"] and training.scale_rewards == "batch" and training.beta == 0.05
    small = ["--max_steps", "1", "--save_strategy", "no", "--logging_steps", "1"]
    command = [sys.executable, *arguments, *on_a_cpu, *small]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'raw_reward'" in done.stdout and "'rewards/reward/mean'" in done.stdout
    assert (folder / "trained" / "model.safetensors").exists()


def one_step(folder, trainer_class, config_class, tmp_path, contrast, **options):
    """Parameters of the policy after one step of TRL; without contrast all baselines are 0."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (folder / "prompts" / "train.jsonl").read_text().splitlines()]
    if not contrast:
        rows = [{**row, "baseline": 0.0} for row in rows]
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1, "learning_rate": 1e-2}
    sizes |= {"max_completion_length": 8, "use_cpu": True, "bf16": False, "report_to": "none", "seed": 0}
    args = config_class(output_dir=str(tmp_path / "trl"), save_strategy="no", disable_tqdm=True, **sizes, **options)
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    data = {"train_dataset": Dataset.from_list(rows)}
    data["processing_class"] = AutoTokenizer.from_pretrained(folder / "policy")
    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    trainer_class(policy, load(folder).reward, args=args, **data).train()
    return torch.cat([p.detach().flatten() for p in policy.parameters()]) - before


@needs("trl", "1.16.0")
@pytest.mark.parametrize("name, options, cancels", [
    ("RLOO", {"beta": 0.0}, True),
    ("GRPO", {"scale_rewards": "none"}, True),
    ("GRPO", {"scale_rewards": "group"}, True),
    ("GRPO", {"scale_rewards": "batch"}, False),
    ("RLOO", {"beta": 0.0, "reward_clip_range": (-30, 30)}, False),
])  # fmt: skip
def test_in_trl_a_baseline_cancels_but_for_a_batch_scale_or_a_clip(exported, tmp_path, name, options, cancels):
    import trl

    folder = exported("trl", exported.levels)
    steps = [
        one_step(folder, getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"), tmp_path, contrast,
                 optim="sgd", max_grad_norm=0.0, **options)
        for contrast in (False, True)
    ]  # fmt: skip
    assert steps[0].norm() > 0
    change = ((steps[1] - steps[0]).norm() / steps[0].norm()).item()
    assert (change < 1e-3) == cancels, change


# --------------------------------------------------------------------------------------------- OpenRLHF 0.11.2


def leave_gpu_libraries_out(patch):
    """What OpenRLHF's modules import at their heads, and don't need for what is called here."""
    importlib.import_module("transformers.trainer")  # it looks for the real deepspeed
    stages = ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.zero.partition_parameters")
    attention = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    for module in ("vllm", "vllm.inputs", "vllm.utils", *stages, *attention):
        patch.setitem(sys.modules, module, MagicMock())


@needs("openrlhf", "0.11.2")
def test_openrlhf_loads_and_calls_the_reward(run, exported, monkeypatch):
    """Its executor with a stand-in for vLLM that "generates" a stored response."""
    with monkeypatch.context() as patch:
        leave_gpu_libraries_out(patch)
        from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    from transformers import AutoTokenizer

    folder = exported("openrlhf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    executor = SingleTurnAgentExecutor([str(folder / "reward.py")])
    limits = SimpleNamespace(max_tokens=24, logprobs=None)
    for i, row in enumerate(rows_of(run)):
        ids = tokenizer(row["responses"][0], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

        class Engine:
            async def generate(self, *arguments, ids=ids, **others):
                return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)])

        answer = asyncio.run(
            executor.execute(prompts[i]["prompt"], prompts[i]["baseline"], limits, 88, tokenizer, Engine())
        )
        assert answer["scores"].item() == pytest.approx(row["rewards"][0], abs=1e-5)
        assert answer["reward"].item() == pytest.approx(row["rewards"][0] - prompts[i]["baseline"], abs=1e-5)
        experience = SamplesGenerator._process_response_into_experience(None, answer, max_len=88)
        assert experience.rewards.shape == (1,) and experience.info["baseline"].shape == (1,)
    failed = asyncio.run(executor.execute(prompts[0]["prompt"], "", limits, 88, tokenizer, Engine()))
    assert failed["reward"] is None  # the exception was logged, as the README of the export says


@needs("openrlhf", "0.11.2")
def test_openrlhf_reads_prompts_and_labels(exported):
    from openrlhf.datasets import PromptDataset
    from openrlhf.datasets.utils import blending_datasets

    folder = exported("openrlhf")
    keys = SimpleNamespace(input_key="prompt", label_key="baseline", apply_chat_template=False)
    strategy = SimpleNamespace(args=SimpleNamespace(data=keys, use_ms=False), is_rank_0=lambda: False, print=print)
    dataset = PromptDataset(blending_datasets(str(folder / "prompts.jsonl"), None, strategy), None, strategy)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [(prompt, label) for _, prompt, label, _ in dataset] == [(row["prompt"], row["baseline"]) for row in rows]


@needs("openrlhf", "0.11.2")
def test_in_openrlhf_a_baseline_cancels_in_group_methods_or_is_clipped(monkeypatch):
    """Its own advantages of one batch, with and without a baseline per prompt."""
    with monkeypatch.context() as patch:
        leave_gpu_libraries_out(patch)
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    rewards, baseline, _, values = batch(16, 4)

    def advantages_of(name, rewards, clip_range):
        reward_options = {"clip_range": clip_range, "overlong_buffer_len": None, "stop_properly_penalty_coef": None}
        advantage = SimpleNamespace(estimator=name, gamma=1.0, lambd=0.95, no_std_norm=False)
        maker = object.__new__(RemoteExperienceMaker)
        maker.advantage_estimator, maker.kl_ctl = name, SimpleNamespace(value=0.0)
        maker.strategy = SimpleNamespace(args=SimpleNamespace(
            reward=SimpleNamespace(**reward_options), rollout=SimpleNamespace(n_samples_per_prompt=4),
            algo=SimpleNamespace(advantage=advantage)))  # fmt: skip
        rows = [
            SimpleNamespace(rewards=reward[None], index=[i], kl=torch.zeros(1, 5, dtype=torch.float64), info={},
                            values=values.flatten(0, 1)[i : i + 1], action_mask=torch.ones(1, 5, dtype=torch.float64))
            for i, reward in enumerate(rewards.flatten())
        ]  # fmt: skip
        rows = maker.compute_advantages_and_returns(rows)
        return torch.cat([row.advantages for row in rows]).view(16, 4, 5)

    for name in ("gae", "reinforce", "flash_reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo"):
        raw, contrastive = (advantages_of(name, r, (-1e6, 1e6)) for r in (rewards, rewards - baseline[:, None]))
        cancels = name not in ("gae", "reinforce", "flash_reinforce")
        assert torch.allclose(raw, contrastive, atol=1e-5) == cancels, name
    theirs, ours = advantages_of("gae", rewards, (-1e6, 1e6)), advantages.ppo_gae(rewards, values)
    torch.testing.assert_close(theirs, ours, rtol=5e-3, atol=1e-4)  # its variance divides by n, ours by n - 1
    far = rewards + 100
    inside, outside = (advantages_of("reinforce", far, limits).abs().max() for limits in ((-1e6, 1e6), (-10, 10)))
    assert inside > 1 and outside < 1e-6  # beyond its default clip range nothing is left of a reward


@needs("openrlhf", "0.11.2")
def test_openrlhf_knows_the_options(exported, tmp_path):
    """Its parser, taken from the end of its script, which imports what needs GPUs."""
    spec = importlib.metadata.distribution("openrlhf").locate_file("openrlhf/cli/train_ppo_ray.py")
    statements = ast.parse(open(spec).read()).body[-1].body  # of `if __name__ == "__main__"`
    parser_lines = [node for node in statements if "parse_args" not in ast.unparse(node)]
    ends = next(i for i, node in enumerate(statements) if "parse_args" in ast.unparse(node))
    namespace = {}
    source = "import argparse\nfrom datetime import datetime\n" + "\n".join(map(ast.unparse, parser_lines[:ends]))
    exec(source, namespace)
    arguments = arguments_of(exported("openrlhf"), tmp_path)
    values = vars(namespace["parser"].parse_args(arguments[2:]))
    assert values["algo.advantage.estimator"] == "gae" and values["reward.clip_range"] == [-1e6, 1e6]
    assert values["data.label_key"] == "baseline" and values["algo.kl.init_coef"] == 0.05


# -------------------------------------------------------------------------------------------------- verl 0.9.1


@needs("verl", "0.9.1")
def test_verls_reward_manager_calls_the_reward(run, exported, tmp_path):
    import numpy as np
    from tensordict import TensorDict
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.utils.dataset.rl_dataset import RLHFDataset

    folder = exported("verl")
    tokenizer, config = AutoTokenizer.from_pretrained(folder / "policy"), verl_config(folder, tmp_path)
    tokenizer.chat_template = config.actor_rollout_ref.model.custom_chat_template
    dataset = RLHFDataset(str(folder / "prompts.parquet"), tokenizer, config.data)
    manager = load_reward_manager(config, tokenizer)
    for i, row in enumerate(rows_of(run)):
        item = dataset[i]
        seen = tokenizer.apply_chat_template(item["raw_prompt"], tokenize=False, add_generation_prompt=True)
        assert seen == row["prompt"]  # the policy reads what the baselines were drawn for
        prompt = torch.tensor([tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]])
        ids = tokenizer(row["responses"][0], add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] * row["ended"][0]
        response = torch.tensor([ids + [tokenizer.pad_token_id] * (24 - len(ids))])
        mask = torch.cat([torch.ones_like(prompt), torch.arange(24)[None] < len(ids)], 1)
        tensors = TensorDict({"prompts": prompt, "responses": response, "attention_mask": mask}, batch_size=1)
        others = {key: np.array([item[key]], dtype=object) for key in ("data_source", "reward_model", "extra_info")}
        answer = manager.loop.run_until_complete(manager.run_single(DataProto(batch=tensors, non_tensor_batch=others)))
        baseline = item["extra_info"]["baseline"]
        assert answer["reward_extra_info"]["raw"] == pytest.approx(row["rewards"][0], abs=1e-5)
        assert answer["reward_score"] == pytest.approx(row["rewards"][0] - baseline, abs=1e-5)


def verl_config(folder, tmp_path):
    """verl's own config with the options of launch.sh."""
    from hydra import compose, initialize_config_dir

    config = importlib.metadata.distribution("verl").locate_file("verl/trainer/config")
    with initialize_config_dir(str(config), version_base=None):
        return compose("ppo_trainer", overrides=arguments_of(folder, tmp_path)[2:])


@needs("verl", "0.9.1")
def test_verl_knows_the_options(exported, tmp_path):
    config = verl_config(exported("verl"), tmp_path)
    assert config.algorithm.adv_estimator == "gae" and config.algorithm.lam == 0.95
    assert config.algorithm.kl_ctrl.kl_coef == 0.05 and config.data.max_response_length == 24
    assert config.actor_rollout_ref.model.custom_chat_template.startswith("{% for message in messages %}")


@needs("verl", "0.9.1")
def test_verls_estimators_are_ours():
    """The arithmetic of `advantages.py` against verl's own functions, on one batch."""
    import numpy as np
    from verl.trainer.ppo import core_algos

    rewards, _, greedy, values = batch(16, 4)
    N, m = rewards.shape
    paid = torch.zeros(N * m, 5, dtype=torch.float64)
    paid[:, -1] = rewards.flatten()
    mask, groups = torch.ones_like(paid), np.arange(N).repeat(m)
    theirs = {
        "ppo_gae": core_algos.compute_gae_advantage_return(paid, values.flatten(0, 1), mask, 1.0, 0.95),
        "grpo": core_algos.compute_grpo_outcome_advantage(paid, mask, groups, epsilon=1e-4),
        "group_mean": core_algos.compute_grpo_outcome_advantage(paid, mask, groups, norm_adv_by_std_in_grpo=False),
        "rloo": core_algos.compute_rloo_outcome_advantage(paid, mask, groups),
        "remax": core_algos.compute_remax_outcome_advantage(paid, greedy.repeat_interleave(m), mask),
    }
    ours = {name: getattr(advantages, name)(rewards) for name in ("grpo", "group_mean", "rloo")}
    ours |= {"remax": advantages.remax(rewards, greedy), "ppo_gae": advantages.ppo_gae(rewards, values)}
    for name, (their, _) in theirs.items():
        our = ours[name] if name == "ppo_gae" else ours[name][..., None].expand(N, m, 5)
        torch.testing.assert_close(their.view(N, m, 5).double(), our.double(), rtol=1e-5, atol=1e-6)
