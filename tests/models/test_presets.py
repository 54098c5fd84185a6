import pytest
import torch

from llmcore.models import PRESETS, ModelConfig, build

PARAMETERS = {
    "tiny": 918_656,
    "tiny_mamba": 881_920,
    "tiny_mamba2": 891_944,
    "tiny_hybrid": 909_440,
    "tiny_moe": 2_696_320,
    "test_small": 50_473_472,
    "1b_transformer": 1_100_048_384,
    "2b_transformer": 2_109_094_400,
    "3b_transformer": 3_015_355_392,
    "4b_transformer": 4_022_012_928,
    "7b_transformer": 6_738_415_616,
    "6b_moe_8x2": 6_452_340_736,
    "16b_moe_64x6": 16_087_369_728,
    "1b_mamba": 1_176_090_624,
    "1b_mamba2": 1_151_207_808,
    "1b_hybrid": 936_464_384,
    "3b_mamba_lite": 2_721_548_800,
    "7b_mamba": 7_002_132_480,
}
# Of those, what one token uses.
ACTIVE = {"tiny_moe": 926_848, "6b_moe_8x2": 1_884_743_680, "16b_moe_64x6": 2_540_292_096}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    config = ModelConfig.from_preset(name)
    with torch.device("meta"):
        model = build(config)
    assert model.num_parameters() == config.num_parameters() == PARAMETERS[name]
    assert config.num_parameters(active=True) == ACTIVE.get(name, PARAMETERS[name])


def test_llamas_parameter_names():
    with torch.device("meta"):
        model = build(ModelConfig.from_preset("tiny", num_hidden_layers=1))
    layer = "model.layers.0."
    assert list(model.state_dict()) == [
        "model.embed_tokens.weight",
        *(f"{layer}self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"{layer}mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        f"{layer}input_layernorm.weight",
        f"{layer}post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


def test_llamas_initialisation():
    torch.manual_seed(0)
    for name, weight in build(ModelConfig.from_preset("tiny")).named_parameters():
        if "norm" in name:
            assert bool((weight == 1).all())
        else:
            assert abs(weight.std().item() - 0.02) < 0.001 and abs(weight.mean().item()) < 0.001


def test_flops_are_those_of_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    import llmcore

    config = ModelConfig.from_preset("tiny", num_key_value_heads=2)
    tokens = torch.zeros(1, 64, dtype=torch.long, device="meta")
    with torch.device("meta"):
        model = build(config)
    with FlopCounterMode(display=False) as counter, llmcore.backend("torch"):
        model(tokens)
    weights = counter.get_total_flops() / 64
    assert weights == config.flops_per_token(64, training=False) - 4 * 4 * 4 * 32 * 65 / 2
    assert config.flops_per_token(64) == 3 * config.flops_per_token(64, training=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig.from_preset("tini"), "unknown preset 'tini'; did you mean 'tiny'? allowed: tiny, tiny_mamba"),
        (lambda: ModelConfig.from_preset("tiny", hiden_size=3), "ModelConfig has no field 'hiden_size'; did you mean 'hidden_size'?"),
        (lambda: ModelConfig.from_dict({"num_attention_heads": 3, "hidden_size": 64}), "hidden_size = 64 is not a multiple of num_attention_heads = 3"),
        (lambda: ModelConfig(num_key_value_heads=3), "num_key_value_heads is 3, which does not divide num_attention_heads = 8"),
        (lambda: ModelConfig(head_dim=20), "head_dim is 20; allowed: 16 to 256 in steps of 8"),
        (lambda: ModelConfig(vocab_size=0), "vocab_size is 0; allowed: whole numbers from 1"),
        (lambda: ModelConfig(hidden_size="big"), "hidden_size is 'big'; allowed: whole numbers from 1"),
        (lambda: ModelConfig(rms_norm_eps=-1.0), "rms_norm_eps is -1.0; allowed: numbers above 0"),
    ],
)  # fmt: skip
def test_bad_configurations(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_dict_round_trip():
    config = ModelConfig.from_preset("1b_transformer")
    assert ModelConfig.from_dict(config.to_dict()) == config
