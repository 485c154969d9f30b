# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A layer that fits its context
#
# A Mesa layer keeps two matrices per head and, at every token, solves the regularised least-squares problem of the
# context so far ([arXiv 2506.05233](https://arxiv.org/abs/2506.05233)). Here we build a layer around that operator,
# jit it, train it for a moment, and look at what it does: regression from examples it has never seen, within one
# forward pass.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from pallas_kernels import SolverConfig, mesa_chunk

# %% [markdown]
# ## The task
#
# Every sequence has a linear map of its own, $y = Wx$ plus noise. After seeing $(x_1, y_1), \dots, (x_{t-1}, y_{t-1})$
# the layer is asked for the $y$ of $x_t$. Inputs come through a fixed random mixing, so there is something to learn:
# keys and queries that undo it.

# %%
SIZE, LENGTH, BATCH, NOISE = 8, 48, 32, 0.1
MIXING = jax.random.orthogonal(jax.random.key(7), SIZE) * jnp.linspace(0.2, 2.0, SIZE)


def sequences(key):
    """Returns mixed inputs, inputs and targets, each [b, t, SIZE]."""
    map_key, input_key, noise_key = jax.random.split(key, 3)
    weights = jax.random.normal(map_key, (BATCH, SIZE, SIZE)) / SIZE**0.5
    x = jax.random.normal(input_key, (BATCH, LENGTH, SIZE))
    y = jnp.einsum("btk,bkv->btv", x, weights) + NOISE * jax.random.normal(noise_key, x.shape)
    return x @ MIXING, x, y


# %% [markdown]
# ## The layer
#
# Three learned parts: how inputs become keys and queries, how strongly the past is kept, and how much to regularise.
# The solve itself has nothing to learn. Keys and values are those of the *previous* token: the answer is never in view.


# %%
def previous(z):
    """Shifts [b, t, k] by one token."""
    return jnp.pad(z, ((0, 0), (1, 0), (0, 0)))[:, :-1]


class InContextRegression(nn.Module):
    solver: SolverConfig = SolverConfig(tolerance=0.0)

    @nn.compact
    def __call__(self, x, y):
        """Predicts y [b, t, v] from x [b, t, k] and all earlier pairs; also returns how well each token was solved."""
        project = nn.Dense(SIZE, use_bias=False)
        q, k, v = project(x), project(previous(x)), previous(y)
        ridge = jnp.exp(self.param("log_ridge", nn.initializers.zeros, (1, SIZE)))
        log_decay = nn.log_sigmoid(self.param("forget", nn.initializers.constant(2.0), ()))
        gates = jnp.full((*x.shape[:2], 1), 1.0)
        out, _, report = mesa_chunk(
            q[:, :, None],
            k[:, :, None],
            v[:, :, None],
            log_decay * gates,
            gates,
            ridge,
            solver=self.solver,
            with_report=True,
        )
        return out[:, :, 0], report


layer = InContextRegression()
mixed, x, y = sequences(jax.random.key(0))
params = layer.init(jax.random.key(1), mixed, y)
jax.tree.map(jnp.shape, params)

# %% [markdown]
# ## A few steps of training

# %%
optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 150))


def loss(params, mixed, y):
    prediction, _ = layer.apply(params, mixed, y)
    return jnp.mean((prediction - y) ** 2)


@jax.jit
def step(params, opt_state, key):
    mixed, _, y = sequences(key)
    value, gradient = jax.value_and_grad(loss)(params, mixed, y)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


def errors(params):
    """Mean squared error at every position, on fresh sequences."""
    mixed, _, y = sequences(jax.random.key(99))
    prediction, report = layer.apply(params, mixed, y)
    return jnp.mean((prediction - y) ** 2, axis=(0, 2)), report


untrained, _ = errors(params)
opt_state, losses = optimizer.init(params), []
for number in range(150):
    params, opt_state, value = step(params, opt_state, jax.random.key(number))
    losses.append(float(value))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

# %% [markdown]
# ## What it does
#
# The yardstick is ridge regression on the unmixed inputs with the regularisation that is right for this noise: nothing
# does better on average. The error drops once there are more examples than dimensions, as it must.


# %%
def ridge_regression():
    """Error at every position of the Bayes-optimal linear predictor."""
    _, x, y = sequences(jax.random.key(99))

    def predict(t):
        seen = (jnp.arange(LENGTH) < t)[None, :, None]
        past_x, past_y = x * seen, y * seen
        gram = jnp.einsum("btk,btj->bkj", past_x, past_x) + SIZE * NOISE**2 * jnp.eye(SIZE)
        weights = jnp.linalg.solve(gram, jnp.einsum("btk,btv->bkv", past_x, past_y))
        return jnp.einsum("bk,bkv->bv", x[:, t], weights)

    prediction = jnp.stack([predict(t) for t in range(LENGTH)], axis=1)
    return jnp.mean((prediction - y) ** 2, axis=(0, 2))


trained, report = errors(params)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.plot(untrained, color="#999999", label="before training")
left.plot(trained, color="#0072B2", label="Mesa layer")
left.plot(ridge_regression(), color="#D55E00", linestyle="--", label="best possible")
left.axvline(SIZE, color="#999999", linewidth=0.8)
left.set(xlabel="examples seen", ylabel="squared error", yscale="log")
left.legend(frameon=False)
right.semilogy(report.residual.mean((0, 2)), color="#009E73")
right.set(xlabel="examples seen", ylabel="relative residual, solved to rounding")
plt.show()

# %% [markdown]
# The operator keeps the state, so a sequence can come in pieces, and stops where you tell it to: `tolerance=1e-3`
# solves each token only as far as needed and says how many steps that took.

# %%
frugal = InContextRegression(SolverConfig(max_steps=30, tolerance=1e-3))
prediction, report = frugal.apply(params, mixed, y)
print(f"{report.num_steps.mean():.1f} of 30 steps on average, worst residual {report.residual.max():.0e}")
assert trained[-8:].mean() < 0.1 * untrained[:8].mean(), "the layer should have learned to regress"
