"""References from labelled examples: the frozen model looks at each once, in batches of one size."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from r2t2_jax.fingerprint import fingerprint
from r2t2_jax.models.contract import FrozenModel, Inputs, Params
from r2t2_jax.reference_checks import array, check_labelled, names
from r2t2_jax.references import ReferenceSet
from r2t2_jax.shapes import Embedding, Readout, Routing

OWN = "the model's own"  # embedder


def build(
    model: FrozenModel,
    params: Params,
    inputs: Inputs,
    labels,
    ids: Sequence[str] | np.ndarray,
    sources: Sequence[str] | np.ndarray,
    *,
    time=0,
    keep: Literal["all", "correct"] = "all",
    store_inputs: bool = False,
    batch_size: int = 256,
    readout: Callable[[Params, Inputs, Routing], Readout] | None = None,
    embed: Callable[[Params, Inputs], Embedding] | None = None,
    embedder: str = OWN,
) -> ReferenceSet:
    """Runs the frozen model on labelled examples and keeps what re-routing needs of them.

    Args:
      model, params: the frozen model.
      inputs: the examples, a tree of arrays with r as the first axis.
      labels: [r], indices of model.answers.
      ids: [r], a name of its own for each.
      sources: [r], what each was made from; see ReferenceSet.
      time: when they are added, one number or [r].
      keep: "correct" leaves out what the model, at its own router's routing, answers wrongly (arXiv 2502.20395,
        section 3); "all" keeps it too: its label is as good.
      store_inputs: keep the examples themselves; inputs must then be a dict of arrays.
      batch_size: examples per forward pass; the last batch is filled up, so that one program serves all.
      readout: gives the read-out at a routing where the model has no exact one, or instead of it.
      embed: takes the place of the model's own embedding.
      embedder: name of the embedding.

    Raises:
      TypeError, ValueError: an argument does not fit, or the model's results are not what FrozenModel says.
    """
    ids, sources = names("ids", ids), names("sources", sources)
    labels, time = array("labels", labels), array("time", time)
    check_labelled(ids, sources, labels, model.answers)
    _check_inputs(inputs, time, store_inputs, len(ids))
    if keep not in ("all", "correct"):
        raise ValueError(f"build: keep={keep!r} must be 'all' or 'correct'.")
    if batch_size < 1:
        raise ValueError(f"build: batch_size={batch_size} must be at least 1.")
    if embed is not None and embedder == OWN:
        raise ValueError("build: embedder must name what embed computes, for sets with other embeddings do not mix.")
    see = _eye(model, readout or _exact(model), embed or model.embed)
    seen = _look(see, params, jax.device_get(inputs), len(ids), min(batch_size, len(ids)))
    references = ReferenceSet(
        ids=ids,
        sources=sources,
        labels=labels,
        correct=seen.pop("answer") == labels,
        time=np.broadcast_to(time, ids.shape),
        inputs=dict(inputs) if store_inputs else {},
        model=fingerprint(params),
        embedder=embedder,
        groups=model.groups,
        experts=model.experts,
        answers=model.answers,
        **seen,
    )
    return references if keep == "all" else references.correct_only()


def _exact(model: FrozenModel) -> Callable[[Params, Inputs, Routing], Readout]:
    exact = model.readout
    if exact is None:
        raise ValueError("build: readout is needed, for this model has no exact one; pass its linearisation.")
    return lambda params, inputs, _: exact(params, inputs)


def _eye(model: FrozenModel, readout, embed) -> Callable[[Params, Inputs], dict]:
    """Returns the compiled function that sees all there is to see about a batch."""

    def see(params, inputs):
        routing = model.router(params, inputs)
        return {
            "answer": model.forward(params, inputs, routing).argmax(-1),
            "routing": routing,
            "embedding": embed(params, inputs),
            "features": model.features(params, inputs),
            "readout": readout(params, inputs, routing),
        }

    return jax.jit(see)


def _look(see, params, inputs, count: int, batch_size: int) -> dict:
    """Returns what `see` sees, batch by batch, on the host; the last batch repeats its last example to be full."""
    seen = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        seen.append(jax.device_get(see(params, jax.tree.map(lambda x, rows=rows: x[rows], inputs))))
    return jax.tree.map(lambda *batches: np.concatenate(batches)[:count], *seen)


def _check_inputs(inputs: Inputs, time: np.ndarray, store_inputs: bool, count: int) -> None:
    if time.shape not in ((), (count,)):
        raise ValueError(f"build: time has shape {time.shape}; pass one number, or {count}.")
    if store_inputs and not (isinstance(inputs, dict) and all(hasattr(x, "dtype") for x in inputs.values())):
        raise TypeError("build: store_inputs needs inputs that are a dict of arrays; pass such, or do not store them.")
    for x in jax.tree.leaves(inputs):
        if np.shape(x)[:1] != (count,):
            raise ValueError(
                f"build: inputs have an array of shape {np.shape(x)}; with {count} ids it needs {count} rows."
            )
