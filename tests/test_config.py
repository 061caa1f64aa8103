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


def scaled(kind: str, factor: float | None = 4.0, original: int | None = None, **more) -> dict:
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original} | more
    return {"rope_scaling": {name: value for name, value in scaling.items() if value is not None}}


@pytest.mark.parametrize(
    ("stated", "fields", "context"),
    [
        (64, {}, 64),
        (64, {"rope_scaling": {"rope_type": "default", "factor": 4.0}}, 64),
        (64, scaled("yarn", original=64), 256),  # Qwen2.5's model card
        (256, scaled("yarn", original=64), 256),  # already scaled
        (80, scaled("yarn", original=64), 256),  # Qwen3 states some room for answers
        (64, scaled("yarn"), 256),
        (256, scaled("yarn", factor=None, original=64), 256),
        (64, {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64}, 256),
        (64, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}}, 256),
        (64, scaled("linear"), 256),  # Vicuna-16k
        (64, scaled("linear") | {"max_sequence_length": 256}, 256),
        (256, scaled("linear") | {"max_sequence_length": 256}, 256),  # LongChat
        (64, scaled("linear", original=64), 256),
        (256, scaled("linear", original=64), 256),
        (64, scaled("linear", factor=2.5), 160),
        (64, scaled("linear", factor=1.0), 64),
        (256, scaled("llama3", factor=8.0, original=64), 256),  # Llama 3.1 states the product, and 3.2 less than it
        (64, scaled("llama3", factor=8.0, original=64), 64),
    ],
)
def test_context_is_what_the_extension_makes_possible(stated, fields, context):
    assert tiny.config(max_position_embeddings=stated, **fields).context_length == context


def test_an_extension_added_to_rope_parameters_keeps_what_they_say():
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    config = tiny.config(rope_theta=None, rope_parameters=parameters, rope_scaling={"type": "linear", "factor": 2.0})
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (5e5, "linear", 2.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object such as"),
        ({"rope_scaling": ["linear", 4.0]}, "rope_scaling is .'linear', 4.0.; expected an object"),
        ({"rope_scaling": 4.0}, "rope_scaling is 4.0; expected an object"),
        ({"rope_parameters": "default"}, "rope_parameters is 'default'; expected an object"),
        ({"rope_scaling": {"type": 3}}, "rope scaling 3 is not supported"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope scaling .'linear'. is not supported"),
        ({"rope_scaling": {"type": "divisors"}}, "no rope frequency divisors; expected 4"),
        ({"rope_scaling": {"type": "divisors", "divisors": [1, 2, "3", 4]}}, "a rope frequency divisor is '3'"),
        (scaled("longrope"), "'longrope' is not supported"),
        (scaled("linear", factor=1e300), "makes a context of 1.28e.302 tokens; expected 2147483647 at most"),
        (scaled("yarn", original=0.5), "original_max_position_embeddings is below 1"),
        (scaled("yarn") | {"rope_theta": 1.0}, "rope_theta is 1.0; expected more than 1"),
        (scaled("llama3", low_freq_factor=4.0), "high_freq_factor is 4.0; expected more than low_freq_factor, 4.0"),
        ({"model_type": ["llama"]}, "architecture .'llama'. is not supported"),
        ({"hidden_act": ["silu"]}, "hidden_act .'silu'. is not supported"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
        ({"attention_bias": 1}, "attention_bias is 1; expected true or false"),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": "no"}, "use_sliding_window is 'no'"),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers is '1'"),
        ({"model_type": "mistral", "sliding_window": 0.5}, "sliding_window is 0.5; expected a positive integer"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": "full"}, "layer_types has 'full' for 3 layers"),
        (
            {"model_type": "mistral", "sliding_window": 8, "layer_types": ["a", "b", "c"]},
            "layer_types has 'a'; expected 'sliding_attention'",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected 10000 at most"),
        ({"head_dim": 10**7}, "head_dim is 10000000; expected 65536 at most"),
        ({"head_dim": None, "hidden_size": 2**30}, "head_dim is 268435456; expected 65536 at most"),
        ({"vocab_size": 10**30}, "vocab_size is 10*; expected 2147483647 at most"),
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
