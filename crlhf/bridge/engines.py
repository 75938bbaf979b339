"""The three engines: the columns in which each wants prompts and baselines, and the command that starts it.

OpenRLHF and verl have PPO with a critic, where contrast matters. TRL 1.16 has none: its GRPO and RLOO subtract a mean
of the prompt's own group, in which every constant of a prompt cancels (`tutorials/advantages.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..config import Config

# Hydra's quotes around a chat template that adds nothing: prompts are texts already, with their template in them.
AS_IT_IS = "{% for message in messages %}{{ message.content }}{% endfor %}"


@dataclass(frozen=True)
class Engine:
    """What an export has to know of an engine."""

    title: str
    version: str  # the one that the tests of exports were run with
    prompts: str  # name of the file with prompts and baselines
    row: Callable[[str, str, float, int], dict]  # (prompt as the engine reads it, plain prompt, baseline, number)
    launch: Callable[[Config, int, str], list[str]]  # (config of the run, GPUs, folder of the critic's start)
    adds_bos: bool  # does it put BOS before a prompt where the tokenizer does so?
    watch: tuple[str, ...]  # what to watch for, for the README of the export


def text_row(prompt: str, plain: str, baseline: float, number: int) -> dict:
    """As OpenRLHF and TRL read it."""
    return {"prompt": prompt, "baseline": baseline}


# ------------------------------------------------------------------------------------------------- OpenRLHF


def openrlhf_launch(config: Config, gpus: int, critic: str) -> list[str]:
    ppo = config.ppo
    data = config.data
    longest = data.max_prompt_tokens + data.max_response_tokens
    return [
        "python3 -m openrlhf.cli.train_ppo_ray",
        f'--actor.model_name_or_path "$here/policy" --critic.model_name_or_path "$here/{critic}"',
        '--reward.remote_url "$here/reward.py" --reward.clip_range -1000000 1000000',
        '--data.prompt_dataset "$here/prompts.jsonl" --data.input_key prompt --data.label_key baseline',
        f"--data.max_len {longest} --rollout.max_new_tokens {data.max_response_tokens}",
        f"--algo.advantage.estimator gae --algo.advantage.gamma 1 --algo.advantage.lambd {ppo.lam}",
        f"--algo.kl.init_coef {ppo.kl_coef} --algo.kl.estimator k1",
        f"--actor.eps_clip {ppo.clip_range} --critic.value_clip {ppo.clip_range}",
        f"--actor.adam.lr {ppo.lr} --critic.adam.lr {ppo.critic_lr}",
        f"--rollout.batch_size {ppo.batch_size} --rollout.n_samples_per_prompt 1",
        f"--rollout.temperature {ppo.temperature}",
        f"--train.batch_size {ppo.batch_size // ppo.minibatches} --train.max_epochs {ppo.epochs}",
        f"--actor.num_nodes 1 --actor.num_gpus_per_node {gpus} --ref.num_nodes 1 --ref.num_gpus_per_node {gpus}",
        f"--critic.num_nodes 1 --critic.num_gpus_per_node {gpus} --train.colocate_all",
        f"--vllm.num_engines {gpus} --vllm.tensor_parallel_size 1 --vllm.enable_sleep --ds.enable_sleep",
        '--ckpt.output_dir "$here/trained"',
    ]


# ----------------------------------------------------------------------------------------------------- verl


def verl_row(prompt: str, plain: str, baseline: float, number: int) -> dict:
    return {
        "data_source": "crlhf",
        "prompt": [{"role": "user", "content": prompt}],
        "reward_model": {"style": "rule", "ground_truth": ""},  # verl asks for it; the reward doesn't
        "extra_info": {"index": number, "prompt": plain, "baseline": baseline},
    }


def verl_launch(config: Config, gpus: int, critic: str) -> list[str]:
    ppo = config.ppo
    data = config.data
    minibatch = ppo.batch_size // ppo.minibatches
    rows = config.run.micro_batch_size or 8
    return [
        "python3 -m verl.trainer.main_ppo",
        f"algorithm.adv_estimator=gae algorithm.gamma=1.0 algorithm.lam={ppo.lam}",
        f"algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef={ppo.kl_coef}",
        '"data.train_files=$here/prompts.parquet" "data.val_files=$here/prompts.parquet"',
        f"data.train_batch_size={ppo.batch_size}",
        f"data.max_prompt_length={data.max_prompt_tokens} data.max_response_length={data.max_response_tokens}",
        f"""'actor_rollout_ref.model.custom_chat_template="{AS_IT_IS}"'""",
        f'"actor_rollout_ref.model.path=$here/policy" actor_rollout_ref.actor.optim.lr={ppo.lr}',
        f"actor_rollout_ref.actor.clip_ratio_low={ppo.clip_range}",
        f"actor_rollout_ref.actor.clip_ratio_high={ppo.clip_range}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={minibatch} actor_rollout_ref.actor.ppo_epochs={ppo.epochs}",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={rows} critic.ppo_micro_batch_size_per_gpu={rows}",
        f"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu={rows}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={rows} actor_rollout_ref.rollout.name=vllm",
        f"actor_rollout_ref.rollout.n=1 actor_rollout_ref.rollout.temperature={ppo.temperature}",
        f'"critic.model.path=$here/policy" critic.optim.lr={ppo.critic_lr} critic.cliprange_value={ppo.clip_range}',
        '"reward.custom_reward_function.path=$here/reward.py" reward.custom_reward_function.name=compute_score',
        f"trainer.nnodes=1 trainer.n_gpus_per_node={gpus} trainer.val_before_train=False trainer.test_freq=-1",
        '"trainer.default_local_dir=$here/trained" "trainer.logger=[console]"',
    ]


# ------------------------------------------------------------------------------------------------------ TRL


def trl_launch(config: Config, gpus: int, critic: str) -> list[str]:
    ppo = config.ppo
    group = ppo.group_size if ppo.group_size > 1 else 4
    rows_per_gpu = math.ceil(ppo.batch_size / gpus)
    whole_groups = math.ceil(rows_per_gpu / group) * group
    return [
        f"accelerate launch --num_processes {gpus} -m trl.scripts.grpo",
        '--model_name_or_path "$here/policy" --reward_funcs reward.reward --dataset_name "$here/prompts"',
        f"--num_generations {group} --scale_rewards batch --beta {ppo.kl_coef} --epsilon {ppo.clip_range}",
        f"--per_device_train_batch_size {whole_groups} --num_iterations {ppo.epochs}",
        f"--max_completion_length {config.data.max_response_tokens} --temperature {ppo.temperature}",
        f'--learning_rate {ppo.lr} --report_to none --output_dir "$here/trained"',
    ]


WATCH_OPENRLHF = (
    "An exception in reward.py is only logged (`Failed to fetch reward`), and the reward is then None.",
    "By default OpenRLHF clips rewards to ±10 before it subtracts the KL price; launch.sh lifts that.",
    "Keep --algo.advantage.estimator gae (or reinforce): with rloo, group_norm, dr_grpo and reinforce_baseline the"
    " baseline cancels.",
)
WATCH_VERL = (
    "verl applies a chat template to every prompt. These prompts are texts that have theirs, if any: launch.sh gives a"
    " template that adds nothing.",
    "verl doesn't hand the prompt to the reward: it travels in extra_info, beside its baseline.",
    "Keep algorithm.adv_estimator=gae (or reinforce_plus_plus): with grpo, rloo, remax and reinforce_plus_plus_baseline"
    " the baseline cancels.",
    "The critic starts as the policy with a new head: give it some steps alone (trainer.critic_warmup).",
)
WATCH_TRL = (
    "TRL 1.16.0 has no PPO. GRPO and RLOO subtract a mean of the prompt's own group, in which the baseline cancels: the"
    " policy learns what it would learn from the raw reward.",
    "What is left is a scale over the batch (--scale_rewards batch, as in launch.sh): it divides by the standard"
    " deviation of all rewards, which is large where levels differ much between prompts, and the steps are small then."
    " With --scale_rewards group or none, and with RLOO as it comes, this export changes nothing.",
    "For the method itself take OpenRLHF or verl, with a critic.",
)

ENGINES = {
    "openrlhf": Engine(
        title="OpenRLHF",
        version="0.11.2",
        prompts="prompts.jsonl",
        row=text_row,
        launch=openrlhf_launch,
        adds_bos=False,
        watch=WATCH_OPENRLHF,
    ),
    "verl": Engine(
        title="verl",
        version="0.9.1",
        prompts="prompts.parquet",
        row=verl_row,
        launch=verl_launch,
        adds_bos=False,
        watch=WATCH_VERL,
    ),
    "trl": Engine(
        title="TRL",
        version="1.16.0",
        prompts="prompts/train.jsonl",
        row=text_row,
        launch=trl_launch,
        adds_bos=True,
        watch=WATCH_TRL,
    ),
}
