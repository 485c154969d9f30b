"""See the solver at work on one text: what does local optimisation contribute to each prediction, and from where?

  python -m experiments.mesanet.explain runs/mesa                              the start of a held-out text, one page
  python -m experiments.mesanet.explain runs/mesa --text "def f(x):" --tokens 7
  python -m experiments.mesanet.explain runs/mesa --against runs/transformer   coloured by the difference of two models

The page shows the text three times, coloured by the loss that is gained, by the solver's steps and by its residual; and
for some tokens what each head read: the exact weights of the context's values in its output (mesanet_jax/explain.py).
Seconds for a small model.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import cli
from experiments.cli import UserError
from experiments.data import held_out_documents
from experiments.pictures import COLORS
from experiments.runs import Run, open_run
from experiments.webpage import Markup, Section, Table, escaped, page, provenance, table, tint
from mesanet_jax import MesaNet, SolverConfig
from mesanet_jax.explain import explain

BETTER, WORSE, WORK = COLORS[0], COLORS[1], COLORS[2]
ROUNDING = 1e-7  # residuals below are nothing but that
STYLE = """
.text { font: .88rem/1.9 ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; print-color-adjust: exact; }
.text span { border-radius: 2px; padding: .1em 0; }
.text .here { outline: 2px solid var(--ink); }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Which text, read by which model.

    Attributes:
      run: folder of a trained run with mesa layers.
      against: folder of a run with the same tokenizer to compare losses with; empty compares with the same model that
        does not solve.
      text: what is read; empty takes the start of a held-out document.
      document: number of that document.
      length: tokens that are read at most; time and page grow with its square.
      tokens: places of the tokens whose context is shown; none takes those that gain most.
      num_tokens: how many of those that gain most.
      top: context tokens that are listed for each head.
      output: the page; empty puts explain.html into the run's folder.
    """

    run: tyro.conf.Positional[Path]
    against: str = ""
    text: str = ""
    document: int = 0
    length: int = 256
    tokens: tuple[int, ...] = ()
    num_tokens: int = 4
    top: int = 5
    output: str = ""

    def __post_init__(self):
        least = {"document": 0, "length": 1, "num_tokens": 0, "top": 1}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise ValueError(f"ExplainConfig: {field}={getattr(self, field)} must be at least {low}.")


COMMAND = "experiments.mesanet.explain"  # which its pages name, so that they know each other


class Reading(NamedTuple):
    """A text that was read; place p is its p-th token, predicted from those before it."""

    words: list[str]  # [t]
    nll: np.ndarray  # [t] nats
    other: np.ndarray  # [t] nats, of what it is compared with
    steps: np.ndarray  # [l, h, t]
    residual: np.ndarray  # [l, h, t]
    weights: np.ndarray  # [l, h, t, t + 1] of BOS and all tokens, for the prediction of token t


def main(config: ExplainConfig) -> None:
    """Reads the text and writes the page."""
    output = Path(config.output) if config.output else config.run / "explain.html"
    cli.check_page("output", output, COMMAND)
    run = open_run(config.run)
    if "mesa" not in run.config.model.pattern:
        raise UserError(f"run: {config.run} has no mesa layer; name a run that has one.")
    other = open_run(Path(config.against)) if config.against else None
    if other is not None and _tokenizer_of(other) != _tokenizer_of(run):
        raise UserError(f"against: {config.against} has another tokenizer than {config.run}; name a run with the same.")
    ids = _ids(config, run)
    beyond = [place for place in config.tokens if not 0 <= place < len(ids)]
    if beyond:
        raise UserError(f"tokens: {beyond[0]} is no place in a text of {len(ids)} tokens; take 0 to {len(ids) - 1}.")
    reading = read(run, other, ids)
    chosen = config.tokens or _gained_most(reading, config.num_tokens)
    facts = provenance(["python", "-m", COMMAND, *sys.argv[1:]], seed=0)
    try:
        output.write_text(write(run.name, other.name if other else "", reading, chosen, config.top, facts))
    except OSError as error:
        raise cli.unwritable("output", output, error) from None
    print("\n".join(findings(run.name, other.name if other else "", reading)) + f"\n\npage: {output}")


def read(run: Run, other: Run | None, ids: np.ndarray) -> Reading:
    """Returns what the run, and what it is compared with, make of ids [t]."""
    tokens = jnp.asarray(np.concatenate([[run.tokenizer.bos], ids]))[None]
    found = jax.jit(lambda params, x: explain(run.model, params, x))(run.params, tokens)
    if other is None:
        unsolved = MesaNet(dataclasses.replace(run.config.model, solver=SolverConfig(max_steps=0)))
        logits, _ = unsolved.apply(run.params, tokens)
    else:
        logits, _ = other.model.apply(other.params, tokens)
    report = jax.tree.map(lambda x: np.moveaxis(np.asarray(x[:, 0]), 1, 2)[..., :-1], found.report)
    words = [run.tokenizer.decode([token]) for token in ids]
    weights = np.asarray(found.weights[:, 0])[..., :-1, :]
    return Reading(words, _nll(found.logits, ids), _nll(logits, ids), report.num_steps, report.residual, weights)


def findings(name: str, other: str, reading: Reading) -> list[str]:
    """Returns what the numbers say, in sentences."""
    gain = reading.other - reading.nll
    versus = f"than {other}" if other else "than without solving"
    steps, by_head = reading.steps.mean(axis=(0, 1)), reading.steps.mean(axis=-1)
    layer, head = np.unravel_index(np.argmax(by_head), by_head.shape)
    return [
        f"{name} predicts {np.sum(gain > 0.1)} of {len(gain)} tokens better {versus} by more than 0.1 nats and "
        f"{np.sum(gain < -0.1)} worse: {reading.nll.mean():.3f} against {reading.other.mean():.3f} nats per token.",
        f"A token takes {steps.mean():.1f} steps on average over layers and heads, {steps.max():.1f} at most; the most "
        f"are taken by mesa layer {layer}, head {head}, {by_head[layer, head]:.1f}. The largest residual is "
        f"{reading.residual.max():.1e}.",
    ]


def write(name: str, other: str, reading: Reading, chosen: Sequence[int], top: int, facts: dict[str, str]) -> str:
    """Returns the page."""
    notes = [
        "A head's output is a sum of the values of the context. Its weights are zeta beta k . x: how much is still "
        "held of a token, times how well its key fits x, the solution of the token's own least-squares problem "
        "(arXiv 2506.05233, eq. 8). They may be negative, and need not add up to 1.",
        "Weights say what an output was read from, not what the layers above made of it.",
    ]
    if not other:
        notes.append(
            "Without solving, x is the query itself, which is gated linear attention. The model was trained to solve, "
            "so that is a question about this model, not about one trained without."
        )
    blocks = [_gain(name, other, reading), _work(reading), _left(reading)]
    blocks += [_context(reading, place, top) for place in chosen]
    layers, heads, number = reading.steps.shape
    subtitle = f"{number} tokens, {layers} mesa layers of {heads} heads"
    said = findings(name, other, reading)
    return page(f"{name}, token by token", subtitle, said, blocks, notes, facts, style=STYLE, contents=True)


def _gain(name: str, other: str, reading: Reading) -> Section:
    gain = reading.other - reading.nll
    spread = float(np.quantile(np.abs(gain), 0.95)) or 1.0
    without = f"by {other}" if other else "without"
    return _coloured(
        f"What {name} gains on {other}" if other else "What solving gains",
        f"Blue is predicted better, orange worse; full colour is {spread:.2f} nats. Point at a token for its numbers.",
        reading.words,
        [tint(BETTER if x > 0 else WORSE, abs(x) / spread) for x in gain],
        [f"{x:.2f} nats, {y:.2f} {without}" for x, y in zip(reading.nll, reading.other, strict=True)],
    )


def _work(reading: Reading) -> Section:
    steps = reading.steps.mean(axis=(0, 1))
    return _coloured(
        "Where the solver works",
        f"Steps before each token was predicted, the mean over layers and heads; full colour is {steps.max():.1f}.",
        reading.words,
        [tint(WORK, x / max(float(steps.max()), 1e-9)) for x in steps],
        [f"{x:.1f} steps" for x in steps],
    )


def _left(reading: Reading) -> Section:
    worst = reading.residual.max(axis=(0, 1))
    orders = np.log10(np.maximum(worst, ROUNDING) / ROUNDING)
    return _coloured(
        "What it leaves",
        f"The largest relative residual of all layers and heads, by powers of ten from {ROUNDING:.0e}; full colour is "
        f"{worst.max():.1e}.",
        reading.words,
        [tint(WORK, x / max(float(orders.max()), 1e-9)) for x in orders],
        [f"residual {x:.1e}" for x in worst],
    )


def _context(reading: Reading, place: int, top: int) -> Section:
    """What one prediction was read from: the text by the heads' mean share, and a table by head."""
    weights = reading.weights[:, :, place, : place + 1]  # [l, h, s], the start of the text first
    shares = np.abs(weights) / np.maximum(np.abs(weights).sum(axis=-1, keepdims=True), 1e-30)
    mean, seen = shares.mean(axis=(0, 1)), ["", *reading.words[:place]]
    fullest = max(float(mean.max()), 1e-30)
    text = _spans(seen, [tint(BETTER, x / fullest) for x in mean], [f"{100 * x:.1f} %" for x in mean], first=-1)
    rows = []
    for layer, head in np.ndindex(weights.shape[:2]):
        most = np.argsort(-shares[layer, head])[:top]
        listed = ", ".join(f"{_visible(seen[s])} at {s - 1} ({weights[layer, head, s]:+.2g})" for s in most)
        solve = f"{reading.steps[layer, head, place]:.0f}", f"{reading.residual[layer, head, place]:.1e}"
        rows.append((f"layer {layer}, head {head}", *solve, f"{100 * shares[layer, head, most].sum():.0f} %", listed))
    header = ("mesa layer and head", "steps", "residual", "their share", f"the {top} tokens it leans on most")
    caption = "Shares are of the sum of absolute weights, which are in brackets. Place -1 is the start of the text."
    heading = f"Token {place}: {_visible(reading.words[place])}"
    said = (
        f"{reading.nll[place]:.2f} nats, {reading.other[place]:.2f} in comparison. Coloured by the mean share of the "
    )
    said += f"heads; full colour is {100 * fullest:.0f} %."
    here = f'<span class="here">{escaped(_visible(reading.words[place]))}</span>'
    listing = table(Table(heading, header, rows, caption, words=True))
    return Section(heading, Markup(f'<p class="quiet">{said}</p><p class="text">{text}{here}</p>{listing}'))


def _coloured(heading: str, caption: str, words: list[str], tints: list[Markup], said: list[str]) -> Section:
    text = _spans(words, tints, said, first=0)
    return Section(heading, Markup(f'<p class="quiet">{escaped(caption)}</p><p class="text">{text}</p>'))


def _spans(words: list[str], tints: list[Markup], said: list[str], first: int) -> str:
    """The words one after another, each with its colour and with what is said when it is pointed at."""
    return "".join(
        f'<span title="{place} {escaped(_visible(word))}: {escaped(note)}"{style}>{escaped(word)}</span>'
        for place, (word, style, note) in enumerate(zip(words, tints, said, strict=True), first)
    )


def _visible(word: str) -> str:
    return repr(word)


def _gained_most(reading: Reading, number: int) -> list[int]:
    return sorted(np.argsort(reading.nll - reading.other, kind="stable")[:number].tolist())


def _tokenizer_of(run: Run) -> tuple[int, bytes]:
    """What tells one tokenizer from another: its first id and its file, of which bytes have none."""
    file = run.path / "tokenizer.json"
    return run.tokenizer.bos, file.read_bytes() if file.exists() else b""


def _ids(config: ExplainConfig, run: Run) -> np.ndarray:
    if config.text:
        return run.tokenizer.encode(config.text)[: config.length]
    documents = held_out_documents(run.config.data, run.tokenizer)
    if config.document >= len(documents):
        raise UserError(f"document: there are {len(documents)} held-out ones; take 0 to {len(documents) - 1}.")
    return np.asarray(documents[config.document].tokens[1 : config.length + 1])


def _nll(logits: jax.Array, ids: np.ndarray) -> np.ndarray:
    """Nats [t] of each token, predicted from those before it."""
    logs = jax.nn.log_softmax(logits[0, :-1].astype(jnp.float32))
    return -np.take_along_axis(np.asarray(logs), ids[:, None], axis=-1)[:, 0]


if __name__ == "__main__":
    cli.run(main, ExplainConfig)
