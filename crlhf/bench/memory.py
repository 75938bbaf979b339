"""What each stage of a run needs of memory: `python -m crlhf memory --model gpt2 --max-prompt-tokens 256 ...`.

Nothing is estimated by a formula. The code that trains runs once on tensors without data (torch's fake tensors), and a
ledger counts every storage that they would have while it lives: weights in fp32, their bf16 copies, gradients,
AdamW's two moments, and what the backward pass keeps. All rows have full length, so this is the most a run can need.
What the libraries hold beside tensors (a CUDA context: about half a gigabyte) is not in it.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from ..config import Config
from ..dpo import pair_loss
from ..engine.forward import Cache, Model, compute_in, recompute_activations, sampling, sequence_logits
from ..engine.models import pick_device, pick_precision, random_scalar_model, read_model_config
from ..engine.peak import peak_bytes, start_peak
from ..engine.text import Batch
from ..engine.training import adamw, gradient_step
from ..pipeline.memory import GB, Pass, passes_of, tiny_vocabulary
from ..pipeline.options import parse_command_line
from ..pipeline.tables import markdown_table
from ..policy import next_token
from ..ppo import MicroBatch, Models, Rollout, micro_batch_loss
from ..reward import bradley_terry_loss
from ..sft import sft_loss


def published_shapes() -> dict[str, PretrainedConfig]:
    """Three models by their published shapes. No weights are needed to count."""
    return {
        "gpt2": GPT2Config(),
        "HuggingFaceTB/SmolLM2-135M": LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        "Qwen/Qwen2.5-0.5B": Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    }


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of a causal LM of this shape, built without memory on torch's meta device."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, from when they are made to when nothing holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.known = weakref.WeakSet()
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.drop, size)

    def drop(self, size: int) -> None:
        self.bytes -= size


# ------------------------------------------------------------------------------ one step of each stage, at full length


@dataclass
class Shape:
    """What a stage's memory depends on."""

    model: PretrainedConfig
    config: Config
    one_pass: Pass
    dtype: torch.dtype


def language_model(shape: Shape) -> Model:
    model = AutoModelForCausalLM.from_config(shape.model)
    return compute_in(model.eval(), shape.dtype)


def scored_model(shape: Shape) -> Model:
    """One with a scalar head: a reward model, or a critic."""
    return compute_in(random_scalar_model(shape.model), shape.dtype)


def full_batch(rows: int, shape: Shape) -> Batch:
    """Rows whose prompts and responses fill all columns."""
    data = shape.config.data
    prompts = torch.ones(rows, data.max_prompt_tokens, dtype=torch.long)
    responses = torch.ones(rows, data.max_response_tokens, dtype=torch.long)
    return Batch(prompts, prompts > 0, responses, responses > 0)


def full_sequences(rows: int, shape: Shape) -> list[list[int]]:
    data = shape.config.data
    return [[1] * (data.max_prompt_tokens + data.max_response_tokens)] * rows


def one_step(loss: Callable, optimizers: list, passes: int) -> None:
    """A later step: AdamW's moments are there, and before the last of several passes the gradients of others, too."""
    for optimizer in optimizers:
        set_gradients(optimizer, True)
        gradient_step(optimizer, 1e-6)  # makes the moments
    for optimizer in optimizers:
        set_gradients(optimizer, passes > 1)
    loss().backward()
    for optimizer in optimizers:
        gradient_step(optimizer, 1e-6)


def set_gradients(optimizer: torch.optim.Optimizer, wanted: bool) -> None:
    """Gradients of zeros, or none."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter) if wanted else None


def sft_stage(shape: Shape) -> None:
    model = language_model(shape)
    batch = full_batch(shape.one_pass.rows, shape)
    one_step(lambda: sft_loss(model, batch), [adamw(model)], shape.one_pass.passes)


def reward_stage(shape: Shape) -> None:
    model = scored_model(shape)
    sequences = full_sequences(2 * shape.one_pass.rows, shape)

    def loss() -> Tensor:
        scores = sequence_logits(model, sequences, 0).squeeze(1)
        chosen, rejected = scores.chunk(2)
        return bradley_terry_loss(chosen, rejected)

    one_step(loss, [adamw(model)], shape.one_pass.passes)


def dpo_stage(shape: Shape) -> None:
    policy = language_model(shape)
    ref_policy = language_model(shape).requires_grad_(False)
    batch = full_batch(2 * shape.one_pass.rows, shape)
    one_step(lambda: pair_loss(policy, ref_policy, batch, 0.1)[0], [adamw(policy)], shape.one_pass.passes)


def ppo_stage(shape: Shape) -> None:
    """Update, and the sampling of the rollout that follows, when AdamW's moments are there."""
    config = shape.config
    policy = language_model(shape)
    ref_policy = language_model(shape).requires_grad_(False)
    reward_model = scored_model(shape).requires_grad_(False)
    critic = None
    if config.ppo.critic == "shared":
        critic = nn.Linear(shape.model.hidden_size, 1)
    elif config.ppo.critic != "none":
        critic = scored_model(shape)
    networks = [network for network in (policy, critic) if network is not None]
    if config.ppo.recompute_activations:
        for network in networks:
            recompute_activations(network)

    models = Models(policy, ref_policy, critic, None)
    rows = shape.one_pass.rows
    batch = full_batch(rows, shape)
    table = torch.zeros(batch.response_ids.shape)
    rollout = Rollout([], [], None, batch, [], table, table, table, table, table, table)
    micro_batch = MicroBatch(torch.arange(rows), batch)

    def loss() -> Tensor:
        return micro_batch_loss(models, rollout, micro_batch, config.ppo)[0]

    optimizers = [adamw(network) for network in networks]  # their moments stay while the next rollout is sampled
    one_step(loss, optimizers, shape.one_pass.passes)
    sampled = min(config.ppo.batch_size, config.run.sampling_batch_size)
    sample_and_score(policy, reward_model, sampled, shape)


def sampling_stage(shape: Shape) -> None:
    policy = language_model(shape)
    reward_model = scored_model(shape).requires_grad_(False)
    sample_and_score(policy, reward_model, shape.one_pass.rows, shape)


@torch.no_grad()
def sample_and_score(policy: Model, reward_model: Model, rows: int, shape: Shape) -> None:
    """The last token of `rows` responses, when the cache is longest, and the pass of the reward model over them."""
    sequences = full_sequences(rows, shape)
    ids = torch.tensor(sequences)[:, 1:]
    with sampling(policy):
        cache = Cache(policy, ids > 0, 1)
        cache.next_logits(ids)
        logits = cache.next_logits(ids[:, :1])
        next_token(logits, torch.empty_like(logits).exponential_())
    del cache
    sequence_logits(reward_model, sequences, 0)


# ------------------------------------------------------------------------------------------------------ the answer


STAGES = {"sft": sft_stage, "reward": reward_stage, "baselines": sampling_stage, "ppo": ppo_stage, "dpo": dpo_stage}


def stages_of(config: Config, model: PretrainedConfig, dtype: torch.dtype) -> dict[str, tuple[Callable, Shape]]:
    """The stages of a run that need memory, each as a function and what to call it with."""
    stages = {}
    for name, one_pass in passes_of(config).items():
        stages[name] = STAGES[name], Shape(model, config, one_pass, dtype)
    return stages


def stage_bytes(stage: Callable, shape: Shape) -> int:
    """The most bytes that a stage's tensors hold at once."""
    with FakeTensorMode(), Ledger() as ledger:
        stage(shape)
    return ledger.peak


def measured_bytes(stage: Callable, shape: Shape) -> int:
    """The same, read off a GPU on which the stage really runs, with random weights."""
    gc.collect()
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    start_peak(device)
    with device:
        stage(shape)
    return peak_bytes(device) - before


def model_shape(config: Config) -> PretrainedConfig:
    """The architecture of --model: of a known name, of the tiny model, or as its config.json says."""
    model = config.model
    if model.name == "tiny":
        return GPT2Config(
            vocab_size=tiny_vocabulary(config),
            n_positions=config.data.max_prompt_tokens + config.data.max_response_tokens,
            n_embd=model.width,
            n_layer=model.layers,
            n_head=model.heads,
        )
    return published_shapes().get(model.name) or read_model_config(model.name)


def lowering_option(stage: str, config: Config) -> str:
    """The option that lowers a stage's memory most."""
    if stage == "baselines":
        sampling = passes_of(config)[stage]
        return f"{sampling.option} (now {sampling.rows})"
    if config.run.micro_batch_size != 1:
        return f"--micro-batch-size (now {config.run.micro_batch_size or 'a whole step'})"
    if stage == "ppo":
        return "--max-prompt-tokens and --max-response-tokens or --ppo-critic shared"
    return "--max-prompt-tokens and --max-response-tokens"


def main(arguments: list[str]) -> None:
    """Print what the stages of one run need; without options, a table of three models, on a GPU measured, too."""
    _, _, config = parse_command_line(arguments)
    if not arguments:
        print_models(stage_bytes, "computed")
        if torch.cuda.is_available():
            print_models(measured_bytes, f"measured on {torch.cuda.get_device_name()}")
        return
    device = pick_device(config.run.device, config.model.name == "tiny")
    dtype = pick_precision(config.run.precision, device)
    model = model_shape(config)
    precision = str(dtype).removeprefix("torch.")
    print(f"{config.model.name}: {count_parameters(model) / 1e6:.1f}M parameters, {precision}")
    needs = {}
    for name, stage in stages_of(config, model, dtype).items():
        needs[name] = stage_bytes(*stage)
        print(f"  {name:<10} {needs[name] / GB:6.2f} GB")
    worst = max(needs, key=needs.get)
    print(f"the most is {needs[worst] / GB:.2f} GB, in {worst}: {lowering_option(worst, config)} lowers it")


def print_models(bytes_of: Callable, how: str) -> None:
    """The three models in bf16, with the defaults of a pretrained model."""
    header = ["model", "parameters", "SFT", "reward", "sampling", "PPO"]
    header += ["PPO, shared critic", "PPO, recomputing", "DPO"]
    rows = []
    for name, model in published_shapes().items():
        config = Config.for_model(name)
        config.run.methods = "ppo,dpo"
        calls = stages_of(config, model, torch.bfloat16)  # they read the config again at every call
        sizes = {stage: bytes_of(*call) for stage, call in calls.items()}
        config.ppo.critic = "shared"
        sizes["shared"] = bytes_of(*calls["ppo"])
        config.ppo.critic = "reward_model"
        config.ppo.recompute_activations = True
        sizes["recomputing"] = bytes_of(*calls["ppo"])
        cells = [name, f"{count_parameters(model) / 1e6:.0f}M"]
        for column in ("sft", "reward", "baselines", "ppo", "shared", "recomputing", "dpo"):
            cells.append(f"{sizes[column] / GB:.1f} GB")
        rows.append(cells)
    print(markdown_table(header, rows))
    print(
        f"\nbf16 over fp32 weights, {config.run.micro_batch_size} rows a pass (--micro-batch-size), "
        f"{config.data.max_prompt_tokens} prompt and {config.data.max_response_tokens} response tokens; {how}."
    )
