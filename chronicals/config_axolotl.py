"""Names that other tools' configs use, as tables: what they are called here, what has no effect, what is not supported.

The names are those of Axolotl's schema, of transformers' `TrainingArguments` and of TRL's `SFTConfig`, and the common
ones of TRL's scripts, Unsloth and LLaMA-Factory. A key in none of these tables and not in the schema is unknown, and
gets the nearest name. Left out: keys of Axolotl's plugins beyond the common ones.
"""

from __future__ import annotations

from typing import Any

ALIASES: dict[str, str] = {
    "alpha_pattern": "lora_alpha_pattern",
    "auto_resume_from_checkpoints": "resume_from_checkpoint",
    "bfloat16": "bf16",
    "bias": "lora_bias",
    "cutoff_len": "sequence_len",
    "dataset_num_proc": "dataset_processes",
    "ensure_weight_tying": "peft_ensure_weight_tying",
    "evaluation_strategy": "eval_strategy",
    "exclude_modules": "lora_exclude_modules",
    "float16": "fp16",
    "full_determinism": "deterministic",
    "gradient_checkpointing": "recompute",
    "init_lora_weights": "peft_init_lora_weights",
    "label_smoothing": "label_smoothing_factor",
    "layers_pattern": "peft_layers_pattern",
    "layers_to_transform": "peft_layers_to_transform",
    "lora_rank": "lora_r",
    "lr_scheduler_type": "lr_scheduler",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "model_name": "base_model",
    "model_name_or_path": "base_model",
    "model_revision": "revision_of_model",
    "modules_to_save": "lora_modules_to_save",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "packing": "sample_packing",
    "per_device_eval_batch_size": "eval_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "r": "lora_r",
    "random_state": "seed",
    "rank_pattern": "lora_rank_pattern",
    "run_name": "wandb_name",
    "target_modules": "lora_target_modules",
    "use_dora": "peft_use_dora",
    "use_gradient_checkpointing": "recompute",
    "use_rslora": "peft_use_rslora",
}

DATASET_ALIASES: dict[str, str] = {
    "message_field_content": "message_property_mappings.content",
    "message_field_role": "message_property_mappings.role",
    "subset": "name",
}

# key -> value as written -> value here. Keys of the first level are names here, not aliases.
VALUES: dict[str, dict[Any, Any]] = {
    "optimizer": {
        # "paged" is where moments wait, never what they are
        **dict.fromkeys("adamw_torch adamw_torch_fused adamw_hf paged_adamw paged_adamw_32bit".split(), "adamw"),
        **dict.fromkeys("adamw_bnb_8bit adamw_torch_8bit ao_adamw_8bit paged_adamw_8bit".split(), "adamw_8bit"),
    },
    "lr_scheduler": {"constant_with_warmup": "constant", "wsd": "warmup_stable_decay"},
    "recompute": {True: "full", False: "light", "unsloth": "full", "offload": "full", "offload_disk": "full"},
    "peft_init_lora_weights": {True: "kaiming", False: "false"},
    "resume_from_checkpoint": {True: "auto"},
    "save_strategy": {False: "no"},  # YAML 1.1 reads a bare `no` as false
    "eval_strategy": {False: "no"},
    "max_steps": {-1: None, 0: None},  # how TrainingArguments says "not set"
    "wandb_watch": {"false": None},
    "wandb_log_model": {"false": None},
}

DATASET_VALUES: dict[str, dict[Any, Any]] = {"ds_type": {"jsonl": "json"}}

# Values that Axolotl or transformers know and we do not have yet; other wrong values get the list of what there is.
KNOWN_VALUES: dict[str, frozenset[str]] = {
    "optimizer": frozenset(
        """
    adafactor adagrad adalomo adamw_anyprecision adamw_apex_fused adamw_torch_4bit adamw_torch_npu_fused adopt_adamw
    ao_adamw_4bit ao_adamw_fp8 apollo_adamw came_pytorch dion flash_adam flash_adamw flash_lion flash_sgd flash_sgdw
    galore_adafactor galore_adamw galore_adamw_8bit grokadamw lion lion_32bit lion_8bit lomo muon optimi_adamw
    paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit paged_lion_8bit
    q_galore_adamw8bit rmsprop rmsprop_bnb schedule_free_adamw schedule_free_sgd sgd sinkgd
    stable_adamw
    """.split()
    ),
    "activation_offloading": frozenset(["legacy", "disk"]),
    "adapter": frozenset(["llama-adapter"]),
    "bnb_4bit_quant_type": frozenset(["fp4"]),
    "lr_scheduler": frozenset(
        """
    cosine_warmup_with_min_lr cosine_with_min_lr cosine_with_restarts greedy inverse_sqrt log_sweep one_cycle
    polynomial reduce_lr_on_plateau rex
    """.split()
    ),
    "excess_length_strategy": frozenset(["raise"]),
    "train_on_eos": frozenset(["none"]),
    "save_strategy": frozenset(["best"]),
}

_ATTENTION = "attention is always exact over packed documents; its backend is chosen by what is installed"
_SPEED = "it is about speed and memory, never about what is learnt"
_FAMILY = "the model's own config.json names its family"

# Accepted, without any effect: key -> why, one line, for the log.
NOTES: dict[str, str] = {
    "tf32": "matrix products run in the compute dtype that bf16 and fp16 choose",
    "flash_attention": _ATTENTION,
    "attn_implementation": _ATTENTION,
    "pad_to_sequence_len": "every bin has sequence_len slots",
    "model_type": _FAMILY,
    "type_of_model": _FAMILY,
    "tokenizer_type": "the tokenizer loads through AutoTokenizer",
    "strict": "the schema is always strict",
    "eval_sample_packing": "the evaluation loss does not depend on packing",
    "save_first_step": "a test save is always made before the first step",
    "save_safetensors": "weights are always saved as safetensors",
    "remove_unused_columns": "only the columns that a row form needs are read",
    "shuffle_merged_datasets": "each epoch visits all documents in a seeded order",
    "sdp_attention": _ATTENTION,
    "is_llama_derived_model": _FAMILY,
    "is_mistral_derived_model": _FAMILY,
    "is_qwen_derived_model": _FAMILY,
    "gradient_checkpointing_kwargs": "recompute has no further options",
    "tokenizer_use_fast": "the tokenizer loads through AutoTokenizer",
    "do_eval": "eval_strategy says when to evaluate",
    "do_train": "training is what a config is for",
    "eval_max_new_tokens": "evaluation generates no text",
    "eval_on_start": "evaluation, where there is one, begins before the first step",
    "include_tkps": "tokens per second are always logged",
    "include_tokens_per_second": "tokens per second are always logged",
    "logging_first_step": "the first step is always logged",
    "padding_free": "documents are packed without padding between them",
    **dict.fromkeys(
        "sample_packing_bin_size sample_packing_eff_est sample_packing_group_size".split(),
        "packing sees all documents at once",
    ),
    "debug": "`chronicals --debug train` shows tracebacks, `chronicals inspect` the data",
    **dict.fromkeys(
        "eager_attention flex_attention flex_attn_compile_kwargs xformers_attention".split(),
        _ATTENTION,
    ),
    **dict.fromkeys(
        """
    chunked_cross_entropy chunked_cross_entropy_num_chunks cut_cross_entropy dataloader_num_workers
    dataloader_pin_memory dataloader_prefetch_factor flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm
    gc_steps liger_cross_entropy liger_fused_linear_cross_entropy liger_glu_activation liger_kernel_config
    liger_layer_norm liger_rms_norm liger_rope low_cpu_mem_usage torch_compile torch_compile_backend
    torch_compile_mode torch_empty_cache_steps use_liger_kernel
    """.split(),
        _SPEED,
    ),
}

# Inside bnb_config_kwargs.
BNB_NOTES: dict[str, str] = {
    "bnb_4bit_compute_dtype": "matrix products run in the compute dtype that bf16 and fp16 choose",
    "bnb_4bit_quant_storage": "codes are kept as bytes",
    **dict.fromkeys(
        "llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_threshold".split(),
        "nothing is in 8 bits",
    ),
}

# Items of Axolotl's `plugins` that are about speed and memory alone; any other plugin is not supported.
SPEED_PLUGINS = frozenset(
    f"axolotl.integrations.{name}" for name in ("liger.LigerPlugin", "cut_cross_entropy.CutCrossEntropyPlugin")
)

_WATCHDOG = "remove it; the guard stops a run whose loss or gradient is not finite"
_DTYPE = "use `bf16: true`, `fp16: true`, or `bf16: false` for float32"
_LATER = "it is planned; remove the key, or set it to null, to train in 32 or 16 bits on one device"

# Known, and an error unless null or false: key -> how to mend, "" for the plain answer.
UNSUPPORTED: dict[str, str] = {
    "load_in_8bit": "use load_in_4bit, which is half as large, or remove it for 16 bits",
    "deepspeed": _LATER,
    "fsdp": _LATER,
    "fsdp_config": _LATER,
    "loss_watchdog_patience": _WATCHDOG,
    "loss_watchdog_threshold": _WATCHDOG,
    "batch_size": "set micro_batch_size and gradient_accumulation_steps, whose product it is",
    "base_model_config": "base_model's own config.json is used; remove the key",
    "trust_remote_code": "no code from a repository is ever run; remove the key",
    "lr_scheduler_kwargs": "use cosine_min_lr_ratio, or lr_decay_ratio for warmup_stable_decay",
    "max_packed_sequence_len": "use sequence_len",
    "pretraining_dataset": "use datasets with `type: completion`",
    "push_to_hub": "upload output_dir with `hf upload` after the run",
    "hub_model_id": "upload output_dir with `hf upload` after the run",
    # scripts of TRL, Unsloth, LLaMA-Factory
    "dataset": "use `datasets: [{path: ...}]`",
    "dataset_config": "use `name` in an entry of datasets",
    "dataset_dir": "write the folder into `path` of an entry of datasets",
    "dataset_name": "use `datasets: [{path: ...}]`",
    "dataset_test_split": "use test_datasets",
    "dataset_text_field": "use `field` in an entry of datasets",
    "dataset_train_split": "use `split` in an entry of datasets",
    "dtype": _DTYPE,
    "eos_token": "use special_tokens",
    "finetuning_type": "use `adapter: lora`, or leave it out to train all weights",
    "full_finetuning": "leave adapter out, and all weights are trained",
    "lora_target": "use lora_target_modules",
    "lora_task_type": "remove it; causal language models are what is trained",
    "pad_token": "use special_tokens",
    "quantization_bit": "use load_in_4bit",
    "stage": "remove it; supervised fine-tuning is what there is",
    "template": "use chat_template",
    "torch_dtype": _DTYPE,
    "use_peft": "use `adapter: lora`",
    "use_cpu": "use `device: cpu`",
    "no_cuda": "use `device: cpu`",
    "float32": "use `bf16: false`",
    **dict.fromkeys(
        """
    accelerator_config activation_checkpointing adam_beta3 adam_epsilon2
    added_tokens_overrides auto_find_batch_size average_tokens_across_devices batch_flattening bench_dataset
    bench_split bf16_full_eval center_rewards_coefficient chat_template_kwargs cls_model_config
    comet_api_key comet_experiment_config comet_experiment_key comet_mode comet_online comet_project_name
    comet_workspace context_parallel_size cosine_constant_lr_ratio cpo_alpha curriculum_sampling data_seed
    dataloader_drop_last dataset_exact_deduplication dataset_keep_in_memory dataset_shard_idx dataset_shard_num ddp
    ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout deepcompile
    dense_mixer device_map diffusion dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of disable_tqdm
    do_bench_eval do_causal_lm_eval dp_replicate_size dp_shard_size dpo_beta
    dpo_generate_during_eval dpo_label_smoothing dpo_loss_type dpo_loss_weights dpo_norm_loss dpo_padding_free
    dpo_use_liger_kernel dpo_use_logits_to_keep dpo_use_weighting dynamic_checkpoint eaft_alpha eaft_k ebft
    embedding_lr embedding_lr_scale embeddings_skip_upcast eta_min eval_accumulation_steps eval_causal_lm_metrics
    eval_delay eval_sequence_len eval_table_size experimental_skip_move_to_device
    expert_parallel_backend expert_parallel_size experts_implementation fix_untrained_tokens flash_attn_d512
    flash_optimum fp32_norm_classes fp32_norms fp8 fp8_enable_fsdp_float8_all_gather freeze_mm_modules
    fsdp_final_state_dict_type fsdp_version fused_attn_kernel gc_collect_steps gemma4_hybrid_attn_impl
    generate_samples generation_do_sample generation_max_new_tokens generation_prompt_ratio generation_temperature
    generation_top_k generation_top_p gptq gptq_groupsize gptq_model_v1 gpu_memory_limit gradio_max_new_tokens
    gradio_server_name gradio_server_port gradio_share gradio_temperature gradio_title greater_is_better
    grokfast_alpha grokfast_lamb group_by_length heads_k_stride hf_mlflow_log_artifacts hf_use_auth_token
    hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip image_resize_algorithm image_size
    include_num_input_tokens_seen is_falcon_derived_model is_preprocess
    jagged_restart_anneal_steps jagged_restart_steps jagged_restart_warmup_steps kd_alpha kd_ce_alpha
    kd_temperature kd_trainer kto_desirable_weight kto_undesirable_weight large_head_attention layer_offloading
    liger_use_token_scaling lisa_layers_attribute lisa_n_layers lisa_step_interval llama4_linearized_experts
    llmcompressor lm_eval_tasks load_best_model_at_end local_rank log_level logging_dir
    logging_strategy lora_embedding_kernel lora_fan_in_fan_out lora_model_dir lora_on_cpu
    lora_target_parameters
    lr_div_factor lr_groups lr_quadratic_warmup
    max_memory max_prompt_len mean_resizing_embeddings merge_lora merge_method metric_for_best_model min_sample_len
    mlflow_experiment_name mlflow_run_name mlflow_tracking_uri model_config model_kwargs model_quantization_config
    model_quantization_config_kwargs mora multipack_real_batches neftune_noise_alpha noisy_embedding_alpha
    num_dataset_shards_to_save num_generation_samples num_labels optim_args optim_target_modules orpo_alpha
    otel_metrics_host otel_metrics_port overrides_of_model_config overrides_of_model_kwargs pad_to_multiple_of peft
    peft_autocast_adapter_dtype peft_layer_replication
    peft_trainable_token_indices plugins
    alora_invocation_tokens arrow_config corda_config eva_config fan_in_fan_out layer_replication loftq_config
    target_parameters trainable_token_indices use_bdlora use_qalora
    pose_max_context_len pose_num_chunks pose_split_on_token_ids precompute_ref_log_probs preprocess_iterable
    pretrain_multipack_attn pretrain_multipack_buffer_size pretraining_sample_concatenation process_reward_model
    processor_kwargs processor_type profiler_steps profiler_steps_start push_dataset_to_hub qat
    qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits qgalore_proj_group_size qgalore_proj_quant
    qgalore_proj_type qgalore_queue_size qgalore_rank qgalore_scale qgalore_update_proj_gap
    qlora_sharded_model_loading quantization quantize_moe_experts ray_num_workers ray_run_name relora
    relora_cpu_offload relora_prune_method relora_prune_ratio relora_steps resize_token_embeddings_to_32x
    resources_per_worker reward_model ring_attn_func rl rl_beta role_boundaries rope_scaling rpo_alpha s2_attention
    sage_attention sample_packing_mp_start_method sample_packing_seq_len_multiplier sample_packing_sequentially
    save_only_model scaling_softmax scaling_softmax_bias scaling_softmax_factor sdpa_varlen selective_checkpointing
    sequence_parallel_degree shrink_embeddings shuffle_before_merging_datasets simpo_gamma skip_prepare_dataset
    spectrum_model_name spectrum_top_fraction streaming streaming_multipack_buffer_size swanlab_experiment_name
    swanlab_mode swanlab_project swanlab_workspace tensor_parallel_size tiled_mlp tiled_mlp_num_shards
    tiled_mlp_use_original_mlp tokenizer_legacy tokenizer_save_jinja_files tokenizer_use_mistral_common
    torch_compile_options torchdistx_path total_num_tokens total_supervised_tokens
    trackio_project_name trackio_run_name trackio_space_id train_sampling_strategy trainer_cls trl unfreeze
    unfrozen_parameters use_cache use_comet use_eaft use_kernels use_mlflow use_onebitllms use_otel_metrics
    use_pose use_ray use_scattermoe use_sonicmoe use_swanlab use_trackio vllm world_size
    """.split(),
        "",
    ),
}
DATASET_UNSUPPORTED: dict[str, str] = {
    "trust_remote_code": "no code from a repository is ever run; remove the key",
    "conversation": "use chat_template",
    **dict.fromkeys(
        """
    drop_system_message field_human field_model field_thinking input_format input_transform logprobs_field
    message_field_training_detail preprocess_shards split_thinking temperature template_thinking_key
    train_on_eot
    """.split(),
        "",
    ),
}
