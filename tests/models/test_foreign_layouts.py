"""Models in Hugging Face's and state-spaces' layouts: the same logits as transformers', the same bits there and back."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmcore import models
from llmcore.models import ModelConfig, build, files
from llmcore.models.foreign import hugging_face

SIZES = dict(vocab_size=96, hidden_size=40, num_hidden_layers=3, state_size=5, eos_token_id=7, pad_token_id=None)
ODD = dict(SIZES, conv_kernel=3, expand=3, time_step_rank=7, layer_norm_epsilon=1e-4, tie_word_embeddings=False)
# Two kinds of Mamba-2: two groups of heads in chunks that do not fit the sequence, and steps that are clamped.
TWO = dict(SIZES, num_heads=8, head_dim=10, n_groups=2, chunk_size=16)
LIMITED = dict(
    TWO, n_groups=1, time_step_limit=(0.01, 0.5), conv_kernel=3, expand=3, head_dim=15, tie_word_embeddings=True
)
TOKENS = torch.arange(66).view(2, 33)
OURS = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layer_pattern=["mamba"])


def theirs(seed=0, **changes):
    """transformers' model with random weights, of which none has the value or the size it starts from."""
    torch.manual_seed(seed)
    changes = {**SIZES, **changes}
    if "num_heads" in changes:
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**changes)).eval()
    else:
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", ".D", "bias", "norm.weight", "norm_f.weight")):
                parameter += 0.4 * torch.randn_like(parameter)
            else:
                parameter *= 1.5
    return model


def as_state_spaces(model, folder, **changes):
    """The same model as the mamba_ssm package has it on disk."""
    c = model.config
    tied = c.tie_word_embeddings
    folder.mkdir()
    state = {name.replace("backbone.embeddings", "backbone.embedding"): t for name, t in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    mixer = dict(d_state=c.state_size, d_conv=c.conv_kernel, expand=c.expand)
    if c.model_type == "mamba":
        mixer |= dict(dt_rank=c.time_step_rank)
    else:
        limit = list(c.time_step_limit)
        mixer |= dict(layer="Mamba2", headdim=c.head_dim, ngroups=c.n_groups, chunk_size=16, dt_limit=limit)
    config = dict(d_model=c.hidden_size, n_layer=c.num_hidden_layers, vocab_size=c.vocab_size, ssm_cfg=mixer)
    config |= dict(rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8)
    (folder / "config.json").write_text(
        json.dumps({**config, **({} if tied else {"tie_embeddings": False}), **changes})
    )
    return folder


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits.double()


def same_tensors(a, b):
    def bits(t):
        return t.contiguous().view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(bits(a[n]), bits(b[n])) for n in a
    )


def assert_same_function(ours, model):
    """At most twice transformers' error, and no more of that than the rounding of a float32 (or 16-bit) model gives."""
    exact, given, expected = logits(copy.deepcopy(ours).double()), logits(ours), logits(model)
    ulp = torch.finfo(ours.lm_head.weight.dtype).eps * exact.abs().max()
    assert (expected - exact).abs().max() < 32 * ulp, "not the same function"
    assert (given - exact).abs().max() <= 2 * (expected - exact).abs().max() + 2 * ulp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [SIZES, ODD, dict(SIZES, residual_in_fp32=False), TWO, LIMITED],
    ids=["tied", "odd", "residual", "mamba2", "limited"],
)
def test_logits_and_bits_of_transformers_there_and_back(tmp_path, changes, dtype):
    model = theirs(**changes).to(dtype)
    model.save_pretrained(tmp_path / "a")
    ours = models.load(tmp_path / "a").eval()
    assert ours.lm_head.weight.dtype == dtype and ours.config.layer_pattern == [model.config.model_type]
    assert_same_function(ours, model)
    models.save(ours, tmp_path / "b", format="hugging_face")
    assert same_tensors(*(load_file(tmp_path / f / "model.safetensors") for f in "ab"))
    before, after = (transformers.AutoConfig.from_pretrained(tmp_path / folder).to_dict() for folder in "ab")
    for config in (before, after):
        del config["_name_or_path"]
        config.pop("chunk_size", None)  # how to compute, not what
    assert before == after
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()) and type(again) is type(model)
    assert again.dtype == dtype and same_tensors(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("changes", "mixer"),
    [
        (SIZES, dict(d_state=5, dt_rank=3)),
        (ODD, dict(d_state=5, d_conv=3, expand=3, dt_rank=7)),
        (TWO, dict(layer="Mamba2", d_state=5, headdim=10, ngroups=2)),
        (LIMITED, dict(layer="Mamba2", d_state=5, d_conv=3, expand=3, headdim=15, dt_limit=[0.01, 0.5])),
    ],
    ids=["tied", "odd", "mamba2", "limited"],
)
def test_state_spaces_there_and_back(tmp_path, changes, mixer):
    model = theirs(**{**changes, "layer_norm_epsilon": 1e-5})
    ours = models.load(as_state_spaces(model, tmp_path / "a")).eval()
    assert_same_function(ours, model)
    models.save(ours, tmp_path / "b", format="state_spaces")
    before, after = (torch.load(tmp_path / f / "pytorch_model.bin", weights_only=True) for f in "ab")
    assert same_tensors(before, after) and "lm_head.weight" in after
    assert models.load(tmp_path / "b").config == ours.config
    expected = dict(d_model=40, n_layer=3, vocab_size=96, rms_norm=True, residual_in_fp32=True, fused_add_norm=True)
    expected |= dict(pad_vocab_size_multiple=1, ssm_cfg=mixer)
    if not model.config.tie_word_embeddings:
        expected["tie_embeddings"] = False
    assert json.loads((tmp_path / "b/config.json").read_text()) == expected
    sizes = [(tmp_path / f / "pytorch_model.bin").stat().st_size for f in "ab"]
    assert abs(sizes[0] - sizes[1]) < 4096, "the embedding is written once"


def test_state_spaces_pad_the_vocabulary(tmp_path):
    path = as_state_spaces(theirs(), tmp_path / "a", vocab_size=91)
    assert models.load(path).config.vocab_size == 96
    path = as_state_spaces(theirs(), tmp_path / "b", vocab_size=85, pad_vocab_size_multiple=16)
    assert models.load(path).config.vocab_size == 96
    path = as_state_spaces(theirs(), tmp_path / "c", vocab_size=86, pad_vocab_size_multiple=1)
    with pytest.raises(
        ValueError, match=r"embedding.weight in .* has shape \(96, 40\); config.json asks for \(86, 40\)"
    ):
        models.load(path)


@pytest.mark.parametrize("changes", [ODD, TWO], ids=["mamba", "mamba2"])
def test_greedy_generation_of_transformers(tmp_path, changes):
    model = theirs(**{**changes, "eos_token_id": None})
    model.save_pretrained(tmp_path / "a")
    ours, prompt = models.load(tmp_path / "a").eval(), TOKENS[:, :9]
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(prompt, 12, temperature=0), expected) and expected.shape == (2, 21)
    # Stopping at a token of its own, which the ids in config.json tell.
    ours.config.eos_token_id = stop = int(expected[0, 12])
    ours.config.pad_token_id = stop
    models.save(ours, tmp_path / "b", format="hugging_face")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    expected = again.generate(prompt[:1], max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(prompt[:1], 12, temperature=0, eos_token_id=stop), expected)
    assert expected.shape[1] < 21


@pytest.mark.parametrize("format", ["llmcore", "hugging_face", "state_spaces"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_ours_there_and_back(tmp_path, format, tied, kind):
    torch.manual_seed(0)
    changes = dict(layer_pattern=[kind], mamba2_head_dim=16, tie_word_embeddings=tied, rms_norm_eps=1e-5, dropout=0.1)
    model = build(ModelConfig(**{**OURS, **changes})).eval()
    models.save(model, tmp_path / "a", format=format)
    again = models.load(tmp_path / "a").eval()
    assert torch.equal(again(TOKENS % 64).logits, model(TOKENS % 64).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    again(TOKENS % 64, TOKENS % 64).loss.backward()
    lost = {"num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "dropout"}
    lost |= {"max_position_embeddings"} if format == "state_spaces" else set()
    lost |= {"mamba2_head_dim"} if kind == "mamba" else set()
    differing = {name for name, value in again.config.to_dict().items() if value != model.config.to_dict()[name]}
    assert differing <= (set() if format == "llmcore" else lost)


def test_a_model_without_attention_has_no_table_of_positions(tmp_path):
    theirs().save_pretrained(tmp_path)
    model = models.load(tmp_path).eval()
    assert model.config.max_position_embeddings == 2**20 and not list(model.buffers())
    assert model(torch.zeros(1, 2100, dtype=torch.long)).logits.shape == (1, 2100, 96)


def test_the_residual_stream(tmp_path):
    """float32 where config.json says so and weights are of 16 bits; the weights' dtype otherwise."""
    seen = []
    for folder, wide in (("a", True), ("b", False)):
        theirs(residual_in_fp32=wide).bfloat16().save_pretrained(tmp_path / folder)
        model = models.load(tmp_path / folder)
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, out: seen.append((out[0].dtype, out[1].dtype)))
        model(TOKENS, TOKENS).loss.backward()
        model.double()(TOKENS)
    wide, narrow, exact = torch.float32, torch.bfloat16, torch.float64
    assert seen == [(narrow, wide)] * 3 + [(exact, exact)] * 3 + [(narrow, narrow)] * 3 + [(exact, exact)] * 3


def in_shards(folder, sizes, suffix):
    """model.safetensors taken apart into files of so many tensors, with an index."""
    state = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    where, stem = {}, {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    for number, size in enumerate(sizes):
        shard = f"{stem}-{number}.{suffix}"
        part, state = dict(state[:size]), state[size:]
        (torch.save if suffix == "bin" else save_file)(part, folder / shard)
        where |= dict.fromkeys(part, shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, suffix):
    model = theirs()
    model.save_pretrained(tmp_path / "a")
    in_shards(tmp_path / "a", (5, 9, 99), suffix)
    assert_same_function(models.load(tmp_path / "a").eval(), model)


def test_shards_of_transformers(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_function(models.load(tmp_path).eval(), model)


def test_safetensors_before_a_pickle(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert_same_function(models.load(tmp_path).eval(), model)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_tensors(tmp_path, zipped):
    model = theirs()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same_function(models.load(tmp_path).eval(), model)


def test_both_names_of_the_embedding_and_a_tied_head(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    embedding = state.pop("backbone.embeddings.weight")
    save_file({**state, "backbone.embedding.weight": embedding}, tmp_path / "model.safetensors")
    assert_same_function(models.load(tmp_path).eval(), model)
    embedding[0, 0] = float("nan")
    both = {"backbone.embedding.weight": embedding, "lm_head.weight": embedding.clone()}
    save_file({**state, **both}, tmp_path / "model.safetensors")
    assert models.load(tmp_path).lm_head.weight[0, 0].isnan()
    both["lm_head.weight"][1, 1] += 1
    save_file({**state, **both}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight in .* is not backbone.embeddings.weight, though"):
        models.load(tmp_path)


class Code:
    def __reduce__(self):
        return print, ("run",)


def weights(change):
    """Replaces tensors in model.safetensors; None takes one away."""

    def apply(path):
        state = {**load_file(path / "model.safetensors"), **change}
        save_file({name: t for name, t in state.items() if t is not None}, path / "model.safetensors")

    return apply


def pickled(what):
    def apply(path):
        (path / "model.safetensors").unlink()
        torch.save(what, path / "pytorch_model.bin")

    return apply


def truncated(path):
    pickled(theirs().state_dict())(path)
    data = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def flipped(path):
    pickled(theirs().state_dict())(path)
    data = bytearray((path / "pytorch_model.bin").read_bytes())
    data[data.index(b"weight")] = 0xFF
    (path / "pytorch_model.bin").write_bytes(data)


def emptied(path):
    pickled({})(path)
    (path / "pytorch_model.bin").write_bytes(b"")


def sharded(change):
    def apply(path):
        in_shards(path, (5, 99), "safetensors")
        change(path, path / "model.safetensors.index.json")

    return apply


def index(**where):
    def apply(path, file):
        values = json.loads(file.read_text())
        values["weight_map"] |= {name.replace("__", "."): shard for name, shard in where.items()}
        file.write_text(json.dumps(values))

    return apply


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda p: (p / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors is missing; a model directory holds"),
        (weights({"backbone.norm_f.weight": None}), ValueError, "model.safetensors lacks backbone.norm_f.weight, which its config.json asks for."),
        (weights({"backbone.norm_f.weight": torch.ones(3)}), ValueError, "has shape (3,); config.json asks for (40,)."),
        (weights({"backbone.norm_f.weight": torch.ones(40, dtype=torch.int8)}), ValueError, "is of int8; allowed: floating-point numbers."),
        (weights({"backbone.layers.0.mixer.in_proj.bias": torch.ones(3)}), ValueError, "holds backbone.layers.0.mixer.in_proj.bias, unknown to its config.json."),
        (pickled({"a": torch.ones(3), "b": Code()}), ValueError, "pytorch_model.bin is damaged, or holds more than tensors"),
        (pickled({"model": {"a": torch.ones(3)}}), ValueError, "must hold a dict of tensors by their parameters' names"),
        (pickled([torch.ones(3)]), ValueError, "must hold a dict of tensors by their parameters' names"),
        (truncated, ValueError, "pytorch_model.bin is damaged or truncated"),
        (flipped, ValueError, "pytorch_model.bin is damaged or truncated"),
        (emptied, ValueError, "pytorch_model.bin is damaged or truncated"),
        (sharded(lambda p, i: (p / "model-1.safetensors").unlink()), FileNotFoundError, "model-1.safetensors is missing; model.safetensors.index.json names it."),
        (sharded(lambda p, i: i.write_text("{")), ValueError, "index.json is not valid JSON"),
        (sharded(lambda p, i: i.write_text("{}")), ValueError, "index.json must hold a weight_map"),
        (sharded(index(a="../b/model.safetensors")), ValueError, "names the file '../b/model.safetensors'; allowed: files of its own directory."),
        (sharded(index(a="model-0.safetensors")), ValueError, "model-0.safetensors lacks a, which model.safetensors.index.json says it holds."),
        (sharded(lambda p, i: save_file({"backbone.norm_f.weight": torch.ones(40), **load_file(p / "model-0.safetensors")}, p / "model-0.safetensors")), ValueError, "holds backbone.norm_f.weight, and so does another file."),
    ],
)  # fmt: skip
def test_damaged_directories(tmp_path, capsys, damage, error, words):
    theirs().save_pretrained(tmp_path)
    damage(tmp_path)
    capsys.readouterr()
    with pytest.raises(error) as caught:
        models.load(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "rwkv"}, 'model_type is "rwkv"; allowed: "mamba", "mamba2", "mixtral", "qwen3_moe".'),
        ({"model_type": ["mamba"]}, 'model_type is ["mamba"]; allowed: "mamba"'),
        ({"architectures": ["MambaModel"]}, 'architectures is ["MambaModel"]; allowed: ["MambaForCausalLM"].'),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; allowed: "silu", "swish".'),
        ({"use_bias": True}, "use_bias is true; allowed: false."),
        ({"use_conv_bias": False}, "use_conv_bias is false; allowed: true."),
        ({"quantization_config": {"bits": 4}}, "quantization_config is given; allowed: weights that are not quantized."),
        ({"conv_kernel": 5}, "conv_kernel is 5; allowed: 2 to 4."),
        ({"state_size": 300}, "state_size is 300; allowed: 1 to 256."),
        ({"expand": 1.5}, "expand is 1.5; allowed: whole numbers from 1."),
        ({"hidden_size": None}, "hidden_size is None; allowed: whole numbers from 1."),
        ({"time_step_rank": "all"}, "time_step_rank is 'all'; allowed: whole numbers from 1."),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'; allowed: a whole number, a list of them, or none."),
        ({"residual_in_fp32": 1}, "residual_in_fp32 is 1; allowed: true, false."),
    ],
)  # fmt: skip
def test_what_hugging_face_asks_for_in_vain(tmp_path, changes, words):
    theirs().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError) as caught:
        models.load(tmp_path)
    assert str(caught.value).startswith(f"load: {tmp_path / 'config.json'}: {words}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm": False}, "rms_norm is false; allowed: true."),
        ({"d_intermediate": 64}, "d_intermediate is 64; allowed: 0."),
        ({"attn_layer_idx": [1]}, "attn_layer_idx is [1]; allowed: [], null."),
        ({"ssm_cfg": {"bias": True}}, "ssm_cfg.bias is true; allowed: false."),
        ({"ssm_cfg": {"conv_bias": False}}, "ssm_cfg.conv_bias is false; allowed: true."),
        ({"ssm_cfg": {"d_conv": 8}}, "ssm_cfg.d_conv is 8; allowed: 2 to 4."),
        ({"ssm_cfg": {"layer": "Mamba3"}}, 'ssm_cfg.layer is "Mamba3"; allowed: "Mamba1", "Mamba2".'),
        ({"ssm_cfg": {"dstate": 8}}, "Mamba1 has no field 'ssm_cfg.dstate'; did you mean 'ssm_cfg.d_state'? allowed: d_model,"),
        ({"ssm_cfg": [1]}, "ssm_cfg must be an object, but it is a list."),
        ({"bidirectional": True}, "Mamba1 has no field 'bidirectional'; "),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0; allowed: whole numbers from 1."),
        ({"n_layer": 0}, "n_layer is 0; allowed: whole numbers from 1."),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 32}}, "ssm_cfg.d_ssm is 32; allowed: null."),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim is true; allowed: false."),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm is false; allowed: true."),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg.norm_before_gate is true; allowed: false."),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 33}}, "ssm_cfg.headdim is 33; allowed: a divisor of ssm_cfg.expand * d_model = 80."),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 10, "dt_limit": [1, 0]}}, "ssm_cfg.dt_limit is [1, 0]; allowed: none, or two"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": 3}}, "ssm_cfg.dt_limit is 3; allowed: [0.0, Infinity]."),
        ({"ssm_cfg": {"dt_rank": 3, "headdim": 10}}, "Mamba1 has no field 'ssm_cfg.headdim'; "),
        ({"vocab_size": "many"}, "vocab_size is 'many'; allowed: whole numbers from 1."),
    ],
)  # fmt: skip
def test_what_state_spaces_ask_for_in_vain(tmp_path, changes, words):
    as_state_spaces(theirs(), tmp_path / "a", **changes)
    with pytest.raises(ValueError) as caught:
        models.load(tmp_path / "a")
    assert str(caught.value).startswith(f"load: {tmp_path / 'a' / 'config.json'}: {words}")


@pytest.mark.parametrize("format", ["hugging_face", "state_spaces"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_pattern": ["attention"]}, "has no model of attention layers with dense feed-forwards; allowed: mamba layers alone, mamba2"),
        ({"layer_pattern": ["mamba", "attention"]}, "has no model of attention and mamba layers with dense feed-forwards; allowed: mamba"),
        ({"layer_pattern": ["mamba", "mamba2"]}, "has no model of mamba and mamba2 layers; allowed: mamba layers alone, mamba2 layers alone, "),
        ({"mamba_feed_forward": True}, "has no model of mamba layers with dense feed-forwards; allowed: mamba layers alone"),
    ],
)  # fmt: skip
def test_what_they_have_no_name_for(tmp_path, format, changes, words):
    with pytest.raises(ValueError) as caught:
        models.save(build(ModelConfig(**{**OURS, **changes})), tmp_path / "a", format=format)
    assert str(caught.value).startswith(f"save: format {format!r} {words}") and not (tmp_path / "a").exists()


def test_bad_formats(tmp_path):
    model = build(ModelConfig(**OURS))
    with pytest.raises(
        ValueError, match="format is 'huggingface'; did you mean 'hugging_face'. allowed: llmcore, hugging"
    ):
        models.save(model, tmp_path / "a", format="huggingface")
    with pytest.raises(
        ValueError, match="rms_norm_eps is 1e-06, for which format 'state_spaces' has no field; allowed"
    ):
        models.save(model, tmp_path / "a", format="state_spaces")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("format", ["llmcore", "hugging_face", "state_spaces"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_nothing_is_overwritten_nor_hidden(tmp_path, format, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} exists; choose an empty directory, nothing is overwritten"):
        models.save(build(ModelConfig(**OURS, rms_norm_eps=1e-5)), tmp_path, format=format)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("format", ["hugging_face", "state_spaces"])
@pytest.mark.parametrize("step", [0, 1])
def test_what_is_half_written_is_no_model(tmp_path, monkeypatch, format, step):
    """The disk may go at any step: before the weights have their name, or config.json has."""
    model, steps = build(ModelConfig(**OURS, rms_norm_eps=1e-5)), iter(range(9))
    replace = files.os.replace

    def fail(source, target):
        if next(steps) == step:
            raise OSError("no space left")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            models.save(model, tmp_path, format=format)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        models.load(tmp_path)


def test_views_are_written_without_what_they_are_views_of(tmp_path):
    model = build(ModelConfig(**OURS, rms_norm_eps=1e-5))
    flat = torch.cat([t.flatten() for t in model.state_dict().values()])
    parts = flat.split([t.numel() for t in model.state_dict().values()])
    state = {name: part.view_as(t) for (name, t), part in zip(model.state_dict().items(), parts, strict=True)}
    models.write(state, model.config, tmp_path / "a", "state_spaces")
    models.write({n: t.clone() for n, t in state.items()}, model.config, tmp_path / "b", "state_spaces")
    sizes = [(tmp_path / folder / "pytorch_model.bin").stat().st_size for folder in "ab"]
    assert sizes[0] == sizes[1] and same_tensors(models.load(tmp_path / "a").state_dict(), state)


def test_the_written_dtype_holds_every_weight(tmp_path):
    model = build(ModelConfig(**OURS)).bfloat16()
    with torch.no_grad():
        model.model.layers[0].mixer.A_log.data = torch.rand_like(model.model.layers[0].mixer.A_log).float()
    models.save(model, tmp_path, format="hugging_face")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.backbone.layers[0].mixer.A_log, model.model.layers[0].mixer.A_log)
    assert same_tensors(models.load(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("table", "config"),
    [(hugging_face.MAMBA, transformers.MambaConfig), (hugging_face.MAMBA2, transformers.Mamba2Config)],
)
def test_tables_know_every_field_of_transformers_by_its_default(table, config):
    """What transformers adds to a configuration stands in no table, until someone has read what it changes."""
    common = {f.name for f in dataclasses.fields(transformers.PretrainedConfig)} - {"tie_word_embeddings"}
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name not in common}
    known = {f.theirs: f.default for f in table.fields} | {name: allowed[0] for name, allowed in table.only.items()}
    assert set(defaults) <= set(known) | set(table.ignored)
    assert set(known) - set(defaults) <= {"max_position_embeddings"}
    if "time_step_limit" in defaults:
        assert defaults.pop("time_step_limit") == (0.0, math.inf)
    assert all(known[name] == default for name, default in defaults.items() if name in known)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 4}, "num_heads * head_dim is 40; allowed: expand * hidden_size = 80."),
        ({"n_groups": 3}, "n_groups is 3; allowed: a divisor of the 8 heads."),
        ({"rms_norm": False}, "rms_norm is false; allowed: true."),
        ({"norm_before_gate": True}, "norm_before_gate is true; allowed: false."),
        ({"time_step_limit": [0.5, 0.1]}, "time_step_limit is [0.5, 0.1]; allowed: none, or two numbers that rise"),
        ({"time_step_limit": "none"}, 'time_step_limit is "none"; allowed: [0.0, Infinity].'),
        (
            {"architectures": ["MambaForCausalLM"]},
            'architectures is ["MambaForCausalLM"]; allowed: ["Mamba2ForCausalLM"].',
        ),
    ],
)
def test_what_mamba2_of_hugging_face_asks_for_in_vain(tmp_path, changes, words):
    theirs(**TWO).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError) as caught:
        models.load(tmp_path)
    assert str(caught.value).startswith(f"load: {tmp_path / 'config.json'}: {words}")


def test_infinity_in_json(tmp_path):
    """JSON has none: Python writes a bare word, newer versions of transformers an object."""
    theirs(**TWO).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    for low, high, expected in ((0.0, math.inf, None), (0.1, math.inf, [0.1, math.inf]), (0.1, 0.2, [0.1, 0.2])):
        (tmp_path / "config.json").write_text(json.dumps({**config, "time_step_limit": [low, high]}))
        assert models.load(tmp_path).config.mamba2_step_limit == expected
