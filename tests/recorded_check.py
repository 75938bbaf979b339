"""Is recorded sampling right on this GPU, and how fast is it? `python -m tests.recorded_check`

Four minutes at most; parts that don't fit in any more are left out. A part that fails prints its traceback, and the
others go on. It prints one table, and as its last line all numbers as JSON. `--tiny` tries the script itself out, on
a CPU too, where a recording is the step itself.

Models have random weights, in the shapes of GPT-2 (124M) and SmolLM2-135M. No response ends, but for those of the
first checks.
"""

import argparse
import copy
import gc
import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from crlhf.engine.files import stream
from crlhf.engine.forward import Model, compute_in
from crlhf.engine.recorded import Step, cuda_graph, record_sampling, sampling_cache
from crlhf.pipeline.tables import markdown_table
from crlhf.policy import sample

SHAPES = {
    "smollm2": {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
}
TINY = {
    "smollm2": {"num_hidden_layers": 2, "hidden_size": 36, "intermediate_size": 48, "vocab_size": 300},
    "gpt2": {"n_layer": 2, "n_embd": 48, "vocab_size": 300},
}
FAMILIES = ("llama", "qwen2", "qwen3", "smollm3", "gpt_neox", "olmo2", "opt", "gemma2", "mixtral")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PEAKS = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12}  # bytes a second from memory, by a part of the device's name


class Check:
    """The settings of one run of this script, and what came out so far."""

    def __init__(self, device: torch.device, tiny: bool, seconds: float) -> None:
        self.device = device
        self.tiny = tiny
        self.end = time.perf_counter() + seconds
        self.results: dict[str, object] = {}
        self.models: dict[str, Model] = {}
        self.rows: list[dict] = []
        self.errors: list[str] = []
        self.lines: list[str] = []  # warnings of recorders

    def part(self, name: str, action: Callable[[], object]) -> None:
        """Run one part, whatever happens in it."""
        if time.perf_counter() > self.end:
            print(f"{name}: left out, no time is left", flush=True)
            self.errors.append(f"{name}: no time was left")
            return
        start = time.perf_counter()
        try:
            self.results[name] = action()
            print(f"{name}: {self.results[name]}  [{time.perf_counter() - start:.1f} s]", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"{name}: FAILED", flush=True)
            self.errors.append(f"{name}: {error!r}"[:300])
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ----------------------------------------------------------------------------------------------- the work

    def model(self, shape: str, dtype: torch.dtype) -> Model:
        """A copy of the model of this shape, which is made once: on a CPU that takes seconds."""
        if shape not in self.models:
            sizes = SHAPES[shape] | (TINY[shape] if self.tiny else {})
            self.models[shape] = self.model_of(AutoConfig.for_model(**sizes), dtype)
        return compute_in(copy.deepcopy(self.models[shape]), dtype)

    def model_of(self, config: transformers.PretrainedConfig, dtype: torch.dtype) -> Model:
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        return compute_in(model.to(self.device).eval(), dtype)

    def record(self, model: Model) -> Model:
        on_gpu = self.device.type == "cuda"
        return record_sampling(model, self.warn, cuda_graph if on_gpu else run_only)

    def warn(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def prompts(self, rows: int, length: int, vocabulary: int, padded: bool = False) -> tuple[Tensor, Tensor]:
        ids = torch.randint(3, vocabulary, (rows, length), generator=stream(0, "prompts"))
        mask = torch.ones(rows, length, dtype=torch.bool)
        if padded:
            for row in range(rows):
                mask[row, : row % (length // 2)] = False
        return ids.to(self.device), mask.to(self.device)

    def drawn(self, model: Model, prompts: tuple[Tensor, Tensor], n_new: int, eos: int = -1, k: int = 1) -> Tensor:
        """Responses with a seed of their own."""
        tokenizer = SimpleNamespace(eos_token_id=eos, pad_token_id=0)
        generator = stream(0, "draws", device=self.device)
        return sample(model, tokenizer, prompts, n_new, generator=generator, k=k).response_ids

    def seconds(self, action: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # --------------------------------------------------------------------------------------------- is it right?

    def same_tokens(self, shape: str) -> str:
        """In fp32: padded prompts, rows that end, two responses a prompt, two batches of different lengths."""
        model = self.model(shape, torch.float32)
        vocabulary = model.config.vocab_size
        with torch.no_grad():
            model.get_output_embeddings().weight[1] *= 3  # an EOS that is drawn now and then
        batches = [self.prompts(24, length, vocabulary, padded=True) for length in (20, 40)]
        expected = [self.drawn(model, prompts, 48, eos=1, k=2) for prompts in batches]
        self.record(model)
        for prompts, theirs in zip(batches, expected):
            for _ in range(2):
                ours = self.drawn(model, prompts, 48, eos=1, k=2)
                assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
                same = (ours == theirs).all(1)
                assert same.float().mean() > 0.95, f"only {int(same.sum())} of {len(same)} responses are the same"
        assert model.recorder.works, "it was not recorded"
        ended = int((theirs == 0).any(1).sum())
        return f"{int(same.sum())} of {len(same)} responses are the same ({ended} ended early)"

    def weights_that_change(self, shape: str) -> str:
        """In bf16: the recording follows weights that change in place, and a second call draws the same."""
        model = self.record(self.model(shape, torch.bfloat16))
        prompts = self.prompts(8, 16, model.config.vocab_size)
        first = self.drawn(model, prompts, 24)
        again = self.drawn(model, prompts, 24)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)
        after = self.drawn(model, prompts, 24)
        assert model.recorder.works, "it was not recorded"
        assert torch.equal(first, again), "a second call draws something else"
        assert not torch.equal(first, after), "new weights change nothing"
        return "they are followed"

    def families(self) -> dict[str, str]:
        """Tiny models of other families: which are recorded here?"""
        answers = {}
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 64, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 128}
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 64}
        for family in FAMILIES:
            try:
                model = self.record(self.model_of(AutoConfig.for_model(family, **sizes), torch.bfloat16))
                self.drawn(model, self.prompts(8, 16, 300, padded=True), 16)
                answers[family] = "recorded" if model.recorder.works else self.lines[-1]
            except Exception as error:
                answers[family] = repr(error)[:200]
        return answers

    def a_step_that_reads(self) -> str:
        """It must be refused, and the GPU must work afterwards."""
        model = self.model("gpt2", torch.float32)
        prompts = self.prompts(8, 16, 300)
        model.config.scale_attn_by_inverse_layer_idx = True  # not the lean path
        norm = model.transformer.ln_f
        norm.register_forward_hook(lambda module, inputs, output: output if output.isfinite().all() else None)
        self.record(model)
        ours = self.drawn(model, prompts, 16)
        assert self.device.type == "cpu" or not model.recorder.works, "it was recorded"
        model.recorder = None
        assert torch.equal(ours, self.drawn(model, prompts, 16))
        return "refused: " + (self.lines or [""])[-1]

    # ---------------------------------------------------------------------------------------------- how fast?

    def timings(self, shape: str, precision: str, rows: int) -> dict:
        """Milliseconds a token, its prompt's part not counted, of `generate`, of sampling as before, and recorded."""
        P, n_new = (16, 8) if self.tiny else (256, 128)
        model = self.model(shape, DTYPES[precision])
        prompts = self.prompts(rows, P, model.config.vocab_size)
        result = {"shape": shape, "precision": precision, "rows": rows}
        result["generate"] = self.milliseconds(self.generating(model, prompts), n_new)
        result["before"] = self.milliseconds(lambda n: self.drawn(model, prompts, n), n_new)
        before = self.peak()
        self.record(model)
        result["recording seconds"] = self.seconds(lambda: self.drawn(model, prompts, n_new))
        result["recorded"] = self.milliseconds(lambda n: self.drawn(model, prompts, n), n_new, n_new)
        result["works"] = model.recorder.works
        result["peak GiB before"] = before
        result["peak GiB recorded"] = self.peak()
        if model.recorder.works:
            result["replay"] = self.replay_milliseconds(model, prompts, n_new)
            result["mbu"] = self.share_of_bandwidth(model, rows, P + n_new / 2, result["replay"])
        self.rows.append(result)
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}

    def generating(self, model: Model, prompts: tuple[Tensor, Tensor]) -> Callable[[int], None]:
        """The library's loop, on weights of this precision: quicker for it than casting them."""
        model = copy.deepcopy(model).to(model.compute_dtype)
        options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "input_ids": prompts[0]}

        def run(n_new: int) -> None:
            with torch.inference_mode():
                output = model.generate(attention_mask=prompts[1].long(), max_new_tokens=n_new, **options)
            assert output.shape[1] == prompts[0].shape[1] + n_new

        return run

    def milliseconds(self, run: Callable[[int], object], n_new: int, fewest: int = 4) -> float:
        """Of one token: what n_new of them take beyond what one takes, after a call that warms up."""
        run(fewest)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        one = min(self.seconds(lambda: run(1)) for _ in range(2))
        return 1000 * (self.seconds(lambda: run(n_new)) - one) / (n_new - 1)

    def replay_milliseconds(self, model: Model, prompts: tuple[Tensor, Tensor], n_new: int) -> float:
        """Of the step alone, without noise and draw."""
        with torch.no_grad():
            cache = sampling_cache(model, prompts[1], n_new)
            cache.next_logits(prompts[0])
            token = prompts[0][:, :1]
            seconds = self.seconds(lambda: [cache.next_logits(token) for _ in range(n_new - 1)])
        return 1000 * seconds / (n_new - 1)

    def share_of_bandwidth(self, model: Model, rows: int, columns: float, milliseconds: float) -> float:
        """Bytes that a step has to read, weights and real keys and values, by what the memory gives in its time."""
        peak = self.bandwidth()
        if peak is None:
            return 0.0
        size = torch.finfo(model.compute_dtype).bits // 8
        weights = size * sum(parameter.numel() for parameter in model.parameters())
        heads_and_sizes = model.recorder.memory.numel() / (rows * next(iter(model.recorder.decoders))[1])
        return (weights + size * rows * columns * heads_and_sizes) / (peak * milliseconds / 1000)

    def bandwidth(self) -> float | None:
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name()
        return next((peak for part, peak in PEAKS.items() if part in name), None)

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0

    # ---------------------------------------------------------------------------------------------- the report

    def report(self) -> None:
        header = ["shape", "precision", "rows", "generate", "before", "recorded", "replay alone"]
        header += ["generate / recorded", "before / recorded", "tokens/s", "MBU", "recording s", "GiB before", "GiB"]
        cells = []
        for row in self.rows:
            milliseconds = [f"{row.get(name, 0):.2f}" for name in ("generate", "before", "recorded", "replay")]
            ratios = [f"{row[name] / row['recorded']:.1f}" for name in ("generate", "before")]
            speed = [f"{1000 * row['rows'] / row['recorded']:.0f}", f"{row.get('mbu', 0):.0%}"]
            others = ("recording seconds", "peak GiB before", "peak GiB recorded")
            rest = [f"{row[name]:.1f}" for name in others]
            cells.append([row["shape"], row["precision"], str(row["rows"]), *milliseconds, *ratios, *speed, *rest])
        print("\nMilliseconds a token of sampling, 256 tokens of prompt and 128 new ones\n")
        print(markdown_table(header, cells), flush=True)
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        versions = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
        found = {"rows": self.rows, "results": self.results, "errors": self.errors, "lines": self.lines}
        print(json.dumps(versions | {"tiny": self.tiny} | found), flush=True)


def run_only(step: Step, pool: object) -> Step:
    """A recording without a GPU."""
    return step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try this script out")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=210, help="no part begins after so many")
    options = parser.parse_args(arguments)
    check = Check(torch.device(options.device), options.tiny, options.seconds)
    for shape in SHAPES:
        check.part(f"same tokens, {shape}", partial(check.same_tokens, shape))
    for shape in SHAPES:
        check.part(f"changed weights, {shape}", partial(check.weights_that_change, shape))
    for rows in (64, 256):
        for precision in DTYPES:
            for shape in SHAPES:
                timings = partial(check.timings, shape, precision, 4 if options.tiny else rows)
                check.part(f"timings, {shape}, {precision}, {rows} rows", timings)
    check.part("families", check.families)
    check.part("a step that reads", check.a_step_that_reads)
    check.report()


if __name__ == "__main__":
    main()
