"""The chat templates that come with lit-lora, against the text that each family documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_lora.errors import InputError, UsageError
from lit_lora.tokenizer import Message, Tokenizer, encode_chat, encode_prompt
from lit_lora.tokenizer.template import ChatTemplate
from lit_lora.tokenizer.templates import NAMED, named_template
from tests.tiny import tiny_tokenizer
from tests.tokenizer.conftest import MakeTokenizer, change_json

SYSTEM: Message = {"role": "system", "content": "Be brief."}
CHAT: list[Message] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]

# name -> system, user, assistant, user and the opening of an answer; then what comes before the first user without a
# system message.
RENDERINGS: dict[str, tuple[str, str]] = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!</s>\n\n### Instruction:\nBye\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n",
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n",
    ),
    "command-r": (
        "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello!<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Bye<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
    ),
    "deepseek": (
        "<s>Be brief.<｜User｜>Hi<｜Assistant｜>Hello!</s><｜User｜>Bye<｜Assistant｜>",
        "<s><｜User｜>",
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\n",
    ),
    "granite": (
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Hello!<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Bye<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "<|start_of_role|>user<|end_of_role|>",
    ),
    "llama-2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Bye [/INST]",
        "<s>[INST] ",
    ),
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\n",
    ),
    "mistral": ("<s>[INST] Be brief.\n\nHi[/INST] Hello!</s>[INST] Bye[/INST]", "<s>[INST] "),
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nBye<|end|>\n"
        "<|assistant|>\n",
        "<|user|>\n",
    ),
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Hello!<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        "<|im_start|>user<|im_sep|>",
    ),
    "plain": (
        "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nHello!</s>\n\n### User:\nBye\n\n### Assistant:\n",
        "### User:\n",
    ),
    "qwen": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n",
    ),
    "tulu": (
        "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello!</s>\n<|user|>\nBye\n<|assistant|>\n",
        "<|user|>\n",
    ),
    "vicuna": (
        "Be brief. USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT:",
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ",
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
        "<|user|>\n",
    ),
}


def compiled(name: str) -> ChatTemplate:
    text = named_template(name, starts_with_bos=False)
    return ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"}, name)


def test_every_template_has_a_rendering_and_a_file() -> None:
    files = {path.stem for path in Path(named_template.__code__.co_filename).parent.glob("*.jinja")}
    assert set(RENDERINGS) == set(NAMED) == files


@pytest.mark.parametrize("name", RENDERINGS)
def test_a_conversation_reads_as_the_family_documents(name: str) -> None:
    template = compiled(name)
    with_system, before = RENDERINGS[name]
    assert template.render([SYSTEM, *CHAT], generation_prompt=True) == with_system
    assert template.render(CHAT, generation_prompt=True).startswith(before + "Hi")
    # A finished answer and the next question continue the same text.
    assert with_system.startswith(template.render([SYSTEM, CHAT[0]], generation_prompt=True))
    assert with_system.startswith(template.render([SYSTEM, *CHAT]))


@pytest.mark.parametrize("name", ["llama-2", "mistral", "gemma"])
def test_templates_that_alternate_refuse_two_questions_in_a_row(name: str) -> None:
    with pytest.raises(InputError, match="must alternate"):
        compiled(name).render([CHAT[0], CHAT[0]])


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "deepseek"])
def test_a_role_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="only user and assistant have a place"):
        compiled(name).render([CHAT[0], {"role": "tool", "content": "5"}])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's tokenizer that knows every token of every template, and has no template."""
    tokens = dict.fromkeys(["<s>", "</s>", *(token for tokens in NAMED.values() for token in tokens)])
    return tiny_tokenizer(
        tmp_path / "base", template=None, specials=tuple(tokens), bos="<s>", eos="</s>", pad=None, vocab_size=384
    )


@pytest.mark.parametrize("name", NAMED)
def test_training_learns_to_stop_with_every_template_and_generation_does(base: Path, name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(base)
    tokenizer.choose_template(name)
    encoded = encode_chat(tokenizer, CHAT[:2])
    learned = [token for token, target in zip(encoded.ids, encoded.loss_mask, strict=True) if target]
    assert tokenizer.decode(learned).strip() == "Hello!"
    assert learned[-1] in tokenizer.stop_ids

    # What is saved says the same to us and to transformers.
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.stop_ids == tokenizer.stop_ids
    prompt = encode_prompt(tokenizer, CHAT)
    assert encode_prompt(again, CHAT) == prompt
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    assert theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False) == prompt


def test_other_programs_stop_at_the_end_of_turn_too(base: Path, tmp_path: Path) -> None:
    import json

    change_json(base / "generation_config.json", eos_token_id=1, temperature=0.5)
    tokenizer = Tokenizer.load(base)
    tokenizer.choose_template("llama-3")
    tokenizer.save(tmp_path / "saved")
    generation = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [1, tokenizer.token_id("<|eot_id|>")], "temperature": 0.5}


@pytest.mark.parametrize("name", ["chatml", "zephyr", "llama-2"])
def test_a_conversation_begins_with_bos_once_if_the_tokenizer_puts_it_there(make: MakeTokenizer, name: str) -> None:
    tokenizer = Tokenizer.load(make("llama2", bos=True))
    tokenizer.choose_template(name)
    ids = encode_prompt(tokenizer, CHAT[:1])
    assert ids[0] == tokenizer.bos_id
    assert ids.count(ids[0]) == 1


def test_a_template_whose_end_of_turn_is_no_token_is_refused(make: MakeTokenizer) -> None:
    tokenizer = Tokenizer.load(make("zephyr"))
    with pytest.raises(
        InputError, match=r"chat template phi-3: <\|end\|> ends an answer, which is not a token"
    ) as caught:
        tokenizer.choose_template("phi-3")
    assert "vicuna" in str(caught.value.hint)
    assert "peft.trainable_tokens" in str(caught.value.hint)
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.choose_template("phi-3")
    assert tokenizer.token_id("<|end|>") in tokenizer.stop_ids
    assert encode_chat(tokenizer, CHAT[:2]).ids.count(tokenizer.token_id("<|end|>") or 0) == 2


def test_a_user_who_writes_the_new_end_of_turn_writes_text(make: MakeTokenizer) -> None:
    tokenizer = Tokenizer.load(make("zephyr"))
    tokenizer.add_tokens(["<|end|>"])
    end = tokenizer.token_id("<|end|>")
    assert end in tokenizer.encode("</s> and <|end|>")  # so far it is a word
    tokenizer.choose_template("phi-3")
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "</s> and <|end|>"}])
    assert ids.count(end or 0) == 1
    assert "and <|end|><|end|>" in tokenizer.decode(ids, skip_special=False)


def test_a_mark_in_several_tokens_is_counted(make: MakeTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.load(make("zephyr"))
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.choose_template("phi-3")
    pieces = len(tokenizer.encode("<|user|>"))
    assert pieces > 1
    assert f"<|user|> is {pieces} tokens" in capsys.readouterr().err


def test_an_unknown_name_is_answered_with_the_known_ones(make: MakeTokenizer) -> None:
    tokenizer = Tokenizer.load(make())
    with pytest.raises(
        UsageError, match=r"no chat template 'chatlm' \(did you mean 'chatml'\?\), known: default, alpaca"
    ):
        tokenizer.choose_template("chatlm")
    with pytest.raises(InputError, match=r"nowhere\.jinja"):
        tokenizer.choose_template("nowhere.jinja")


def test_a_file_is_a_template_too(make: MakeTokenizer, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer = Tokenizer.load(make())
    tokenizer.choose_template(str(tmp_path / "own.jinja"))
    assert tokenizer.template.render(CHAT[:1]) == "user: Hi<|im_end|>"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}<|nonsense|>{% endfor %}")
    with pytest.raises(InputError, match=r"<\|nonsense\|> ends an answer"):
        tokenizer.choose_template(str(tmp_path / "own.jinja"))
