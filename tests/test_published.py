"""The sizes of published models: names and shapes of every tensor are those of transformers, without computing anything."""

import jax
import pytest
import torch
import transformers as hf

import fmodels as fm
from fmodels.models import family
from fmodels.weights import rules
from tests import families

GEMMA = {"vocab_size": 256000, "tie_word_embeddings": True}
DEBERTA = {
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "position_biased_input": False,
}  # fmt: skip
PUBLISHED = {
    "Llama-3.1-70B": ("LlamaForCausalLM", 70_553_706_496, {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
        },
    }),
    "Mistral-7B": ("MistralForCausalLM", 7_241_732_096, {"max_position_embeddings": 32768, "sliding_window": 4096}),
    "Qwen2.5-7B": ("Qwen2ForCausalLM", 7_615_616_512, {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }),
    "Qwen3-8B": ("Qwen3ForCausalLM", 8_190_735_360, {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128,
    }),
    "gemma-7b": ("GemmaForCausalLM", 8_537_680_896, GEMMA),
    "gemma-2-9b": ("Gemma2ForCausalLM", 9_241_705_984, GEMMA | {
        "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
    }),
    "gemma-3-1b": ("Gemma3ForCausalLM", 999_885_952, {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    }),
    "Phi-3-mini": ("Phi3ForCausalLM", 3_821_079_552, {"sliding_window": 2047}),
    "phi-2": ("PhiForCausalLM", 2_779_683_840, {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    }),
    "OLMo-2-7B": ("Olmo2ForCausalLM", 7_298_617_344, {"vocab_size": 100352, "num_key_value_heads": 32}),
    "SmolLM3-3B": ("SmolLM3ForCausalLM", 3_075_098_624, {}),
    "granite-3.1-8b": ("GraniteForCausalLM", 8_170_848_256, {
        "vocab_size": 49155, "intermediate_size": 12800, "num_hidden_layers": 40, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }),
    "c4ai-command-r-v01": ("CohereForCausalLM", 34_980_831_232, {}),
    "starcoder2-7b": ("Starcoder2ForCausalLM", 7_173_923_840, {
        "hidden_size": 4608, "intermediate_size": 18432, "num_hidden_layers": 32, "num_attention_heads": 36, "num_key_value_heads": 4,
        "max_position_embeddings": 16384,
    }),
    "stablelm-3b": ("StableLmForCausalLM", 2_795_443_200, {}),
    "gpt-j-6b": ("GPTJForCausalLM", 6_050_882_784, {}),
    "opt-350m": ("OPTForCausalLM", 331_196_416, {
        "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    }),
    "opt-6.7b": ("OPTForCausalLM", 6_658_473_984, {
        "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
    }),
    "gpt-neo-2.7B": ("GPTNeoForCausalLM", 2_651_307_520, {
        "hidden_size": 2560, "num_layers": 32, "num_heads": 20, "attention_types": [[["global", "local"], 16]],
    }),
    "bloom-7b1": ("BloomForCausalLM", 7_069_016_064, {"hidden_size": 4096, "n_layer": 30, "n_head": 32}),
    "falcon-7b": ("FalconForCausalLM", 6_921_720_704, {}),
    "falcon-40b": ("FalconForCausalLM", 41_303_293_952, {
        "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True,
    }),
    "falcon-rw-1b": ("FalconForCausalLM", 1_311_625_216, {
        "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "alibi": True, "bias": True,
        "multi_query": False, "parallel_attn": False,
    }),
    "xglm-564M": ("XGLMForCausalLM", 564_463_616, {}),
    "gpt-neox-20b": ("GPTNeoXForCausalLM", 20_554_567_680, {}),
    "Mixtral-8x7B": ("MixtralForCausalLM", 46_702_792_704, {"max_position_embeddings": 32768}),
    "Qwen1.5-MoE-A2.7B": ("Qwen2MoeForCausalLM", 14_315_784_192, {}),
    "Qwen3-30B-A3B": ("Qwen3MoeForCausalLM", 30_532_122_624, {
        "num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True, "max_position_embeddings": 40960,
    }),
    "gpt-oss-20b": ("GptOssForCausalLM", 20_914_757_184, {"num_hidden_layers": 24, "num_local_experts": 32}),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", 671_026_419_200, {}),
    "xlm-roberta-large": ("XLMRobertaForMaskedLM", 560_142_482, {
        "vocab_size": 250002, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "max_position_embeddings": 514, "type_vocab_size": 1,
    }),
    "albert-xxlarge-v2": ("AlbertForMaskedLM", 206_368_944, {}),
    "electra-small": ("ElectraForPreTraining", 13_549_057, {}),
    "all-mpnet-base-v2": ("MPNetModel", 109_486_464, {"max_position_embeddings": 514}),
    "deberta-v3-small": ("DebertaV2ForMaskedLM", 142_024_548, DEBERTA | {
        "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072,
    }),
    "deberta-v2-xlarge": ("DebertaV2Model", 884_593_152, DEBERTA | {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "nomic-embed-text-v1.5": ("NomicBertModel", 136_731_648, {}),
    "bigbird-roberta-base": ("BigBirdForPreTraining", 128_112_824, {}),
    "ModernBERT-large": ("ModernBertForMaskedLM", 395_881_664, {
        "hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28, "num_attention_heads": 16,
    }),
    "distilbert-base": ("DistilBertForMaskedLM", 66_985_530, {}),
}  # fmt: skip
"""Name -> transformers' class, numbers of the model (a tied head once), config."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes(name):
    architecture, count, sizes = PUBLISHED[name]
    kind = getattr(hf, architecture)
    with torch.device("meta"):
        model = kind(kind.config_class(**sizes))
    model.tie_weights()
    config = family(model.config.model_type).config.from_hf(model.config.to_dict() | {"architectures": [architecture]})
    assert sum(p.numel() for p in (*model.parameters(), *families.learned_buffers(model))) == count
    params = fm.abstract(config, dtype="bfloat16")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count == fm.num_parameters(params)
    places = family(config).weights.of_module.places(config)
    shapes = {disk: rules.disk_shape(place.rule, place.sizes(config)) for disk, place in places.items()}
    repeats = family(config).weights.of_module.repeats(config)
    theirs = {disk: tuple(tensor.shape) for disk, tensor in model.state_dict().items() if disk not in repeats}
    assert {disk: shape for disk, shape in shapes.items() if disk in theirs} == theirs
    assert [disk for disk in shapes.keys() - theirs.keys() if not places[disk].rule.optional] == []
