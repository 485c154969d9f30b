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
# # Re-routing a frozen mixture of experts
#
# Six frozen experts look at a scene and answer a question; a router that has only ever seen clean scenes decides whom
# to believe. On blurred, noisy or washed-out scenes it often believes the wrong one. R2-T2
# ([arXiv 2502.20395](https://arxiv.org/abs/2502.20395)) leaves every weight as it is and moves the *routing* of one
# input toward what worked for its neighbours. Here is all of it, small enough for a minute.

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from experiments.r2t2 import scenes, train
from experiments.r2t2.folder import open_model
from experiments.r2t2.references import collect
from r2t2_jax.calibrate import prepare
from r2t2_jax.evaluate import Paired, interval
from r2t2_jax.fingerprint import fingerprint
from r2t2_jax.models.scenes import ANSWERS, question_text
from r2t2_jax.neighbors import NeighborConfig
from r2t2_jax.reroute import RerouteConfig, reroute
from r2t2_jax.strategies import STRATEGIES

run = Path(tempfile.mkdtemp()) / "run"
train.main(train.TrainConfig(output=run, num_scenes=8000, expert_epochs=8, readouts=("affine",)))
frozen = open_model(run)

# %% [markdown]
# Scenes the model will meet: the same kind of picture, under conditions that it has never seen.

# %%
test = scenes.make("test", 1000, seed=0)
figure, axes = plt.subplots(1, 5, figsize=(11, 2.6))
for condition, (name, axis) in enumerate(zip(scenes.CONDITIONS, axes, strict=True)):
    row = np.flatnonzero(test.condition == condition)[0]
    axis.imshow(test.image[row])
    axis.set_title(f"{name}\n{question_text(test.question[row])}", fontsize=8)
    axis.axis("off")

# %% [markdown]
# References: labelled examples of the new conditions, what the frozen model made of them, and how it routed them.
# `prepare` leaves each out once to find out when to abstain, and forecasts what re-routing will gain.

# %%
opened = collect(frozen, scenes.make("reference", 3000, seed=0), picture=0.5)
config = RerouteConfig(strategy="amortised", neighbors=NeighborConfig(k=20))
memory, forecast = prepare(opened.references, config)
print(opened.references)
print(f"forecast: mends {forecast.mended:.1%}, breaks {forecast.broken:.1%}")

# %% [markdown]
# A small network that has learned from the references proposes a routing for each test scene, by itself; where the
# thresholds are not met the frozen router answers. "descent" would ask the neighbours by gradient descent instead.

# %%
decisions = reroute(frozen.model, frozen.params, memory, test.inputs, config, embedder=opened.embedder)
paired = Paired(decisions.base_answers == test.label, decisions.answers == test.label)
low, high = interval(paired)
print(f"right before {paired.before.mean():.1%}, after {paired.after.mean():.1%}")
print(f"gain {paired.gain:+.1%} ({low:+.1%} to {high:+.1%}): fixed {paired.fixed:.1%}, broken {paired.broken:.1%}")

# %% [markdown]
# One decision: whom the router believed, and whom it believes now.

# %%
row = int(np.flatnonzero(decisions.answers != decisions.base_answers)[0])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), width_ratios=[1, 2])
left.imshow(test.image[row])
left.set_title(question_text(test.question[row]), fontsize=9)
left.axis("off")
place = np.arange(6)
before, after = ANSWERS[decisions.base_answers[row]], ANSWERS[decisions.answers[row]]
right.barh(place + 0.2, decisions.base_routing[row], 0.4, label=f"router: {before}", color="#8a8d93")
right.barh(place - 0.2, decisions.routing[row], 0.4, label=f"re-routed: {after}", color="#0072B2")
right.set_yticks(place, frozen.model.experts)
right.set_title(f"the answer is {ANSWERS[test.label[row]]}", fontsize=9)
right.legend()

# %% [markdown]
# A strategy of your own is one function and one row. This one believes every expert alike where it re-routes.


# %%
def flatten(problem, memory, config, groups):
    return jax.numpy.full_like(problem.routing, 1 / problem.routing.shape[-1])


STRATEGIES["flatten"] = flatten
flat = RerouteConfig(strategy="flatten", neighbors=NeighborConfig(k=50))
memory, forecast = prepare(opened.references, flat)
theirs = reroute(frozen.model, frozen.params, memory, test.inputs, flat, embedder=opened.embedder)
print(f"forecast {forecast.gain:+.1%}, gain {np.mean(theirs.answers == test.label) - paired.before.mean():+.1%}")

# %% [markdown]
# Frozen means frozen: after 2,000 re-routings every parameter is what it was, bit for bit.

# %%
assert fingerprint(frozen.params) == frozen.fingerprint
print(frozen.fingerprint)
