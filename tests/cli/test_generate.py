from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from tests.cli.answering import Terminal, make_base, make_run
from tests.tiny import CHATML


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", base)


@pytest.fixture
def type_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(monkeypatch, capsys)


def test_pain_52_the_same_question_gets_the_same_answer_and_only_that_on_stdout(type_in: Terminal, base: Path) -> None:
    code, out, err = type_in("generate", base, "hello", "--temperature", "0")
    assert code == 0
    assert out.endswith("\n")
    assert "tokens in" in err
    assert f"next: lit-lora chat {base}" in err
    assert type_in("generate", base, "hello", "--temperature", "0")[1] == out
    assert type_in("generate", base, stdin="hello\n")[1] == out


def test_a_seed_gives_the_same_varied_answer(type_in: Terminal, base: Path) -> None:
    hot = ("generate", base, "hello", "--temperature", "5", "--top-k", "300", "--min-p", "0", "--top-p", "1", "--seed")
    assert type_in(*hot, "1")[1] == type_in(*hot, "1")[1] != type_in(*hot, "2")[1]


def test_run_adapter_and_base_with_adapter_are_the_same_model(type_in: Terminal, base: Path, run: Path) -> None:
    plain = type_in("generate", base, "hello")[1]
    code, out, err = type_in("generate", run, "hello")
    assert code == 0
    assert out != plain
    assert "tensors applied" in err
    assert type_in("generate", run / "adapter", "hello")[1] == out
    assert type_in("generate", base, "hello", "--adapter", run)[1] == out
    assert type_in("generate", base, "hello", "--adapter", run / "adapter")[1] == out


def test_an_opened_model_is_ready_to_use_whatever_dropout_it_was_trained_with(base: Path, tmp_path: Path) -> None:
    from lit_lora.open.decoder import open_model

    run = make_run(tmp_path / "run", base)  # its dropout is 0.5
    for folder in (base, run):
        model = open_model(folder, dtype="fp32").model
        assert not [name for name, module in model.named_modules() if module.training]
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("into", "computed"), [("bf16", torch.bfloat16), ("fp16", torch.float32), ("fp32", torch.float32)]
)
def test_pain_16_a_merged_model_is_opened_in_what_its_merge_kept_the_update_in(
    into: str, computed: torch.dtype, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_lora.cli import main
    from lit_lora.open.decoder import open_model

    merged = tmp_path / "merged"
    with pytest.raises(SystemExit) as done:
        main(["merge", str(run), "--out", str(merged), "--dtype", into, "--allow-lossy"])
    assert not done.value.code
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert open_model(run).model.lm_head.weight.dtype == torch.bfloat16  # stored in float32, fastest in bfloat16
    assert open_model(merged).model.lm_head.weight.dtype == computed
    assert open_model(merged, dtype="bf16").model.lm_head.weight.dtype == torch.bfloat16


def test_an_adapter_with_added_tokens_brings_its_tokenizer(type_in: Terminal, base: Path) -> None:
    from lit_lora.open.decoder import open_model

    run = make_run(Path("tokens"), base, add_tokens=("[TICKET]", "[END]"))
    tokenizer = open_model(run, dtype="fp32").tokenizer
    assert tokenizer.encode("[TICKET]") == [384]
    assert tokenizer.fingerprint != open_model(base, dtype="fp32").tokenizer.fingerprint
    assert type_in("generate", run, "[TICKET] hello [END]", "--repetition-penalty", "1.3")[0] == 0


def test_a_file_of_prompts_comes_back_in_order_and_as_if_alone(type_in: Terminal, base: Path) -> None:
    rows = [
        {"prompt": "hello", "id": 1},
        {"messages": [{"role": "user", "content": "word " * 20}], "id": 2},
        {"prompt": "你好 😀", "system": "Be kind.", "id": 3},
    ]
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    Path("prompts.jsonl").write_text(text, encoding="utf-8")
    code, out, _ = type_in("generate", base, "--file", "prompts.jsonl", "--out", "answers.jsonl")
    assert code == 0
    assert "wrote answers.jsonl: 3 answers" in out
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{key: row[key] for key in row if key not in ("answer", "ended")} for row in answers] == rows
    assert answers[0]["answer"] + "\n" == type_in("generate", base, "hello")[1]
    assert answers[1]["answer"] + "\n" == type_in("generate", base, "word " * 20)[1]
    assert answers[2]["answer"] + "\n" == type_in("generate", base, "你好 😀", "--system", "Be kind.")[1]
    assert {row["ended"] for row in answers} <= {"stop", "length"}


def test_the_prompt_of_a_file_may_stand_in_a_column_of_another_name(type_in: Terminal, base: Path) -> None:
    Path("mails.csv").write_text("id,body\n1,hello\n2,and?\n")
    code, out, _ = type_in("generate", base, "--file", "mails.csv", "--column", "body")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["id"], row["body"]) for row in rows] == [("1", "hello"), ("2", "and?")]
    assert rows[0]["answer"] + "\n" == type_in("generate", base, "hello")[1]
    code, _, err = type_in("generate", base, "--file", "mails.csv")
    assert code == 3
    assert "found columns id, body\nhint: --column NAME" in err
    assert type_in("generate", base, "hello", "--column", "body")[0] == 2


def test_lines_of_a_text_file_are_prompts_and_answers_go_to_stdout(type_in: Terminal, base: Path) -> None:
    Path("prompts.txt").write_text("hello\n\nand you?\n")
    out = type_in("generate", base, "--file", "prompts.txt")[1]
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["hello", "and you?"]


def test_raw_continues_the_text_without_template(type_in: Terminal, base: Path) -> None:
    from lit_lora.tokenizer import Tokenizer

    _, raw, err = type_in("generate", base, "hello", "--raw")
    assert raw != type_in("generate", base, "hello")[1]
    assert f"{len(Tokenizer.load(base).encode('hello'))} + " in err


def test_a_stop_text_ends_the_answer(type_in: Terminal, base: Path) -> None:
    whole = type_in("generate", base, "hello")[1].removesuffix("\n")
    stop = whole[3:5]
    assert type_in("generate", base, "hello", "--stop", stop)[1] == whole[: whole.index(stop)] + "\n"


def test_a_template_may_be_given_by_name(type_in: Terminal, base: Path) -> None:
    code, _, err = type_in("generate", base, "hi", "--template", "zephyr")
    assert code == 0
    assert "zephyr replaces the template" in err
    assert "+<|user|>" in err
    code, _, err = type_in("generate", base, "hi", "--template", "zefyr")
    assert (code, "did you mean 'zephyr'?" in err) == (2, True)


def test_pain_03_another_template_needs_a_flag_and_shows_what_it_changes(type_in: Terminal, base: Path) -> None:
    Path("other.jinja").write_text(CHATML.replace("assistant", "bot"))
    plain, (code, out, err) = (
        type_in("generate", base, "hi"),
        type_in("generate", base, "hi", "--template", "other.jinja"),
    )
    assert code == 0
    assert out != plain[1]
    assert "-<|im_start|>assistant" in err
    assert "+<|im_start|>bot" in err
    Path("same.jinja").write_text(CHATML)
    assert type_in("generate", base, "hi", "--template", "same.jinja")[1] == plain[1]


def test_pain_45_a_local_model_opens_no_socket(
    type_in: Terminal, base: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert type_in("generate", base, "hello")[0] == 0
    assert type_in("generate", run, "hello")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["nowhere", "hello"], 3, "nowhere: no such folder"),
        (["BASE", ""], 2, "the prompt is empty"),
        (["BASE", "hello", "--temperature=-1"], 2, "temperature"),
        (["BASE", "hello", "--top-p", "2"], 2, "top_p"),
        (["BASE", "hello", "--adapter", "nowhere"], 3, "nowhere: no such folder"),
        (["BASE", "hello", "--adapter", "."], 3, "no adapter_config.json in it"),
        (["BASE", "hello", "--file", "x.jsonl"], 2, "a PROMPT or --file"),
        (["BASE", "hello", "--out", "x.jsonl"], 2, "--out needs --file"),
        (["BASE", "--file", "x.jsonl"], 3, "x.jsonl: no such file"),
        (
            ["BASE", "--file", "rows.jsonl"],
            3,
            "rows.jsonl:2: expected 'prompt' with text, or 'messages', found columns prmpt",
        ),
        (["BASE", "--file", "answered.jsonl"], 3, "answered.jsonl:1: the conversation ends with an answer"),
        (["BASE", "--file", "empty.txt"], 3, "empty.txt: no prompts in it"),
        (["BASE", "--file", "one.txt", "--out", "rows.jsonl"], 4, "rows.jsonl: already exists"),
        (["BASE", "--file", "one.txt", "--out", "rows.jsonl/answers.jsonl"], 4, "part of this path is a file"),
        (["BASE", "--file", "."], 3, ".: is a folder, expected a file"),
        (["BASE", "--file", "long.txt"], 3, "long.txt:2: the prompt has"),
        (["BASE", "hello", "--template", "nowhere.jinja"], 3, "nowhere.jinja"),
        (["BASE", "hello", "--device", "tpu"], 2, "device 'tpu' is not available"),
        ([".", "hello"], 3, "expected config.json"),
        (["unfinished", "hello"], 3, "has written no adapter yet"),
    ],
)
def test_mistakes_are_one_clear_line(
    type_in: Terminal, base: Path, arguments: list[str], code: int, problem: str
) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a"}\n{"prmpt": "a"}\n')
    answered = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    Path("answered.jsonl").write_text(json.dumps(answered))
    Path("empty.txt").write_text("\n\n")
    Path("one.txt").write_text("one\n")
    Path("long.txt").write_text("hello\n" + "word " * 300 + "\n")
    Path("unfinished").mkdir()
    Path("unfinished/config.yaml").write_text("recipe: lora\n")
    before = Path("rows.jsonl").read_text()
    found, out, err = type_in("generate", *[str(base) if word == "BASE" else word for word in arguments])
    assert (found, out) == (code, "")
    assert problem in next(line for line in err.splitlines() if line.startswith("error: "))
    assert Path("rows.jsonl").read_text() == before


def test_an_adapter_whose_base_is_not_here_says_how_to_name_it(type_in: Terminal, base: Path, run: Path) -> None:
    import shutil

    shutil.copytree(run / "adapter", "moved")
    config = json.loads(Path("moved/adapter_config.json").read_text())
    Path("moved/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/name"}))
    code, _, err = type_in("generate", "moved", "hello")
    assert code == 2
    assert "base model owner/name not found" in err
    assert "--adapter moved" in err
    assert type_in("generate", base, "hello", "--adapter", "moved")[0] == 0


def test_a_tokenizer_larger_than_the_embedding_is_refused(type_in: Terminal, base: Path) -> None:
    import shutil

    from lit_lora.tokenizer import Tokenizer

    shutil.copytree(base, "grown")
    tokenizer = Tokenizer.load(base)
    tokenizer.add_tokens(["[NEW]"])
    tokenizer.save(Path("grown"))
    code, _, err = type_in("generate", "grown", "hello")
    assert code == 3
    assert "the tokenizer has 385 tokens, the model's embedding 384" in err


@pytest.mark.parametrize(
    "command", ["generate RUN/merged hello", "chat RUN/merged", "evaluate RUN RUN/merged --data r.jsonl"]
)
def test_a_run_that_is_not_merged_yet_says_how_to_merge_it(type_in: Terminal, run: Path, command: str) -> None:
    Path("r.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    code, out, err = type_in(*command.replace("RUN", str(run)).split())
    assert (code, out) == (3, "")
    assert f"{run}/merged: {run} has not been merged yet" in err
    assert f"lit-lora merge {run}\n" in err
    assert "download" not in err


def trained_on(run: Path, folder: Path, **data: object) -> Path:
    """A copy of the run, whose rows were read with these settings."""
    from lit_lora.data import DataConfig
    from lit_lora.data.trained import save_reading

    shutil.copytree(run, folder)
    save_reading(DataConfig.model_validate({"path": "rows.jsonl", **data}), folder / "adapter")
    return folder


def test_a_run_answers_under_the_system_message_it_was_trained_with(
    type_in: Terminal, run: Path, tmp_path: Path
) -> None:
    trained = trained_on(run, tmp_path / "trained", system="Be brief.")
    _, expected, _ = type_in("generate", run, "hello", "--system", "Be brief.")
    _, without, _ = type_in("generate", run, "hello")
    assert expected != without

    for folder in (trained, trained / "adapter"):
        _, out, err = type_in("generate", folder, "hello")
        assert out == expected
        assert "as trained: system message 'Be brief.'" in err
    assert type_in("generate", trained, "hello", "--system", "")[1] == without
    assert (
        type_in("chat", trained, stdin="hello\n")[1]
        == type_in("chat", run, "--system", "Be brief.", stdin="hello\n")[1]
    )


def test_one_option_does_not_drop_the_other_settings_of_training(type_in: Terminal, run: Path, tmp_path: Path) -> None:
    columns = {"prompt": "Is it good? {review}", "completion": "label"}
    trained = trained_on(run, tmp_path / "trained", system="Be brief.", columns=columns)
    asked = type_in("generate", run, "Is it good? Great film", "--system", "Be long.")[1]
    assert type_in("generate", trained, "Great film", "--system", "Be long.")[1] == asked
    plain = type_in("generate", run, "Great film", "--system", "Be brief.")[1]
    assert type_in("generate", trained, "Great film", "--columns", "none")[1] == plain


def test_rows_of_a_file_are_asked_in_the_template_of_training_and_need_no_answer(
    type_in: Terminal, run: Path, tmp_path: Path
) -> None:
    columns = {"prompt": "Is {title} good? {review}", "completion": "label"}
    trained = trained_on(run, tmp_path / "trained", columns=columns, values={"label": {"0": "no", "1": "yes"}})
    rows = [{"title": "A", "review": "Great"}, {"title": "A", "review": "Great", "label": 1, "id": 7}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = type_in("generate", run, "Is A good? Great")[1]

    code, out, err = type_in("generate", trained, "--file", "rows.jsonl")

    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0, err
    assert [answer["answer"] + "\n" for answer in answers] == [expected, expected]
    assert (answers[1]["id"], answers[1]["label"]) == (7, 1)


def test_tools_and_roles_of_a_row_are_read_as_in_training(type_in: Terminal, run: Path, tmp_path: Path) -> None:
    from lit_lora.cli import generate
    from lit_lora.data.trained import read_reading

    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {"messages": [{"role": "human", "content": "Hi"}], "tools": tools}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    reading = read_reading(run, run / "adapter")
    [(_, _, conversation)] = generate._rows(tmp_path / "rows.jsonl", "prompt", reading)
    assert conversation.tools == tools
    assert conversation.messages == [{"role": "user", "content": "Hi"}]


def test_columns_of_the_rows_are_never_overwritten_by_answers(type_in: Terminal, run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Hi", "answer": "right"}) + "\n")
    code, out, err = type_in("generate", run, "--file", "rows.jsonl")
    record = json.loads(out)
    assert code == 0
    assert record["answer"] == "right"
    assert set(record) == {"question", "answer", "model_answer", "model_ended"}
    assert "model_answer and model_ended" in err

    (tmp_path / "again.jsonl").write_text(json.dumps({**record, "ended": "stop"}) + "\n")
    code, _, err = type_in("generate", run, "--file", "again.jsonl")
    assert code != 0
    assert "rename or remove them" in err


def test_a_merged_model_answers_as_it_was_trained_wherever_it_is_moved(
    type_in: Terminal, run: Path, tmp_path: Path
) -> None:
    from lit_lora.cli import main

    trained = trained_on(run, tmp_path / "trained", system="Be brief.")
    with pytest.raises(SystemExit) as caught:
        main(["merge", str(trained), "--out", str(tmp_path / "elsewhere"), "--dtype", "fp32"])
    assert not caught.value.code
    _, out, err = type_in("generate", tmp_path / "elsewhere", "hello")
    assert "as trained: system message 'Be brief.'" in err
    assert out.endswith(type_in("generate", trained, "hello")[1])  # after the report of the merge


def test_another_adapter_in_a_chat_brings_the_system_message_of_its_training(
    type_in: Terminal, run: Path, base: Path, tmp_path: Path
) -> None:
    trained = trained_on(run, tmp_path / "trained", system="Be brief.")
    expected = type_in("chat", trained, stdin="hello\n")[1]
    assert type_in("chat", base, stdin=f"/adapter {trained}\nhello\n")[1] == expected
    bare = type_in("chat", base, stdin="hello\n")[1]
    assert type_in("chat", trained, stdin="/adapter off\nhello\n")[1] == bare


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hello", "completion": "bad", "label": False},
        {"prompt": "hello", "chosen": "a", "rejected": "b"},
        {"instruction": "hello", "input": ""},
        {"question": "hello"},
        {"question": "hello", "answer": 3},
        {"messages": [{"role": "user", "content": "hello"}], "weight": 0},
        {"conversations": [{"from": "human", "value": "hello"}]},
        {"prompt": [{"role": "user", "content": "hello"}]},
    ],
    ids=str,
)
def test_a_row_of_any_format_is_asked_whatever_its_answer_is(
    type_in: Terminal, run: Path, tmp_path: Path, row: dict[str, object]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    code, out, err = type_in("generate", run, "--file", "rows.jsonl")
    assert code == 0, err
    record = json.loads(out)
    answer = record.get("model_answer", record.get("answer"))
    assert answer + "\n" == type_in("generate", run, "hello")[1]
    assert row.items() <= record.items()
