"""Exports: what each engine is given, its reward file called as the engine calls it, and one line for bad input."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import model_folder
from datasets import load_dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification

from crlhf.__main__ import main
from crlhf.bridge.engines import ENGINES
from crlhf.bridge.export import added_bos, filled
from crlhf.config import ExportConfig
from crlhf.engine.models import save, tiny_model
from crlhf.engine.text import encode_prompt
from crlhf.engine.tokenizers import bpe_tokenizer
from crlhf.pipeline.options import from_dict
from crlhf.pipeline.pipeline import Pipeline
from tutorials import advantages

TINY = (
    "--demonstrations 200 --pairs 60 --train-prompts 12 --eval-prompts 8 --sft-epochs 1 --reward-epochs 1 "
    "--model-width 16 --model-heads 2 --model-layers 1 --ppo-iterations 2 --ppo-batch-size 8 --methods contrastive "
    "--device cpu --threads 1"
).split()
FUNCTION = "def score(prompts, responses):\n    return [len(x) / 10 - len(y) for x, y in zip(prompts, responses)]\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three finished runs: a trained reward model under a rater bias, a function, a classifier with three labels."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "judge.py").write_text(FUNCTION)
    classifier = model_folder(folder / "classifier", labels=3)
    given = ["--ppo-critic", "zero_head", "--prompt-bias", "0"]
    rewards = {
        "trained": [],
        "function": ["--reward", f"{folder / 'judge.py'}:score", *given],
        "labels": ["--reward", str(classifier), "--reward-label", "LABEL_1", *given],
    }
    for name, options in rewards.items():
        assert main(["baselines", *TINY, *options, "--out", str(folder / name)]) == 0
    return folder


@pytest.fixture
def export(runs, tmp_path):
    """Export a run for an engine; returns the folder."""

    def run(engine, name="trained"):
        out = tmp_path / f"{name}-{engine}"
        assert main(["export", str(runs / name), "--to", engine, "--out", str(out)]) == 0
        return out

    return run


def load(folder):
    """reward.py, loaded by its path alone, as the engines do."""
    spec = importlib.util.spec_from_file_location("reward", folder / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(run):
    return [json.loads(line) for line in (run / "baselines" / "baselines.jsonl").read_text().splitlines()]


def expected(run, prompts, responses):
    """Rewards by the pipeline itself, without the world's faults."""
    config = from_dict(json.loads((run / "config.json").read_text()))
    config.run.out = str(run)
    return Pipeline(config).reward_callable(config.reward.source)(prompts, responses)


# ------------------------------------------------------------------------------------- called as the engines do


@pytest.mark.parametrize("name", ["trained", "function", "labels"])
def test_openrlhf_gets_reward_minus_baseline_for_one_query_a_call(runs, export, name):
    module, prompts = load(folder := export("openrlhf", name)), []
    for line, row in zip((folder / "prompts.jsonl").read_text().splitlines(), rows_of(runs / name)):
        exported, response = json.loads(line), row["responses"][0]
        query = f"{exported['prompt']} {response} <eos>"
        answer = module.reward_func([query], [exported["prompt"]], [exported["baseline"]])
        raw = expected(runs / name, [row["prompt"]], [module.response_of(query, row["prompt"])])
        assert answer["rewards"].shape == answer["scores"].shape == (1,)
        torch.testing.assert_close(answer["scores"], raw, atol=1e-5, rtol=0)
        torch.testing.assert_close(answer["rewards"], raw - exported["baseline"], atol=1e-5, rtol=0)
        assert answer["extra_logs"]["baseline"].item() == pytest.approx(exported["baseline"])
        prompts.append(exported["prompt"])
    assert prompts == [row["prompt"] for row in rows_of(runs / name)]


@pytest.mark.parametrize("name", ["trained", "function", "labels"])
def test_verl_gets_prompt_and_baseline_through_extra_info(runs, export, name, tmp_path):
    module = load(folder := export("verl", name))
    rows = load_dataset(
        "parquet", data_files=str(folder / "prompts.parquet"), split="train", cache_dir=str(tmp_path / "c")
    )
    for exported, row in zip(rows, rows_of(runs / name), strict=True):
        assert exported["prompt"] == [{"role": "user", "content": row["prompt"]}]
        raw = expected(runs / name, [row["prompt"]] * 4, row["responses"])
        assert exported["extra_info"]["baseline"] == pytest.approx(raw.mean().item(), abs=1e-5)
        answer = module.compute_score(
            data_source=exported["data_source"],
            solution_str=row["responses"][1],
            ground_truth=exported["reward_model"]["ground_truth"],
            extra_info=exported["extra_info"] | {"num_turns": None, "rollout_reward_scores": {}},
            reward_router_address=None,
        )
        assert set(answer) == {"score", "raw", "baseline"} and answer["raw"] == pytest.approx(raw[1].item(), abs=1e-5)
        assert answer["score"] == pytest.approx(answer["raw"] - answer["baseline"])


@pytest.mark.parametrize("name", ["trained", "function", "labels"])
def test_trl_gets_a_list_a_column(runs, export, name):
    module, rows = load(folder := export("trl", name)), rows_of(runs / name)
    exported = [json.loads(line) for line in (folder / "prompts" / "train.jsonl").read_text().splitlines()]
    prompts, baselines = [row["prompt"] for row in exported for _ in (0, 1)], [row["baseline"] for row in exported]
    responses, logged = [response for row in rows for response in row["responses"][:2]], {}
    answer = module.reward(
        prompts=prompts,
        completions=responses,
        completion_ids=[[1]] * len(prompts),
        baseline=[b for b in baselines for _ in (0, 1)],
        trainer_state=None,
        log_metric=lambda name, value: logged.update({name: value}),
    )
    raw = expected(runs / name, prompts, responses).tolist()
    assert logged["raw_reward"] == pytest.approx(sum(raw) / len(raw), abs=1e-5) and "baseline" in logged
    assert answer == pytest.approx([r - b for r, b in zip(raw, [b for b in baselines for _ in (0, 1)])], abs=1e-5)


def test_the_worlds_faults_are_in_neither_reward_nor_baseline(runs, export):
    """The run's rewards hold a constant a prompt of standard deviation 1; the exported baselines don't."""
    folder, rows = export("openrlhf"), rows_of(runs / "trained")
    exported = [json.loads(line)["baseline"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    stored = torch.tensor([row["rewards"] for row in rows]).mean(1)
    clean = torch.stack([expected(runs / "trained", [row["prompt"]] * 4, row["responses"]).mean() for row in rows])
    torch.testing.assert_close(torch.tensor(exported), clean, atol=1e-5, rtol=0)
    assert (stored - clean).std() > 0.3 and "--prompt-bias" in (folder / "README.md").read_text()


def test_an_export_needs_nothing_of_this_project(export, tmp_path):
    code = "import importlib.util, sys\n"
    code += "spec = importlib.util.spec_from_file_location('reward', sys.argv[1])\n"
    code += "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
    code += "print(module.compute_score('crlhf', 'good .', '', {'prompt': 'i liked the plot .', 'baseline': 0.5}))\n"
    code += "assert not [name for name in sys.modules if name.startswith('crlhf')]"
    folder = shutil.move(export("verl"), tmp_path / "elsewhere")  # and it may be moved
    command = [sys.executable, "-I", "-c", code, str(folder / "reward.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "'baseline': 0.5" in done.stdout, done.stderr


def test_a_long_response_is_cut_where_the_run_cuts_it(runs, export):
    score, prompt = load(export("trl")).scoring.score, rows_of(runs / "trained")[0]["prompt"]
    text = "the plot was good . " * 8
    assert score([prompt], [text]) == pytest.approx(expected(runs / "trained", [prompt], [text]).tolist(), abs=1e-5)
    assert score([prompt], [text]) == pytest.approx(score([prompt], [" ".join(text.split()[:24])]), abs=1e-6)


# ------------------------------------------------------------------------------------------ bad input to a reward


def test_openrlhf_bad_input_names_the_prompt(export):
    reward = load(export("openrlhf", "function")).reward_func
    prompt = "i liked the plot ."
    for labels in ([""], [None], [math.nan], ["x"], [[1.0, 2.0]], [math.inf]):
        with pytest.raises(ValueError, match=re.escape(f"prompt {prompt!r}: its label is {labels[0]!r}")):
            reward([prompt + " good"], [prompt], labels)
    with pytest.raises(ValueError, match="prompt 'i liked the plot .': the query doesn't begin with it"):
        reward(["the plot . good"], [prompt], [0.5])
    with pytest.raises(ValueError, match=r"prompt \['i liked the plot .'\]: got 2 queries, 1 prompts and 1 labels"):
        reward([prompt, prompt], [prompt], [0.5])


def test_verl_bad_input_names_the_prompt(export):
    score = load(export("verl", "function")).compute_score
    for extra in (None, {}, {"baseline": 0.5}, {"prompt": None, "baseline": 0.5}):
        with pytest.raises(ValueError, match="response 'good': extra_info holds no prompt"):
            score("crlhf", "good", "", extra)
    for baseline in (None, math.nan, "x"):
        with pytest.raises(ValueError, match=f"prompt 'a film': its baseline is {baseline!r}"):
            score("crlhf", "good", "", {"prompt": "a film", "baseline": baseline})


def test_trl_bad_input_names_the_prompt(export):
    reward = load(export("trl", "function")).reward
    for baseline in (None, math.nan, "x"):
        with pytest.raises(ValueError, match=f"prompt 'b film': its baseline is {baseline!r}"):
            reward(["a film", "b film"], ["good", "bad"], [0.5, baseline])
    with pytest.raises(ValueError, match=r"prompt \['a film'\]: got 2 prompts, 2 completions and 1 baselines"):
        reward(["a film", "b film"], ["good", "bad"], [0.5])
    message = [{"role": "user", "content": "a film"}]
    with pytest.raises(ValueError, match="a film.*plain texts are needed"):
        reward([message], [message], [0.5])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_score_that_is_no_number_names_the_prompt(export, engine):
    module = load(export(engine, "function"))
    module.scoring.score = lambda prompts, responses: [math.nan] * len(prompts)
    calls = {
        "openrlhf": lambda: module.reward_func(["a film good"], ["a film"], [0.5]),
        "verl": lambda: module.compute_score("crlhf", "good", "", {"prompt": "a film", "baseline": 0.5}),
        "trl": lambda: module.reward(["a film"], ["good"], [0.5]),
    }
    with pytest.raises(ValueError, match="prompt 'a film': its score is nan"):
        calls[engine]()


# ------------------------------------------------------------------------------------------------ the command line


def test_an_export_is_whole_and_says_what_it_is(runs, export, capsys):
    for name, engine in ENGINES.items():
        out = export(name)
        assert (out / engine.prompts).exists() and not list(out.rglob("*.tmp")) and not list(out.rglob("*.bin"))
        assert (out / "policy" / "model.safetensors").exists() and (out / "reward_model" / "config.json").exists()
        subprocess.run(["bash", "-n", out / "launch.sh"], check=True)
        words = (out / "README.md").read_text()
        assert f"{engine.title} {engine.version}" in words and "rho is" in words and "run on no cluster" in words
        assert json.loads((out / "stage.json").read_text())["settings"]["engine"] == name
        assert str(runs) not in "".join(path.read_text() for path in out.glob("*") if path.suffix in (".py", ".sh"))
        assert main(["export", str(runs / "trained"), "--to", name, "--out", str(out)]) == 0
        assert "nothing has changed" in capsys.readouterr().out


def test_launch_commands_carry_the_numbers_of_the_run(export):
    commands = {name: (export(name) / "launch.sh").read_text() for name in ENGINES}
    assert "estimator gae" in commands["openrlhf"] and "init_coef 0.05" in commands["openrlhf"]
    assert "--reward.clip_range -1000000 1000000" in commands["openrlhf"] and "eps_clip 0.2" in commands["openrlhf"]
    assert "adv_estimator=gae" in commands["verl"] and "kl_coef=0.05" in commands["verl"]
    assert "max_response_length=24" in commands["verl"] and "--beta 0.05" in commands["trl"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("{run} --to verl", "the following arguments are required: --out"),
        ("{run}", "the following arguments are required: --to, --out"),
        ("--to verl --out {out}", "the following arguments are required: RUN"),
        ("{run} --to nemo --out {out}", "--to is 'nemo': choose one of openrlhf, verl, trl"),
        ("{run} --to verl --out {out} --gpus 0", "--gpus is 0: use a value from 1 to 10000"),
        ("{tmp}/nothing --to verl --out {out}", "nothing is no folder of a run"),
        ("{run}/sft --to verl --out {out}", "sft is no folder of a run"),
        ("{run} --to verl --out {run}", "is not empty: choose a new folder"),
        ("{run} --to verl --out {run}/dpo", "is inside the run: choose a folder outside"),
        ("{run} --to verl --out {run}/../judge.py", "judge.py is a file: choose a new folder"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, arguments, message):
    words = arguments.format(run=runs / "function", out=tmp_path / "out", tmp=tmp_path).split()
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_runs_that_lack_something_are_refused(runs, tmp_path, capsys):
    out, run = str(tmp_path / "out"), tmp_path / "run"
    options = ["--reward", "gold", "--ppo-critic", "zero_head", "--out", str(run)]
    assert main(["sft", *TINY, "--out", str(run)]) == 0
    assert main(["export", str(run), "--to", "trl", "--out", out]) == 2
    assert "has no finished stage 'preferences': run python -m crlhf baselines" in capsys.readouterr().err
    assert main(["baselines", *TINY, *options]) == 0
    assert main(["export", str(run), "--to", "trl", "--out", out]) == 2
    assert "--reward gold is the embedded world's own" in capsys.readouterr().err
    judge = tmp_path / "judge.py"
    judge.write_text(FUNCTION)
    options = ["--reward", f"{judge}:score", "--ppo-critic", "zero_head", "--out", str(tmp_path / "other")]
    assert main(["baselines", *TINY, *options]) == 0
    judge.write_text(FUNCTION + "# edited\n")
    assert main(["export", str(tmp_path / "other"), "--to", "trl", "--out", out]) == 2
    assert "not what the baselines were scored with" in capsys.readouterr().err
    assert main(["baselines", *TINY, "--redo", "--out", str(run)]) == 0
    rows = tmp_path / "run" / "baselines" / "baselines.jsonl"
    rows.write_text(rows.read_text()[:-9])
    assert main(["export", str(run), "--to", "trl", "--out", out]) == 2
    assert "baselines.jsonl has changed: delete the folder" in capsys.readouterr().err
    (run / "config.json").write_text('{"run": {"seed": "x"}, "data": {}, "ppo": {}}')
    assert main(["export", str(run), "--to", "trl", "--out", out]) == 2
    assert "config.json can't be understood" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_an_export_was_made_from_is_recorded_and_checked(runs, tmp_path, capsys):
    """A later command that stops before the baselines may have changed what they stand on, or what is said of them."""
    run = tmp_path / "moved"
    shutil.copytree(runs / "trained", run)  # a run may have moved
    assert main(["export", str(run), "--to", "trl", "--out", str(tmp_path / "out")]) == 0
    made_from = json.loads((tmp_path / "out" / "stage.json").read_text())["settings"]["run"]
    assert made_from["data"]["model.name"] == "tiny" and made_from["reward"]["reward.source"] == "train"
    assert made_from["baselines"]["baselines.k"] == 4 and made_from["baselines"]["baselines.temperature"] == 1.0
    config = json.loads((run / "config.json").read_text())
    config["baselines"]["temperature"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    assert main(["export", str(run), "--to", "trl", "--out", str(tmp_path / "other")]) == 2
    assert "the stage 'baselines' of" in (error := capsys.readouterr().err) and "doesn't belong" in error
    assert main(["sft", *TINY, "--sft-lr", "1e-3", "--redo", "--out", str(run)]) == 0
    assert main(["export", str(run), "--to", "trl", "--out", str(tmp_path / "other")]) == 2
    assert "the stage 'preferences' of" in capsys.readouterr().err


# ------------------------------------------------------------------- baselines for a model and a reward from outside


@pytest.mark.parametrize("conversational", [False, True])
def test_baselines_of_prompts_alone_need_neither_sft_nor_ppo(tmp_path, capsys, conversational):
    prompts = [f"i liked the {a} . i hated the {b} ." for a in ("plot", "cast") for b in ("script", "music", "camera")]
    rows = [{"prompt": [{"role": "user", "content": prompt}] if conversational else prompt} for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(FUNCTION)
    model, out = model_folder(tmp_path / "model"), tmp_path / "run"
    command = ["baselines", "--baselines-prompts", "all", "--model", str(model), "--out", str(out), "--device", "cpu"]
    command += ["--dataset", str(tmp_path / "prompts.jsonl"), "--reward", f"{tmp_path / 'judge.py'}:score"]
    command += ["--max-prompt-tokens", "32", "--max-response-tokens", "8", "--k", "3", "--temperature", "0.7"]
    command[command.index("--temperature")] = "--baselines-temperature"
    assert main(command) == 0
    found = rows_of(out)
    said = {f"\n\nHuman: {prompt}\n\nAssistant:" for prompt in prompts} if conversational else set(prompts)
    assert {row["prompt"] for row in found} == said and all(len(row["rewards"]) == 3 for row in found)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (model, out / "sft")]
    assert weights[0] == weights[1]  # the model as it came
    settings = json.loads((out / "baselines" / "stage.json").read_text())["settings"]
    made_with = [settings[f"baselines.{knob}"] for knob in ("k", "temperature", "prompts")]
    assert made_with == [3, 0.7, "all"]
    assert main(command) == 0 and "baselines: done before, reused" in capsys.readouterr().out
    assert main([*command, "--baselines-temperature", "0.8"]) == 2
    assert "baselines.temperature was 0.7, is 0.8" in capsys.readouterr().err
    (tmp_path / "judge.py").write_text(FUNCTION + "# edited\n")
    assert main(command) == 2 and "judge.py has changed" in capsys.readouterr().err
    assert main([*command, "--sft-epochs", "1", "--out", str(tmp_path / "other")]) == 2
    assert "holds prompts alone, nothing to imitate: give --sft-epochs 0" in capsys.readouterr().err


def test_nobody_elses_folder_is_touched(runs, tmp_path, capsys):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "notes.txt").write_text("mine")
    assert main(["export", str(runs / "function"), "--to", "verl", "--out", str(tmp_path / "out")]) == 2
    assert "out.part, where the export is put together, is not ours" in capsys.readouterr().err
    assert (tmp_path / "out.part" / "notes.txt").read_text() == "mine" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "code, message",
    [
        (
            "import helper\n" + FUNCTION,
            "the exported scoring.py fails with ModuleNotFoundError: No module named 'helper'",
        ),
        ("import os\n" + FUNCTION.replace("len(x) / 10", "os.urandom(1)[0]"), "every time"),
    ],
)
def test_rewards_that_do_not_travel_are_refused(tmp_path, capsys, monkeypatch, code, message):
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "judge.py").write_text(code)
    options = ["--reward", f"{tmp_path / 'judge.py'}:score", "--ppo-critic", "zero_head", "--prompt-bias", "0"]
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert main(["baselines", *TINY, *options, "--out", str(tmp_path / "run")]) == 0
        sys.modules.pop("helper", None)
    if "helper" in code:  # a check of the run's own file passes where the helper is found, and the copy is tried alone
        monkeypatch.setattr("crlhf.bridge.export.load_function_reward", lambda spec: None)
    assert main(["export", str(tmp_path / "run"), "--to", "verl", "--out", str(tmp_path / "out")]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bos", [False, True])
def test_byte_level_tokenizers_and_bos(tmp_path, bos):
    """Engines add no special tokens to a prompt, so that a BOS which the tokenizer adds must stand in the text."""
    texts = [f"\n\nHuman: caf\u00e9  {i}\tand  more?\n\nAssistant:" for i in range(12)]
    tokenizer = bpe_tokenizer(texts * 3, 320)
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        pieces = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=pieces)
    ids = tokenizer.eos_token_id, tokenizer.pad_token_id
    save(tmp_path / "model", tiny_model(len(tokenizer), *ids, 128, 1, 8, 1, 0), tokenizer)
    config = tiny_model(len(tokenizer), *ids, 128, 1, 8, 1, 0).config
    config.num_labels = 1
    save(tmp_path / "judge", AutoModelForSequenceClassification.from_config(config), tokenizer)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    command = ["baselines", "--baselines-prompts", "all", "--model", str(tmp_path / "model"), "--device", "cpu"]
    command += ["--dataset", str(tmp_path / "prompts.jsonl"), "--reward", str(tmp_path / "judge"), "--k", "2"]
    limits = ["--max-prompt-tokens", "64", "--max-response-tokens", "8", "--out", str(tmp_path / "run")]
    assert main([*command, *limits]) == 0
    for engine in ("openrlhf", "verl"):
        assert main(["export", str(tmp_path / "run"), "--to", engine, "--out", str(tmp_path / engine)]) == 0
    module, seen = load(tmp_path / "openrlhf"), 0
    for line, row in zip((tmp_path / "openrlhf" / "prompts.jsonl").read_text().splitlines(), rows_of(tmp_path / "run")):
        prompt = json.loads(line)["prompt"]
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert prompt == "<s>" * bos + row["prompt"] and ids == encode_prompt(tokenizer, row["prompt"])
        for response, reward in zip(row["responses"], row["rewards"]):
            written = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            if tokenizer.decode(written[:-1]) != response:
                continue  # random bytes that are no text
            query, seen = tokenizer.decode(ids + written), seen + 1
            answer = module.reward_func([query], [prompt], [0.0])
            assert answer["scores"].item() == pytest.approx(reward, abs=1e-5)
    assert seen > 3


def test_all_prompts_of_the_world_are_more_than_ppo_may_need(tmp_path, capsys):
    out = str(tmp_path / "run")
    command = ["--baselines-prompts", "all", *TINY, "--ppo-batch-size", "64", "--out", out]
    assert main(["baselines", *command]) == 0
    assert len(rows_of(tmp_path / "run")) == 12 + 8
    assert main(["contrastive", *command]) == 2  # PPO says what it needs, when it is asked for
    assert "12 training prompts, fewer than --ppo-batch-size 64" in capsys.readouterr().err


def test_a_stopped_export_goes_on(runs, tmp_path, monkeypatch, capsys):
    out, arguments = tmp_path / "out", ["export", str(runs / "function"), "--to", "verl", "--out"]

    def broken(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("crlhf.bridge.export.readme", broken)
        assert main([*arguments, str(out)]) == 130
    assert not out.exists() and (tmp_path / "out.part" / "launch.sh").exists()
    assert main([*arguments, str(out)]) == 0 and (out / "README.md").exists()
    assert not (tmp_path / "out.part").exists()


def test_templates_are_filled_line_by_line():
    text = filled("openrlhf_reward", {"COEFFICIENT": 0.25, "SPECIAL_TOKENS": ['"', "#"], "BOS": "<s>"})
    assert "COEFFICIENT = 0.25  # c: the share" in text and 'SPECIAL_TOKENS = ["\\"", "#"]  # of' in text
    assert 'BOS = "<s>"  # what' in text
    with pytest.raises(AssertionError, match="0 lines MISSING"):
        filled("openrlhf_reward", {"MISSING": 1})
    assert set(ExportConfig.__dataclass_fields__["to"].metadata["choices"]) == set(ENGINES)


def test_bos_is_written_where_the_tokenizer_adds_it(tokenizer):
    class WithBos:
        bos_token, bos_token_id = "<s>", 7

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [7] * (text.startswith("<s>") or add_special_tokens) + [1, 2]}

    assert added_bos(WithBos(), "a b") == "<s>" and added_bos(tokenizer, "i liked the plot .") == ""


# ----------------------------------------------------------------------------------------- where a baseline cancels


def batch(n=64, m=4):
    draw = torch.Generator().manual_seed(0)
    level = torch.randn(n, dtype=torch.float64, generator=draw)
    rewards = level[:, None] + 0.7 * torch.randn(n, m, dtype=torch.float64, generator=draw)
    baseline = level + 0.3 * torch.randn(n, dtype=torch.float64, generator=draw)
    greedy, values = level + 0.5, 0.1 * torch.randn(n, m, 5, dtype=torch.float64, generator=draw)
    return rewards, baseline, greedy, values


def test_a_baseline_cancels_in_group_methods_and_counts_elsewhere():
    table = advantages.relative_changes(*batch())
    cancels = {"RLOO", "mean of the group, Dr. GRPO", "GRPO", "ReMax"}
    for name, change in table.items():
        assert (change < 1e-12) == (name in cancels), (name, change)
    assert min(change for name, change in table.items() if name not in cancels) > 0.1


def test_the_estimators_are_what_loops_over_rows_give():
    rewards, _, greedy, values = batch(3, 4)
    N, m = rewards.shape
    for i in range(N):
        for j in range(m):
            others = [rewards[i, n] for n in range(m) if n != j]
            assert advantages.rloo(rewards)[i, j] == pytest.approx((rewards[i, j] - sum(others) / (m - 1)).item())
            mean = sum(rewards[i]) / m
            sd = (sum((r - mean) ** 2 for r in rewards[i]) / (m - 1)) ** 0.5
            assert advantages.grpo(rewards)[i, j] == pytest.approx(((rewards[i, j] - mean) / (sd + 1e-4)).item())
            assert advantages.remax(rewards, greedy)[i, j] == pytest.approx((rewards[i, j] - greedy[i]).item())
    everyone = [r for row in rewards for r in row]
    mean = sum(everyone) / len(everyone)
    sd = (sum((r - mean) ** 2 for r in everyone) / (len(everyone) - 1)) ** 0.5
    assert advantages.reinforce(rewards)[1, 2] == pytest.approx(((rewards[1, 2] - mean) / sd).item(), rel=1e-6)
    A = torch.zeros(N, m, 5, dtype=torch.float64)
    for i in range(N):
        for j in range(m):
            for t in range(5):  # GAE as a double sum: discounted one-step errors
                for u in range(t, 5):
                    after = values[i, j, u + 1] if u < 4 else 0.0
                    error = (rewards[i, j] if u == 4 else 0.0) + after - values[i, j, u]
                    A[i, j, t] += 0.95 ** (u - t) * error
    torch.testing.assert_close(advantages.ppo_gae(rewards, values), (A - A.mean()) / A.std(), rtol=1e-6, atol=1e-8)
