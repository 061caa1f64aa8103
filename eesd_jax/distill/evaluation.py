"""What a branch is worth on held-out text: teacher-forced means, rollouts of the real decoder, and the calibration of its confidence.

Agreement and overlap can look fine where the tokens per round of the decoder are poor (a branch must go on from its own drafts), so both
are looked at.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerBase

from eesd_jax.config import DecodeConfig, DraftConfig, ExperimentConfig
from eesd_jax.decode.controllers import Calibration, Fixed
from eesd_jax.distill import loss, step, teacher
from eesd_jax.distill.data import Batch, JoinedRows, Rows
from eesd_jax.distill.layout import Layout
from eesd_jax.engine.drafter import Drafter
from eesd_jax.engine.engine import Engine
from eesd_jax.engine.generation import Rounds
from eesd_jax.weights.load import LoadedModel

_PROMPT_TOKENS = 256
_CALIBRATION_BATCHES = 32

_evaluate = jax.jit(step.evaluate, static_argnums=0)


class Evaluation(NamedTuple):
    """Measures branches of one experiment; the same on every process.

    held_out: rows that are not trained on. cache: their features, None online. tokenizer, eos_ids: of the target, for rollouts.
    """

    config: ExperimentConfig
    step_config: step.StepConfig
    frozen: step.Frozen
    layout: Layout
    held_out: Rows | JoinedRows
    cache: teacher.FeatureCache | teacher.JoinedCache | None
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]

    def measure(self, trained: step.Trained) -> dict[str, float]:
        """Held-out means (see `loss.Totals`), tokens per round, and acceptance at each place of a round; by name, in that order."""
        sums = [_evaluate(self.step_config, self.frozen, trained, *batch)[0] for batch in self._batches(self.config.evaluation.batches)]
        values: dict[str, float] = {}
        if sums:
            totals = loss.Totals(*(sum(float(value) for value in column) for column in zip(*sums, strict=True)))
            values = {name: value / max(totals.positions, 1.0) for name, value in totals._asdict().items() if name != "positions"}
        if self.config.evaluation.rollouts and jax.process_count() == 1:
            values |= self._roll_out(trained)
        return values

    def calibrate(self, trained: step.Trained) -> Calibration:
        """Fits the calibration of the branch's confidence; the identity where there is no held-out text."""
        found = [_evaluate(self.step_config, self.frozen, trained, *batch)[1] for batch in self._batches(_CALIBRATION_BATCHES)]
        if not found:
            return Calibration()
        columns = zip(*(on_every_host(item) for item in found), strict=True)
        confidence, agrees, counts = (np.concatenate([leaf.ravel() for leaf in column]) for column in columns)
        return fit_calibration(confidence[counts], agrees[counts])

    def _batches(self, limit: int) -> Iterator[tuple[Batch, teacher.Features | None]]:
        """The first `limit` batches of the held-out rows, in order."""
        size = self.config.batch_size
        own = size // self.layout.shares
        for first in range(self.layout.share * own, min(len(self.held_out), limit * size) + self.layout.share * own, size):
            # The last batch is filled up with its last row, which does not count again.
            parts = [self.held_out[min(i, len(self.held_out) - 1)] for i in range(first, first + own)]
            batch = Batch(*(np.stack(field) for field in zip(*parts, strict=True)))
            real = np.arange(first, first + own) < len(self.held_out)
            batch = batch._replace(loss_mask=batch.loss_mask & real[:, None])
            features = None if self.cache is None else self.cache.read(batch.row, batch.tokens.shape[1])
            yield self.layout.place((batch, features))

    def _roll_out(self, trained: step.Trained) -> dict[str, float]:
        """Greedy text of the real decoder on held-out prompts; the target's weights are there twice for as long as it lasts."""
        evaluation, model_config = self.config.evaluation, self.step_config.model
        # Prompts are cut from the left, so that the context has room for the text.
        longest = max(1, min(_PROMPT_TOKENS, model_config.context_length - evaluation.rollout_tokens))
        examples = [self.held_out.examples[i] for i in range(min(evaluation.rollouts, len(self.held_out.examples)))]
        prompts = [example.prompt[-longest:].tolist() for example in examples if example.prompt.size]
        if not prompts:
            return {}
        branch = step.to_branch(trained, self.frozen, self.frozen.trunk.final_norm.dtype)
        draft = DraftConfig(self.config.branch.exit_layer, evaluation.rollout_draft, verify_widths=())
        model = LoadedModel(model_config, teacher.join_trunk(model_config, self.frozen.trunk), self.tokenizer, self.eos_ids)
        engine = Engine(model, DecodeConfig(chunk=evaluation.rollout_tokens), Drafter(branch, draft, Calibration(), trained=True))
        generations = engine.generate_ids(
            prompts,
            seeds=[0] * len(prompts),
            max_new_tokens=evaluation.rollout_tokens,
            controller=Fixed(evaluation.rollout_draft),
        )
        log = Rounds.join([generation.log for generation in generations])
        values = {"tokens_per_round": float(np.mean(log.committed))}
        return values | {f"acceptance_{i + 1}": float(share) for i, share in enumerate(log.acceptance_by_position())}


def on_every_host(tree: NamedTuple) -> NamedTuple:
    """The same tree of whole numpy arrays, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def fit_calibration(confidence: np.ndarray, accepted: np.ndarray) -> Calibration:
    """Slope and intercept of a logistic regression of acceptance on the log odds of confidence (Platt 1999), by Newton's method.

    Args:
      confidence: [n] in [0, 1]. accepted: bool [n]. Where all or none were accepted, the identity remains.
    """
    if accepted.all() or not accepted.any():
        return Calibration()
    inputs = np.stack([np.asarray(Calibration().log_odds(jnp.asarray(confidence)), np.float64), np.ones(len(confidence))], axis=1)
    weights = np.array([1.0, 0.0])
    # A little pull towards the identity keeps separable data finite.
    pull, prior = 1e-3, np.array([1.0, 0.0])
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (p - accepted) + pull * (weights - prior)
        hessian = (inputs * (p * (1 - p))[:, None]).T @ inputs + pull * np.eye(2)
        change = np.linalg.solve(hessian, gradient)
        weights = weights - np.clip(change, -2, 2)
        if np.abs(change).max() < 1e-9:
            break
    return Calibration(float(weights[0]), float(weights[1]))
