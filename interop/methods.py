"""Which public methods of transformers' models the wrappers do not have, and why.

The others have the same names here: those of `PreTrainedModel`, `TFPreTrainedModel`, `FlaxPreTrainedModel`,
`ModuleUtilsMixin`, `TFModelUtilsMixin`, `GenerationMixin` and `PushToHubMixin` of version 4.57 and version 5.
`tests/interop/test_methods.py` checks that each is there or here, and that nothing is here that does not exist.
"""

from __future__ import annotations

CALLED_BY_FIT = (
    "of Keras' models: put the model into one as a layer, interop.tensorflow.TFLayer, whose labels add the loss"
)
CONTAINERS = "modules hold Parameters and do not compute; set those of the tables, or load_state_dict"
CUSTOM_CODE = "no code of a checkpoint ever runs, and none is saved"
GENERATE = "an option of generate"
MANY = "fm.generate_many(model.params, model.config, prompts)"
NEVER_INITIALISED = "weights are assigned, never first initialised; from_config draws a new model"
PLACEMENT = "fm.partition_specs(params, axes) says how a tree is spread; a wrapper is one process"
PYTORCH_ONLY = "the variables of TensorFlow stay where they were made; tf.device decides"
TENSORFLOW_ONLY = "TensorFlow's name; TorchModel has state_dict and get_output_embeddings"

NEITHER = {
    "enable_peft_hotswap": "load_adapter(hotswap=True) needs no preparation",
    # initialisation
    **dict.fromkeys(
        ["init_weights", "initialize_weights", "post_init", "get_init_context", "mark_tied_weights_as_initialized"],
        NEVER_INITIALISED,
    ),
    # code and cards on the Hub
    **dict.fromkeys(["register_for_auto_class", "is_custom_code", "is_remote_code", "load_custom_generate"], CUSTOM_CODE),
    **dict.fromkeys(["add_model_tags", "model_tags", "create_model_card"], "the card is made by fm.push_to_hub"),
    # what a call returns
    "can_record_outputs": "forward takes hidden_states= and attentions=",
    "loss_function": "a loss follows from the task and labels=; any other can be taken of the logits",
    "warn_if_padding_and_no_attention_mask": "padding is what mask= says, and nothing else",
    # attention and devices
    **dict.fromkeys(
        ["set_attn_implementation", "get_correct_attn_implementation", "is_backend_compatible", "kernelize", "use_kernels",
         "set_use_kernels", "to_bettertransformer", "reverse_bettertransformer"],
        "the numbers are those of eager attention; fm.forward takes attention=",
    ),
    **dict.fromkeys(
        ["get_experts_implementation", "get_correct_experts_implementation", "set_experts_implementation"],
        "fm.forward takes experts=",
    ),
    **dict.fromkeys(
        ["tp_plan", "tp_size", "ep_plan", "pp_plan", "fsdp_plan", "fsdp_size", "supports_tp_plan", "supports_pp_plan",
         "supports_context_parallel", "init_parallel_plans", "prepare_distribute_model", "maybe_distribute_model",
         "is_distributed_loading_by_transformers", "gather_sharded_state_dict_for_save", "save_distributed_checkpoint",
         "barrier_after_gathered_checkpoint_save", "should_save_on_this_rank"],
        PLACEMENT,
    ),
    **dict.fromkeys(["add_memory_hooks", "reset_memory_hooks_state"], "memory is XLA's; see jax.profiler"),
    "dequantize": "a wrapper holds plain tensors",
    "get_compiled_call": "every call is compiled",
    "enable_input_require_grads": "JAX takes gradients with respect to any parameter, whatever the inputs need",
    "disable_input_require_grads": "see enable_input_require_grads",
    # modules
    **dict.fromkeys(["set_decoder", "set_encoder"], CONTAINERS),
    "retrieve_modules_from_names": "named_modules() and named_parameters() list all",
    "named_non_persistent_buffers": "all buffers are saved",
    "get_expanded_tied_weights_keys": "fm.tied_names(config) has them",
    "tie_embeddings_and_encoder_decoder": "tie_weights",
    "generation_config_class": "fm.GenerationConfig",
    "module": "the model is its own module",
    "load_flax_weights": "fm.load reads every format",
    "load_flax_sharded_weights": "fm.load reads every format",
    # generation
    **dict.fromkeys(
        ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager",
         "destroy_cached_continuous_batching_manager"],
        MANY,
    ),
    **dict.fromkeys(["beam_search", "greedy_search", "sample", "contrastive_search"], GENERATE),
    "adjust_generation_fn": "version 5 calls it while it loads; config.generation is what it sets",
    "heal_tokens": "a matter of the tokenizer, which a model does not have",
    "prepare_inputs_for_generation": "generation is one compiled program, which nobody can step into",
    "seed_generator": "generate takes seed= or key=: there is no hidden state",
    # Keras
    **dict.fromkeys(
        ["build", "build_in_name_scope", "compute_loss", "evaluate", "fit", "get_config",
         "get_label_to_output_name_mapping", "predict", "predict_on_batch", "test_on_batch", "test_step", "train_on_batch",
         "train_step"],
        CALLED_BY_FIT,
    ),
    "prepare_tf_dataset": "tf.data.Dataset.from_tensor_slices of what the tokenizer gives",
    **dict.fromkeys(["serving", "serving_output"], "TFModel.export writes the signature serving_default"),
    **dict.fromkeys(["get_output_layer_with_bias", "get_prefix_bias_name"], "deprecated by transformers; get_bias"),
}  # fmt: skip
"""Name -> why neither wrapper has it, or what does the same."""

TORCH = {
    **dict.fromkeys(
        ["get_bias", "set_bias", "get_lm_head", "input_signature", "supports_xla_generation"], TENSORFLOW_ONLY
    ),
}
"""Name -> why `TorchModel` does not have it."""

TENSORFLOW = {
    **dict.fromkeys(["cuda", "to", "device"], PYTORCH_ONLY),
    **dict.fromkeys(["float", "half"], "to_fp32, to_fp16 and to_bf16"),
    **dict.fromkeys(["train", "eval"], "there is no dropout"),
    **dict.fromkeys(["base_model", "get_decoder", "get_encoder"], "there are no modules, only named_variables"),
    "compile": CALLED_BY_FIT,
}
"""Name -> why `TFModel` does not have it."""
