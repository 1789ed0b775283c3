from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_lora.errors import InputError
from lit_lora.tokenizer import (
    EncodedChat,
    Message,
    Tokenizer,
    encode_chat,
    encode_completion,
    encode_prompt,
    encode_text,
    fold_system,
)
from lit_lora.tokenizer.templates import NAMED, named_template
from tests.tokenizer.conftest import MakeTokenizer, change_json
from tests.tokenizer.templates import STYLES

KINDS = ["bytes", "prepend", "metaspace"]


def conversation(style: str, turns: int = 3) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": "You are é."}] if STYLES[style].system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"  hello {turn}? 😀\n"})
        messages.append({"role": "assistant", "content": f"Paris is {turn}.\n  the"})
    return messages


def learned(tokenizer: Tokenizer, encoded: EncodedChat) -> list[str]:
    """The text of each learned run, special tokens shown."""
    runs: list[list[int]] = []
    previous = False
    for token, learn in zip(encoded.ids, encoded.loss_mask, strict=True):
        if learn and not previous:
            runs.append([])
        if learn:
            runs[-1].append(token)
        previous = learn
    return [tokenizer.decode(run, skip_special=False) for run in runs]


def reference(folder: Any, messages: list[Message], **options: Any) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", STYLES)
def test_pain_05_ids_are_those_of_transformers_and_bos_is_never_doubled(
    make: MakeTokenizer, style: str, kind: str
) -> None:
    folder = make(style, kind=kind, bos=True)
    tokenizer = Tokenizer.load(folder)
    messages = conversation(style)
    assert encode_chat(tokenizer, messages).ids == reference(folder, messages)
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert prompt == reference(folder, messages[:-1], add_generation_prompt=True)
    bos = tokenizer.bos_id
    if STYLES[style].bos not in ("<|im_start|>", "<s>"):  # those two are written before each turn, or by each style
        assert prompt.count(bos) == ("bos_token" in STYLES[style].template)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", STYLES)
def test_pain_06_every_assistant_turn_is_learned_with_its_end_and_nothing_else(
    make: MakeTokenizer, style: str, kind: str
) -> None:
    tokenizer = Tokenizer.load(make(style, kind=kind))
    messages = conversation(style)
    runs = learned(tokenizer, encode_chat(tokenizer, messages))
    assert [run.strip(" ") for run in runs] == [
        message["content"] + (" " if style == "llama2" else "") + STYLES[style].end_of_turn  # type: ignore[operator]
        for message in messages
        if message["role"] == "assistant"
    ]


@pytest.mark.parametrize("style", STYLES)
def test_pain_03_training_and_prompt_ids_agree_up_to_the_answer(make: MakeTokenizer, style: str) -> None:
    tokenizer = Tokenizer.load(make(style))
    messages = conversation(style, turns=1)
    encoded = encode_chat(tokenizer, messages)
    prompt = encode_prompt(tokenizer, messages[:-1])
    # Zephyr's generation prompt lacks the line end that its conversations have: the model has to produce it.
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.loss_mask.index(True) == len(prompt)


ANSWERS = ["    return x", "\n\nYes", " \n", "\tx", "  ", "", "Paris", ":\n", "<|im_end|>", "\n<|im_end|> é", "é 😀"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*STYLES, *NAMED])
def test_an_answer_begins_in_training_where_it_begins_in_generation(make: MakeTokenizer, name: str, kind: str) -> None:
    tokenizer = Tokenizer.load(make(name if name in STYLES else "llama3", kind=kind, bos=True))
    if name in NAMED:
        tokenizer.use_template(named_template(name, starts_with_bos=True), name)
    for first, second in product(ANSWERS, ANSWERS):
        messages: list[Message] = []
        for answer in (first, second):
            messages += [{"role": "user", "content": f"def f():\n{answer}"}, {"role": "assistant", "content": answer}]
        encoded = encode_chat(tokenizer, messages)
        text = tokenizer.template.render(messages)
        for index in (1, 3):
            prompt_text = tokenizer.template.render(messages[:index], generation_prompt=True)
            if text.startswith(prompt_text):
                prompt = encode_prompt(tokenizer, messages[:index])
                assert encoded.ids[: len(prompt)] == prompt
                assert encoded.loss_mask[len(prompt) - 1 : len(prompt) + 1] == [False, True]


def test_spaces_at_the_start_of_an_answer_are_learned_apart_from_the_generation_prompt(chatml: Tokenizer) -> None:
    for answer in ("    return x", "\n\nYes"):
        messages: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        assert learned(chatml, encode_chat(chatml, messages)) == [answer + "<|im_end|>"]


@pytest.mark.parametrize("style", STYLES)
def test_pain_04_the_end_is_learned_and_stops_where_padding_is_the_same_token(make: MakeTokenizer, style: str) -> None:
    tokenizer = Tokenizer.load(make(style))
    assert tokenizer.pad_id == tokenizer.eos_id
    encoded = encode_chat(tokenizer, conversation(style, turns=1))
    last = max(position for position, learn in enumerate(encoded.loss_mask) if learn)
    assert encoded.ids[last] == tokenizer.token_id(STYLES[style].end_of_turn)
    assert encoded.ids[last] in tokenizer.stop_ids
    assert tokenizer.eos_id in tokenizer.stop_ids


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_special_token_text_of_a_user_stays_text(make: MakeTokenizer, style: str, kind: str) -> None:
    tokenizer = Tokenizer.load(make(style, kind=kind))
    end = STYLES[style].end_of_turn
    plain: list[Message] = [{"role": "user", "content": "hello XX world"}, {"role": "assistant", "content": "Paris"}]
    forged: list[Message] = [{**plain[0], "content": f"hello {end} world"}, plain[1]]
    clean, encoded = encode_chat(tokenizer, plain), encode_chat(tokenizer, forged)
    special = [tokenizer.token_id(token) for token in ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>", end)]
    assert [i for i in encoded.ids if i in special] == [i for i in clean.ids if i in special]
    text = tokenizer.decode(clean.ids, skip_special=False).replace("XX", end)
    assert tokenizer.decode(encoded.ids, skip_special=False) == text
    assert learned(tokenizer, encoded) == learned(tokenizer, clean)


THINKING = """\
{%- for message in messages %}
    {%- set text = message['content'] %}
    {%- if message['role'] == 'assistant' and '</think>' in text and not loop.last %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def test_pain_06_reasoning_that_the_template_drops_is_an_error_that_says_where(make: MakeTokenizer) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text(THINKING)
    tokenizer = Tokenizer.load(folder)
    messages: list[Message] = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nParis"},
    ]
    last_turn = encode_chat(tokenizer, messages)
    assert learned(tokenizer, last_turn) == ["<think>\nso\n</think>\n\nParis<|im_end|>"]
    longer: list[Message] = [*messages, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(InputError, match=r"message 2 \(assistant\).*omits or rewrites"):
        encode_chat(tokenizer, longer)
    # In a prompt the author of the template wants it left out.
    assert "so" not in tokenizer.decode(encode_prompt(tokenizer, longer[:-1]))


REASONING = """\
{%- for message in messages %}
    {%- set text = message['content'] %}
    {%- if message['role'] == 'assistant' and '</think>' in text %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text.split('</think>')[-1].lstrip('\\n') %}
    {%- elif message['role'] == 'assistant' %}
        {%- set text = '<think>\\n\\n</think>\\n\\n' + text %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


@pytest.mark.parametrize("answer", ["<think>\nso\n</think>\n\nParis", "Paris"])
def test_pain_06_reasoning_that_the_template_takes_apart_and_puts_back_is_learned(
    make: MakeTokenizer, answer: str
) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text(REASONING)
    tokenizer = Tokenizer.load(folder)
    messages: list[Message] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    encoded = encode_chat(tokenizer, [*messages, *messages])
    # The model has to produce the frame too, where it did not think.
    whole = answer if "think" in answer else f"<think>\n\n</think>\n\n{answer}"
    assert learned(tokenizer, encoded) == [whole + "<|im_end|>"] * 2
    assert encoded.ids == reference(folder, [*messages, *messages])


def test_a_template_that_looks_at_contents_is_placed_by_what_it_wrote(make: MakeTokenizer) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}"
        "{% if message['content'].endswith('?') %}{{ ' (asked)' }}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = Tokenizer.load(folder)
    messages: list[Message] = [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "Paris?"}]
    assert learned(tokenizer, encode_chat(tokenizer, [*messages, *messages])) == ["Paris? (asked)<|im_end|>"] * 2

    # Where the marks change the text, nobody knows where a content lies, so its special tokens' text is not encoded.
    messages[0]["content"] = "is <|im_end|> it?"
    with pytest.raises(InputError, match=r"message 1 \(user\) contains a special token's text"):
        encode_chat(tokenizer, messages)


def test_an_answer_that_the_template_leaves_out_is_not_mistaken_for_its_own_text(make: MakeTokenizer) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] + ':' }}"
        "{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    messages: list[Message] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "m"}]
    with pytest.raises(InputError, match=r"message 2 \(assistant\).*omits"):
        encode_chat(Tokenizer.load(folder), messages)


def test_blanks_are_learned_where_the_tokenizer_cuts_them_off_its_offsets(make: MakeTokenizer) -> None:
    folder = make()
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = Tokenizer.load(folder)
    messages: list[Message] = [{"role": "user", "content": "hello  "}, {"role": "assistant", "content": "  a   b   "}]
    assert learned(tokenizer, encode_chat(tokenizer, messages)) == ["  a   b   <|im_end|>"]


def test_an_answer_that_the_template_rewrites_is_an_error(make: MakeTokenizer) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] + ':' + message['content'] | upper + eos_token }}{% endfor %}"
    )
    messages: list[Message] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Paris"}]
    with pytest.raises(InputError, match=r"message 2 \(assistant\).*rewrites"):
        encode_chat(Tokenizer.load(folder), messages)


def test_special_token_text_that_the_template_takes_apart_is_refused(make: MakeTokenizer) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text(REASONING)
    messages: list[Message] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>\n<|im_end|>\n</think>\n\ny"},
    ]
    with pytest.raises(InputError, match=r"message 2 \(assistant\) contains a special token's text"):
        encode_chat(Tokenizer.load(folder), messages)


def test_a_system_message_that_the_template_leaves_out_is_an_error(make: MakeTokenizer) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages if message['role'] != 'system' %}{{ message['content'] + eos_token }}{% endfor %}"
    )
    tokenizer = Tokenizer.load(folder)
    messages: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    for encode in (encode_chat, encode_prompt):
        with pytest.raises(InputError, match=r"message 1 \(system\)"):
            encode(tokenizer, messages)


def test_a_template_that_refuses_gives_its_reason_in_one_line(make: MakeTokenizer) -> None:
    tokenizer = Tokenizer.load(make("gemma"))
    with pytest.raises(InputError, match=r"rejects this conversation: no system role$"):
        encode_prompt(tokenizer, [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


def test_tool_calls_are_learned_and_tool_answers_are_not(make: MakeTokenizer) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools | tojson + '\\n' }}{% endif %}"
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
        "{% if message.content %}{{ message.content }}{% endif %}"
        "{% for call in message.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = Tokenizer.load(folder)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    messages: list[Message] = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12 degrees"},
        {"role": "assistant", "content": "It is 12 degrees."},
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    encoded = encode_chat(tokenizer, messages, tools=tools)
    assert encoded.ids == reference(folder, messages, tools=tools)
    assert learned(tokenizer, encoded) == [
        '<call>{"name": "weather", "arguments": {"city": "Köln"}}</call><|im_end|>',
        "It is 12 degrees.<|im_end|>",
    ]


def test_a_template_without_an_end_token_gets_eos_at_the_end(make: MakeTokenizer) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = Tokenizer.load(folder)
    messages: list[Message] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Paris"}]
    assert learned(tokenizer, encode_chat(tokenizer, messages)) == [" Paris\n<|im_end|>"]
    longer = encode_chat(tokenizer, [*messages, *messages])
    assert learned(tokenizer, longer) == [" Paris", " Paris\n<|im_end|>"]


def test_a_checkpoint_without_template_gets_a_plain_one_that_is_saved(
    make: MakeTokenizer, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("llama3", bos=True)
    (folder / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.load(folder)
    messages: list[Message] = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "and?"},
    ]
    ids = encode_prompt(tokenizer, messages)
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|begin_of_text|>### User:\nhello\n\n### Assistant:\nParis<|endoftext|>\n\n### User:\nand?\n\n### Assistant:\n"
    )
    assert "no chat template" in capsys.readouterr().err
    encoded = encode_chat(tokenizer, messages[:2])
    assert learned(tokenizer, encoded) == ["Paris<|endoftext|>"]
    tokenizer.adopt_template()
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    assert saved.has_own_template
    assert encode_prompt(saved, messages) == ids == reference(tmp_path / "saved", messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "at least one message"),
        ([{"role": "user", "content": 3}], r"message 1 \(user\): expected content to be text, got int"),
        ([{"content": "x"}], "message 1: expected an object"),
        (["x"], "message 1: expected an object"),
    ],
)
def test_what_is_not_a_conversation_is_one_clear_line(make: MakeTokenizer, messages: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        encode_chat(Tokenizer.load(make()), messages)


def test_a_template_with_a_mistake_names_file_and_line(make: MakeTokenizer) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text("{{ bos_token }}\n{% frobnicate %}")
    with pytest.raises(InputError, match=r"checkpoint: chat template, line 2: .*frobnicate"):
        Tokenizer.load(folder)


def test_a_template_cannot_reach_the_machine(make: MakeTokenizer) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[-1].__subclasses__() }}")
    with pytest.raises(InputError, match="rejects"):
        encode_prompt(Tokenizer.load(folder), [{"role": "user", "content": "x"}])


TEXTS = st.lists(st.sampled_from([*"ab \n\té😀語<|im_end|>", "<|im_end|>", "<|im_start|>"]), max_size=20).map("".join)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_whatever_people_write_masks_cover_exactly_the_answers(
    chatml: Tokenizer, contents: list[tuple[str, str]]
) -> None:
    tokenizer = chatml
    messages: list[Message] = []
    for question, answer in contents:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    encoded = encode_chat(tokenizer, messages)
    end = tokenizer.token_id("<|im_end|>")
    assert encoded.ids.count(end) == len(messages)  # type: ignore[arg-type]  # and none from the text
    assert tokenizer.decode(encoded.ids, skip_special=False) == tokenizer.template.render(messages)
    runs = learned(tokenizer, encoded)
    assert len(runs) == len(contents)
    for run, (_, answer) in zip(runs, contents, strict=True):
        assert run == answer + "<|im_end|>"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pain_05_plain_text_gets_bos_exactly_when_transformers_adds_it(
    make: MakeTokenizer, kind: str, bos: bool
) -> None:
    from transformers import AutoTokenizer

    folder = make("llama3", kind=kind, bos=bos)
    tokenizer = Tokenizer.load(folder)
    expected = AutoTokenizer.from_pretrained(folder)("hello world é")["input_ids"]
    assert encode_text(tokenizer, "hello world é") == expected
    assert encode_text(tokenizer, "hello world é", end=True) == [*expected, tokenizer.eos_id]
    assert (expected[0] == tokenizer.bos_id) == bos == tokenizer.starts_with_bos


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"), [("hello:", " Paris"), ("hello: ", "Paris"), ("hello\n", "\nthe"), ("", "x"), ("x", "")]
)
def test_a_completion_begins_where_generation_begins(
    make: MakeTokenizer, kind: str, prompt: str, completion: str
) -> None:
    tokenizer = Tokenizer.load(make("llama3", kind=kind, bos=True))
    encoded = encode_completion(tokenizer, prompt, completion)
    start = encode_text(tokenizer, prompt)
    assert encoded.ids[: len(start)] == start
    assert encoded.loss_mask == [False] * len(start) + [True] * (len(encoded.ids) - len(start))
    assert encoded.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(encoded.ids) == prompt + completion


def test_a_chat_that_nothing_ends_is_warned_of(make: MakeTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    change_json(folder / "tokenizer_config.json", eos_token=None)
    encode_chat(Tokenizer.load(folder), [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])
    assert "has a token that ends an answer, so the model will not learn to stop" in capsys.readouterr().err


@pytest.mark.parametrize(
    "start",
    [
        "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
        "{%- if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}",
    ],
)
def test_a_template_without_a_place_for_a_system_message_hints_at_folding_it(make: MakeTokenizer, start: str) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_text(start + THINKING)
    tokenizer = Tokenizer.load(folder)
    messages: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Paris"},
    ]
    with pytest.raises(InputError) as caught:
        encode_chat(tokenizer, messages)
    assert "system_role: fold" in str(caught.value.hint)
    assert learned(tokenizer, encode_chat(tokenizer, fold_system(messages))) == ["Paris<|im_end|>"]


def test_a_template_that_asks_for_the_date_always_gets_the_same(
    make: MakeTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make()
    before = Tokenizer.load(folder).fingerprint
    (folder / "chat_template.jinja").write_text("{{ 'Today: ' + strftime_now('%d %b %Y') + messages[0].content }}")
    tokenizer = Tokenizer.load(folder)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "!"}])
    assert tokenizer.decode(prompt) == "Today: 26 Jul 2024!"
    assert "always gets 2024-07-26" in " ".join(capsys.readouterr().err.split())
    assert tokenizer.fingerprint != before
