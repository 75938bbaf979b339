"""crlhf/pipeline/data.py: every format in the shape the hub has it, what is dropped and why, and the split."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from crlhf.config import DataConfig, UserError
from crlhf.engine.text import encode_prompt, encode_response
from crlhf.engine.tokenizers import bpe_tokenizer, training_texts
from crlhf.pipeline.data import Unusable, build_corpus, check_columns, parse_row
from crlhf.pipeline.reading import read_rows

REAL = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf-harmless-sample.jsonl.gz"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HH = {
    "chosen": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant: Yes, please.",
    "rejected": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant: No.",
}
POST = {"id": "t3_1", "post": "My cat sings.", "title": "Cat", "subreddit": "pets", "site": None, "article": None}
SUMMARIES = [
    {"text": " A cat sings.", "policy": "sup2", "note": None},
    {"text": "Cats.\n", "policy": "ref", "note": "?"},
]
SAFE = {
    "prompt": "Is it safe?",
    "response_0": "Yes.",
    "response_1": "No.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer(["some words to learn from", "and a few more words"] * 4, 300)


@pytest.fixture
def chat_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def parse(row, tokenizer, preferred="better_response_id"):
    """One row as it comes out: (prompt, response), or (prompt, chosen, rejected)."""
    check_columns(set(row), preferred, "rows")
    config = DataConfig(preferred=preferred)
    example = parse_row(row, "rows, row 1", set(row), config, tokenizer)
    if "rejected" in example:
        assert example["prompt"] == example["rejected_prompt"]
    return tuple(example[key] for key in ("prompt", "completion", "rejected") if key in example)


def corpus_of(rows, tokenizer, seed=0, **settings):
    settings = {"max_prompt_tokens": 100, "max_response_tokens": 100, **settings}
    return build_corpus(rows, "rows.jsonl", tokenizer, DataConfig(**settings), seed)


def pairs(n):
    return [{"prompt": f"prompt {i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(n)]


# ----------------------------------------------------------------------------------------------- formats


def test_hh_dialogue_is_split_at_its_last_assistant_turn(tokenizer):
    prompt = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant:"
    assert parse(HH, tokenizer) == (prompt, " Yes, please.", " No.")
    one_turn = {side: f"\n\nHuman: Tea?\n\nAssistant: {side}\n" for side in ("chosen", "rejected")}
    assert parse(one_turn, tokenizer) == ("\n\nHuman: Tea?\n\nAssistant:", " chosen\n", " rejected\n")


def test_hh_dialogue_that_ends_with_the_human_is_unusable(tokenizer):
    with pytest.raises(Unusable, match="assistant's turn"):
        parse({**HH, "rejected": HH["rejected"] + "\n\nHuman: Why?"}, tokenizer)


IMPLICIT = {"chosen": [user("Tea?"), assistant("Yes.")], "rejected": [user("Tea?"), assistant("No.")]}
EXPLICIT = {"prompt": [user("Tea?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
ULTRAFEEDBACK = {"prompt": "Tea?", "prompt_id": "1", "messages": IMPLICIT["chosen"], "score_chosen": 8.0, **IMPLICIT}
REPEATED = {"prompt": [user("Tea?")], **IMPLICIT}
PROMPT_TEXT = {"prompt": "Tea?", "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
ANSWER_TEXT = {"prompt": [user("Tea?")], "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize("row", [IMPLICIT, EXPLICIT, ULTRAFEEDBACK, REPEATED, PROMPT_TEXT, ANSWER_TEXT])
def test_conversational_preferences_without_chat_template(row, tokenizer):
    assert parse(row, tokenizer) == ("\n\nHuman: Tea?\n\nAssistant:", " Yes.", " No.")


@pytest.mark.parametrize("row", [IMPLICIT, EXPLICIT, ULTRAFEEDBACK, REPEATED, PROMPT_TEXT, ANSWER_TEXT])
def test_conversational_preferences_with_chat_template(row, chat_tokenizer):
    assert parse(row, chat_tokenizer) == ("<|user|>Tea?\n<|assistant|>", "Yes.", "No.")


def test_long_conversations_keep_every_earlier_turn(tokenizer):
    before = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), user("Tea?")]
    row = {"chosen": [*before, assistant("Yes.")], "rejected": [*before, assistant("No.")]}
    prompt = "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant:"
    assert parse(row, tokenizer) == (prompt, " Yes.", " No.")


def test_text_prompt_beside_a_conversation_with_a_system_message(tokenizer):
    before = [{"role": "system", "content": "Be kind."}, user("Tea?")]
    row = {"prompt": "Tea?", "chosen": [*before, assistant("Yes.")], "rejected": [*before, assistant("No.")]}
    assert parse(row, tokenizer) == ("\n\nSystem: Be kind.\n\nHuman: Tea?\n\nAssistant:", " Yes.", " No.")


def test_prompt_chosen_rejected_as_text_is_taken_as_it_is(tokenizer):
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert parse(row, tokenizer) == ("The sky is", " blue.", " green.")


def test_text_prompts_get_no_chat_template(chat_tokenizer):
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert parse(row, chat_tokenizer) == ("The sky is", " blue.", " green.")


@pytest.mark.parametrize("choice, chosen", [(0, " A cat sings."), (1, " Cats."), ("1", " Cats."), (True, " Cats.")])
def test_summarize_from_feedback(choice, chosen, tokenizer):
    row = {"info": POST, "summaries": SUMMARIES, "choice": choice, "worker": "w", "batch": "b", "split": "train"}
    prompt, better, worse = parse(row, tokenizer)
    assert prompt == "SUBREDDIT: r/pets\nTITLE: Cat\nPOST: My cat sings.\nTL;DR:"
    assert better == chosen and {better, worse} == {" A cat sings.", " Cats."}


def test_summarize_from_feedback_news_article_has_no_subreddit(tokenizer):
    info = {**POST, "post": None, "title": None, "subreddit": None, "article": "Cats sing."}
    assert parse({"info": info, "summaries": SUMMARIES, "choice": 0}, tokenizer)[0] == "POST: Cats sing.\nTL;DR:"


def test_safe_rlhf_takes_the_preferred_column(tokenizer):
    assert parse(SAFE, tokenizer) == ("Is it safe?", "No.", "Yes.")
    assert parse(SAFE, tokenizer, preferred="safer_response_id") == ("Is it safe?", "Yes.", "No.")
    with pytest.raises(UserError, match="'best'.*--preferred.*safer_response_id"):
        parse(SAFE, tokenizer, preferred="best")


@pytest.mark.parametrize("label", [-1, 2, None, "", "tie", float("nan")])
def test_a_label_that_names_neither_response_is_unusable(label, tokenizer):
    with pytest.raises(Unusable, match="better_response_id is neither 0 nor 1"):
        parse({**SAFE, "better_response_id": label}, tokenizer)


@pytest.mark.parametrize("label", ["1", "1.0", 1.0, True])
def test_a_label_may_be_text_or_another_number(label, tokenizer):
    assert parse({**SAFE, "better_response_id": label}, tokenizer) == ("Is it safe?", "No.", "Yes.")


def test_demonstrations(tokenizer):
    expected = "\n\nHuman: Tea?\n\nAssistant:", " Yes."
    assert parse({"prompt": "The sky", "completion": " is blue."}, tokenizer) == ("The sky", " is blue.")
    assert parse({"prompt": [user("Tea?")], "completion": [assistant("Yes.")]}, tokenizer) == expected
    assert parse({"messages": [user("Tea?"), assistant("Yes.")], "id": 3}, tokenizer) == expected


def test_a_thumbs_down_is_no_demonstration(tokenizer):
    row = {"prompt": "The sky", "completion": " is blue.", "label": True}
    assert parse(row, tokenizer) == ("The sky", " is blue.")
    with pytest.raises(Unusable, match="label is false"):
        parse({**row, "label": False}, tokenizer)


def test_plain_text_is_split_after_its_first_words(tokenizer):
    row = {"text": "On a very rainy day I saw this  film\ntwice and slept.", "label": 0}
    assert parse(row, tokenizer) == ("On a very rainy day I saw this", "  film\ntwice and slept.")


@pytest.mark.parametrize(
    "columns, wanted",
    [
        ("prompt chosen", "'rejected'"),
        ("rejected", "'chosen'"),
        ("completion", "'prompt'"),
        ("prompt", "'completion' or 'chosen' and 'rejected'"),
        ("a b", "'chosen' and 'rejected'"),
    ],
)
def test_missing_columns_are_named(columns, wanted):
    there = ", ".join(sorted(columns.split()))
    with pytest.raises(UserError, match=f"missing the column {wanted}: it has {there}"):
        check_columns(set(columns.split()), "better_response_id", "rows")


def test_a_chat_template_that_refuses_a_row_makes_it_unusable(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role') }}", raising=False)
    with pytest.raises(Unusable, match="chat template refuses"):
        parse(IMPLICIT, tokenizer)


# ------------------------------------------------------------------------------------------ files and folders


KINDS = ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "saved", "splits")


def write_rows(path, rows):
    """Write rows as the kind of file or folder that the name says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name == "a.jsonl":
        path.write_text(lines, encoding="utf-8")
    elif path.name == "a.json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.name == "a.jsonl.gz":
        path.write_bytes(gzip.compress(lines.rstrip("\n").encode()))
    elif path.name == "a.parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "row",
    [IMPLICIT, SAFE, {"info": POST, "summaries": SUMMARIES, "choice": 1}, HH],
    ids=["messages", "safe", "summaries", "text"],
)
def test_every_kind_of_file_gives_the_same_rows(name, row, tmp_path, tokenizer):
    write_rows(tmp_path / name, [row, row, row])
    rows = read_rows(str(tmp_path / name))
    assert len(rows) == 3
    assert parse(rows[2], tokenizer) == parse(row, tokenizer)
    assert len(read_rows(str(tmp_path / name), max_rows=2)) == 2


def test_folder_of_parquet_files_by_split(tmp_path):
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(pairs(3)).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(pairs(2)).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert read_rows(str(tmp_path)) == pairs(3)
    assert read_rows(str(tmp_path), split="test") == pairs(2)
    with pytest.raises(UserError, match="split 'valid'"):
        read_rows(str(tmp_path), split="valid")


def test_saved_folder_without_the_split(tmp_path):
    write_rows(tmp_path / "splits", pairs(2))
    with pytest.raises(UserError, match="split 'test'.*its splits are train"):
        read_rows(str(tmp_path / "splits"), split="test")


def test_subset_after_a_colon(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(pairs(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("someone/data:comparisons", split="valid") == pairs(2)
    read_rows("someone/data")
    assert asked == [
        (("someone/data", "comparisons"), {"split": "valid"}),
        (("someone/data", None), {"split": "train"}),
    ]


def test_csv_keeps_words_that_look_like_missing_values(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_bytes(
        "\ufeffprompt,response_0,response_1,better_response_id\r\n"
        '"Say, nothing",None,NA,1\r\nSay,"two\nlines",b,0\r\nSay,a,b,\r\n'.encode()
    )
    rows = read_rows(str(path))
    assert parse(rows[0], tokenizer) == ("Say, nothing", "NA", "None")
    assert parse(rows[1], tokenizer) == ("Say", "two\nlines", "b")
    with pytest.raises(Unusable):  # its label is empty
        parse(rows[2], tokenizer)


def test_jsonl_with_line_separators_inside_strings(tmp_path):
    rows = [{"prompt": "a\u2028b\u2029c\x85d\x0c", "completion": "e"}, {"prompt": "f", "completion": "g"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    assert read_rows(str(tmp_path / "a.jsonl")) == rows


def test_json_with_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path):
    row = '{"prompt": "a", "completion": "b"}'
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{row}\r\n\r\n{row}\r\n".encode())
    (tmp_path / "b.json").write_bytes(f"\ufeff[{row},\r\n{row}]".encode())
    assert read_rows(str(tmp_path / "a.jsonl")) == read_rows(str(tmp_path / "b.json")) == [json.loads(row)] * 2


def test_half_an_emoji_becomes_a_question_mark_and_a_whole_one_stays(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"prompt": "x\ud83d y", "completion": "\ud83d\ude00"}')
    assert read_rows(str(tmp_path / "a.jsonl")) == [{"prompt": "x? y", "completion": "\U0001f600"}]


def test_unreadable_files_name_the_place(tmp_path):
    good = '{"prompt": "a", "completion": "b"}\n'
    cases = {
        "broken.jsonl": (good + "\n" + '{"prompt": \n', "line 3: not valid JSON"),
        "broken.json": ('[\n{"prompt": "a"},\n{"prompt" "b"}]', "line 3: not valid JSON"),
        "list.jsonl": (good + "\n3\n", "line 3: expected an object .* got int"),
        "list.json": ("[{}, 4]", "row 2: expected an object .* got int"),
        "empty.jsonl": ("\n \n", "holds no rows"),
        "empty.json": ("[]", "holds no rows"),
        "text.txt": ("hello", "unknown kind of file '.txt'"),
        "notgzip.jsonl.gz": (good, "can't be read: .*UTF-8 text in gzip"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}.*{message}|{message}"):
            read_rows(str(tmp_path / name))
    whole = gzip.compress(good.encode() * 50)
    for name, content in (
        ("latin.jsonl", '{"prompt": "é"}'.encode("latin-1")),
        ("cut.jsonl.gz", whole[:-12]),
        ("damaged.jsonl.gz", whole[:12] + b"\xff" * 8 + whole[20:]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} can't be read"):
            read_rows(str(tmp_path / name))
    for name in ("none.jsonl", "none.csv", "none.parquet"):
        with pytest.raises(UserError, match=f"{name} does not exist"):
            read_rows(str(tmp_path / name))


# --------------------------------------------------------------------------------------------- a limit of rows


@pytest.mark.parametrize("name", ("a.parquet", "a.csv", "saved", "splits"))
def test_a_limit_turns_no_more_rows_into_dicts_than_it_says(name, tmp_path, monkeypatch):
    if name == "a.csv":
        datasets.Dataset.from_list(pairs(50)).to_csv(tmp_path / name)
    else:
        write_rows(tmp_path / name, pairs(50))
    sizes, to_list = [], datasets.Dataset.to_list

    def measured(dataset):
        sizes.append(len(dataset))
        return to_list(dataset)

    monkeypatch.setattr(datasets.Dataset, "to_list", measured)
    assert read_rows(str(tmp_path / name), max_rows=3) == pairs(3)
    assert read_rows(str(tmp_path / name), max_rows=90) == read_rows(str(tmp_path / name)) == pairs(50)
    assert sizes == [3, 50, 50]


@pytest.mark.parametrize("name", ("a.jsonl", "a.jsonl.gz"))
def test_a_limit_stops_reading_lines(name, tmp_path):
    """What comes long after the last row that is wanted may be anything: nobody looks at it."""
    rows = [{"prompt": f"{i} " + "word " * 100, "completion": "x"} for i in range(3000)]
    content = "\n\n".join(json.dumps(row) for row in rows).encode() + b"\n\xff\xff{"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_rows(str(tmp_path / name), max_rows=3) == rows[:3]
    with pytest.raises(UserError, match=f"{name} can't be read"):
        read_rows(str(tmp_path / name))


def test_a_limit_of_a_list_in_json(tmp_path):
    (tmp_path / "a.json").write_text("\n\n " + json.dumps(pairs(9), indent=1))
    assert read_rows(str(tmp_path / "a.json"), max_rows=3) == pairs(3)


# ------------------------------------------------------------------------------------ dropped, cut, split


def test_dropped_rows_are_counted_by_reason(tokenizer):
    good = pairs(30)
    bad = [
        {**good[0], "prompt": "  "},
        {**good[1], "prompt": None},
        {**good[2], "chosen": None},
        {**good[3], "rejected": "\n"},
        {**good[4], "rejected": good[4]["chosen"]},
        {**good[5], "prompt": "long " * 60},
        {**good[6], "chosen": [assistant("x"), user("y")]},
    ]
    corpus = corpus_of([*good, *bad], tokenizer)
    assert len(corpus.preferences) + len(corpus.eval_preferences) == 30
    (note,) = corpus.notes
    assert note.startswith("rows.jsonl: 7 of 37 rows dropped: ")
    assert dict(reversed(part.split(" ", 1)) for part in note.split(": ", 2)[2].split(", ")) == {
        "with an empty prompt": "2",
        "with an empty response": "2",
        "with chosen equal to rejected": "1",
        "with a prompt longer than --max-prompt-tokens 100": "1",
        "whose dialogue does not end with the assistant's turn": "1",
    }


def test_sides_with_different_prompts_are_dropped(tokenizer):
    differing = {**HH, "rejected": HH["rejected"].replace("Tea", "Coffee")}
    rows = [{side: text.replace("Hi", f"Hi {i}") for side, text in HH.items()} for i in range(9)]
    corpus = corpus_of([differing, *rows], tokenizer)
    assert corpus.notes == ["rows.jsonl: 1 of 10 rows dropped: 1 whose two sides have different prompts"]
    with pytest.raises(UserError, match="none of its 2 rows can be used: 2 whose two sides have different prompts"):
        corpus_of([differing, differing], tokenizer)


@pytest.mark.parametrize("chosen", [[], [assistant("hello")], [user(""), assistant("hello")], "no marks at all"])
def test_dialogues_without_a_prompt_are_dropped(chosen, tokenizer):
    with pytest.raises(UserError, match="2 with an empty prompt"):
        corpus_of([{"chosen": chosen, "rejected": chosen}] * 2, tokenizer)


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "hello"}]])
def test_messages_without_text_are_dropped(content, tokenizer):
    rows = [{"messages": [user("hello"), {"role": "assistant", "content": content}]}] * 2
    with pytest.raises(UserError, match="2 with a message that is no text"):
        corpus_of(rows, tokenizer)


@pytest.mark.parametrize(
    "row, message",
    [
        ({**SAFE, "prompt": 3}, "row 1: a value is neither a text nor a list of messages"),
        ({"prompt": 3, "completion": "x"}, "row 1: a value is neither a text nor a list of messages"),
        ({"prompt": "x", "completion": 3.5}, "row 1: a value is neither a text nor a list of messages"),
        ({"messages": [{"from": "human", "value": "x"}]}, "row 1: the column 'content' is missing"),
    ],
)
def test_values_of_a_wrong_type_name_the_row(row, message, tokenizer):
    with pytest.raises(UserError, match=message):
        corpus_of([row] * 3, tokenizer)


def test_rows_without_a_column_of_the_first_row_are_named(tokenizer):
    with pytest.raises(UserError, match="row 4: the column 'rejected' is missing"):
        corpus_of([*pairs(3), {"prompt": "a", "chosen": "b"}], tokenizer)


def test_cut_responses_are_counted(tokenizer):
    rows = pairs(20)
    text = " word" * 5
    n = len(encode_response(tokenizer, text))
    rows[3]["chosen"], rows[5]["rejected"] = text, text
    assert corpus_of(rows, tokenizer, max_response_tokens=n + 1).notes == []  # the EOS still fits
    assert corpus_of(rows, tokenizer, max_response_tokens=n).notes == [
        f"rows.jsonl: 2 of 40 responses are longer than --max-response-tokens {n} and are cut there"
    ]


def test_prompt_of_exactly_the_limit_stays(tokenizer):
    longest = max(len(encode_prompt(tokenizer, row["prompt"])) for row in pairs(20))
    assert corpus_of(pairs(20), tokenizer, max_prompt_tokens=longest).notes == []
    assert "10 with a prompt longer" in corpus_of(pairs(20), tokenizer, max_prompt_tokens=longest - 1).notes[0]


def test_held_out_prompts_are_in_no_training_row(tokenizer):
    rows = pairs(40) + [{**row, "chosen": " other"} for row in pairs(40)]
    corpus = corpus_of(rows, tokenizer, eval_fraction=0.25)
    held_out = set(corpus.eval_prompts)
    assert len(corpus.eval_prompts) == len(held_out) == 10 and len(corpus.train_prompts) == 30
    assert not held_out & set(corpus.train_prompts)
    assert held_out == {row["prompt"] for row in corpus.eval_preferences}
    for part in (corpus.demonstrations, corpus.preferences):
        assert {row["prompt"] for row in part} == set(corpus.train_prompts)
    assert len(corpus.preferences) == len(corpus.demonstrations) == 60 and len(corpus.eval_preferences) == 20
    texts = {(row["prompt"], row["chosen"], row["rejected"]) for row in rows}
    assert texts == {tuple(row.values()) for row in corpus.preferences + corpus.eval_preferences}


def test_split_depends_on_the_seed_alone(tokenizer):
    first, again, other = (corpus_of(pairs(40), tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.eval_prompts != other.eval_prompts


def test_too_few_prompts_to_split(tokenizer):
    with pytest.raises(UserError, match="only 2 usable prompts"):
        corpus_of(pairs(2), tokenizer)


def test_demonstrations_have_no_preferences(tokenizer):
    texts = [f"row of this file with the number {i} is a word of some length" for i in range(20)]
    corpus = corpus_of([{"text": text} for text in texts], tokenizer)
    assert not corpus.preferences and not corpus.eval_preferences and len(corpus.demonstrations) == 18
    assert {row["completion"] for row in corpus.demonstrations} == {" is a word of some length"}


@pytest.mark.parametrize("prompt", ["prompt {}", [user("prompt {}")]])
def test_prompts_alone_are_enough_where_no_answers_are_wanted(prompt, tokenizer):
    texts = [json.dumps(prompt).replace("{}", str(i)) for i in range(20)]
    rows = [{"prompt": json.loads(text), "text": "not an answer"} for text in texts]
    config = DataConfig(max_prompt_tokens=100, max_response_tokens=1)
    corpus = build_corpus(rows, "rows.jsonl", tokenizer, config, 0, prompts_suffice=True)
    assert len(corpus.train_prompts) == 18 and len(corpus.eval_prompts) == 2 and not corpus.notes
    wanted = "prompt 3" if isinstance(prompt, str) else "\n\nHuman: prompt 3\n\nAssistant:"
    assert wanted in corpus.train_prompts + corpus.eval_prompts
    assert not corpus.demonstrations and not corpus.preferences
    rows = [{"prompt": row["prompt"]} for row in rows]
    with pytest.raises(UserError, match="missing the column 'completion' or"):
        build_corpus(rows, "rows.jsonl", tokenizer, config, 0)


def test_training_texts_finds_every_text():
    rows = [IMPLICIT, {"info": POST, "n": 3}]
    assert {"Tea?", "Yes.", "No.", "My cat sings."} <= set(training_texts(rows))


@pytest.mark.skipif(not REAL.is_file(), reason="the sample of real data is not here")
def test_real_dialogues(tokenizer):
    rows = read_rows(str(REAL))
    corpus = build_corpus(rows, "sample", tokenizer, DataConfig(max_prompt_tokens=10**6, max_response_tokens=10**6), 0)
    n_used = len(corpus.preferences) + len(corpus.eval_preferences)
    assert len(rows) == 1200 and n_used == 1196
    assert corpus.notes == ["sample: 4 of 1200 rows dropped: 4 with an empty response"]
    whole = {(row["chosen"], row["rejected"]) for row in rows}
    for row in corpus.preferences + corpus.eval_preferences:
        assert row["prompt"].startswith("\n\nHuman:") and row["prompt"].endswith("\n\nAssistant:")
        assert (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) in whole
