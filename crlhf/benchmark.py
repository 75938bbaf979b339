"""How fast is it, and how far from what the machine can do? `python -m crlhf benchmark` prints the tables.

Models have random weights and can't emit EOS (its id lies behind the vocabulary), so every response has full
length and the work is known beforehand. Only the offline sampling is timed with responses that end, too: a trained
policy's do. Everything timed is the code that training runs.

    share of the floor = (counted FLOPs / measured matmul rate) / measured seconds

What is compared takes turns, round by round, so that a machine that slows down slows both. Figures are medians.
"""

import gc
import io
import math
import resource
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.activations import ACT2FN

from . import fast
from .baselines import sample_baselines
from .config import BaselineConfig, PPOConfig, UserError
from .flops import PHASES, Workload, bytes_to_decode, iteration_flops, sampling_flops
from .models import frozen_copy, save, scalar_model, tiny_model
from .policy import pad_prompts, sample
from .ppo import collect_rollout, gae, token_rewards, train_ppo, update, whiten
from .reward import ModelReward
from .runs import autocast, pick_device, stream
from .training import adamw
from .vocabulary import wrap

CRITICS = ("separate", "shared")
LR = 1e-6  # small: the timed iterations shall stay alike
SIZES = {"tiny": Workload(layers=4, width=128, heads=4, vocab=512),
         "small": Workload(layers=8, width=256, heads=8, vocab=2000),
         "gpt2": Workload(layers=12, width=768, heads=12, vocab=50257)}  # 124M parameters

# ------------------------------------------------------------------------------------------------- the work


def word_tokenizer(vocab):
    """Words w0, w1, ... with ids 0 to vocab - 1; padding and EOS behind them, out of the model's reach."""
    ids = {f"w{i}": i for i in range(vocab)} | {"<pad>": vocab, "<eos>": vocab + 1}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer, pad_token="<pad>", eos_token="<eos>")


def setup(work, critic, device):
    """Models, optimisers and prompts of a workload. The reward is a scalar model of the policy's size."""
    tokenizer = word_tokenizer(work.vocab)
    policy = tiny_model(work.vocab, tokenizer.eos_token_id, tokenizer.pad_token_id, work.prompt + work.response,
                        work.layers, work.width, work.heads, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, policy, tokenizer)
        reward_model, value_model = (scalar_model(folder, tokenizer.pad_token_id).to(device) for _ in range(2))
    reward_model.score.reset_parameters()
    policy, reward_model = policy.to(device), frozen_copy(reward_model)
    critic = value_model if critic == "separate" else torch.nn.Linear(work.width, 1).to(device)
    ids = torch.randint(work.vocab, (max(work.batch, work.prompts), work.prompt), generator=stream(0, "prompts"))
    return SimpleNamespace(work=work, device=device, tokenizer=tokenizer, policy=policy, critic=critic,
                           reference=frozen_copy(policy), reward_model=reward_model, prompt_ids=ids,
                           prompts=[" ".join(f"w{i}" for i in row) for row in ids.tolist()],
                           reward=ModelReward(reward_model, tokenizer, work.response),
                           optimizers=[adamw(model, device) for model in (policy, critic)])


def with_activation(name, s):
    """Give the models an activation, "gelu_new" as GPT-2 comes with, in steps, or the same function fused. `fast`
    fuses it anyway."""
    for model in (s.policy, s.reference, s.reward_model, s.critic):
        for block in model.transformer.h if hasattr(model, "transformer") else ():
            block.mlp.act = ACT2FN[name]
    return s


def let_responses_end(s, chance=1 / 12):
    """Make w0 the EOS, and lean the final norm towards it until each token is the EOS with about this probability."""
    weight, odds = s.policy.lm_head.weight[0].detach(), chance / (1 - chance)
    s.policy.transformer.ln_f.bias.data.add_(weight, alpha=math.log(odds * (s.work.vocab - 1)) / weight.square().sum())
    s.tokenizer.eos_token = s.tokenizer.pad_token = "w0"
    s.policy.generation_config.eos_token_id = s.policy.generation_config.pad_token_id = 0
    return s


def ppo_iteration(s):
    """One iteration as `ppo.train_ppo` does it -> seconds of its phases."""
    work, clock = s.work, [now(s.device)]
    config = PPOConfig(batch_size=work.batch, epochs=work.epochs, minibatches=work.minibatches)
    rollout = collect_rollout(s.policy, s.reference, s.critic, s.tokenizer, s.prompts[:work.batch], config,
                              torch.rand(work.batch, work.response, generator=stream(0, "rollout", device=s.device),
                                         device=s.device))
    clock.append(now(s.device))
    rewards = s.reward(rollout.prompts, rollout.responses).to(s.device)
    clock.append(now(s.device))
    mask = rollout.batch.response_mask
    shaped = token_rewards(rewards, rollout.log_probs, rollout.ref_log_probs, mask, config.kl_coef)
    advantages, returns = gae(shaped, rollout.values, mask, config.gamma, config.lam)
    update(s.policy, s.critic, s.optimizers, rollout, whiten(advantages, mask), returns, config, [LR, LR],
           stream(0, "minibatches"))
    clock.append(now(s.device))
    return dict(zip(PHASES, [*(end - start for start, end in zip(clock, clock[1:])), clock[-1] - clock[0]]))


def our_baselines(s):
    """All baseline responses, at a reward that takes no time."""
    sample_baselines(s.policy, s.tokenizer, lambda prompts, responses: torch.zeros(len(prompts)),
                     s.prompts[:s.work.prompts], BaselineConfig(k=s.work.k), s.work.response, seed=0)


@torch.no_grad()
def library_baselines(s):
    """The same work with `model.generate`: 64 x 4 responses fit into one batch of ours, too."""
    ids, mask = (tensor.to(s.device) for tensor in pad_prompts(s.tokenizer, s.prompts[:s.work.prompts]))
    with autocast(s.device):
        out = s.policy.generate(input_ids=ids, attention_mask=mask.long(), do_sample=True, top_k=0,
                                max_new_tokens=s.work.response, num_return_sequences=s.work.k)
    s.tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)


# -------------------------------------------------------------------------------------------------- the floor


def matmul_rate(work, device):
    """FLOP/s of one block's products on one minibatch's tokens: the floor at the model's own shapes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    N, D = work.batch // work.minibatches * (work.prompt + work.response), work.width
    pairs = [(torch.randn(a, b, device=device, dtype=dtype), torch.randn(b, c, device=device, dtype=dtype))
             for a, b, c in ((N, D, 3 * D), (N, D, D), (N, D, 4 * D), (N, 4 * D, D))]
    return 2 * N * 12 * D * D / seconds_of(lambda: [x @ y for x, y in pairs], device, 0.1)


def decode_floor(work, n_parameters, device):
    """Seconds that sampling a batch needs to move its bytes. The bandwidth is that of copying 1 GiB, which is read
    and written."""
    source, target = torch.empty(2, 2**30, dtype=torch.uint8, device=device)
    rate = 2 * 2**30 / seconds_of(lambda: target.copy_(source), device, 0.2)
    return bytes_to_decode(work, n_parameters) / rate


# ---------------------------------------------------------------------------------------- timing and tables


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(action, device, at_least=0.0):
    """Mean seconds of an action that is repeated in doubling numbers for `at_least` seconds."""
    n = 1
    while True:
        start = now(device)
        for _ in range(n):
            action()
        if (seconds := now(device) - start) >= at_least:
            return seconds / n
        n *= 2


def interleave(actions, rounds):
    """Call every action once a round, after a round to warm up: {name: action} -> {name: median of its results}."""
    results = [{name: action() for name, action in actions.items()} for _ in range(rounds + 1)][1:]
    return medians(results)


def medians(rows):
    """A list of (nested) dicts of numbers -> one dict of medians."""
    if not isinstance(rows[0], dict):
        return statistics.median(rows)
    return {key: medians([row[key] for row in rows]) for key in rows[0]}


def peak_mebibytes(device):
    """Most memory held so far: on a GPU by tensors, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts it in KiB


def print_table(title, header, rows):
    print(f"\n{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def iteration_table(sizes, critics, device, rounds):
    rows = []
    for name, critic in ((name, critic) for name in sizes for critic in critics):
        work, s = SIZES[name], setup(SIZES[name], critic, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        t = interleave({"ppo": lambda: ppo_iteration(s), "rate": lambda: matmul_rate(work, device)}, rounds)
        flops, speed = iteration_flops(work, critic), work.batch / t["ppo"]["iteration"]
        rows.append([name, critic, *(f"{t['ppo'][phase]:.3f} ({flops[phase] / t['rate'] / t['ppo'][phase]:.0%})"
                                     for phase in PHASES), f"{speed:.0f}", f"{speed * work.response:.0f}",
                     f"{flops['iteration'] / 1e9:.0f}", f"{t['rate'] / 1e9:.0f}", f"{peak_mebibytes(device):.0f}"])
    print_table("One PPO iteration: seconds (share of the floor)",
                ["size", "critic", *PHASES, "samples/s", "tokens/s", "GFLOP", "matmul GFLOP/s", "peak MiB"], rows)


def baseline_table(sizes, device, rounds):
    """Offline sampling beside `model.generate`, and beside the machine's limit: on a CPU the time that its products
    need, on a GPU the time that the bytes of one batch need."""
    rows = []
    for name in sizes:
        work = SIZES[name]
        full, ending = setup(work, "shared", device), let_responses_end(setup(work, "shared", device))
        mask = torch.ones(work.batch, work.prompt, dtype=torch.bool, device=device)
        ids, n = full.prompt_ids[:work.batch].to(device), work.prompts * work.k
        uniforms = torch.rand(work.batch, work.response, generator=stream(0, "sample"), device="cpu").to(device)
        actions = {"sample": lambda: sample(full.policy, ids, mask, uniforms, full.tokenizer.eos_token_id,
                                            full.tokenizer.pad_token_id)}
        for lengths, s in (("all full", full), ("as they end", ending)):
            actions |= {(lengths, "ours"): lambda s=s: our_baselines(s),
                        (lengths, "fused"): lambda s=s: library_baselines(with_activation("gelu_pytorch_tanh", s)),
                        (lengths, "generate"): lambda s=s: library_baselines(with_activation("gelu_new", s))}
        t = interleave({key: lambda a=action: seconds_of(a, device) for key, action in actions.items()}
                       | {"rate": lambda: matmul_rate(work, device)}, rounds)
        share = (decode_floor(work, full.policy.num_parameters(), device) / t["sample"] if device.type == "cuda"
                 else work.prompts * sampling_flops(work, work.k) / t["rate"] / t["all full", "ours"])
        for lengths, floor in (("all full", f"{share:.0%}"), ("as they end", "")):
            ours, fused, library = (t[lengths, loop] for loop in ("ours", "fused", "generate"))
            rows.append([name, lengths, f"{n / ours:.0f}", f"{n / library:.0f} ({library / ours:.2f}x)",
                         f"{n / fused:.0f} ({fused / ours:.2f}x)", floor])
    print_table("Offline baselines: responses per second (and how many times as many ours are)",
                ["size", "lengths", "ours", "model.generate", "model.generate, fused activation",
                 "ours: share of the floor"], rows)


def scaling_table(work, device, rounds):
    """Seconds as one quantity is doubled after another. Linear cost shows as factors up to 2 and 4."""
    rows = []
    for quantity in ("batch", "response", "k", "prompts"):
        cost = our_baselines if quantity in ("k", "prompts") else ppo_iteration
        setups = {n: setup(replace(work, **{quantity: getattr(work, quantity) * n}), "shared", device)
                  for n in (1, 2, 4)}
        t = interleave({n: lambda s=s: seconds_of(lambda: cost(s), device) for n, s in setups.items()}, rounds)
        rows.append([cost.__name__, f"{quantity} = {getattr(work, quantity)}", f"{t[1]:.3f}",
                     *(f"{t[n]:.3f} ({t[n] / t[1]:.2f}x)" for n in (2, 4))])
    print_table("Seconds as the work is doubled", ["cost of", "from", "once", "twice", "four times"], rows)


def memory_table(work, device, iterations):
    """Does memory grow while PPO trains? Every call of the reward reads the peak so far. Iterations are short:
    what grows, grows with their number."""
    work, peaks = replace(work, response=8), []
    s = setup(work, "separate", device)
    config = PPOConfig(iterations=iterations, batch_size=4, epochs=1, minibatches=1, lr=LR, critic_lr=LR)

    def reward(prompts, responses):
        peaks.append(peak_mebibytes(device))
        return s.reward(prompts, responses)

    with tempfile.TemporaryDirectory() as folder:
        train_ppo(s.policy, s.reference, s.critic, s.tokenizer, reward, s.prompts, config, work.response, 0, folder)
    rows = [[i, f"{peaks[i - 1]:.1f}"] for i in sorted({1, -(-iterations // 10), -(-iterations // 2), iterations})]
    print_table("Memory while PPO trains", ["iteration", "peak so far, MiB"], rows)


# ------------------------------------------------------------------------------------------------ TRL beside


def trl_trainer(s, folder):
    """TRL's PPOTrainer on the same models and the same work. One call of its `train` is one iteration."""
    try:
        from trl.experimental.ppo import PPOConfig as TRLConfig, PPOTrainer
    except ImportError:
        raise UserError("--against trl needs TRL 1.12.0, the last with a PPOTrainer: pip install trl==1.12.0") from None
    from datasets import Dataset

    work, on_cpu = s.work, s.device.type == "cpu"
    args = TRLConfig(output_dir=folder, num_ppo_epochs=work.epochs, num_mini_batches=work.minibatches,
                     per_device_train_batch_size=work.batch // work.minibatches,
                     gradient_accumulation_steps=work.minibatches, total_episodes=work.batch,
                     local_rollout_forward_batch_size=work.batch, response_length=work.response, temperature=1.0,
                     learning_rate=LR, use_cpu=on_cpu, bf16=not on_cpu, gradient_checkpointing=False,
                     num_sample_generations=0, save_strategy="no", report_to="none", disable_tqdm=True)
    data = Dataset.from_dict({"input_ids": s.prompt_ids[:work.batch].tolist()})
    return PPOTrainer(args, s.tokenizer, s.policy, s.reference, s.reward_model, data, s.critic, eval_dataset=data)


def trl_table(sizes, critics, device, rounds):
    """TRL runs on GPT-2 as it comes, and on our models, whose activation is already fused. It collects garbage twice an
    iteration, which is no work of PPO: the leanest way to run it is without that."""
    rows, leanest = [], "TRL, fused activation, no gc"
    for name in sizes:
        with tempfile.TemporaryDirectory() as folder:
            as_it_comes = trl_trainer(with_activation("gelu_new", setup(SIZES[name], "separate", device)), folder)
            fused = trl_trainer(setup(SIZES[name], "separate", device), folder)

            def trl(trainer, collect):
                with redirect_stdout(io.StringIO()), mock.patch.object(gc, "collect", collect):
                    return seconds_of(trainer.train, device)

            no_gc = lambda *args: 0
            actions = {"TRL": lambda: trl(as_it_comes, gc.collect), "TRL, no gc": lambda: trl(as_it_comes, no_gc),
                       leanest: lambda: trl(fused, no_gc)}
            for critic in critics:
                s = setup(SIZES[name], critic, device)
                actions[f"ours, {critic}"] = lambda s=s: ppo_iteration(s)["iteration"]
            t = interleave(actions, rounds)
        rows += [[name, loop, f"{t[loop]:.3f}", f"{t['TRL'] / t[loop]:.2f}", f"{t['TRL, no gc'] / t[loop]:.2f}",
                  f"{t[leanest] / t[loop]:.2f}"] for loop in actions]
    print_table("One PPO iteration beside TRL's PPOTrainer, which has a separate value model",
                ["size", "loop", "seconds", "TRL / this", "TRL, no gc / this", "leanest TRL / this"], rows)


def parse(arguments):
    from .__main__ import Parser  # answers a mistake in one line

    parser = Parser(prog="python -m crlhf benchmark", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="auto", choices=("auto", *SIZES), help="auto: all (gpt2 only on a GPU)")
    parser.add_argument("--critic", default="both", choices=("both", *CRITICS), help="a model, or a head on the policy")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--cuda-graphs", action="store_true", help="sample on a GPU in recorded steps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: as many as torch chooses)")
    parser.add_argument("--against", choices=("trl",), help="only compare with TRL's PPOTrainer (needs TRL 1.12.0)")
    parser.add_argument("--iterations", type=int, default=0, help="only train so long, and print whether memory grows")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 0 or options.iterations < 0:
        raise UserError("benchmark: --rounds is at least 1, --threads and --iterations at least 0")
    return options


def machine(device):
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "CPU")
    name = f"{torch.cuda.get_device_name()}, bf16 autocast" if device.type == "cuda" else f"{cpu}, fp32"
    return f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def main(arguments=None):
    options = parse(arguments)
    fast.use_graphs = options.cuda_graphs
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = [options.size] if options.size != "auto" else [*SIZES] if device.type == "cuda" else ["tiny", "small"]
    critics = CRITICS if options.critic == "both" else (options.critic,)
    print(f"{machine(device)}; medians of {options.rounds} rounds", flush=True)
    if options.iterations:
        return memory_table(SIZES[sizes[0]], device, options.iterations)
    if options.against:
        return trl_table(sizes, critics, device, options.rounds)
    iteration_table(sizes, critics, device, options.rounds)
    baseline_table(sizes, device, options.rounds)
    scaling_table(SIZES[sizes[0]], device, options.rounds)
