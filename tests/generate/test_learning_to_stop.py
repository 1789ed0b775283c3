from __future__ import annotations

import copy

import torch

from lit_lora.generate import Sampling, answer_all
from lit_lora.model import CausalLM
from lit_lora.tokenizer import Message, Tokenizer, encode_chat, encode_prompt


def test_pain_04_after_overfitting_four_rows_every_answer_ends_by_itself(model: CausalLM, tokenizer: Tokenizer) -> None:
    assert tokenizer.pad_id == tokenizer.eos_id
    answers = ["Paris.", "yes", '{"order": "48213"}', "no, thanks 😀"]
    chats: list[list[Message]] = [
        [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer}]
        for number, answer in enumerate(answers)
    ]
    rows = [encode_chat(tokenizer, chat) for chat in chats]
    student = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        for row in rows:
            labels = torch.tensor([i if learn else -100 for i, learn in zip(row.ids, row.loss_mask, strict=True)])
            logits = student(torch.tensor([row.ids]))[0]
            torch.nn.functional.cross_entropy(logits[:-1], labels[1:]).backward()
        optimizer.step()
    prompts = [encode_prompt(tokenizer, chat[:-1]) for chat in chats]
    given = answer_all(student, tokenizer, prompts, Sampling(max_new_tokens=40))
    assert [(answer.text, answer.ended) for answer in given] == [(answer, "stop") for answer in answers]
