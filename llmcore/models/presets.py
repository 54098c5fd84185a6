"""Named model sizes. Fields that are not named here keep ModelConfig's defaults."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # A byte-level model that two CPU cores train in minutes.
    "tiny": dict(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=1024, tie_word_embeddings=False,
    ),
    # Of tiny's size: Mamba alone, Mamba-2 alone, and two Mamba layers before each one of attention.
    "tiny_mamba": dict(
        vocab_size=256, hidden_size=128, num_hidden_layers=7, num_attention_heads=4, max_position_embeddings=1024,
        layer_pattern=["mamba"],
    ),
    "tiny_mamba2": dict(
        vocab_size=256, hidden_size=128, num_hidden_layers=7, num_attention_heads=4, max_position_embeddings=1024,
        layer_pattern=["mamba2"], mamba2_state_size=64, mamba2_head_dim=32,
    ),
    "tiny_hybrid": dict(
        vocab_size=256, hidden_size=128, intermediate_size=320, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=1024, layer_pattern=["mamba", "mamba", "attention"],
    ),
    # tiny with experts: as many parameters for a token, three times as many in all.
    "tiny_moe": dict(
        vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=1024,
        feed_forward_pattern=["experts"], num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96,
    ),
    "test_small": dict(
        vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8,
        max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "1b_transformer": dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=4096,
    ),
    "2b_transformer": dict(
        vocab_size=32000, hidden_size=2560, intermediate_size=6912, num_hidden_layers=28, num_attention_heads=20,
        num_key_value_heads=5, max_position_embeddings=4096,
    ),
    "3b_transformer": dict(
        vocab_size=32000, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, max_position_embeddings=4096,
    ),
    "4b_transformer": dict(
        vocab_size=32000, hidden_size=3072, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=24,
        num_key_value_heads=8, max_position_embeddings=4096,
    ),
    "7b_transformer": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096,
    ),
    # Two of eight experts, as Mixtral has them; six of 64 fine ones and two shared, as DeepSeekMoE.
    "6b_moe_8x2": dict(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=4096, feed_forward_pattern=["experts"], num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=5632,
    ),
    "16b_moe_64x6": dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=10944, num_hidden_layers=28, num_attention_heads=16,
        max_position_embeddings=4096, feed_forward_pattern=["dense", *["experts"] * 27], num_experts=64,
        num_experts_per_tok=6, num_shared_experts=2, moe_intermediate_size=1408, router_bias_rate=0.001,
        router_balance_loss=0.0,
    ),
    "1b_mamba": dict(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=42, num_attention_heads=32, max_position_embeddings=8192,
        layer_pattern=["mamba"], tie_word_embeddings=True,
    ),
    "1b_mamba2": dict(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=42, num_attention_heads=32, max_position_embeddings=8192,
        layer_pattern=["mamba2"], tie_word_embeddings=True,
    ),
    "1b_hybrid": dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=28, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, layer_pattern=["mamba", "mamba", "attention", "mamba"],
        tie_word_embeddings=True,
    ),
    "3b_mamba_lite": dict(
        vocab_size=32000, hidden_size=2560, num_hidden_layers=64, num_attention_heads=40, max_position_embeddings=8192,
        layer_pattern=["mamba"], tie_word_embeddings=True,
    ),
    "7b_mamba": dict(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=64, num_attention_heads=32, max_position_embeddings=8192,
        layer_pattern=["mamba"],
    ),
}  # fmt: skip
