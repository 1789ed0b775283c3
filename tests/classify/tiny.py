"""Tiny random encoders and encoder-decoders of transformers, a tokenizer of words for them, and a task to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import yaml
from tokenizers import models, pre_tokenizers, processors
from torch import nn

GOOD = ("fine", "great", "lovely", "brilliant")
BAD = ("bad", "dull", "awful", "boring")
OTHER = ("a", "the", "film", "story", "was", "and", "truly", "its", "acting", "plot", "negative", "positive")
SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
WORDS = (*SPECIALS, *GOOD, *BAD, *OTHER)

_SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_SEQ2SEQ_SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5_SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "bert": lambda **more: transformers.BertConfig(**_SIZES | {"max_position_embeddings": 32} | more),
    "roberta": lambda **more: transformers.RobertaConfig(
        **_SIZES | {"max_position_embeddings": 33, "type_vocab_size": 1, "bos_token_id": 1, "eos_token_id": 2} | more
    ),
    "deberta-v2": lambda **more: transformers.DebertaV2Config(
        **_SIZES
        | {
            "max_position_embeddings": 32,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "pooler_dropout": 0.0,
            "pooler_hidden_size": 16,
        }
        | more
    ),
    "t5": lambda **more: transformers.T5Config(**_T5_SIZES | {"tie_word_embeddings": True} | more),
    "flan-t5": lambda **more: transformers.T5Config(
        **_T5_SIZES | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} | more
    ),
    "bart": lambda **more: transformers.BartConfig(**_SEQ2SEQ_SIZES | more),
    "mbart": lambda **more: transformers.MBartConfig(**_SEQ2SEQ_SIZES | more),
    "nllb": lambda **more: transformers.M2M100Config(**_SEQ2SEQ_SIZES | {"scale_embedding": True} | more),
    "pegasus": lambda **more: transformers.PegasusConfig(**_SEQ2SEQ_SIZES | {"decoder_start_token_id": 0} | more),
    "modernbert": lambda **more: transformers.ModernBertConfig(
        **_SIZES
        | {
            "max_position_embeddings": 32,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            "bos_token_id": 1,
            "cls_token_id": 1,
            "eos_token_id": 2,
            "sep_token_id": 2,
        }
        | more
    ),
    "electra": lambda **more: transformers.ElectraConfig(
        **_SIZES | {"max_position_embeddings": 32, "embedding_size": 12} | more
    ),
    "distilbert": lambda **more: transformers.DistilBertConfig(
        **{
            "vocab_size": len(WORDS),
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        }
        | more
    ),
    "xlm-roberta": lambda **more: transformers.XLMRobertaConfig(
        **_SIZES | {"max_position_embeddings": 33, "type_vocab_size": 1, "bos_token_id": 1, "eos_token_id": 2} | more
    ),
}
SEQ2SEQ = ("t5", "flan-t5", "bart", "mbart", "nllb", "pegasus")
"""Encoder-decoders, which write texts; the others are encoders with a head."""
FAMILIES = ("bert", "roberta", "deberta-v2", "t5")
"""The types on which everything is tested."""
MORE_FAMILIES = tuple(family for family in CONFIGS if family not in FAMILIES)
"""Types that share the code of those: their names and heads are tested."""
ENCODERS = tuple(family for family in FAMILIES if family not in SEQ2SEQ)


def make_model(family: str, *, seed: int = 0, labels: int = 2, spread: float = 0.2, **more: Any) -> nn.Module:
    """A model with its head, of random weights that are no zeros and ones."""
    torch.manual_seed(seed)
    config = CONFIGS[family](**({} if family in SEQ2SEQ else {"num_labels": labels}), **more)
    auto = transformers.AutoModelForSeq2SeqLM if family in SEQ2SEQ else transformers.AutoModelForSequenceClassification
    model: nn.Module = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(mean=1.0 if norm else 0.0, std=spread)
    return model.eval()


def inputs(family: str) -> dict[str, torch.Tensor]:
    """Two rows of seven and of four tokens, and for a decoder two of three."""
    ids = torch.randint(4, len(WORDS), (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 4:], ids[1, 4:] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    return {**found, "decoder_input_ids": torch.tensor([[0, 5, 6], [0, 9, 4]])} if family in SEQ2SEQ else found


def save_base(family: str, folder: Path, *, head: bool = False, **more: Any) -> Path:
    """A checkpoint folder with a tokenizer; of an encoder without a head, as after pretraining, unless asked for."""
    model: Any = make_model(family, **more)
    (model if head or family in SEQ2SEQ else model.base_model).save_pretrained(folder)
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    backend.post_processor = processors.TemplateProcessing(
        single="$A [SEP]" if family in SEQ2SEQ else "[CLS] $A [SEP]",
        pair="$A $B [SEP]" if family in SEQ2SEQ else pair,
        special_tokens=[(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")],
    )
    backend.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    settings = {**names, "eos_token": "[SEP]", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**6}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_rows(path: Path, count: int = 48, *, seed: int = 0, **columns: str) -> Path:
    """Sentences that are good or bad by one word, as JSON Lines; keywords rename text and label."""
    generator = torch.Generator().manual_seed(seed)
    text, label = columns.get("text", "sentence"), columns.get("label", "label")

    def draw(words: tuple[str, ...], many: int = 1) -> list[str]:
        return [words[int(i)] for i in torch.randint(0, len(words), (many,), generator=generator)]

    rows = []
    for number in range(count):
        good = number % 2
        about = draw(OTHER[:10], 2 + number % 5)
        rows.append({text: " ".join([*about, *draw(GOOD if good else BAD), "film"]), label: good})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: Path, **sections: Any) -> Path:
    """A config of a short run on ``folder/base`` and ``folder/rows.jsonl``; sections given are mixed in."""
    config: dict[str, Any] = {
        "recipe": "classify",
        "model": {"path": str(folder / "base"), "dtype": "fp32"},
        "data": {"path": str(folder / "rows.jsonl"), "validation": 12},
        "train": {"max_steps": 9, "batch_size": 8, "eval_every": 3, "samples": 1},
        "optimizer": {"lr": 2e-2},
        "out": str(folder / "run"),
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
