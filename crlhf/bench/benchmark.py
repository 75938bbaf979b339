"""How fast is it? `python -m crlhf benchmark` prints the tables.

Models have random weights and can't emit EOS (its id lies behind the vocabulary), so every response has full length and
all loops do the same work. Only the offline sampling is timed with responses that end, too: a trained policy's do.
Everything timed is the code that training runs.

What is compared takes turns, round by round, so that a machine that slows down slows both. Figures are medians.
"""

import gc
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial

import tokenizers
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ..baselines import sample_baselines
from ..config import BaselineConfig, BenchmarkConfig, PPOConfig, UserError
from ..engine.checkpoint import Job
from ..engine.files import stream
from ..engine.forward import Model, autocast, compute_in
from ..engine.models import frozen_copy, pick_device, pick_precision, random_scalar_model, tiny_model
from ..engine.peak import peak_bytes, start_peak
from ..engine.recorded import record_sampling
from ..engine.text import Tokenizer, pad_prompts
from ..engine.tokenizers import wrap
from ..pipeline.options import Parser, add_options, read_settings
from ..pipeline.rewards import ModelReward
from ..pipeline.tables import markdown_table
from ..ppo import Models, train_ppo

LR = 1e-6  # small: the timed iterations shall stay alike
CRITICS = ("shared", "separate")  # the smaller first: some systems know only the peak of all so far

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
    is_recorded: bool = False  # sampling replays CUDA graphs


SIZES = {
    "tiny": Workload(layers=4, width=128, heads=4, vocab=512),
    "small": Workload(layers=8, width=256, heads=8, vocab=2000),
    "gpt2": Workload(layers=12, width=768, heads=12, vocab=50257),  # 124M parameters
}


class Setup:
    """Models and prompts of a workload. The reward is a scalar model of the policy's size."""

    def __init__(self, work: Workload, critic: str, device: torch.device) -> None:
        self.work = work
        self.device = device
        self.tokenizer = numbered_words(work.vocab)
        policy = tiny_model(
            work.vocab,
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
            context=work.prompt + work.response,
            layers=work.layers,
            width=work.width,
            heads=work.heads,
            seed=0,
        )
        policy = self.ready(policy)
        if critic == "shared":
            value_model = torch.nn.Linear(work.width, 1).to(device)
        else:
            value_model = self.ready(random_scalar_model(policy.config))
        self.models = Models(policy, frozen_copy(policy), value_model, self.tokenizer)
        reward_model = self.ready(random_scalar_model(policy.config))
        self.reward = ModelReward(reward_model.requires_grad_(False), self.tokenizer, work.response)
        ids = torch.randint(work.vocab, (work.batch, work.prompt), generator=stream(0, "prompts"))
        self.prompts = [self.tokenizer.decode(row) for row in ids]

    def ready(self, model: Model) -> Model:
        model = compute_in(model.to(self.device), self.work.dtype)
        return record_sampling(model) if self.work.is_recorded else model


def numbered_words(vocab: int) -> Tokenizer:
    """Words w0, w1, ... with ids 0 to vocab - 1; padding and EOS behind them, out of the model's reach."""
    ids = {f"w{i}": i for i in range(vocab)}
    ids["<pad>"] = vocab
    ids["<eos>"] = vocab + 1
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
    """Make w0 the EOS, and lean the final norm towards it until each token is the EOS with about this probability.

    A bias of s w / |w|^2, for the word vector w of w0, adds s to its logit. With logits near 0 otherwise its odds are
    e^s / (V - 1).
    """
    policy = setup.models.policy
    odds = chance / (1 - chance)
    word = policy.lm_head.weight[0].detach()
    shift = math.log(odds * (setup.work.vocab - 1))
    policy.transformer.ln_f.bias.data += word * shift / word.square().sum()
    setup.tokenizer.eos_token = setup.tokenizer.pad_token = "w0"
    policy.generation_config.eos_token_id = policy.generation_config.pad_token_id = 0


def train(setup: Setup, iterations: int = 1) -> list[dict]:
    """Iterations of PPO, with the metrics that every run logs."""
    config = PPOConfig(
        iterations=iterations,
        batch_size=setup.work.batch,
        epochs=setup.work.epochs,
        minibatches=setup.work.minibatches,
        lr=LR,
        critic_lr=LR,
    )
    job = Job("ppo", max_response_tokens=setup.work.response)  # without a folder: nothing is saved
    return train_ppo(setup.models, setup.reward, setup.prompts, config, job)


def our_baselines(setup: Setup) -> None:
    """All baseline responses. The reward takes no time."""
    config = BaselineConfig(k=setup.work.k)
    job = Job("baselines", max_response_tokens=setup.work.response)

    def no_reward(prompts: list[str], responses: list[str]) -> Tensor:
        return torch.zeros(len(responses))

    sample_baselines(setup.models.policy, setup.tokenizer, no_reward, setup.prompts, config, job)


@torch.no_grad()
def library_baselines(setup: Setup, activation: str) -> None:
    """The same work with `model.generate`: 64 x 4 responses fit into one batch of ours, too."""
    policy = setup.models.policy
    use_activation(activation, policy)
    ids, mask = pad_prompts(setup.tokenizer, setup.prompts)
    with autocast(policy):
        sequences = policy.generate(
            input_ids=ids.to(setup.device),
            attention_mask=mask.long().to(setup.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=setup.work.response,
            num_return_sequences=setup.work.k,
        )
    setup.tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)


def trl_trainer(setup: Setup, folder: str) -> object:
    """TRL's PPOTrainer on the same models and prompts. A call of its `train` is one iteration, with as many optimiser
    steps as ours: what it calls a train batch is a rollout, and num_mini_batches divides that."""
    try:
        from trl.experimental import ppo as trl
    except ImportError:
        problem = "--against trl needs TRL 1.12.0, the last with a PPOTrainer"
        raise UserError(problem, "pip install trl==1.12.0") from None
    from datasets import Dataset

    ids, _ = pad_prompts(setup.tokenizer, setup.prompts)
    prompts = Dataset.from_dict({"input_ids": ids.tolist()})
    return trl.PPOTrainer(
        trl.PPOConfig(folder, **trl_options(setup.work, on_cpu=setup.device.type == "cpu")),
        setup.tokenizer,
        setup.models.policy,
        setup.models.ref_policy,
        setup.reward.model,
        prompts,
        setup.models.critic,
        eval_dataset=prompts,
    )


def trl_options(work: Workload, on_cpu: bool) -> dict:
    """The settings with which TRL does the same work."""
    return {
        "per_device_train_batch_size": work.batch,
        "total_episodes": work.batch,
        "local_rollout_forward_batch_size": work.batch,
        "num_ppo_epochs": work.epochs,
        "num_mini_batches": work.minibatches,
        "gradient_accumulation_steps": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",  # else it is 0 from the second call on
        "response_length": work.response,
        "temperature": 1.0,
        "num_sample_generations": 0,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train_trl(trainer: object, collects_garbage: bool) -> None:
    """One iteration of TRL, without what it prints. Its two garbage collections look through every object there is;
    or, without them, through those alone that the iteration made: what was there before is frozen, and passed over."""
    if not collects_garbage:
        gc.freeze()
    with redirect_stdout(io.StringIO()):
        trainer.train()
    gc.unfreeze()


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


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n{markdown_table(header, rows)}", flush=True)


def iteration_table(work: Workload, device: torch.device, rounds: int) -> None:
    """One PPO iteration by phase. The first one warms up."""
    rows = []
    for critic in CRITICS:
        setup = Setup(work, critic, device)
        start_peak(device)
        metrics = train(setup, rounds + 1)[1:]
        peak = peak_bytes(device) / 2**20
        cells = [critic]
        for phase in ("rollout", "scoring", "update"):
            seconds = statistics.median(row[f"seconds_{phase}"] for row in metrics)
            cells.append(f"{seconds:.3f}")
        speed = statistics.median(row["samples_per_second"] for row in metrics)
        cells += [f"{work.batch / speed:.3f}", f"{speed:.0f}", f"{speed * work.response:.0f}", f"{peak:.0f}"]
        rows.append(cells)
    header = ["critic", "rollout", "scoring", "update", "together", "samples/s", "tokens/s", "peak MiB"]
    print_table("One PPO iteration: seconds", header, rows)


def baseline_table(work: Workload, device: torch.device, rounds: int) -> None:
    """Offline sampling beside `model.generate`, on GPT-2 as it comes and on a model whose activation is fused."""
    setups = {"all full": Setup(work, "shared", device), "as they end": Setup(work, "shared", device)}
    let_responses_end(setups["as they end"])
    actions = {}
    for lengths, setup in setups.items():
        actions[f"{lengths}, ours"] = partial(our_baselines, setup)
        actions[f"{lengths}, generate"] = partial(library_baselines, setup, "gelu_new")
        actions[f"{lengths}, fused"] = partial(library_baselines, setup, "gelu_pytorch_tanh")
    seconds = interleave(actions, rounds)
    n = work.batch * work.k
    rows = []
    for lengths in setups:
        ours = seconds[f"{lengths}, ours"]
        cells = [lengths, f"{n / ours:.0f}"]
        for loop in ("generate", "fused"):
            library = seconds[f"{lengths}, {loop}"]
            cells.append(f"{n / library:.0f} ({library / ours:.2f}x)")
        rows.append(cells)
    title = "Offline baselines: responses per second (and how many times as many ours are)"
    print_table(title, ["lengths", "ours", "model.generate", "model.generate, fused activation"], rows)


def trl_table(work: Workload, device: torch.device, rounds: int) -> None:
    """TRL runs on GPT-2 as it comes, and on our models, whose activation is already fused. It collects garbage twice an
    iteration, which is no work of PPO: the leanest way to run it is without that."""
    theirs = replace(work, is_recorded=False)
    plain = Setup(theirs, "separate", device)
    use_activation("gelu_new", plain.models.policy, plain.models.ref_policy, plain.models.critic, plain.reward.model)
    fused = Setup(theirs, "separate", device)
    with tempfile.TemporaryDirectory() as folder:
        as_it_comes = trl_trainer(plain, folder)
        leanest = trl_trainer(fused, folder)
        actions = {
            "TRL": partial(train_trl, as_it_comes, collects_garbage=True),
            "TRL, no gc": partial(train_trl, as_it_comes, collects_garbage=False),
            "TRL, fused activation, no gc": partial(train_trl, leanest, collects_garbage=False),
        }
        trl_loops = list(actions)
        for critic in CRITICS:
            actions[f"ours, {critic}"] = partial(train, Setup(work, critic, device))
        seconds = interleave(actions, rounds)
    rows = []
    for loop, ours in seconds.items():
        ratios = [f"{seconds[other] / ours:.2f}" for other in trl_loops]
        rows.append([loop, f"{ours:.3f}", *ratios])
    header = ["loop", "seconds", "TRL / this", "TRL, no gc / this", "leanest TRL / this"]
    print_table("One PPO iteration beside TRL's PPOTrainer, which has a separate value model", header, rows)


def machine(device: torch.device) -> str:
    """What it runs on; of a processor, which of its instructions torch uses."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m crlhf benchmark", allow_abbrev=False, description=__doc__.splitlines()[0])
    add_options(parser, BenchmarkConfig)
    settings = read_settings(BenchmarkConfig, parser.read(arguments))
    device = pick_device(settings.device, is_tiny=False)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dtype = pick_precision(settings.precision, device)
    is_recorded = settings.recorded == "auto" and device.type == "cuda"
    work = replace(SIZES[settings.size], dtype=dtype, is_recorded=is_recorded)
    precision = str(dtype).removeprefix("torch.")
    print(f"{machine(device)}; size {settings.size}, {precision}, medians of {settings.rounds} rounds", flush=True)
    if settings.against == "trl":
        trl_table(work, device, settings.rounds)
    else:
        iteration_table(work, device, settings.rounds)
        baseline_table(work, device, settings.rounds)
