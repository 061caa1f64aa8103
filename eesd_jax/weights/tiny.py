"""`tiny`: a random Llama of two hundred thousand weights with a tokenizer of single characters, made on the spot.

It says nothing, but goes through everything: for trying commands, configurations and meshes in seconds, without a network.
"""

import zlib
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models

from eesd_jax.model.config import ModelConfig

if TYPE_CHECKING:  # it takes as long as JAX to import, and nothing needs it before a model is loaded
    from transformers import PreTrainedTokenizerFast

TINY_NAME = "tiny"
_SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
_CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\näöüéè"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CONFIG = {
    "model_type": "llama",
    "vocab_size": 104,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def config() -> ModelConfig:
    """Its static shape: every axis divides by 8, so that every mesh of 8 devices can be tried."""
    return ModelConfig.from_hf(_CONFIG, TINY_NAME)


class RandomSource:
    """Its weights, drawn by NumPy: the same on every machine, and nothing is compiled for them. A source for `load_params`.

    Args:
      shapes: by name; every read of a name gives the same values. Norms are ones, the rest is of unit variance in its outputs.
    """

    description = TINY_NAME

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes = shapes

    def read(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
        return values * np.float32(shape[1] ** -0.5)


def tokenizer() -> "PreTrainedTokenizerFast":
    """A token a character (others become `?`), and three special ones; chat template included."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_SPECIAL[0], chat_template=_CHAT_TEMPLATE, clean_up_tokenization_spaces=False
    )
