"""What RLHF eats: prompts, demonstrations and preferences, from a hub dataset or a file.

Every format becomes rows of plain texts in the columns the ecosystem uses: {prompt, completion} for
demonstrations and {prompt, chosen, rejected} for preferences. Formats are told apart by their columns:

    chosen, rejected                  dialogues as one text (Anthropic/hh-rlhf) or as messages
    prompt, chosen, rejected          texts or messages (trl-lib, UltraFeedback)
    info, summaries, choice           openai/summarize_from_feedback, comparisons
    prompt, response_0, response_1    PKU-Alignment/PKU-SafeRLHF; --preferred picks the judging column
    prompt, completion | messages     demonstrations only
    text                              plain text (imdb): first words are the prompt, the rest the completion

Rows that can't be used are dropped for a stated reason and counted; nothing is dropped in silence.

A hub dataset with several subsets takes one after a colon: openai/summarize_from_feedback:comparisons.
"""

import collections
from dataclasses import dataclass, field

from ..config import DataConfig, UserError
from ..engine.files import Progress, shuffled
from ..engine.text import Tokenizer, encode_prompt, encode_response

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MOST_CHARACTERS = 1_000_000
PAIR = ("prompt", "completion", "rejected_prompt", "rejected")


class Unusable(Exception):
    """Why a row is dropped. The text follows a count, as in '3 with an empty prompt'."""


@dataclass
class Corpus:
    """Texts ready for training. Prompts are unique, and held-out prompts occur in no training row."""

    train_prompts: list[str]
    eval_prompts: list[str]
    demonstrations: list[dict]  # rows {prompt, completion}
    preferences: list[dict] = field(default_factory=list)  # rows {prompt, chosen, rejected}
    eval_preferences: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was dropped or cut, and how often


# ------------------------------------------------------------------------------------------ telling formats


def render(messages: list[dict], tokenizer: Tokenizer) -> str:
    """Messages that end before the assistant's turn, as prompt text: chat template, or HH-RLHF's plain form."""
    if tokenizer.chat_template:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template is a program of its own, and may fail in any way
            raise Unusable("that the tokenizer's chat template refuses") from None
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "".join(f"\n\n{names.get(m['role'], m['role'])}: {m['content']}" for m in messages) + ASSISTANT


def split_dialogue(dialogue: str | list[dict], tokenizer: Tokenizer) -> tuple[str, str]:
    """A whole dialogue -> (prompt text, last assistant turn). Text is split at its last '\\n\\nAssistant:'."""
    not_answered = Unusable("whose dialogue does not end with the assistant's turn")
    if isinstance(dialogue, str):
        before, mark, response = dialogue.rpartition(ASSISTANT)
        if HUMAN in response:
            raise not_answered
        return before + mark, response
    if not all(isinstance(message["content"], str) for message in dialogue):
        raise Unusable("with a message that is no text")  # tool calls, images
    *before, answer = dialogue or [{"role": "assistant", "content": ""}]
    if answer["role"] != "assistant":
        raise not_answered
    if not any(message["content"].strip() for message in before):
        return "", answer["content"]
    return render(before, tokenizer), answer["content"] if tokenizer.chat_template else " " + answer["content"]


def prompt_and_response(prompt: str | list, response: str | list, tokenizer: Tokenizer) -> tuple[str, str]:
    """A prompt and a response, each a text or messages, as two texts."""
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt, response
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if len(response) == 1 else []
    repeats = response[: len(prompt)] == prompt  # some datasets repeat the prompt at the head of the response
    return split_dialogue(response if repeats else [*prompt, *response], tokenizer)


def parse_pair(row: dict, columns: set[str], preferred: str, tokenizer: Tokenizer) -> tuple[str, str, str, str]:
    """A preference row in any known format -> (prompt, chosen, prompt of rejected, rejected)."""
    if {"chosen", "rejected"} <= columns:
        sides = [row["chosen"] or "", row["rejected"] or ""]
        if "prompt" in columns:
            sides = [prompt_and_response(row["prompt"] or "", side, tokenizer) for side in sides]
        else:
            sides = [split_dialogue(side, tokenizer) for side in sides]
        return (*sides[0], *sides[1])
    if {"info", "summaries", "choice"} <= columns:
        prompt, better = reddit_prompt(row["info"]), better_index(row["choice"], "choice")
        texts = [" " + (summary["text"] or "").strip() for summary in row["summaries"]]
    else:
        prompt, better = row["prompt"] or "", better_index(row[preferred], preferred)
        texts = [row["response_0"] or "", row["response_1"] or ""]
    return prompt, texts[better], prompt, texts[1 - better]


def reddit_prompt(info: dict) -> str:
    """The post of a summarize_from_feedback row as a prompt. News articles have neither subreddit nor title."""
    post = info.get("post") or info.get("article")
    if not post:
        return ""
    parts = (("SUBREDDIT: r/", info.get("subreddit")), ("TITLE: ", info.get("title")), ("POST: ", post))
    return "\n".join([label + text for label, text in parts if text] + ["TL;DR:"])


def better_index(value: object, column: str) -> int:
    """0 or 1 from a label that may be a number, a bool or text. Ties and missing labels are -1, None or ''."""
    try:
        if float(value) in (0, 1):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise Unusable(f"whose {column} is neither 0 nor 1")


def parse_demonstration(row: dict, columns: set[str], prompt_words: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """A row without preferences -> (prompt, completion)."""
    if "completion" in columns:
        if row.get("label") is False:  # trl-lib/kto-mix: a thumbs-down
            raise Unusable("whose label is false")
        return prompt_and_response(row["prompt"] or "", row["completion"] or "", tokenizer)
    if "messages" in columns:
        return split_dialogue(row["messages"] or [], tokenizer)
    words = (row["text"] or "").split(" ")
    return " ".join(words[:prompt_words]), "".join(" " + word for word in words[prompt_words:])


def are_preferences(columns: set[str]) -> bool:
    formats = ({"chosen", "rejected"}, {"info", "summaries", "choice"}, {"prompt", "response_0", "response_1"})
    return any(wanted <= columns for wanted in formats)


def are_prompts_alone(columns: set[str]) -> bool:
    """Rows with a prompt and nothing that answers it: enough for baselines, not for SFT."""
    return "prompt" in columns and not are_preferences(columns) and not {"completion", "chosen", "rejected"} & columns


def check_columns(columns: set[str], preferred: str, name: str) -> None:
    """Raise a UserError that names what is missing, if the columns are of no known format."""
    if {"chosen", "rejected"} <= columns or {"info", "summaries", "choice"} <= columns:
        return
    if {"prompt", "response_0", "response_1"} <= columns and preferred not in columns:
        what = f"{name} has no column '{preferred}' that says which response is better"
        raise UserError(f"{what}: give one of its columns to --preferred ({', '.join(sorted(columns))})")
    if are_preferences(columns) or {"prompt", "completion"} <= columns or {"messages", "text"} & columns:
        return
    other = {"chosen": "rejected", "rejected": "chosen", "prompt": "completion' or 'chosen' and 'rejected"}
    other["completion"] = "prompt"
    missing = next((other[column] for column in other if column in columns), "chosen' and 'rejected")
    raise UserError(f"{name} is missing the column '{missing}': it has {', '.join(sorted(columns))}")


# ---------------------------------------------------------------------------------------- rows to a corpus


def build_corpus(
    rows: list[dict], name: str, tokenizer: Tokenizer, config: DataConfig, seed: int, held_out_rows: list[dict] = ()
) -> Corpus:
    """Parse, filter, split. Raises UserError when nothing usable is left.

    held_out_rows: those of config.eval_dataset; without them a share of the prompts is held out.
    """
    examples, notes = read_examples(rows, name, tokenizer, config)
    if not held_out_rows:
        return split_corpus(examples, config.eval_fraction, seed, name, notes)
    held_out, more_notes = read_examples(held_out_rows, config.eval_dataset, tokenizer, config)
    eval_prompts = set(example["prompt"] for example in held_out)
    kept = [example for example in examples if example["prompt"] not in eval_prompts]
    if len(kept) < len(examples):
        notes.append(f"{name}: {len(examples) - len(kept)} rows dropped whose prompt is in {config.eval_dataset}")
    order = shuffled_prompts(kept, seed)
    if len(order) < 2:
        raise UserError(f"{name} has only {len(order)} usable prompts that are not in {config.eval_dataset}")
    return fill_corpus(kept + held_out, order, shuffled_prompts(held_out, seed), notes + more_notes)


def read_examples(
    rows: list[dict], name: str, tokenizer: Tokenizer, config: DataConfig
) -> tuple[list[dict], list[str]]:
    """Usable rows as texts, and notes about the others."""
    columns, preferred = set(rows[0]), config.preferred or "better_response_id"
    check_columns(columns, preferred, name)
    dropped, examples = collections.Counter(), []
    with Progress(len(rows), "reading") as bar:
        for number, row in enumerate(rows, 1):
            try:
                example = parse_row(row, f"{name}, row {number}", columns, preferred, config.prompt_words, tokenizer)
                require_usable(example, tokenizer, config)
                examples.append(example)
            except Unusable as reason:
                dropped[str(reason)] += 1
            bar.update()
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    if not examples:
        raise UserError(f"{name}: none of its {len(rows)} rows can be used: {reasons}")
    notes = [f"{name}: {sum(dropped.values())} of {len(rows)} rows dropped: {reasons}"] if dropped else []
    responses = [row[side] for row in examples for side in ("completion", "rejected") if side in row]
    n_cut = sum(len(encode_response(tokenizer, text)) >= config.max_response_tokens for text in responses)
    if n_cut:
        limit = f"--max-response-tokens {config.max_response_tokens}"
        notes.append(f"{name}: {n_cut} of {len(responses)} responses are longer than {limit} and are cut there")
    return examples, notes


def parse_row(
    row: dict, place: str, columns: set[str], preferred: str, prompt_words: int, tokenizer: Tokenizer
) -> dict[str, str]:
    """One row as {prompt, completion}, and for preferences also rejected and the prompt of its side."""
    try:
        if are_preferences(columns):
            names, texts = PAIR, parse_pair(row, columns, preferred, tokenizer)
        else:
            names, texts = PAIR[:2], parse_demonstration(row, columns, prompt_words, tokenizer)
    except KeyError as error:
        raise UserError(f"{place}: the column {error} is missing") from None
    except (TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{place}: a value is neither a text nor a list of messages ({error})") from None
    for value in texts:
        if not isinstance(value, str):
            raise UserError(f"{place}: {value!r:.60} is neither a text nor a list of messages")
    return dict(zip(names, texts))


def require_usable(example: dict[str, str], tokenizer: Tokenizer, config: DataConfig) -> None:
    """Raise Unusable with the reason for which a row must be dropped."""
    if not example["prompt"].strip():
        raise Unusable("with an empty prompt")
    if max(map(len, example.values())) > MOST_CHARACTERS:  # before a tokenizer works on it for minutes
        raise Unusable(f"with a text of more than {MOST_CHARACTERS:,} characters")
    if not example["completion"].strip() or not example.get("rejected", "-").strip():
        raise Unusable("with an empty response")
    if "rejected" in example:
        if example["prompt"] != example["rejected_prompt"]:
            raise Unusable("whose two sides have different prompts")
        if example["completion"] == example["rejected"]:
            raise Unusable("with chosen equal to rejected")
    if len(encode_prompt(tokenizer, example["prompt"])) > config.max_prompt_tokens:
        raise Unusable(f"with a prompt longer than --max-prompt-tokens {config.max_prompt_tokens}")


def shuffled_prompts(examples: list[dict], seed: int) -> list[str]:
    """Their unique prompts, in an order of the seed's."""
    unique = list(dict.fromkeys(example["prompt"] for example in examples))
    return [unique[i] for i in shuffled(len(unique), seed, "split")]


def split_corpus(examples: list[dict], eval_fraction: float, seed: int, name: str, notes: list[str]) -> Corpus:
    """Hold out a share of the unique prompts, and every row that has one of them."""
    prompts = shuffled_prompts(examples, seed)
    n_eval = max(1, round(eval_fraction * len(prompts)))
    if len(prompts) - n_eval < 2:
        raise UserError(f"{name} has only {len(prompts)} usable prompts: that is too few to train on and hold some out")
    return fill_corpus(examples, prompts[n_eval:], prompts[:n_eval], notes)


def fill_corpus(examples: list[dict], train_prompts: list[str], eval_prompts: list[str], notes: list[str]) -> Corpus:
    corpus, held_out = Corpus(train_prompts, eval_prompts, [], notes=notes), set(eval_prompts)
    for example in examples:
        prompt, completion = example["prompt"], example["completion"]
        if prompt not in held_out:
            corpus.demonstrations.append({"prompt": prompt, "completion": completion})
        if "rejected" in example:
            pairs = corpus.eval_preferences if prompt in held_out else corpus.preferences
            pairs.append({"prompt": prompt, "chosen": completion, "rejected": example["rejected"]})
    return corpus
