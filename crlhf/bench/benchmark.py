"""How fast is it? `python -m crlhf benchmark` prints the tables.

Models have random weights and can't emit EOS (its id lies behind the vocabulary), so every response has full length and
all loops do the same work. Only the offline sampling is timed with responses that end, too: a trained policy's do.
Everything timed is the code that training runs.

What is compared takes turns, round by round, so that a machine that slows down slows both. Figures are medians.
"""

import gc
import io
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import tokenizers
import torch
from transformers.activations import ACT2FN

from ..baselines import sample_baselines
from ..config import BaselineConfig, PPOConfig, UserError
from ..engine.checkpoint import Job
from ..engine.files import stream
from ..engine.forward import Model, autocast, compute_in
from ..engine.models import frozen_copy, pick_device, pick_precision, save, scalar_model, tiny_model
from ..engine.text import Tokenizer, pad_prompts
from ..engine.tokenizers import wrap
from ..pipeline.options import Parser
from ..pipeline.rewards import ModelReward
from ..ppo import Models, train_ppo

LR = 1e-6  # small: the timed iterations shall stay alike
CRITICS = ("shared", "separate")  # the one that needs less memory first: on a CPU the peak is that of all so far

# ------------------------------------------------------------------------------------------------- the work


@dataclass
class Workload:
    layers: int
    width: int
    heads: int
    vocab: int
    prompt: int = 16  # tokens of every prompt
    response: int = 32  # tokens of every response
    batch: int = 64  # prompts of a rollout, and of the offline sampling
    epochs: int = 4
    minibatches: int = 4
    k: int = 4  # offline responses per prompt
    dtype: torch.dtype = torch.float32  # of matrix products


SIZES = {
    "tiny": Workload(layers=4, width=128, heads=4, vocab=512),
    "small": Workload(layers=8, width=256, heads=8, vocab=2000),
    "gpt2": Workload(layers=12, width=768, heads=12, vocab=50257),  # 124M parameters
}


class Setup:
    """Models and prompts of a workload. The reward is a scalar model of the policy's size."""

    def __init__(self, work: Workload, critic: str, device: torch.device) -> None:
        self.work, self.device, self.tokenizer = work, device, numbered_words(work.vocab)
        eos_id, pad_id, context = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, work.prompt + work.response
        policy = tiny_model(work.vocab, eos_id, pad_id, context, work.layers, work.width, work.heads, seed=0)
        compute_in(policy.to(device), work.dtype)
        with tempfile.TemporaryDirectory() as folder:
            save(folder, policy, self.tokenizer)
            reward_model, value_model = (
                compute_in(scalar_model(folder, pad_id).to(device), work.dtype) for _ in range(2)
            )
        reward_model.score.reset_parameters()
        value = value_model if critic == "separate" else torch.nn.Linear(work.width, 1).to(device)
        self.models = Models(policy, frozen_copy(policy), value, self.tokenizer)
        self.reward = ModelReward(frozen_copy(reward_model), self.tokenizer, work.response)
        ids = torch.randint(work.vocab, (work.batch, work.prompt), generator=stream(0, "prompts"))
        self.prompts = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def numbered_words(vocab: int) -> Tokenizer:
    """Words w0, w1, ... with ids 0 to vocab - 1; padding and EOS behind them, out of the model's reach."""
    ids = {f"w{i}": i for i in range(vocab)} | {"<pad>": vocab, "<eos>": vocab + 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer, pad_token="<pad>", eos_token="<eos>")


def use_activation(name: str, *models: Model) -> None:
    """For the library's forward pass: "gelu_new" as GPT-2 comes with, in steps, or the same function fused,
    "gelu_pytorch_tanh". Our own forward pass fuses it anyway."""
    for model in models:
        for block in model.transformer.h:
            block.mlp.act = ACT2FN[name]


def let_responses_end(setup: Setup, chance: float = 1 / 12) -> None:
    """Make w0 the EOS, and lean the final norm towards it until each token is the EOS with about this probability."""
    policy, odds = setup.models.policy, chance / (1 - chance)
    weight = policy.lm_head.weight[0].detach()
    policy.transformer.ln_f.bias.data += weight * math.log(odds * (setup.work.vocab - 1)) / weight.square().sum()
    setup.tokenizer.eos_token = setup.tokenizer.pad_token = "w0"
    policy.generation_config.eos_token_id = policy.generation_config.pad_token_id = 0


def train(setup: Setup, iterations: int = 1) -> list[dict]:
    """Iterations of PPO, with the metrics that every run logs."""
    work, rates = setup.work, {"lr": LR, "critic_lr": LR}
    config = PPOConfig(iterations, batch_size=work.batch, epochs=work.epochs, minibatches=work.minibatches, **rates)
    with tempfile.TemporaryDirectory() as folder:
        job = Job("ppo", Path(folder), max_response_tokens=work.response, checkpoint_seconds=math.inf)
        return train_ppo(setup.models, setup.reward, setup.prompts, config, job)


def our_baselines(setup: Setup) -> None:
    """All baseline responses. The reward takes no time."""
    policy, config = setup.models.policy, BaselineConfig(k=setup.work.k)
    job = Job("baselines", None, max_response_tokens=setup.work.response)
    sample_baselines(policy, setup.tokenizer, lambda _, texts: torch.zeros(len(texts)), setup.prompts, config, job)


@torch.no_grad()
def library_baselines(setup: Setup, activation: str) -> None:
    """The same work with `model.generate`: 64 x 4 responses fit into one batch of ours, too."""
    work, policy = setup.work, setup.models.policy
    use_activation(activation, policy)
    ids, mask = (tensor.to(setup.device) for tensor in pad_prompts(setup.tokenizer, setup.prompts))
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": work.response, "num_return_sequences": work.k}
    with autocast(policy):
        out = policy.generate(input_ids=ids, attention_mask=mask.long(), **sampling)
    setup.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def trl_trainer(setup: Setup, folder: str) -> object:
    """TRL's PPOTrainer on the same models and prompts. A call of its `train` is one iteration, with as many optimiser
    steps as ours: what it calls a train batch is a rollout, and num_mini_batches divides that."""
    try:
        from trl.experimental import ppo as trl
    except ImportError:
        raise UserError("--against trl needs TRL 1.12.0, the last with a PPOTrainer: pip install trl==1.12.0") from None
    from datasets import Dataset

    work, models, on_cpu = setup.work, setup.models, setup.device.type == "cpu"
    names = ("per_device_train_batch_size", "total_episodes", "local_rollout_forward_batch_size")
    options = dict.fromkeys(names, work.batch)
    options |= {"num_ppo_epochs": work.epochs, "num_mini_batches": work.minibatches, "gradient_accumulation_steps": 1}
    options |= {"learning_rate": LR, "lr_scheduler_type": "constant"}  # else it is 0 from the second call on
    options |= {"response_length": work.response, "temperature": 1.0, "num_sample_generations": 0}
    options |= {"use_cpu": on_cpu, "bf16": not on_cpu, "gradient_checkpointing": False}
    args = trl.PPOConfig(folder, save_strategy="no", report_to="none", disable_tqdm=True, **options)
    prompts = Dataset.from_dict({"input_ids": pad_prompts(setup.tokenizer, setup.prompts)[0].tolist()})
    networks = models.policy, models.ref_policy, setup.reward.model, prompts, models.critic
    return trl.PPOTrainer(args, setup.tokenizer, *networks, eval_dataset=prompts)


def train_trl(trainer: object, collects_garbage: bool) -> None:
    """One iteration of TRL, without what it prints, and with or without its two garbage collections."""
    collect = gc.collect if collects_garbage else mock.Mock()
    with redirect_stdout(io.StringIO()), mock.patch.object(gc, "collect", collect):
        trainer.train()


# ---------------------------------------------------------------------------------------- timing and tables


def interleave(actions: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Call every action once a round, after a round to warm up -> the median seconds of each.

    All actions end with texts or numbers, which a GPU can't give before it has done all its work.
    """
    seconds = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peak_mebibytes(device: torch.device) -> float:
    """Most memory held so far: on a GPU by tensors, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts it in KiB


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |", flush=True)


def iteration_table(work: Workload, device: torch.device, rounds: int) -> None:
    """One PPO iteration by phase. The first one warms up."""
    rows, names = [], ("seconds_rollout", "seconds_scoring", "seconds_update", "samples_per_second")
    for critic in CRITICS:
        setup = Setup(work, critic, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        metrics = train(setup, rounds + 1)[1:]
        *phases, speed = (statistics.median(row[name] for row in metrics) for name in names)
        seconds = [f"{value:.3f}" for value in (*phases, work.batch / speed)]
        others = [f"{value:.0f}" for value in (speed, speed * work.response, peak_mebibytes(device))]
        rows.append([critic, *seconds, *others])
    header = ["critic", "rollout", "scoring", "update", "together", "samples/s", "tokens/s", "peak MiB"]
    print_table("One PPO iteration: seconds", header, rows)


def baseline_table(work: Workload, device: torch.device, rounds: int) -> None:
    """Offline sampling beside `model.generate`, on GPT-2 as it comes and on a model whose activation is fused."""
    full, ending = (Setup(work, "shared", device) for _ in range(2))
    let_responses_end(ending)
    actions, rows, n = {}, [], work.batch * work.k
    for lengths, setup in (("all full", full), ("as they end", ending)):
        actions[f"{lengths}, ours"] = partial(our_baselines, setup)
        actions[f"{lengths}, generate"] = partial(library_baselines, setup, "gelu_new")
        actions[f"{lengths}, fused"] = partial(library_baselines, setup, "gelu_pytorch_tanh")
    seconds = interleave(actions, rounds)
    for lengths in ("all full", "as they end"):
        ours, plain, fused = (seconds[f"{lengths}, {loop}"] for loop in ("ours", "generate", "fused"))
        library = [f"{n / other:.0f} ({other / ours:.2f}x)" for other in (plain, fused)]
        rows.append([lengths, f"{n / ours:.0f}", *library])
    title = "Offline baselines: responses per second (and how many times as many ours are)"
    print_table(title, ["lengths", "ours", "model.generate", "model.generate, fused activation"], rows)


def trl_table(work: Workload, device: torch.device, rounds: int) -> None:
    """TRL runs on GPT-2 as it comes, and on our models, whose activation is already fused. It collects garbage twice an
    iteration, which is no work of PPO: the leanest way to run it is without that."""
    plain, fused = (Setup(work, "separate", device) for _ in range(2))
    use_activation("gelu_new", plain.models.policy, plain.models.ref_policy, plain.models.critic, plain.reward.model)
    with tempfile.TemporaryDirectory() as folder:
        as_it_comes, leanest = trl_trainer(plain, folder), trl_trainer(fused, folder)
        actions = {
            "TRL": partial(train_trl, as_it_comes, collects_garbage=True),
            "TRL, no gc": partial(train_trl, as_it_comes, collects_garbage=False),
            "TRL, fused activation, no gc": partial(train_trl, leanest, collects_garbage=False),
        }
        theirs = list(actions)
        actions |= {f"ours, {critic}": partial(train, Setup(work, critic, device)) for critic in CRITICS}
        seconds = interleave(actions, rounds)
    rows = []
    for loop, ours in seconds.items():
        ratios = [f"{seconds[other] / ours:.2f}" for other in theirs]
        rows.append([loop, f"{ours:.3f}", *ratios])
    header = ["loop", "seconds", "TRL / this", "TRL, no gc / this", "leanest TRL / this"]
    print_table("One PPO iteration beside TRL's PPOTrainer, which has a separate value model", header, rows)


def machine(device: torch.device) -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "CPU")
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    return f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m crlhf benchmark", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", choices=SIZES, help="of the models (default: tiny)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: as many as torch chooses)")
    parser.add_argument("--against", choices=("trl",), help="only compare with TRL's PPOTrainer (needs TRL 1.12.0)")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 0:
        raise UserError("benchmark: --rounds is at least 1, --threads at least 0")
    work, device, rounds = SIZES[options.size], pick_device(options.device, is_tiny=False), options.rounds
    if options.threads:
        torch.set_num_threads(options.threads)
    work = replace(work, dtype=pick_precision(options.precision, device))
    dtype = str(work.dtype).removeprefix("torch.")
    print(f"{machine(device)}; size {options.size}, {dtype}, medians of {rounds} rounds", flush=True)
    if options.against:
        trl_table(work, device, rounds)
    else:
        iteration_table(work, device, rounds)
        baseline_table(work, device, rounds)
