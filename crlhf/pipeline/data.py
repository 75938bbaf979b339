"""What RLHF eats: prompts, demonstrations and preferences, from a hub dataset or a file.

Every format becomes rows of plain texts in the columns the ecosystem uses: {prompt, completion} for
demonstrations and {prompt, chosen, rejected} for preferences. Formats are told apart by their columns:

    chosen, rejected                  dialogues as one text (Anthropic/hh-rlhf) or as messages
    prompt, chosen, rejected          texts or messages (trl-lib, UltraFeedback)
    info, summaries, choice           openai/summarize_from_feedback, comparisons
    prompt, response_0, response_1    PKU-Alignment/PKU-SafeRLHF; --preferred picks the judging column
    prompt, completion | messages     demonstrations only
    text                              plain text (imdb): 8 words are the prompt, the rest the completion
    prompt                            prompts alone, where nothing but baselines is wanted

Rows that can't be used are dropped for a stated reason and counted; nothing is dropped in silence.

A hub dataset with several subsets takes one after a colon: openai/summarize_from_feedback:comparisons.
"""

import collections
from dataclasses import dataclass, field, replace

from ..config import DataConfig, UserError
from ..engine.files import Progress, shuffled
from ..engine.text import Tokenizer, encode_prompt, encode_response

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
MOST_CHARACTERS = 1_000_000

PROMPT_WORDS = 8  # of a plain text

PAIRS = {"chosen", "rejected"}
COMPARISONS = {"info", "summaries", "choice"}
TWO_RESPONSES = {"prompt", "response_0", "response_1"}
FORMATS = (PAIRS, COMPARISONS, TWO_RESPONSES, {"prompt", "completion"}, {"messages"}, {"text"})


class Unusable(Exception):
    """Why a row is dropped. The text follows a count, as in '3 with an empty prompt'."""


@dataclass
class Corpus:
    """Texts ready for training. Prompts are unique, and held-out prompts occur in no training row."""

    train_prompts: list[str]
    eval_prompts: list[str]
    demonstrations: list[dict] = field(default_factory=list)  # rows {prompt, completion}
    preferences: list[dict] = field(default_factory=list)  # rows {prompt, chosen, rejected}
    eval_preferences: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was dropped or cut, and how often


# ------------------------------------------------------------------------------------ messages and dialogues


def render(messages: list[dict], tokenizer: Tokenizer) -> str:
    """Messages that end before the assistant's turn, as prompt text: chat template, or HH-RLHF's plain form."""
    if tokenizer.chat_template:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template is a program of its own, and may fail in any way
            raise Unusable("that the tokenizer's chat template refuses") from None
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [f"\n\n{names.get(m['role'], m['role'])}: {m['content']}" for m in messages]
    return "".join(turns) + ASSISTANT


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
    response = answer["content"]
    if answer["role"] != "assistant":
        raise not_answered
    if not any(message["content"].strip() for message in before):
        return "", response
    if not tokenizer.chat_template:
        response = " " + response
    return render(before, tokenizer), response


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


# ---------------------------------------------------------------------------------------------- the formats


def are_prompts_alone(columns: set[str]) -> bool:
    """Rows with a prompt and nothing that answers it: enough for baselines, not for SFT."""
    is_answered = {"completion", *PAIRS} & columns or COMPARISONS <= columns or TWO_RESPONSES <= columns
    return "prompt" in columns and not is_answered


def check_columns(columns: set[str], preferred: str, name: str) -> None:
    """Raise a UserError that names what is missing, if the columns are of no known format."""
    listed = ", ".join(sorted(columns))
    known = next((known for known in FORMATS if known <= columns), None)
    if known == TWO_RESPONSES and preferred not in columns:
        problem = f"{name} has no column '{preferred}' that says which response is better"
        raise UserError(problem, f"give one of its columns to --preferred ({listed})")
    if known:
        return
    partners = {"chosen": "rejected", "rejected": "chosen", "prompt": "completion' or 'chosen' and 'rejected"}
    partners["completion"] = "prompt"
    missing = next((partners[column] for column in partners if column in columns), "chosen' and 'rejected")
    raise UserError(f"{name} is missing the column '{missing}'", f"it has {listed}")


def answers_of(row: dict, columns: set[str], preferred: str) -> dict[str, str | list]:
    """A row of any format as {prompt, completion} or, of preferences, {prompt, completion, rejected}.

    All are texts or messages. Without a prompt the others are whole dialogues.
    """
    if PAIRS <= columns:
        answers = {"completion": row["chosen"], "rejected": row["rejected"]}
        return answers | {"prompt": row["prompt"]} if "prompt" in columns else answers
    if COMPARISONS <= columns:
        prompt = reddit_prompt(row["info"])
        better = better_index(row["choice"], "choice")
        texts = [" " + (summary["text"] or "").strip() for summary in row["summaries"]]
        return {"prompt": prompt, "completion": texts[better], "rejected": texts[1 - better]}
    if TWO_RESPONSES <= columns:
        better = better_index(row[preferred], preferred)
        texts = [row["response_0"], row["response_1"]]
        return {"prompt": row["prompt"], "completion": texts[better], "rejected": texts[1 - better]}
    if "completion" in columns:
        if row.get("label") is False:  # trl-lib/kto-mix: a thumbs-down
            raise Unusable("whose label is false")
        return {"prompt": row["prompt"], "completion": row["completion"]}
    if "messages" in columns:
        return {"completion": row["messages"]}
    if "text" in columns:
        words = (row["text"] or "").split(" ")
        completion = "".join(" " + word for word in words[PROMPT_WORDS:])
        return {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": completion}
    return {"prompt": row["prompt"]}


def parse_side(answers: dict, side: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """(prompt, response) of one side, as texts."""
    response = answers.get(side) or ""
    if "prompt" in answers:
        return prompt_and_response(answers["prompt"] or "", response, tokenizer)
    return split_dialogue(response, tokenizer)


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


def parse_row(row: dict, position: str, columns: set[str], config: DataConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """One row as texts: {prompt}, {prompt, completion}, or for preferences also the other side."""
    try:
        answers = answers_of(row, columns, config.preferred)
        prompt, completion = parse_side(answers, "completion", tokenizer)
        example = {"prompt": prompt}
        if "completion" in answers:
            example["completion"] = completion
        if "rejected" in answers:
            example["rejected_prompt"], example["rejected"] = parse_side(answers, "rejected", tokenizer)
    except KeyError as error:
        raise UserError(position, f"the column {error} is missing") from None
    except (TypeError, AttributeError, IndexError) as error:
        raise UserError(position, f"a value is neither a text nor a list of messages ({error})") from None
    return example


def require_usable(example: dict[str, str], tokenizer: Tokenizer, config: DataConfig) -> None:
    """Raise Unusable with the reason for which a row must be dropped."""
    if not example["prompt"].strip():
        raise Unusable("with an empty prompt")
    if max(map(len, example.values())) > MOST_CHARACTERS:  # before a tokenizer works on it for minutes
        raise Unusable(f"with a text of more than {MOST_CHARACTERS:,} characters")
    if not all(response.strip() for response in responses_of(example)):
        raise Unusable("with an empty response")
    if "rejected" in example:
        if example["prompt"] != example["rejected_prompt"]:
            raise Unusable("whose two sides have different prompts")
        if example["completion"] == example["rejected"]:
            raise Unusable("with chosen equal to rejected")
    if len(encode_prompt(tokenizer, example["prompt"])) > config.max_prompt_tokens:
        raise Unusable(f"with a prompt longer than --max-prompt-tokens {config.max_prompt_tokens}")


def responses_of(example: dict[str, str]) -> list[str]:
    return [example[side] for side in ("completion", "rejected") if side in example]


# ---------------------------------------------------------------------------------------- rows to a corpus


def build_corpus(
    rows: list[dict],
    name: str,
    tokenizer: Tokenizer,
    config: DataConfig,
    seed: int,
    held_out_rows: list[dict] = (),
    prompts_suffice: bool = False,
) -> Corpus:
    """Parse, filter, split. Raises UserError when nothing usable is left.

    held_out_rows: those of config.eval_dataset; without them a share of the prompts is held out.
    prompts_suffice: rows may be prompts alone. They give no demonstrations.
    """
    config = replace(config, preferred=config.preferred or "better_response_id")
    examples, notes = read_examples(rows, name, tokenizer, config, prompts_suffice)
    if held_out_rows:
        held_out, more_notes = read_examples(held_out_rows, config.eval_dataset, tokenizer, config, prompts_suffice)
        eval_prompts = shuffled_prompts(held_out, seed)
        is_held_out = set(eval_prompts)
        kept = [example for example in examples if example["prompt"] not in is_held_out]
        if len(kept) < len(examples):
            notes.append(f"{name}: {len(examples) - len(kept)} rows dropped whose prompt is in {config.eval_dataset}")
        examples = kept + held_out
        notes += more_notes
        train_prompts = shuffled_prompts(kept, seed)
        too_few = f"{name} has only {len(train_prompts)} usable prompts that are not in {config.eval_dataset}"
    else:
        prompts = shuffled_prompts(examples, seed)
        n_eval = max(1, round(config.eval_fraction * len(prompts)))
        eval_prompts = prompts[:n_eval]
        train_prompts = prompts[n_eval:]
        too_few = f"{name} has only {len(prompts)} usable prompts: that is too few to train on and hold some out"
    if len(train_prompts) < 2:
        raise UserError(too_few)
    corpus = Corpus(train_prompts, eval_prompts, notes=notes)
    add_rows(corpus, examples)
    return corpus


def read_examples(
    rows: list[dict], name: str, tokenizer: Tokenizer, config: DataConfig, prompts_suffice: bool
) -> tuple[list[dict], list[str]]:
    """Usable rows as texts, and notes about the others."""
    columns = set(rows[0])
    if prompts_suffice and are_prompts_alone(columns):
        columns = {"prompt"}
    else:
        check_columns(columns, config.preferred, name)
    examples = []
    dropped = collections.Counter()
    with Progress(len(rows), "reading") as bar:
        for number, row in enumerate(rows, 1):
            try:
                example = parse_row(row, f"{name}, row {number}", columns, config, tokenizer)
                require_usable(example, tokenizer, config)
                examples.append(example)
            except Unusable as reason:
                dropped[str(reason)] += 1
            bar.update()
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    if not examples:
        raise UserError(f"{name}: none of its {len(rows)} rows can be used", reasons)
    notes = []
    if dropped:
        notes.append(f"{name}: {sum(dropped.values())} of {len(rows)} rows dropped: {reasons}")
    return examples, notes + cut_responses(examples, name, tokenizer, config.max_response_tokens)


def cut_responses(examples: list[dict], name: str, tokenizer: Tokenizer, limit: int) -> list[str]:
    """A note if responses are longer than `limit` tokens, EOS included."""
    responses = [response for example in examples for response in responses_of(example)]
    n_cut = sum(len(encode_response(tokenizer, response)) >= limit for response in responses)
    option = f"--max-response-tokens {limit}"
    note = f"{name}: {n_cut} of {len(responses)} responses are longer than {option} and are cut there"
    return [note] if n_cut else []


def shuffled_prompts(examples: list[dict], seed: int) -> list[str]:
    """Their unique prompts, in an order of the seed's."""
    unique = list(dict.fromkeys(example["prompt"] for example in examples))
    return [unique[i] for i in shuffled(len(unique), seed, "split")]


def add_rows(corpus: Corpus, examples: list[dict]) -> None:
    """Demonstrations from the training prompts, and preferences for both kinds."""
    is_held_out = set(corpus.eval_prompts)
    for example in examples:
        prompt = example["prompt"]
        if "completion" in example and prompt not in is_held_out:
            corpus.demonstrations.append({"prompt": prompt, "completion": example["completion"]})
        if "rejected" in example:
            pairs = corpus.eval_preferences if prompt in is_held_out else corpus.preferences
            pairs.append({"prompt": prompt, "chosen": example["completion"], "rejected": example["rejected"]})
