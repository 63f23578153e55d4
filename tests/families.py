"""One row a family and variant: a tiny random model of transformers 5, and how to ask it for what `fmodels` computes."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import fmodels as fm

SIZES = {"vocab_size": 61, "initializer_range": 0.2, "pad_token_id": 3}
GPT2 = SIZES | {
    "n_positions": 32,
    "n_embd": 20,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 37,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = SIZES | {
    "max_position_embeddings": 32, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
}  # fmt: skip
BERT = SIZES | {
    "max_position_embeddings": 32, "hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 3,
    "num_attention_heads": 4, "type_vocab_size": 3,
}  # fmt: skip
ROFORMER = BERT | {"num_attention_heads": 2}
ELECTRA = BERT | {"embedding_size": 17}
DISTILBERT = SIZES | {"max_position_embeddings": 32, "dim": 20, "hidden_dim": 37, "n_layers": 3, "n_heads": 4}
MPNET = {name: value for name, value in BERT.items() if name != "type_vocab_size"} | {"pad_token_id": 1}
ALBERT = ELECTRA | {"num_hidden_layers": 5, "num_hidden_groups": 2}
T5 = {
    "vocab_size": 61, "d_model": 20, "d_kv": 6, "d_ff": 37, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "pad_token_id": 3,
    "decoder_start_token_id": 3, "eos_token_id": 1,
}  # fmt: skip
GATED = T5 | {"feed_forward_proj": "gated-gelu", "initializer_factor": 0.5}
BART = {
    "vocab_size": 61, "d_model": 20, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 37, "decoder_ffn_dim": 29, "max_position_embeddings": 32,
    "init_std": 0.2, "pad_token_id": 3, "eos_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
SMALL = {name: value for name, value in LLAMA.items() if name != "head_dim"} | {"num_attention_heads": 4}
GEMMA2 = LLAMA | {"sliding_window": 3, "query_pre_attn_scalar": 7}
GRANITE = LLAMA | {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 1.7,
}  # fmt: skip
MODERNBERT = SIZES | {
    "max_position_embeddings": 32, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 4, "num_attention_heads": 3,
    "local_attention": 5, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
DEBERTA = BERT | {
    "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "position_buckets": 6, "share_att_key": True, "norm_rel_ebd": "layer_norm", "max_relative_positions": 8,
}  # fmt: skip
NOMIC = BERT | {"num_attention_heads": 2}
BIGBIRD = BERT | {"attention_type": "original_full", "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = BIGBIRD | {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
NEOX = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
NEO = SIZES | {
    "max_position_embeddings": 32, "hidden_size": 24, "intermediate_size": 37, "num_layers": 3, "num_heads": 4, "window_size": 3,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
}  # fmt: skip
BLOOM = SIZES | {"hidden_size": 24, "n_layer": 3, "n_head": 6}
FALCON = NEOX | {"ffn_hidden_size": 37, "num_attention_heads": 6}
FALCON.pop("intermediate_size")
XGLM = {
    "vocab_size": 61, "init_std": 0.2, "pad_token_id": 3, "max_position_embeddings": 32, "d_model": 24, "ffn_dim": 37,
    "num_layers": 3, "attention_heads": 4,
}  # fmt: skip
OPT = {name: value for name, value in NEOX.items() if name not in ("intermediate_size", "initializer_range")} | {
    "ffn_dim": 37, "init_std": 0.2,
}  # fmt: skip
GPTJ = GPT2 | {"n_embd": 24, "rotary_dim": 4}
MIXTRAL = LLAMA | {"num_local_experts": 5, "num_hidden_layers": 2, "hidden_size": 20}
QWEN_MOE = LLAMA | {"num_hidden_layers": 2, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 9}
QWEN2_MOE = SMALL | QWEN_MOE | {"head_dim": 10, "shared_expert_intermediate_size": 11}
GPT_OSS = MIXTRAL | {"sliding_window": 3, "swiglu_limit": 0.7}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0, "original_max_position_embeddings": 8}
DEEPSEEK = SIZES | {
    "max_position_embeddings": 32, "hidden_size": 20, "intermediate_size": 37, "moe_intermediate_size": 9, "num_hidden_layers": 2,
    "first_k_dense_replace": 1, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 7, "kv_lora_rank": 5,
    "qk_nope_head_dim": 9, "qk_rope_head_dim": 6, "v_head_dim": 8, "n_routed_experts": 6, "n_group": 3, "topk_group": 2,
    "num_experts_per_tok": 3,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "full_attention"]
LOCAL = ["sliding_attention"] * 2 + ["full_attention"] * 2
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 5.0], "rope_theta": 100.0}
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
DECODERS = frozenset(
    """gpt2 llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 phi olmo2 smollm3 granite cohere starcoder2
    stablelm gptj gpt_neox opt gpt_neo bloom falcon xglm mixtral qwen2_moe qwen3_moe gpt_oss deepseek_v3""".split()
)
THREE = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A row of the table.

    Attributes:
        name: the family, then the task, then what is special.
        architecture: the class in transformers.
        config: of its config.
        options: of its constructor.
        token_types: how many token types to draw from, or None.
        length: of the texts.
        untie: give the built model a head of its own, where its config cannot.
    """

    name: str
    architecture: str
    config: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    token_types: int | None = None
    length: int = 7
    untie: bool = False

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    @property
    def task(self) -> str:
        return self.name.split("/")[1]

    @property
    def choices(self) -> int | None:
        return 3 if self.task in ("multiple-choice", "double-heads") else None

    @property
    def causal(self) -> bool:
        """Whether a padded place may see no token at all."""
        return self.family in DECODERS or self.task == "causal-lm" or self.pair

    @property
    def pair(self) -> bool:
        """Whether there is an encoder and a decoder."""
        return self.family in ("t5", "mt5", "bart") and self.task not in (
            "encoder",
            "token-classification",
            "causal-lm",
        )

    @property
    def shifts(self) -> bool:
        """Whether decoder tokens may be left out."""
        return self.pair and (self.family == "bart" or self.task in ("sequence-classification", "question-answering"))


CASES = (
    Case("gpt2/base", "GPT2Model", GPT2),
    Case("gpt2/causal-lm", "GPT2LMHeadModel", GPT2),
    Case(
        "gpt2/causal-lm/untied", "GPT2LMHeadModel",
        GPT2 | {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "n_inner": None},
        token_types=61,
    ),
    Case("gpt2/double-heads", "GPT2DoubleHeadsModel", GPT2 | {"summary_activation": "tanh", "num_labels": 1}),
    Case("gpt2/sequence-classification", "GPT2ForSequenceClassification", GPT2 | THREE),
    Case("gpt2/token-classification", "GPT2ForTokenClassification", GPT2 | THREE | {"activation_function": "gelu"}),
    Case("gpt2/question-answering", "GPT2ForQuestionAnswering", GPT2),
    Case("llama/base", "LlamaModel", LLAMA),
    Case("llama/causal-lm", "LlamaForCausalLM", LLAMA),
    Case(
        "llama/causal-lm/tied-biases", "LlamaForCausalLM",
        LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    Case("llama/causal-lm/one-group", "LlamaForCausalLM", LLAMA | {"num_key_value_heads": 1, "hidden_act": "gelu"}),
    Case("llama/sequence-classification", "LlamaForSequenceClassification", LLAMA | THREE),
    Case("llama/token-classification", "LlamaForTokenClassification", LLAMA | THREE),
    Case("llama/question-answering", "LlamaForQuestionAnswering", LLAMA),
    Case("mistral/base", "MistralModel", LLAMA),
    Case("mistral/causal-lm", "MistralForCausalLM", LLAMA | {"sliding_window": 3}),
    Case("mistral/sequence-classification", "MistralForSequenceClassification", LLAMA | {"sliding_window": None} | THREE),
    Case("mistral/token-classification", "MistralForTokenClassification", LLAMA | {"sliding_window": None} | THREE),
    Case("mistral/question-answering", "MistralForQuestionAnswering", LLAMA | {"sliding_window": None}),
    Case("mixtral/base", "MixtralModel", MIXTRAL | {"sliding_window": 3}),
    Case("mixtral/causal-lm", "MixtralForCausalLM", MIXTRAL | {"num_experts_per_tok": 3}),
    Case("mixtral/causal-lm/tied", "MixtralForCausalLM", MIXTRAL | {"tie_word_embeddings": True, "num_experts_per_tok": 1}),
    Case("mixtral/sequence-classification", "MixtralForSequenceClassification", MIXTRAL | THREE),
    Case("mixtral/token-classification", "MixtralForTokenClassification", MIXTRAL | THREE),
    Case("mixtral/question-answering", "MixtralForQuestionAnswering", MIXTRAL),
    Case("qwen2/base", "Qwen2Model", SMALL | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    Case("qwen2/causal-lm", "Qwen2ForCausalLM", SMALL | {"num_attention_heads": 6, "tie_word_embeddings": True}),
    Case("qwen2/sequence-classification", "Qwen2ForSequenceClassification", SMALL | THREE),
    Case("qwen2/token-classification", "Qwen2ForTokenClassification", SMALL | THREE),
    Case("qwen2/question-answering", "Qwen2ForQuestionAnswering", SMALL),
    Case("qwen3/base", "Qwen3Model", LLAMA),
    Case(
        "qwen3/causal-lm", "Qwen3ForCausalLM",
        LLAMA | {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1, "attention_bias": True},
    ),
    Case("qwen3/sequence-classification", "Qwen3ForSequenceClassification", LLAMA | THREE),
    Case("qwen3/token-classification", "Qwen3ForTokenClassification", LLAMA | THREE),
    Case("qwen3/question-answering", "Qwen3ForQuestionAnswering", LLAMA),
    Case("qwen2_moe/base", "Qwen2MoeModel", QWEN2_MOE | {"use_sliding_window": True, "sliding_window": 3}),
    Case("qwen2_moe/causal-lm", "Qwen2MoeForCausalLM", QWEN2_MOE | {"norm_topk_prob": True, "qkv_bias": False}),
    Case(
        "qwen2_moe/causal-lm/mixed", "Qwen2MoeForCausalLM",
        QWEN2_MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "tie_word_embeddings": True},
    ),
    Case("qwen2_moe/sequence-classification", "Qwen2MoeForSequenceClassification", QWEN2_MOE | THREE),
    Case("qwen2_moe/token-classification", "Qwen2MoeForTokenClassification", QWEN2_MOE | THREE),
    Case("qwen2_moe/question-answering", "Qwen2MoeForQuestionAnswering", QWEN2_MOE),
    Case("qwen3_moe/base", "Qwen3MoeModel", QWEN_MOE | {"use_sliding_window": True, "sliding_window": 3}),
    Case("qwen3_moe/causal-lm", "Qwen3MoeForCausalLM", QWEN_MOE | {"norm_topk_prob": True, "attention_bias": True}),
    Case("qwen3_moe/causal-lm/mixed", "Qwen3MoeForCausalLM", QWEN_MOE | {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    Case("qwen3_moe/sequence-classification", "Qwen3MoeForSequenceClassification", QWEN_MOE | THREE),
    Case("qwen3_moe/token-classification", "Qwen3MoeForTokenClassification", QWEN_MOE | THREE),
    Case("qwen3_moe/question-answering", "Qwen3MoeForQuestionAnswering", QWEN_MOE),
    Case("gpt_oss/base", "GptOssModel", GPT_OSS),
    Case("gpt_oss/causal-lm", "GptOssForCausalLM", GPT_OSS | {"num_hidden_layers": 3, "rope_parameters": YARN}),
    Case(
        "gpt_oss/causal-lm/no-bias", "GptOssForCausalLM",
        GPT_OSS | {
            "attention_bias": False, "tie_word_embeddings": True, "swiglu_alpha": 1.1, "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    Case("gpt_oss/sequence-classification", "GptOssForSequenceClassification", GPT_OSS | THREE),
    Case("gpt_oss/token-classification", "GptOssForTokenClassification", GPT_OSS | THREE),
    Case("deepseek_v3/base", "DeepseekV3Model", DEEPSEEK | {"q_lora_rank": None, "first_k_dense_replace": 0, "rope_interleave": False}),
    Case(
        "deepseek_v3/causal-lm", "DeepseekV3ForCausalLM",
        DEEPSEEK | {"attention_bias": True, "n_shared_experts": 2, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    Case(
        "deepseek_v3/causal-lm/one-group", "DeepseekV3ForCausalLM",
        DEEPSEEK | {
            "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5,
            "tie_word_embeddings": True,
        },
    ),
    Case("deepseek_v3/sequence-classification", "DeepseekV3ForSequenceClassification", DEEPSEEK | THREE),
    Case("deepseek_v3/token-classification", "DeepseekV3ForTokenClassification", DEEPSEEK | THREE),
    Case("gemma/base", "GemmaModel", LLAMA),
    Case("gemma/causal-lm", "GemmaForCausalLM", LLAMA | {"hidden_act": "gelu", "attention_bias": True}),
    Case("gemma/sequence-classification", "GemmaForSequenceClassification", LLAMA | THREE),
    Case("gemma/token-classification", "GemmaForTokenClassification", LLAMA | THREE),
    Case("gemma2/base", "Gemma2Model", GEMMA2),
    Case("gemma2/causal-lm", "Gemma2ForCausalLM", GEMMA2 | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    Case(
        "gemma2/causal-lm/no-caps", "Gemma2ForCausalLM",
        GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "gelu"},
    ),
    Case("gemma2/sequence-classification", "Gemma2ForSequenceClassification", GEMMA2 | THREE),
    Case("gemma2/token-classification", "Gemma2ForTokenClassification", GEMMA2 | THREE),
    Case("gemma3_text/base", "Gemma3TextModel", GEMMA2 | {"rope_parameters": NESTED}),
    Case("gemma3_text/base/bidirectional", "Gemma3TextModel", GEMMA2 | {"use_bidirectional_attention": True, "sliding_window": 5}),
    Case(
        "gemma3_text/causal-lm", "Gemma3ForCausalLM",
        GEMMA2 | {"layer_types": MIXED, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5},
    ),
    Case("gemma3_text/sequence-classification", "Gemma3TextForSequenceClassification", GEMMA2 | THREE),
    Case("phi3/base", "Phi3Model", SMALL),
    Case("phi3/causal-lm", "Phi3ForCausalLM", SMALL | {"sliding_window": 4}),
    Case(
        "phi3/causal-lm/long", "Phi3ForCausalLM",
        SMALL | {"original_max_position_embeddings": 4, "rope_parameters": LONG, "initializer_range": 0.1},
    ),
    Case("phi3/sequence-classification", "Phi3ForSequenceClassification", SMALL | THREE),
    Case("phi3/token-classification", "Phi3ForTokenClassification", SMALL | THREE),
    Case("phi/base", "PhiModel", SMALL | {"hidden_size": 32}),
    Case(
        "phi/causal-lm", "PhiForCausalLM",
        SMALL | {
            "hidden_size": 32, "qk_layernorm": True, "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0, "partial_rotary_factor": 1.0},
        },
    ),
    Case("phi/sequence-classification", "PhiForSequenceClassification", SMALL | {"hidden_size": 32} | THREE),
    Case("phi/token-classification", "PhiForTokenClassification", SMALL | {"hidden_size": 32} | THREE),
    Case("olmo2/base", "Olmo2Model", LLAMA),
    Case("olmo2/causal-lm", "Olmo2ForCausalLM", LLAMA | {"attention_bias": True}),
    Case("olmo2/sequence-classification", "Olmo2ForSequenceClassification", LLAMA | THREE),
    Case("smollm3/base", "SmolLM3Model", LLAMA | {"use_sliding_window": True, "sliding_window": 3, "no_rope_layer_interval": 2}),
    Case("smollm3/causal-lm", "SmolLM3ForCausalLM", LLAMA | {"no_rope_layers": [0, 1, 0], "attention_bias": True, "mlp_bias": True}),
    Case("smollm3/sequence-classification", "SmolLM3ForSequenceClassification", LLAMA | THREE),
    Case("smollm3/token-classification", "SmolLM3ForTokenClassification", LLAMA | THREE),
    Case("smollm3/question-answering", "SmolLM3ForQuestionAnswering", LLAMA),
    Case("granite/base", "GraniteModel", GRANITE),
    Case("granite/causal-lm", "GraniteForCausalLM", GRANITE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    Case("cohere/base", "CohereModel", LLAMA),
    Case("cohere/causal-lm", "CohereForCausalLM", LLAMA | {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.3}),
    Case("starcoder2/base", "Starcoder2Model", SMALL),
    Case("starcoder2/causal-lm", "Starcoder2ForCausalLM", SMALL | {"sliding_window": 3, "use_bias": False}),
    Case("starcoder2/sequence-classification", "Starcoder2ForSequenceClassification", SMALL | {"sliding_window": 5} | THREE),
    Case("starcoder2/token-classification", "Starcoder2ForTokenClassification", SMALL | {"sliding_window": 5} | THREE),
    Case("stablelm/base", "StableLmModel", SMALL | {"hidden_size": 32, "use_qkv_bias": True}),
    Case("stablelm/causal-lm", "StableLmForCausalLM", SMALL | {"hidden_size": 32, "use_parallel_residual": True}),
    Case(
        "stablelm/causal-lm/head-norms", "StableLmForCausalLM",
        SMALL | {"hidden_size": 32, "qk_layernorm": True, "num_key_value_heads": 2},
    ),
    Case("stablelm/sequence-classification", "StableLmForSequenceClassification", SMALL | {"hidden_size": 32} | THREE),
    Case("stablelm/token-classification", "StableLmForTokenClassification", SMALL | {"hidden_size": 32} | THREE),
    Case("bert/base", "BertModel", BERT, token_types=3),
    Case("bert/base/no-pooler", "BertModel", BERT, {"add_pooling_layer": False}),
    Case("bert/masked-lm", "BertForMaskedLM", BERT, token_types=3),
    Case("bert/masked-lm/untied", "BertForMaskedLM", BERT | {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    Case("bert/causal-lm", "BertLMHeadModel", BERT | {"is_decoder": True}),
    Case("bert/pretraining", "BertForPreTraining", BERT, token_types=3),
    Case("bert/next-sentence", "BertForNextSentencePrediction", BERT, token_types=3),
    Case("bert/sequence-classification", "BertForSequenceClassification", BERT | THREE),
    Case("bert/token-classification", "BertForTokenClassification", BERT | THREE),
    Case("bert/question-answering", "BertForQuestionAnswering", BERT, token_types=3),
    Case("bert/multiple-choice", "BertForMultipleChoice", BERT, token_types=3),
    Case("roberta/base", "RobertaModel", BERT, token_types=3),
    Case("roberta/masked-lm", "RobertaForMaskedLM", BERT, token_types=3),
    Case("roberta/masked-lm/untied", "RobertaForMaskedLM", BERT | {"tie_word_embeddings": False}),
    Case("roberta/causal-lm", "RobertaForCausalLM", BERT | {"is_decoder": True}),
    Case("roberta/base/no-pooler", "RobertaModel", BERT | {"hidden_act": "relu"}, {"add_pooling_layer": False}),
    Case("roberta/sequence-classification", "RobertaForSequenceClassification", BERT | THREE),
    Case("roberta/token-classification", "RobertaForTokenClassification", BERT | THREE),
    Case("roberta/question-answering", "RobertaForQuestionAnswering", BERT),
    Case("roberta/multiple-choice", "RobertaForMultipleChoice", BERT, token_types=3),
    Case("xlm-roberta/base", "XLMRobertaModel", BERT, token_types=3),
    Case("xlm-roberta/masked-lm", "XLMRobertaForMaskedLM", BERT, token_types=3),
    Case("xlm-roberta/masked-lm/untied", "XLMRobertaForMaskedLM", BERT | {"tie_word_embeddings": False}),
    Case("xlm-roberta/causal-lm", "XLMRobertaForCausalLM", BERT | {"is_decoder": True}),
    Case("xlm-roberta/sequence-classification", "XLMRobertaForSequenceClassification", BERT | THREE),
    Case("xlm-roberta/token-classification", "XLMRobertaForTokenClassification", BERT | THREE),
    Case("xlm-roberta/question-answering", "XLMRobertaForQuestionAnswering", BERT),
    Case("xlm-roberta/multiple-choice", "XLMRobertaForMultipleChoice", BERT, token_types=3),
    Case("camembert/base", "CamembertModel", BERT, token_types=3),
    Case("camembert/masked-lm", "CamembertForMaskedLM", BERT, token_types=3),
    Case("camembert/masked-lm/untied", "CamembertForMaskedLM", BERT | {"tie_word_embeddings": False}),
    Case("camembert/causal-lm", "CamembertForCausalLM", BERT | {"is_decoder": True}),
    Case("camembert/sequence-classification", "CamembertForSequenceClassification", BERT | THREE),
    Case("camembert/token-classification", "CamembertForTokenClassification", BERT | THREE),
    Case("camembert/question-answering", "CamembertForQuestionAnswering", BERT),
    Case("camembert/multiple-choice", "CamembertForMultipleChoice", BERT, token_types=3),
    Case("roberta-prelayernorm/base", "RobertaPreLayerNormModel", BERT, token_types=3),
    Case("roberta-prelayernorm/masked-lm", "RobertaPreLayerNormForMaskedLM", BERT, token_types=3),
    Case("roberta-prelayernorm/masked-lm/untied", "RobertaPreLayerNormForMaskedLM", BERT | {"tie_word_embeddings": False}),
    Case("roberta-prelayernorm/causal-lm", "RobertaPreLayerNormForCausalLM", BERT | {"is_decoder": True}),
    Case("roberta-prelayernorm/sequence-classification", "RobertaPreLayerNormForSequenceClassification", BERT | THREE),
    Case("roberta-prelayernorm/token-classification", "RobertaPreLayerNormForTokenClassification", BERT | THREE),
    Case("roberta-prelayernorm/question-answering", "RobertaPreLayerNormForQuestionAnswering", BERT),
    Case("roberta-prelayernorm/multiple-choice", "RobertaPreLayerNormForMultipleChoice", BERT, token_types=3),
    Case("distilbert/base", "DistilBertModel", DISTILBERT),
    Case("distilbert/masked-lm", "DistilBertForMaskedLM", DISTILBERT),
    Case("distilbert/masked-lm/untied", "DistilBertForMaskedLM", DISTILBERT | {"tie_word_embeddings": False}),
    Case("distilbert/sequence-classification", "DistilBertForSequenceClassification", DISTILBERT | THREE),
    Case("distilbert/token-classification", "DistilBertForTokenClassification", DISTILBERT | THREE),
    Case("distilbert/question-answering", "DistilBertForQuestionAnswering", DISTILBERT),
    Case("distilbert/multiple-choice", "DistilBertForMultipleChoice", DISTILBERT),
    Case("electra/base", "ElectraModel", ELECTRA, token_types=3),
    Case("electra/masked-lm", "ElectraForMaskedLM", ELECTRA, token_types=3),
    Case("electra/masked-lm/untied", "ElectraForMaskedLM", ELECTRA | {"tie_word_embeddings": False}),
    Case("electra/causal-lm", "ElectraForCausalLM", ELECTRA | {"is_decoder": True}),
    Case("electra/replaced-token-detection", "ElectraForPreTraining", BERT | {"embedding_size": 20}, token_types=3),
    Case("electra/sequence-classification", "ElectraForSequenceClassification", ELECTRA | THREE),
    Case("electra/token-classification", "ElectraForTokenClassification", ELECTRA | THREE),
    Case("electra/question-answering", "ElectraForQuestionAnswering", ELECTRA),
    Case("electra/multiple-choice", "ElectraForMultipleChoice", ELECTRA, token_types=3),
    Case("mpnet/base", "MPNetModel", MPNET),
    Case("mpnet/masked-lm", "MPNetForMaskedLM", MPNET),
    Case("mpnet/masked-lm/untied", "MPNetForMaskedLM", MPNET | {"tie_word_embeddings": False}),
    Case("mpnet/sequence-classification", "MPNetForSequenceClassification", MPNET | THREE),
    Case("mpnet/token-classification", "MPNetForTokenClassification", MPNET | THREE),
    Case("mpnet/question-answering", "MPNetForQuestionAnswering", MPNET),
    Case("mpnet/multiple-choice", "MPNetForMultipleChoice", MPNET),
    Case("albert/base", "AlbertModel", ALBERT, token_types=3),
    Case("albert/masked-lm", "AlbertForMaskedLM", ALBERT, token_types=3),
    Case("albert/masked-lm/untied", "AlbertForMaskedLM", ALBERT | {"tie_word_embeddings": False}),
    Case("albert/pretraining", "AlbertForPreTraining", ELECTRA, token_types=3),
    Case("albert/sequence-classification", "AlbertForSequenceClassification", ALBERT | THREE),
    Case("albert/token-classification", "AlbertForTokenClassification", ALBERT | THREE),
    Case("albert/question-answering", "AlbertForQuestionAnswering", ALBERT),
    Case("albert/multiple-choice", "AlbertForMultipleChoice", ALBERT, token_types=3),
    Case("gptj/base", "GPTJModel", GPTJ),
    Case("gptj/causal-lm", "GPTJForCausalLM", GPTJ | {"n_inner": None}),
    Case("gptj/sequence-classification", "GPTJForSequenceClassification", GPTJ | THREE),
    Case("gptj/question-answering", "GPTJForQuestionAnswering", GPTJ),
    Case("gpt_neox/base", "GPTNeoXModel", NEOX | {"hidden_size": 48, "use_parallel_residual": False}),
    Case("gpt_neox/causal-lm", "GPTNeoXForCausalLM", NEOX | {"hidden_size": 32}),
    Case(
        "gpt_neox/causal-lm/tied", "GPTNeoXForCausalLM",
        NEOX | {
            "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_new",
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0, "partial_rotary_factor": 1.0},
        },
    ),
    Case("gpt_neox/sequence-classification", "GPTNeoXForSequenceClassification", NEOX | {"hidden_size": 32} | THREE),
    Case("gpt_neox/token-classification", "GPTNeoXForTokenClassification", NEOX | {"hidden_size": 32} | THREE),
    Case("gpt_neox/question-answering", "GPTNeoXForQuestionAnswering", NEOX | {"hidden_size": 32}),
    Case("opt/base", "OPTModel", OPT | {"word_embed_proj_dim": 14, "do_layer_norm_before": False}),
    Case("opt/causal-lm", "OPTForCausalLM", OPT),
    Case("opt/causal-lm/projected", "OPTForCausalLM", OPT | {"word_embed_proj_dim": 14, "do_layer_norm_before": False}),
    Case(
        "opt/causal-lm/untied", "OPTForCausalLM",
        OPT | {"tie_word_embeddings": False, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    Case("opt/causal-lm/no-final-norm", "OPTForCausalLM", OPT | {"_remove_final_layer_norm": True}),
    Case("opt/sequence-classification", "OPTForSequenceClassification", OPT | THREE),
    Case("opt/question-answering", "OPTForQuestionAnswering", OPT),
    Case("gpt_neo/base", "GPTNeoModel", NEO | {"intermediate_size": None, "activation_function": "relu"}),
    Case("gpt_neo/causal-lm", "GPTNeoForCausalLM", NEO),
    Case("gpt_neo/causal-lm/untied", "GPTNeoForCausalLM", NEO | {"tie_word_embeddings": False, "window_size": 2}),
    Case("gpt_neo/sequence-classification", "GPTNeoForSequenceClassification", NEO | THREE),
    Case("gpt_neo/token-classification", "GPTNeoForTokenClassification", NEO | THREE),
    Case("gpt_neo/question-answering", "GPTNeoForQuestionAnswering", NEO),
    Case("bloom/base", "BloomModel", BLOOM),
    Case("bloom/causal-lm", "BloomForCausalLM", BLOOM),
    Case(
        "bloom/causal-lm/untied", "BloomForCausalLM",
        BLOOM | {"n_head": 4, "tie_word_embeddings": False, "apply_residual_connection_post_layernorm": True},
    ),
    Case("bloom/sequence-classification", "BloomForSequenceClassification", BLOOM | THREE),
    Case("bloom/token-classification", "BloomForTokenClassification", BLOOM | THREE),
    Case("bloom/question-answering", "BloomForQuestionAnswering", BLOOM),
    Case("falcon/base", "FalconModel", FALCON),
    Case(
        "falcon/base/alibi", "FalconModel",
        FALCON | {  # of twelve heads, the last four have slopes that bfloat16 rounds
            "alibi": True, "attn_implementation": "sdpa", "num_kv_heads": 2, "new_decoder_architecture": True, "num_attention_heads": 12,
        },
    ),
    Case("falcon/causal-lm", "FalconForCausalLM", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": True}),
    Case(
        "falcon/causal-lm/untied", "FalconForCausalLM",
        FALCON | {
            "tie_word_embeddings": False, "parallel_attn": False, "multi_query": False, "bias": True, "activation": "relu",
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
        },
    ),
    Case(
        "falcon/causal-lm/one-norm", "FalconForCausalLM",
        FALCON | {"num_kv_heads": 3, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    Case(
        "falcon/causal-lm/alibi", "FalconForCausalLM",
        FALCON | {
            "alibi": True, "attn_implementation": "sdpa", "parallel_attn": False, "multi_query": False, "bias": True,
            "ffn_hidden_size": None,
        },
    ),
    Case("falcon/sequence-classification", "FalconForSequenceClassification", FALCON | THREE),
    Case("falcon/token-classification", "FalconForTokenClassification", FALCON | THREE),
    Case("falcon/question-answering", "FalconForQuestionAnswering", FALCON),
    Case("xglm/base", "XGLMModel", XGLM | {"activation_function": "relu"}),
    Case("xglm/causal-lm", "XGLMForCausalLM", XGLM),
    Case("xglm/causal-lm/untied", "XGLMForCausalLM", XGLM | {"tie_word_embeddings": False, "scale_embedding": False}),
    Case("roformer/base", "RoFormerModel", ROFORMER | {"embedding_size": 14}, token_types=3),
    Case("roformer/masked-lm", "RoFormerForMaskedLM", ROFORMER, token_types=3),
    Case("roformer/masked-lm/untied", "RoFormerForMaskedLM", ROFORMER | {"embedding_size": 14} | {"tie_word_embeddings": False}),
    Case("roformer/causal-lm", "RoFormerForCausalLM", ROFORMER | {"embedding_size": 14} | {"is_decoder": True}),
    Case("roformer/sequence-classification", "RoFormerForSequenceClassification", ROFORMER | {"embedding_size": 14} | THREE),
    Case("roformer/token-classification", "RoFormerForTokenClassification", ROFORMER | {"embedding_size": 14} | THREE),
    Case("roformer/question-answering", "RoFormerForQuestionAnswering", ROFORMER | {"embedding_size": 14}),
    Case("roformer/multiple-choice", "RoFormerForMultipleChoice", ROFORMER | {"embedding_size": 14}, token_types=3),
    Case("deberta-v2/base", "DebertaV2Model", DEBERTA | {"conv_kernel_size": 3, "conv_act": "gelu"}),
    Case(
        "deberta-v2/base/distances", "DebertaV2Model",
        BERT | {"relative_attention": True, "pos_att_type": "c2p|p2c", "max_relative_positions": 3}, token_types=3,
    ),
    Case("deberta-v2/base/content", "DebertaV2Model", BERT | {"type_vocab_size": 0, "pos_att_type": ["c2p"]}),
    Case("deberta-v2/masked-lm", "DebertaV2ForMaskedLM", DEBERTA | {"pos_att_type": ["p2c"], "share_att_key": False}),
    Case("deberta-v2/masked-lm/untied", "DebertaV2ForMaskedLM", DEBERTA | {"tie_word_embeddings": False, "conv_kernel_size": 5}),
    Case("deberta-v2/masked-lm/new-head", "DebertaV2ForMaskedLM", DEBERTA | {"legacy": False}),
    Case(
        "deberta-v2/sequence-classification", "DebertaV2ForSequenceClassification",
        DEBERTA | THREE | {"pos_att_type": ["c2p"], "share_att_key": False, "norm_rel_ebd": "none", "pooler_hidden_act": "tanh"},
    ),
    Case("deberta-v2/token-classification", "DebertaV2ForTokenClassification", DEBERTA | THREE),
    Case("deberta-v2/question-answering", "DebertaV2ForQuestionAnswering", DEBERTA | {"max_relative_positions": -1}),
    Case("deberta-v2/multiple-choice", "DebertaV2ForMultipleChoice", DEBERTA | {"type_vocab_size": 3}, token_types=3),
    Case("nomic_bert/base", "NomicBertModel", NOMIC | {"head_dim": 6}, token_types=3),
    Case("nomic_bert/masked-lm", "NomicBertForMaskedLM", NOMIC, token_types=3),
    Case(
        "nomic_bert/masked-lm/untied", "NomicBertForMaskedLM",
        NOMIC | {"tie_word_embeddings": False, "hidden_act": "gelu", "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    Case("nomic_bert/sequence-classification", "NomicBertForSequenceClassification", NOMIC | THREE),
    Case("nomic_bert/token-classification", "NomicBertForTokenClassification", NOMIC | THREE),
    Case("big_bird/base", "BigBirdModel", BIGBIRD, token_types=3),
    Case("big_bird/base/blocks", "BigBirdModel", BLOCKS, token_types=3, length=16),
    Case("big_bird/base/no-pooler-blocks", "BigBirdModel", BLOCKS, {"add_pooling_layer": False}, length=20),
    Case("big_bird/masked-lm", "BigBirdForMaskedLM", BLOCKS | {"block_size": 1}, length=12),
    Case("big_bird/masked-lm/untied", "BigBirdForMaskedLM", BIGBIRD | {"tie_word_embeddings": False, "use_bias": False}),
    Case("big_bird/causal-lm", "BigBirdForCausalLM", BIGBIRD | {"is_decoder": True, "rescale_embeddings": True}),
    Case("big_bird/pretraining", "BigBirdForPreTraining", BIGBIRD, token_types=3),
    Case("big_bird/sequence-classification", "BigBirdForSequenceClassification", BIGBIRD | THREE),
    Case("big_bird/token-classification", "BigBirdForTokenClassification", BLOCKS | THREE, length=16),
    Case("big_bird/question-answering", "BigBirdForQuestionAnswering", BIGBIRD | {"sep_token_id": 16}),
    Case("big_bird/multiple-choice", "BigBirdForMultipleChoice", BIGBIRD, token_types=3),
    Case("modernbert/base", "ModernBertModel", MODERNBERT | {"norm_bias": True, "global_attn_every_n_layers": 2}),
    Case("modernbert/masked-lm", "ModernBertForMaskedLM", MODERNBERT),
    Case(
        "modernbert/masked-lm/untied-biases", "ModernBertForMaskedLM",
        MODERNBERT | {
            "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True,
            "classifier_activation": "silu", "hidden_activation": "relu", "rope_parameters": NESTED,
        },
    ),
    Case("modernbert/masked-lm/no-bias", "ModernBertForMaskedLM", MODERNBERT | {"decoder_bias": False, "layer_types": LOCAL}),
    Case("modernbert/sequence-classification", "ModernBertForSequenceClassification", MODERNBERT | THREE),
    Case(
        "modernbert/sequence-classification/mean", "ModernBertForSequenceClassification",
        MODERNBERT | THREE | {"classifier_pooling": "mean"},
    ),
    Case("modernbert/token-classification", "ModernBertForTokenClassification", MODERNBERT | THREE),
    Case("modernbert/question-answering", "ModernBertForQuestionAnswering", MODERNBERT | {"local_attention": 2}),
    Case("modernbert/multiple-choice", "ModernBertForMultipleChoice", MODERNBERT | {"classifier_pooling": "cls"}),
    Case("modernbert/multiple-choice/mean", "ModernBertForMultipleChoice", MODERNBERT | {"classifier_pooling": "mean"}),
    Case("t5/base", "T5Model", T5 | {"feed_forward_proj": "gelu_new"}),
    Case("t5/seq2seq-lm", "T5ForConditionalGeneration", T5),
    Case("t5/seq2seq-lm/unscaled", "T5ForConditionalGeneration", GATED | {"tie_word_embeddings": False}),
    Case("t5/seq2seq-lm/untied", "T5ForConditionalGeneration", GATED | {"tie_word_embeddings": False}, untie=True),
    Case("t5/encoder", "T5EncoderModel", T5 | {"feed_forward_proj": "gated-silu"}),
    Case("t5/sequence-classification", "T5ForSequenceClassification", T5 | THREE),
    Case("t5/token-classification", "T5ForTokenClassification", T5 | THREE),
    Case("t5/question-answering", "T5ForQuestionAnswering", T5),
    Case("mt5/base", "MT5Model", GATED),
    Case("mt5/seq2seq-lm", "MT5ForConditionalGeneration", GATED),
    Case("mt5/encoder", "MT5EncoderModel", GATED),
    Case("mt5/sequence-classification", "MT5ForSequenceClassification", GATED | THREE),
    Case("mt5/token-classification", "MT5ForTokenClassification", GATED | THREE),
    Case("mt5/question-answering", "MT5ForQuestionAnswering", GATED),
    Case("bart/base", "BartModel", BART | {"scale_embedding": True}),
    Case("bart/seq2seq-lm", "BartForConditionalGeneration", BART),
    Case("bart/seq2seq-lm/untied", "BartForConditionalGeneration", BART | {"tie_word_embeddings": False}),
    Case("bart/sequence-classification", "BartForSequenceClassification", BART | {"activation_function": "relu"}),
    Case("bart/question-answering", "BartForQuestionAnswering", BART),
    Case("bart/causal-lm", "BartForCausalLM", BART),
)  # fmt: skip


# Where the table of angles depends on the length of the text, keys that are cached were turned by another table, as in
# transformers.
CAUSAL = [c.name for c in CASES if c.task == "causal-lm" and not c.name.endswith("/long")]
SEQ2SEQ = [c.name for c in CASES if c.task == "seq2seq-lm"]
PAIRS = ["t5/seq2seq-lm", "bart/seq2seq-lm"]
LANGUAGE = {c.family: c.name for c in reversed(CASES) if c.task in ("causal-lm", "masked-lm", "seq2seq-lm")}
"""The first row of each family with a model of language."""


def by_name(name: str) -> Case:
    """The row with this name."""
    return next(case for case in CASES if case.name == name)


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A row of the table, made real."""

    case: Case
    model: Any
    folder: Path
    params: fm.Params
    config: Any

    @functools.cached_property
    def unstacked(self) -> fm.Params:
        return fm.load(self.folder, layers="list")[0]

    @property
    def attention(self) -> str:
        """transformers' implementation."""
        return self.model.config._attn_implementation

    references: dict[str | None, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def reference(self, padding: str | None = None) -> dict[str, np.ndarray]:
        """What transformers computes on `inputs(padding)`."""
        if padding not in self.references:
            self.references[padding] = reference(self.model, self.inputs(padding))
        return self.references[padding]

    def inputs(self, padding: str | None = None) -> dict[str, np.ndarray]:
        """Tokens, mask, positions, token types, decoder tokens and mask; `padding` is None, "left" or "right"."""
        return inputs(self.case, padding)

    def masks(self, padding: str | None = None) -> dict[str, np.ndarray]:
        """For `assert_equal`."""
        given = self.inputs(padding)
        if not self.case.pair:
            return {"mask": given["mask"]}
        own = np.ones_like(given["tokens"])  # of decoder tokens that were left out
        return {"mask": given.get("decoder_mask", own), "encoder_mask": given["mask"]}

    def forward(
        self, padding: str | None = None, *, params: Any = None, config: Any = None, **options: Any
    ) -> fm.Output:
        """`fm.forward` on the same inputs; positions are left to its default rule."""
        given = {name: a for name, a in self.inputs(padding).items() if name != "positions"}
        params, config = self.params if params is None else params, self.config if config is None else config
        asked = {"hidden_states": True, "attentions": True} | (
            {"router_logits": True} if hasattr(config, "num_experts") else {}
        )
        return fm.forward(params, config, **given, **(asked | options))

    def check(self, padding: str | None = None, **options: Any) -> None:
        """Raises an AssertionError where `forward` departs from transformers."""
        assert_equal(
            self.forward(padding, **options), self.reference(padding), **self.masks(padding), causal=self.case.causal
        )


def build(case: Case) -> Any:
    """A random model of transformers, norms and biases moved off their initial values, eager attention."""
    architecture = getattr(transformers, case.architecture)
    torch.manual_seed(len(case.name))
    config = architecture.config_class(**{"attn_implementation": "eager"} | case.config)
    model = architecture(config, **case.options).eval()
    if case.untie:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in (*model.parameters(), *learned_buffers(model)):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def learned_buffers(model: Any) -> list[torch.Tensor]:
    """Buffers that are weights: BART's `final_logits_bias`."""
    return [buffer for name, buffer in model.named_buffers() if name in model.state_dict()]


@functools.cache
def load(case: Case, root: Path) -> Loaded:
    """Builds the row's model, lets transformers save it, and loads it."""
    folder = root / case.name.replace("/", "-")
    model = build(case)
    model.save_pretrained(folder)
    return Loaded(case, model, folder, *fm.load(folder))


def inputs(case: Case, padding: str | None = None) -> dict[str, np.ndarray]:
    """Two rows (of three choices, where there are choices), the odd ones padded by three."""
    random, length = np.random.default_rng(len(case.name)), case.length
    shape = (2, length) if case.choices is None else (2, case.choices, length)
    mask = np.ones(shape, np.int32)
    if padding is not None:
        mask[..., 1::2, slice(0, 3) if padding == "left" else slice(length - 3, length)] = 0
    tokens = np.where(mask == 1, random.integers(4, 61, shape), 3).astype(np.int32)
    given = {"tokens": tokens, "mask": mask, "positions": np.maximum(mask.cumsum(-1) - 1, 0).astype(np.int32)}
    if case.family in ("t5", "mt5", "bart"):
        del given["positions"]
    if case.pair and case.task == "sequence-classification":  # at the end token, which every row has
        tokens[np.arange(2), length - 1 - mask[:, ::-1].argmax(-1)] = 1
    elif case.pair and not (padding is None and case.shifts):  # other lengths than the encoder's
        real = np.ones((2, length - 2), np.int32)
        if padding is not None:
            real[1, slice(0, 2) if padding == "left" else slice(length - 4, length)] = 0
        texts = np.where(real == 1, random.integers(4, 61, real.shape), 3).astype(np.int32)
        given |= {"decoder_tokens": texts, "decoder_mask": real}
    if case.token_types is not None:
        given["token_types"] = random.integers(0, case.token_types, shape).astype(np.int32)
    return given


def call(model: Any, given: dict[str, np.ndarray], **labels: torch.Tensor) -> Any:
    """transformers' output, with its graph; with a loss if there are labels."""
    tensors = {name: torch.tensor(a, dtype=torch.long) for name, a in given.items()}
    named = {"input_ids": tensors["tokens"], "attention_mask": tensors["mask"]}
    if "token_types" in tensors:
        named["token_type_ids"] = tensors["token_types"]
    if "decoder_tokens" in tensors:
        named |= {"decoder_input_ids": tensors["decoder_tokens"], "decoder_attention_mask": tensors["decoder_mask"]}
    if "positions" in tensors and model.config.model_type in DECODERS:  # others count in ways of their own
        named |= {"position_ids": tensors["positions"].flatten(0, -2), "use_cache": False}
    if type(model).__name__.endswith("DoubleHeadsModel"):
        columns = torch.arange(named["input_ids"].shape[-1])
        named["mc_token_ids"] = (columns * named["attention_mask"]).argmax(-1)
    if hasattr(model.config, "output_router_logits"):
        named["output_router_logits"] = True
        model.set_experts_implementation("eager")  # the default wants sizes that are multiples of 4
    weights = model.config._attn_implementation == "eager"  # no other returns them
    return model(**named, **labels, output_hidden_states=True, output_attentions=weights)


def outputs(out: Any) -> dict[str, torch.Tensor]:
    """transformers' output by the names of `fm.Output`, choices side by side."""
    found = {}
    for theirs, ours in (
        ("hidden_states", "hidden_states"), ("decoder_hidden_states", "hidden_states"),
        ("encoder_hidden_states", "encoder_hidden_states"),
    ):  # fmt: skip
        if theirs in out:
            same = [h for h in out[theirs] if h.shape[-1] == out[theirs][0].shape[-1]]  # OPT projects its last
            found[ours] = torch.stack([h.reshape(same[0].shape) for h in same])
    for theirs, ours in (
        ("attentions", "attentions"), ("decoder_attentions", "attentions"), ("cross_attentions", "cross_attentions"),
        ("encoder_attentions", "encoder_attentions"),
    ):  # fmt: skip
        if out.get(theirs):
            found[ours] = torch.stack(out[theirs])
    if out.get("router_logits"):
        found["router_logits"] = torch.stack(
            [x.reshape(*out.hidden_states[0].shape[:2], -1) for x in out.router_logits]
        )
    if "encoder_last_hidden_state" in out:
        found["encoder_hidden"] = out.encoder_last_hidden_state
    if "last_hidden_state" in out:
        found["hidden"] = out.last_hidden_state
    if out.get("pooler_output") is not None:
        found["pooled"] = out.pooler_output
    if "start_logits" in out:
        found["logits"] = torch.stack([out.start_logits, out.end_logits], -1)
    for theirs, ours in (
        ("logits", "logits"), ("prediction_logits", "logits"),
        ("seq_relationship_logits", "sequence_logits"), ("mc_logits", "sequence_logits"), ("sop_logits", "sequence_logits"),
    ):  # fmt: skip
        if theirs in out:
            found[ours] = out[theirs]
    return found


def reference(model: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As numpy arrays, by the names of `fm.Output`."""
    with torch.no_grad():
        return {
            name: (a.float() if a.dtype == torch.bfloat16 else a).numpy()
            for name, a in outputs(call(model, given)).items()
        }


def assert_equal(
    got: fm.Output,
    want: dict[str, np.ndarray],
    mask: np.ndarray,
    *,
    causal: bool,
    bound: float = 1e-5,
    encoder_mask: np.ndarray | None = None,
) -> None:
    """Every field that transformers has, within `bound · max(1, |theirs|)`; at real positions where there are positions.

    Args:
        got: ours.
        want: theirs.
        mask: `(b t)` or `(b n t)`.
        causal: whether a padded place may see no token at all, so that nothing of it is compared.
        bound: of the difference.
        encoder_mask: `(b s)`, where `mask` is the decoder's.
    """
    both = mask
    for name, theirs in want.items():
        mask = both if encoder_mask is None or not name.startswith("encoder_") else encoder_mask
        flat = mask.reshape(-1, mask.shape[-1]).astype(bool)
        ours = getattr(got, name)
        assert ours is not None, f"{name} is missing"
        ours = np.asarray(ours)
        if name.endswith("attentions"):  # of real queries to all keys
            where = flat[None, :, None, :, None]
        elif name == "router_logits":
            where = flat[None, :, :, None]
        elif name.endswith("hidden_states"):
            ours, theirs, where = ours.reshape(theirs.shape), theirs, flat[None, :, :, None]
        elif ours.ndim > mask.ndim and ours.shape[: mask.ndim] == mask.shape:
            where = mask.astype(bool)[..., None]
        else:
            where = np.ones((1,) * theirs.ndim, bool)
        assert ours.shape == theirs.shape, f"{name} has shape {ours.shape}, transformers {theirs.shape}"
        if not causal and not name.endswith(("hidden_states", "attentions", "router_logits")):
            where = np.ones((1,) * theirs.ndim, bool)
        error = np.where(where, np.abs(ours - theirs) / np.maximum(1, np.abs(theirs)), 0)
        assert error.max() <= bound, (
            f"{name} departs by {error.max():.2e} at {np.unravel_index(error.argmax(), error.shape)}"
        )
