"""Config keys of other tools, and what the same is called here.

After PEFT, the training arguments of transformers and TRL, Axolotl, LLaMA-Factory, torchtune, mlx-lm and Unsloth.
"""

from __future__ import annotations

__all__ = ["ALIASES", "ANSWERS"]

ALIASES: dict[str, tuple[str, ...]] = {
    "model.path": ("base_model", "model_name_or_path", "model_name", "model_id", "pretrained_model_name_or_path"),
    "model.dtype": ("bf16", "fp16", "tf32", "torch_dtype", "precision", "compute_dtype", "bf16_full_eval", "pure_bf16"),
    "model.device": ("device_map", "use_cpu", "no_cuda"),
    "model.chat_template": ("template", "chat_template_path", "chat_template_jinja", "prompt_template"),
    "data.path": (
        *("dataset", "datasets", "dataset_name", "dataset_path", "data_path", "dataset_dir", "train_file"),
        *("train_dataset", "train_data", "data_files", "dataset_id"),
    ),
    "data.validation": (
        *("val_set_size", "val_size", "validation_split", "test_size", "eval_dataset", "validation_file"),
        *("test_datasets", "val_dataset", "validation_split_percentage", "eval_data"),
    ),
    "data.format": ("dataset_format", "conversation", "conversation_style"),
    "data.columns": (
        *("dataset_text_field", "text_field", "field_messages", "column_map", "field_instruction", "field_output"),
        *("prompt_feature", "completion_feature", "text_column", "message_property_mappings"),
    ),
    "data.system": ("system_prompt", "default_system", "system_message", "new_system_prompt"),
    "data.limit": ("max_samples", "max_train_samples", "num_samples", "shards"),
    "data.max_seq_length": (
        *("cutoff_len", "sequence_len", "max_seq_len", "max_length", "model_max_length", "seq_length"),
        *("block_size", "max_sequence_length", "context_length"),
    ),
    "data.learn": (
        *("train_on_inputs", "train_on_prompt", "completion_only_loss", "assistant_only_loss", "mask_prompt"),
        *("train_on_source", "train_on_input", "mask_history", "roles_to_train", "train_on_responses_only"),
    ),
    "peft.init_adapter": ("adapter_name_or_path", "lora_model_dir", "lora_weights", "adapter_checkpoint"),
    "peft.name": ("use_dora", "peft_type", "peft_method", "fine_tune_type", "tuner_type", "train_type"),
    "peft.rank": ("r", "lora_r", "lora_rank"),
    "peft.alpha": ("lora_alpha",),
    "peft.dropout": ("lora_dropout",),
    "peft.target_modules": (
        *("lora_target_modules", "lora_target", "lora_target_linear", "lora_attn_modules", "apply_lora_to_mlp"),
        *("apply_lora_to_output", "lora_keys"),
    ),
    "peft.modules_to_save": ("lora_modules_to_save", "additional_target"),
    "peft.layers": ("layers_to_transform", "lora_layers", "lora_layers_to_transform", "num_layers"),
    "peft.init": ("init_lora_weights", "pissa_init", "lora_init"),
    "peft.use_rslora": ("lora_use_rslora", "rslora"),
    "peft.loraplus_lr_ratio": ("loraplus_ratio",),
    "train.epochs": ("num_train_epochs", "num_epochs", "n_epochs", "max_epochs"),
    "train.max_steps": ("iters", "max_iters", "total_steps", "num_steps", "max_train_steps", "max_steps_per_epoch"),
    "train.activation_checkpointing": (
        *("gradient_checkpointing", "use_gradient_checkpointing", "grad_checkpoint", "enable_activation_checkpointing"),
        "gradient_checkpointing_kwargs",
    ),
    "train.max_grad_norm": ("gradient_clipping", "clip_grad_norm", "grad_clip", "max_norm", "gradient_clip_val"),
    "train.eval_every": (
        *("eval_steps", "evals_per_epoch", "steps_per_eval", "eval_strategy", "evaluation_strategy", "eval_interval"),
        *("do_eval", "eval_on_start"),
    ),
    "train.eval_rows": ("max_eval_samples", "val_batches", "eval_iters", "eval_max_batches"),
    "train.save_every": ("save_steps", "saves_per_epoch", "save_strategy", "save_interval", "checkpoint_every"),
    "train.keep_last": ("save_total_limit",),
    "train.patience": ("early_stopping_patience",),
    "train.best_metric": ("metric_for_best_model", "load_best_model_at_end", "greater_is_better"),
    "optimizer.name": ("optim", "optimizer_name", "optimizer_type", "use_8bit_adam"),
    "optimizer.lr": ("learning_rate", "lr_rate", "max_lr"),
    "optimizer.weight_decay": ("wd",),
    "optimizer.betas": ("adam_beta1", "adam_beta2", "adam_betas", "beta1", "beta2"),
    "optimizer.eps": ("adam_epsilon", "adam_eps", "epsilon"),
    "schedule.name": ("lr_scheduler_type", "lr_scheduler", "lr_schedule", "scheduler", "scheduler_type"),
    "schedule.warmup": ("warmup_steps", "warmup_ratio", "num_warmup_steps", "lr_warmup_steps", "warmup_fraction"),
    "schedule.min_ratio": ("cosine_min_lr_ratio", "min_lr_ratio", "min_lr", "lr_scheduler_kwargs"),
    "seed": ("random_state", "random_seed", "data_seed"),
    "out": ("output_dir", "out_dir", "adapter_path", "save_dir", "output_path", "logging_dir", "checkpoint_dir"),
}
"""Our key -> what others call it. All of these exist in the recipe ``lora``."""

ANSWERS: dict[tuple[str, ...], str] = {
    ("gradient_accumulation_steps", "grad_accumulation_steps", "grad_accum"): (
        "train.batch_size counts all rows of a step; train.micro_batch_tokens sets how many tokens are computed at once"
    ),
    ("per_device_train_batch_size", "micro_batch_size", "per_device_batch_size", "train_batch_size"): (
        "train.batch_size counts all rows of a step, with those of accumulated gradients; train.micro_batch_tokens "
        "sets how many tokens are computed at once"
    ),
    ("per_device_eval_batch_size", "eval_batch_size"): (
        "validation batches follow from train.micro_batch_tokens and change no result"
    ),
    ("load_in_4bit", "load_in_8bit", "quantization_bit", "bnb_4bit_quant_type", "quantization"): (
        "recipe: qlora quantizes the base, by its section quantize"
    ),
    ("bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "quantization_method", "gptq"): (
        "recipe: qlora quantizes the base, by its section quantize"
    ),
    ("adapter", "finetuning_type", "stage", "trainer_type", "use_peft", "rl"): (
        "recipe chooses what trains (lora, qlora, adapter, full or classify), and peft.name the method"
    ),
    (
        "lora",
        "lora_config",
        "lora_parameters",
        "peft_config",
        "qlora",
        "adapter_config",
    ): "the section of the method is peft",
    ("training", "training_args", "training_arguments", "trainer", "args"): "the section is train",
    ("packing", "sample_packing", "eval_sample_packing", "packed", "neat_packing", "pad_to_sequence_len"): (
        "not needed: rows are always computed side by side, without padding, and never see each other"
    ),
    ("group_by_length", "length_column_name", "padding_free", "use_unpad", "padding_side", "padding"): (
        "not needed: rows are always computed side by side, without padding, and never see each other"
    ),
    ("logging_steps", "steps_per_report", "log_every_n_steps", "logging_strategy", "logging_first_step"): (
        "not needed: every step is in metrics.jsonl of the run folder"
    ),
    (
        *("report_to", "wandb_project", "wandb_run_id", "wandb_name", "wandb_entity", "wandb_watch", "wandb"),
        *("use_wandb", "run_name", "metric_logger", "use_tensorboard", "mlflow_experiment_name", "plot_loss"),
    ): ("not needed: the run folder has metrics.jsonl, a plot, and TensorBoard events where tensorboard is installed"),
    ("resume_from_checkpoint", "auto_resume_from_checkpoints", "resume", "resume_adapter_file"): (
        "the option --resume continues a run; peft.init_adapter=FOLDER starts a new one from an adapter"
    ),
    ("overwrite_output_dir", "overwrite", "overwrite_cache"): "the option --overwrite replaces a run",
    ("neftune_noise_alpha", "noisy_embedding_alpha"): "noise on embeddings is not supported; peft.dropout regularizes",
    ("label_smoothing_factor", "label_smoothing"): "label smoothing is not supported",
    ("shuffle", "shuffle_seed", "dataloader_shuffle", "shuffle_merged_datasets"): (
        "rows are shuffled anew in every epoch, by seed"
    ),
    (
        *("dataloader_num_workers", "preprocessing_num_workers", "dataset_num_proc", "num_workers"),
        *("dataloader_pin_memory", "dataset_processes", "remove_unused_columns", "dataset_prepared_path", "streaming"),
    ): "not needed: rows are tokenized once, cached, and mapped into memory",
    (
        *("flash_attention", "flash_attn", "attn_implementation", "sdp_attention", "xformers_attention"),
        *(
            "use_flash_attention_2",
            "flash_attn_2",
            "torch_compile",
            "compile",
            "use_liger_kernel",
            "enable_liger_kernel",
        ),
    ): "not needed: the fastest exact kernels that the machine has are used",
    (
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "ddp_timeout",
        "ddp_find_unused_parameters",
        "local_rank",
        "tensor_parallel",
    ): ("a run uses one device, model.device"),
    ("trust_remote_code", "trust_remote_code_tokenizer"): "code of a checkpoint never runs",
    ("tokenizer", "tokenizer_type", "tokenizer_name", "tokenizer_path", "tokenizer_config"): (
        "the tokenizer is that of model.path"
    ),
    ("tokens", "add_tokens", "added_tokens"): "peft.trainable_tokens adds tokens and trains them",
    ("do_train", "do_predict", "strict", "task_type", "inference_mode"): "not needed",
    ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token"): "a run writes to its folder, out, only",
    ("evaluation", "eval"): "train.eval_every and train.eval_rows set when and on how many rows a run is validated",
}
"""Keys of others without exactly one of ours -> what to do instead. Keys named in it exist in the recipe ``lora``."""
