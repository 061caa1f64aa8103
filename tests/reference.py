"""What tests hold the decoder against: written another way, in float64, on the host."""

from collections.abc import Callable, Sequence

import numpy as np


def warped(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The filters by sorting, as their papers define them: probabilities [V] of logits [V]."""
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max())
        return e / e.sum()

    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    if top_k:
        scaled[order[top_k:]] = -np.inf
    probs = softmax(scaled)[order]
    before = np.cumsum(probs) - probs
    scaled[order[before >= top_p]] = -np.inf
    probs = softmax(scaled)
    scaled[probs < min_p * probs.max()] = -np.inf
    return softmax(scaled)


def enumerate_texts(
    next_logits: Callable[[tuple[int, ...]], np.ndarray], vocabulary: int, budget: int, eos: Sequence[int], setting: tuple
) -> dict[tuple[int, ...], float]:
    """The exact distribution of a model's output: every text that ends by EOS or at the budget, with its probability.

    Args:
      next_logits: from a text so far to the logits [V] of its next token.
      setting: temperature, top_k, top_p, min_p.
    """
    finished, open_texts = {}, {(): 1.0}
    for _ in range(budget):
        grown = {}
        for text, probability in open_texts.items():
            for token, p in enumerate(warped(next_logits(text), *setting)):
                if p > 0:
                    (finished if token in eos else grown)[(*text, token)] = probability * p
        open_texts = grown
    return finished | open_texts
