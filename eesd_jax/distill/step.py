"""One step of self-distillation, as a pure function: features of the frozen target in, a better branch out.

Only the branch is differentiated, optimised and saved. It is kept in float32 and computes in the trunk's dtype.

Axes: A accumulated parts, B rows, T tokens, D hidden, Q draft vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eesd_jax.config import ExperimentConfig, LossConfig, OptimizerConfig
from eesd_jax.distill import loss as losses
from eesd_jax.distill import teacher
from eesd_jax.distill.data import Batch
from eesd_jax.distill.layout import Layout
from eesd_jax.distill.teacher import Features, Trunk
from eesd_jax.model import exit_branch, llama, ops, rope
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import ExitBranch, Fusion


class Trained(NamedTuple):
    """What learns, float32. block: params of one `llama.Block`. norm: [D]. fusion: see `ExitBranch`.

    head: [Q, D], or None where it stays the target's.
    """

    block: llama.Params
    norm: jax.Array
    fusion: Fusion | None
    head: jax.Array | None


class TrainState(NamedTuple):
    """What a checkpoint holds. step: int32 scalar, steps done. trained: see `Trained`. optimizer: optax state, float32."""

    step: jax.Array
    trained: Trained
    optimizer: optax.OptState


class Frozen(NamedTuple):
    """What never changes. trunk: the target. head: [Q, D], the rows of its head that can be drafted. draft_ids: int32 [Q]."""

    trunk: Trunk
    head: jax.Array
    draft_ids: jax.Array


class Metrics(NamedTuple):
    """Means over the positions of a batch, float32 scalars; see `loss.Totals`.

    positions: how many. grad_norm: before clipping. param_norm: of what learns, behind the step.
    """

    loss: jax.Array
    agreement: jax.Array
    overlap: jax.Array
    coverage: jax.Array
    positions: jax.Array
    grad_norm: jax.Array
    param_norm: jax.Array
    learning_rate: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The static side of a step.

    online: whether the target runs in it (else features come from a cache). rows_home: where rows lie, if on a mesh.
    """

    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    steps: int
    online: bool
    rows_home: NamedSharding | None = None

    @classmethod
    def of(cls, config: ExperimentConfig, model: ModelConfig, layout: Layout) -> "StepConfig":
        """The steps of an experiment with that model."""
        home = layout.rows_home if layout.mesh.size > 1 else None
        return cls(model, config.loss, config.optimizer, config.steps, not config.cache.enabled, home)

    @property
    def schedule(self) -> optax.Schedule:
        o = self.optimizer
        warmup = min(o.warmup_steps, self.steps)
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup else o.learning_rate, o.learning_rate, warmup, max(self.steps, warmup + 1), o.final_share * o.learning_rate
        )

    def make_optimizer(self) -> optax.GradientTransformation:
        o = self.optimizer
        adamw = optax.adamw(self.schedule, o.beta1, o.beta2, weight_decay=o.weight_decay, mask=_is_matrix)
        return optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw) if o.clip_norm else adamw


def _is_matrix(params: Trained) -> Trained:
    """Norms and biases are not decayed."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def init_state(config: StepConfig, branch: ExitBranch, *, train_head: bool) -> TrainState:
    """The state before the first step, on the branch's devices: moments lie where their weights do."""
    trained = Trained(branch.block, branch.norm, branch.fusion, branch.head if train_head else None)
    # Copies, because a branch made from the target shares its weights, and the state is given away at every step.
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trained)
    optimizer = config.make_optimizer()
    mesh = branch.norm.sharding.mesh if isinstance(branch.norm.sharding, NamedSharding) else None
    if mesh is None:
        return TrainState(jnp.zeros((), jnp.int32), trained, jax.jit(optimizer.init)(trained))
    shardings = state_shardings(config, trained, mesh)
    state = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trained)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), trained, state)


def state_shardings(config: StepConfig, trained: Trained, mesh: Mesh) -> TrainState:
    """`NamedSharding` of every leaf of the state; `trained` are arrays that are placed already."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    optimizer = config.make_optimizer()
    homes = jax.tree.map(lambda leaf: leaf.sharding, trained)
    moments = optax.tree_map_params(
        optimizer,
        lambda _, home: home,
        jax.eval_shape(optimizer.init, trained),
        homes,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, homes, moments)


def to_branch(trained: Trained, frozen: Frozen, dtype: jnp.dtype) -> ExitBranch:
    """The branch as decoding wants it."""
    head = frozen.head if trained.head is None else trained.head
    block, norm, fusion, head = jax.tree.map(lambda leaf: leaf.astype(dtype), (trained.block, trained.norm, trained.fusion, head))
    return ExitBranch(block, norm, head, frozen.draft_ids, fusion)


def branch_output(
    config: ModelConfig, branch: ExitBranch, hidden_BxTxD: jax.Array, deep_BxTxD: jax.Array | None, batch: Batch
) -> jax.Array:
    """The branch's `draft_output` [B, T, D] on whole packed rows, as decoding would compute it token by token.

    Args:
      deep_BxTxD: what the second input of the token behind each is; None for a branch without one.
    """
    if deep_BxTxD is not None:
        deep_BxTxD = exit_branch.before(jnp.zeros_like(deep_BxTxD[:, 0]), deep_BxTxD)
        deep_BxTxD = jnp.where((batch.positions > 0)[..., None], deep_BxTxD, 0)  # the first token of a text has none before it
    hidden_BxTxD = exit_branch.fuse(config, branch, hidden_BxTxD, deep_BxTxD)
    rot = rope.rotation(config.rope, config.head_dim, batch.positions)
    start_B = jnp.zeros(hidden_BxTxD.shape[0], jnp.int32)
    mask = teacher.attention_mask(batch.segments)
    x, _, _ = llama.Block(config).apply({"params": branch.block}, hidden_BxTxD, rot, None, None, start_B, mask, config.windows[-1])
    return exit_branch.draft_output(config, branch, x)


def compute_features(config: StepConfig, trunk: Trunk, batch: Batch) -> Features:
    """Online features; constants to the gradient."""
    hidden, last = teacher.hidden_states(config.model, trunk, batch, last=True, rows_home=config.rows_home)
    return jax.tree.map(jax.lax.stop_gradient, Features(hidden, last, None))


def total_loss(config: StepConfig, trained: Trained, frozen: Frozen, features: Features, batch: Batch) -> losses.Totals:
    """Sums over the positions that count. The branch comes first: it alone is differentiated."""
    dtype = frozen.trunk.final_norm.dtype
    branch = to_branch(trained, frozen, dtype)
    hidden, last = (None if x is None else x.astype(dtype) for x in (features.hidden, features.last))
    deep = None if branch.fusion is None else last
    vocab_size = frozen.trunk.head.shape[0]

    def score(head: jax.Array | None, student_BxCxD: jax.Array, part: tuple[jax.Array | None, losses.TopTokens | None]) -> losses.Totals:
        last, top = part
        # In float32 up to here, so that its gradient is summed over the chunks in float32.
        head = frozen.head if head is None else head.astype(dtype)
        logits = ops.linear(student_BxCxD, head, preferred_element_type=jnp.float32)
        if top is None:
            totals = losses.against_logits(config.loss, frozen.draft_ids, logits, teacher.teacher_logits(frozen.trunk, last))
        else:
            totals = losses.against_top_tokens(config.loss, frozen.draft_ids, vocab_size, logits, top)
        if config.loss.regression:
            totals = totals._replace(loss=totals.loss + config.loss.regression * losses.regression(student_BxCxD, last))
        return totals

    totals = None
    for _ in range(config.loss.passes):
        student = branch_output(config.model, branch, hidden, deep, batch)
        found = losses.sum_in_chunks(score, config.loss.chunk, trained.head, student, batch.loss_mask, (last, features.top))
        # Only the loss is of all passes; the rest says what the first draft of a round is worth.
        totals = found if totals is None else totals._replace(loss=totals.loss + found.loss)
        deep = student
    return totals._replace(loss=totals.loss / config.loss.passes)


def train_step(
    config: StepConfig, frozen: Frozen, state: TrainState, batch: Batch, features: Features | None
) -> tuple[TrainState, Metrics]:
    """One optimizer step over a global batch.

    Args:
      batch: rows of all devices. With accumulation its rows are taken in A parts; gradients are summed over them, so the result is that
        of the whole batch at once.
      features: from the cache; None online.
    """

    def differentiate(batch: Batch, features: Features | None) -> tuple[losses.Totals, Trained]:
        features = compute_features(config, frozen.trunk, batch) if features is None else features

        def objective(trained: Trained) -> tuple[jax.Array, losses.Totals]:
            totals = total_loss(config, trained, frozen, features, batch)
            return totals.loss, totals

        (_, totals), gradients = jax.value_and_grad(objective, has_aux=True)(state.trained)
        return totals, gradients

    parts = config.optimizer.accumulate
    if parts == 1:
        totals, gradients = differentiate(batch, features)
    else:

        def split(leaf: jax.Array) -> jax.Array:
            # Every A-th row to a part: each device keeps rows in every part.
            return jnp.swapaxes(leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]), 0, 1)

        def add(sums: tuple[losses.Totals, Trained], part: tuple[Batch, Features | None]) -> tuple[tuple[losses.Totals, Trained], None]:
            return jax.tree.map(jnp.add, sums, differentiate(*part)), None

        zeros = losses.zero_totals(), jax.tree.map(jnp.zeros_like, state.trained)
        (totals, gradients), _ = jax.lax.scan(add, zeros, jax.tree.map(split, (batch, features)))
    positions = jnp.maximum(totals.positions, 1.0)
    gradients = jax.tree.map(lambda leaf: leaf / positions, gradients)
    updates, optimizer = config.make_optimizer().update(gradients, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    metrics = Metrics(
        *(value / positions for value in totals[:-1]),
        totals.positions,
        optax.tree.norm(gradients),
        optax.tree.norm(trained),
        config.schedule(state.step),
    )
    return TrainState(state.step + 1, trained, optimizer), metrics


def jit_step(state: TrainState) -> jax.stages.Wrapped:
    """`train_step`, jitted for states that lie where this one does (arrays, or shapes with shardings); it uses up what it is given."""
    # The state stays where it is: what XLA would choose might differ from step to step, and a resumed run would compute otherwise.
    homes = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(train_step, static_argnums=0, donate_argnums=2, out_shardings=(homes, None))


class Confidence(NamedTuple):
    """For the calibration, [B, T] each: the branch's probability of its best token, whether the target's best is the same, what counts."""

    confidence: jax.Array
    agrees: jax.Array
    counts: jax.Array


def evaluate(
    config: StepConfig, frozen: Frozen, trained: Trained, batch: Batch, features: Features | None
) -> tuple[losses.Totals, Confidence]:
    """Held-out sums, and what a calibration is fitted to."""
    features = compute_features(config, frozen.trunk, batch) if features is None else features
    totals = total_loss(config, trained, frozen, features, batch)
    dtype = frozen.trunk.final_norm.dtype
    branch = to_branch(trained, frozen, dtype)
    deep = None if branch.fusion is None else features.last.astype(dtype)
    student = branch_output(config.model, branch, features.hidden.astype(dtype), deep, batch)
    last = features.last.astype(dtype) if features.top is None else None

    def best(part: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        student_BxCxD, last_BxCxD = part
        log_q = jax.nn.log_softmax(ops.linear(student_BxCxD, branch.head, preferred_element_type=jnp.float32))
        ours = frozen.draft_ids[jnp.argmax(log_q, axis=-1)]
        target = None if last_BxCxD is None else jnp.argmax(teacher.teacher_logits(frozen.trunk, last_BxCxD), axis=-1)
        return jnp.exp(jnp.max(log_q, axis=-1)), ours, target

    parts = jax.tree.map(lambda leaf: losses.split_positions(leaf, config.loss.chunk), (student, last))
    found = jax.tree.map(lambda leaf: losses.join_positions(leaf, student.shape[1]), jax.lax.map(best, parts))
    confidence, ours, target = found
    return totals, Confidence(confidence, ours == (features.top.ids[..., 0] if target is None else target), batch.loss_mask)


def position_flops(
    config: ModelConfig, draft_vocab: int, *, online: bool, train_head: bool, deep_input: bool = False, passes: int = 1
) -> float:
    """Multiplications and additions of a step per token: forward of what runs, and twice that again where it is differentiated.

    Attention scores, which grow with the length, are left out, as are recomputed logits: this is what a utilisation is measured by.
    """
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = config.hidden_size * (2 * heads + 2 * kv_heads + 3 * config.intermediate_size)
    head = draft_vocab * config.hidden_size
    fusion = 2 * config.hidden_size**2 if deep_input else 0
    branch = passes * (3 * (fusion + block) + (3 if train_head else 2) * head)
    trunk = config.num_layers * block + config.vocab_size * config.hidden_size if online else 0
    return 2.0 * (branch + trunk)
