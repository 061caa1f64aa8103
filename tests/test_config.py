"""One reading of every `config.json`: what a file leaves out means what transformers means by it, and mistakes are named."""

import math

import pytest
import tiny
import transformers

from eesd_jax.errors import UserError
from eesd_jax.model.config import SUPPORTED_ARCHITECTURES, ModelConfig


@pytest.mark.parametrize("model_type", SUPPORTED_ARCHITECTURES)
@pytest.mark.parametrize("extra", [{}, {"use_sliding_window": True}])
def test_fields_left_out_mean_what_transformers_means(model_type, extra):
    sizes = {"vocab_size": 100, "hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 32}
    given = {"model_type": model_type, "max_position_embeddings": 64, **sizes, **extra}
    complete = transformers.AutoConfig.for_model(**given).to_dict()
    assert ModelConfig.from_hf(given, "given") == ModelConfig.from_hf(complete, "complete")


@pytest.mark.parametrize(
    ("model_type", "fields", "windows"),
    [
        ("llama", {"sliding_window": 8}, (None, None, None)),
        ("mistral", {"sliding_window": 8}, (8, 8, 8)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}, (None, None, None)),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (None, 8, 8)),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None)),
        (
            "qwen3",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, None, 8),
        ),
    ],
)
def test_windows_of_each_block(model_type, fields, windows):
    assert tiny.config(model_type, **fields).windows == windows


@pytest.mark.parametrize(
    ("model_type", "with_bias", "without"),
    [
        ("llama", (True, True), (False, False)),
        ("mistral", (False, False), (False, False)),
        ("qwen2", (True, False), (True, False)),
        ("qwen3", (True, True), (False, False)),
    ],
)
def test_attention_biases_of_each_family(model_type, with_bias, without):
    for told, expected in ((True, with_bias), (False, without)):
        config = tiny.config(model_type, attention_bias=told)
        assert (config.qkv_bias, config.out_bias) == expected


def test_rope_of_transformers_4_and_5():
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    old = tiny.config(rope_theta=5e5, rope_scaling=scaling)
    assert tiny.config(rope_theta=None, rope_parameters={"rope_theta": 5e5, **scaling}) == old
    assert tiny.config(rope_theta=5e5, rope_scaling={"type": "yarn", "original_max_position_embeddings": 64}) == old  # 128 / 64
    assert tiny.config(rope_theta=5e5, rope_parameters={"rope_type": "default"}).rope.theta == 5e5
    assert old.rope.attention_factor == pytest.approx(0.1 * math.log(2) + 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None; expected a positive integer"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 30, "head_dim": None}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"head_dim": 7}, "head_dim is 7; .* even"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; expected a positive number"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported; supported are default, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'linear' has no 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "each layer type .full_attention."),
        ({"model_type": "mistral", "sliding_window": -4}, "sliding_window is -4"),
        ({"model_type": "mistral", "sliding_window": 4, "layer_types": ["sliding_attention"]}, "1 entries for 3 layers"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=f"^tiny: .*{message}"):
        tiny.config(**{"model_type": "llama"} | fields)
