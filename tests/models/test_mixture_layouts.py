"""Mixtral's and Qwen3-MoE's layouts: the same logits as transformers', the same bits there and back."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from models.test_foreign_layouts import assert_same_function, same_tensors
from safetensors.torch import load_file, save_file

from llmcore import models
from llmcore.models import ModelConfig, build
from llmcore.models.foreign.hugging_face import MIXTRAL as MIXTRAL_TABLE
from llmcore.models.foreign.hugging_face import QWEN3_MOE as QWEN3_MOE_TABLE

SIZES = dict(
    vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, max_position_embeddings=64,
)  # fmt: skip
MIXTRAL = dict(SIZES, num_local_experts=5, num_experts_per_tok=2, sliding_window=None)
ODD = dict(
    MIXTRAL,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    rms_norm_eps=1e-4,
    num_key_value_heads=4,
    num_experts_per_tok=5,
    tie_word_embeddings=True,
)
QWEN = dict(SIZES, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=16)
MIXED = dict(
    QWEN,
    norm_topk_prob=True,
    mlp_only_layers=[1],
    num_key_value_heads=1,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)
SPARSE = dict(QWEN, decoder_sparse_step=2, num_experts_per_tok=1)
KINDS = {"mixtral": MIXTRAL, "odd": ODD, "qwen": QWEN, "mixed": MIXED, "sparse": SPARSE}


def theirs(changes, seed=0):
    """transformers' model with random weights, none of the value it starts from."""
    torch.manual_seed(seed)
    if "moe_intermediate_size" in changes:
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**changes)).eval()
    else:
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.4 * torch.randn_like(parameter)
            elif name.endswith("gate.weight"):
                parameter.normal_()  # the router of Qwen3-MoE starts from zeros, where all experts are alike
            else:
                parameter.mul_(2.5)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_bits_of_transformers_there_and_back(tmp_path, kind):
    model = theirs(KINDS[kind])
    model.save_pretrained(tmp_path / "a")
    ours = models.load(tmp_path / "a").eval()
    assert_same_function(ours, model)
    models.save(ours, tmp_path / "b", format="hugging_face")
    assert same_tensors(*(load_file(tmp_path / f / "model.safetensors") for f in "ab"))
    before, after = (transformers.AutoConfig.from_pretrained(tmp_path / folder).to_dict() for folder in "ab")
    given = {"_name_or_path", "decoder_sparse_step", "mlp_only_layers", "head_dim", "rope_theta", "sliding_window"}
    assert {n: v for n, v in before.items() if n not in given} == {n: v for n, v in after.items() if n not in given}
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()) and type(again) is type(model)
    assert same_tensors(again.state_dict(), model.state_dict())
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
def test_in_16_bits(tmp_path, kind):
    """With all experts chosen: their router rounds its logits to 16 bits, and ours does not, so that of some nearly alike
    they choose others."""
    count = KINDS[kind].get("num_local_experts") or KINDS[kind]["num_experts"]
    model = theirs({**KINDS[kind], "num_experts_per_tok": count}).bfloat16()
    model.save_pretrained(tmp_path / "a")
    ours = models.load(tmp_path / "a").eval()
    assert ours.lm_head.weight.dtype == torch.bfloat16
    assert_same_function(ours, model)
    models.save(ours, tmp_path / "b", format="hugging_face")
    assert same_tensors(*(load_file(tmp_path / f / "model.safetensors") for f in "ab"))


@pytest.mark.parametrize("kind", ["mixtral", "mixed"])
def test_greedy_generation_is_the_same(tmp_path, kind):
    model = theirs(KINDS[kind])
    model.save_pretrained(tmp_path / "a")
    prompt = torch.arange(1, 15).view(2, 7)
    model.generation_config.eos_token_id = None
    given = models.load(tmp_path / "a").eval().generate(prompt, 12, temperature=0)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
def test_stacked_experts_are_read_too(tmp_path, kind):
    model = theirs(KINDS[kind])
    model.save_pretrained(tmp_path / "a")
    state = {
        name.replace(".mlp.", ".block_sparse_moe.") if kind == "mixtral" else name: t
        for name, t in model.state_dict().items()
    }
    save_file(state, tmp_path / "a" / "model.safetensors")
    assert_same_function(models.load(tmp_path / "a").eval(), model)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "mixtral"),
        ({"qk_norm": True, "norm_topk_prob": False, "feed_forward_pattern": ["dense", "experts"]}, "qwen3_moe"),
    ],
)
def test_a_model_of_ours_in_their_layout(tmp_path, changes, kind):
    torch.manual_seed(1)
    config = ModelConfig(
        **{
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4,
            "num_attention_heads": 2, "feed_forward_pattern": ["experts"], "num_experts": 4, **changes,
        }
    )  # fmt: skip
    ours = build(config).eval()
    models.save(ours, tmp_path / "a", format="hugging_face")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert model.config.model_type == kind
    assert_same_function(ours, model)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("mixtral", {"sliding_window": 8}, "sliding_window is 8; allowed: null"),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            'rope_type is "yarn"; allowed: "default"',
        ),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; allowed: 1 to the 5 experts"),
        ("mixtral", {"intermediate_size": 0}, ": intermediate_size is 0; allowed: whole numbers from 1"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0; allowed: whole numbers from 1"),
        ("qwen", {"attention_bias": True}, "attention_bias is true; allowed: false"),
        ("qwen", {"use_sliding_window": True}, "use_sliding_window is true; allowed: false"),
        ("qwen", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; allowed: whole numbers from 1"),
        ("qwen", {"hidden_act": "gelu"}, 'hidden_act is "gelu"; allowed: "silu", "swish"'),
    ],
)
def test_what_llmcore_does_not_compute_is_refused(tmp_path, kind, changes, sentence):
    theirs(KINDS[kind]).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError) as caught:
        models.load(tmp_path / "a")
    assert sentence in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda s, n: s.pop(n), "lacks model.layers.0.mlp.experts.3.up_proj.weight, though it holds other experts"),
        (lambda s, n: s.update({n: s[n][:-1]}), "is (23, 64) of torch.float32; allowed: (24, 64) of torch.float32"),
        (lambda s, n: [s.pop(k) for k in list(s) if ".experts.5." in k], "gate_up_proj"),
    ],
)
def test_experts_that_do_not_fit_are_named(tmp_path, spoil, sentence):
    theirs(QWEN).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    state = load_file(file)
    spoil(state, "model.layers.0.mlp.experts.3.up_proj.weight")
    save_file({n: t.contiguous() for n, t in state.items()}, file)
    with pytest.raises(ValueError) as caught:
        models.load(tmp_path / "a")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_shared_experts": 1}, "num_shared_experts is 1, for which format 'hugging_face' has no field"),
        ({"scoring_func": "sigmoid"}, "scoring_func is sigmoid, for which format 'hugging_face' has no field"),
        (
            {"layer_pattern": ["attention", "mamba"]},
            "has no model of attention and mamba layers with experts feed-forwards",
        ),
    ],
)
def test_what_they_have_no_name_for_is_not_written(tmp_path, changes, sentence):
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, feed_forward_pattern=["experts"],
        **changes,
    )  # fmt: skip
    with pytest.raises(ValueError) as caught:
        models.save(build(config), tmp_path / "a", format="hugging_face")
    assert sentence in str(caught.value) and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("table", "config"),
    [(MIXTRAL_TABLE, transformers.MixtralConfig), (QWEN3_MOE_TABLE, transformers.Qwen3MoeConfig)],
    ids=["mixtral", "qwen"],
)
def test_silence_means_what_it_means_in_transformers(table, config):
    told = {name: value for name, value in config().to_dict().items() if value is not None}
    assert table.to_ours({}, Path("config.json")) == table.to_ours(told, Path("config.json"))
