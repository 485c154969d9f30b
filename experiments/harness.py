"""A trained run as a model of lm-eval (the extra `eval`), so that its tasks, prompts and metrics need no copy here.

    results = lm_eval.simple_evaluate(HarnessModel(open_run(path)), tasks=["lambada_openai"])

A text longer than a stretch is read stretch by stretch, and the state goes from one to the next. Mesa layers and the
other recurrent mixers so see all of it in constant memory; attention sees `max_context` tokens.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from experiments.cli import UserError
from experiments.mesh import compiler_options
from experiments.runs import Run
from mesanet_jax import MesaNet, SamplingConfig
from mesanet_jax.generate import draw

STRETCH = 512  # tokens that are read in one call, at most
SHORTEST = 32  # shorter rows are filled up, so that few programs are compiled
BLOCK = 16  # tokens of an answer that are written before it is looked whether all are done
MAX_TOKENS = 256  # of an answer, where the task does not say
CHOICES = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "num_beams"}


class HarnessModel(TemplateLM):
    """Answers the three questions of lm-eval with the model of a run; every text begins with BOS."""

    def __init__(self, run: Run, *, batch_size: int = 8, prompt_length: int = 0, seed: int = 0):
        """Takes a run.

        Args:
          run: the model and its tokenizer.
          batch_size: texts that are read at once.
          prompt_length: tokens of a prompt that an answer is written for, the last ones; 0 keeps all.
          seed: of answers that are drawn at random.
        """
        super().__init__()
        self._run, self._batch_size, self._prompt_length = run, batch_size, prompt_length
        self._key = jax.random.key(seed)

    @property
    def eot_token_id(self) -> int:
        """The id that separates documents: BOS."""
        return self._run.tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Returns ids without BOS, whatever is asked for: a row gets one at its start."""
        del add_special_tokens, kwargs
        return self._run.tokenizer.encode(string).tolist()

    def num_tokens(self, context: str, continuation: str) -> int:
        """Returns how many tokens the continuation is."""
        return len(self._encode_pair(context, continuation)[1] if context else self.tok_encode(continuation))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood in nats of whole texts, each read from its start, however long."""
        texts = [request.args[0] for request in requests]
        answers = self._loglikelihood_tokens([(None, [], self.tok_encode(text)) for text in texts], disable_tqdm)
        for text, (total, _) in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return [total for total, _ in answers]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Returns what the model goes on with, up to the first of the stop strings.

        Raises:
          UserError: a task wants a way of drawing that there is not.
        """
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        answers = [""] * len(requests)
        for places in groups.values():
            choices = requests[places[0]].args[1]
            _check_choices(choices)
            rows = {place: self._prompt(requests[place].args[0]) for place in places}
            for some in tqdm(self._alike(rows), "answers", disable=disable_tqdm):
                for place, answer in zip(some, self._answers([rows[place] for place in some], choices), strict=True):
                    answers[place] = answer
                    self.cache_hook.add_partial("generate_until", requests[place].args, answer)
        return answers

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Returns nats and whether every token of the answer was the most likely one, for (texts, context, answer)."""
        del kwargs
        rows = [self._row(context + answer) for _, context, answer in requests]
        order = np.argsort([-len(row) for row in rows], kind="stable")
        found: list[Any] = [None] * len(rows)
        for start in tqdm(range(0, len(rows), self._batch_size), "texts", disable=disable_tqdm):
            some = order[start : start + self._batch_size]
            for place, (nll, right) in zip(some, self._read([rows[i] for i in some]), strict=True):
                asked, _, answer = requests[place]
                tail = len(nll) - len(answer)
                found[place] = -float(nll[tail:].sum()), bool(right[tail:].all())
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, found[place])
        return found

    def _row(self, ids: list[int]) -> np.ndarray:
        begun = ids[:1] == [self.eot_token_id]
        return np.asarray(ids if begun else [self.eot_token_id, *ids], np.int32)

    def _read(self, rows: Sequence[np.ndarray]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Returns nats of every token but BOS, and whether it was the most likely one, row by row."""
        longest = max(max(len(row) for row in rows) - 1, 1)
        width = STRETCH if longest > STRETCH else _filled(longest)
        stretches = -(-longest // width)
        tokens, targets = np.zeros((2, self._batch_size, stretches * width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row) - 1], targets[i, : len(row) - 1] = row[:-1], row[1:]
        state, parts = None, []
        for start in range(0, stretches * width, width):
            part = slice(start, start + width)
            *read, state = _predict(self._run.model, self._run.params, tokens[:, part], targets[:, part], state)
            parts.append(jax.device_get(read))
        nll, right = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
        return [(nll[i, : len(row) - 1].astype(np.float64), right[i, : len(row) - 1]) for i, row in enumerate(rows)]

    def _prompt(self, text: str) -> np.ndarray:
        return self._row(self.tok_encode(text)[-self._prompt_length :])

    def _alike(self, rows: dict[int, np.ndarray]) -> list[list[int]]:
        """Batches of prompts of as many stretches, so that what pads them on the left lies within the first."""
        order = sorted(rows, key=lambda place: -len(rows[place]))
        groups = (list(some) for _, some in itertools.groupby(order, lambda place: -(-len(rows[place]) // STRETCH)))
        size = self._batch_size
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    def _answers(self, rows: Sequence[np.ndarray], choices: dict[str, Any]) -> list[str]:
        """Writes on after prompts, until all have come to a stop string."""
        sampling, number = _sampling(choices), int(choices.get("max_gen_toks", MAX_TOKENS))
        until = choices.get("until") or []
        until = [until] if isinstance(until, str) else until
        logits, state = self._understood(rows)
        written, texts, done = np.zeros((len(rows), 0), np.int32), [""] * len(rows), False
        while not done:
            self._key, key = jax.random.split(self._key)
            block, logits, state = _write(self._run.model, self._run.params, logits, state, key, sampling)
            written = np.concatenate([written, np.asarray(block)[: len(rows)]], axis=1)
            ended = [_until_bos(ids[:number], self.eot_token_id) for ids in written]
            whole = [self._run.tokenizer.decode(ids) for ids in ended]
            texts = [_cut(text, until) for text in whole]
            done = all(
                len(ids) < written.shape[1] or text != cut for ids, text, cut in zip(ended, whole, texts, strict=True)
            )
        return texts

    def _understood(self, rows: Sequence[np.ndarray]):
        """Reads prompts of as many stretches, aligned at their ends; returns logits [b, y] after them, and state."""
        longest = max(len(row) for row in rows)
        width = STRETCH if longest > STRETCH else _filled(longest)
        padded = np.full((self._batch_size, -(-longest // width) * width), -1, np.int32)
        for i in range(self._batch_size):
            row = rows[min(i, len(rows) - 1)]  # the last again, where the batch is not full
            padded[i, padded.shape[1] - len(row) :] = row
        logits = state = None
        for start in range(0, padded.shape[1], width):
            logits, state = _advance(self._run.model, self._run.params, padded[:, start : start + width], state)
        return logits, state


@functools.partial(jax.jit, static_argnums=0, compiler_options=compiler_options())
def _predict(model: MesaNet, params, tokens: jax.Array, targets: jax.Array, state):
    """Returns nats [b, t] of the targets, whether each is the most likely token [b, t], and the state."""
    logits, state = model.apply(params, tokens, state)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return nll, jnp.argmax(logits, axis=-1) == targets, state


@functools.partial(jax.jit, static_argnums=0, compiler_options=compiler_options())
def _advance(model: MesaNet, params, tokens: jax.Array, state):
    """Reads tokens [b, t], -1 on the left of the first ones; returns logits [b, y] after the last, and the state."""
    logits, state = model.apply(params, jnp.maximum(tokens, 0), state, jnp.where(tokens < 0, -1, 0))
    return logits[:, -1], state


@functools.partial(jax.jit, static_argnums=(0, 5), compiler_options=compiler_options())
def _write(model: MesaNet, params, logits: jax.Array, state, key: jax.Array, sampling: SamplingConfig):
    """Writes BLOCK tokens [b, BLOCK]; returns them, and logits and state after them."""

    def one(carry, key):
        logits, state = carry
        token = draw(key, logits, sampling)
        logits, state = model.apply(params, token[:, None], state)
        return (logits[:, -1], state), token

    (logits, state), tokens = jax.lax.scan(one, (logits, state), jax.random.split(key, BLOCK))
    return tokens.T, logits, state


def unknown_choices(choices: dict[str, Any]) -> list[str]:
    """Returns what generation_kwargs ask for that there is not."""
    return sorted(set(choices) - CHOICES) + ["num_beams"] * (choices.get("num_beams", 1) != 1)


def _check_choices(choices: dict[str, Any]) -> None:
    if unknown := unknown_choices(choices):
        raise UserError(
            f"tasks: a task asks for {unknown[0]} in its generation_kwargs; take it out, what there is are "
            f"{', '.join(sorted(CHOICES - {'num_beams'}))}."
        )


def _filled(length: int) -> int:
    """The next power of two."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _sampling(choices: dict[str, Any]) -> SamplingConfig:
    if not choices.get("do_sample", choices.get("temperature", 0) > 0):
        return SamplingConfig(temperature=0)
    return SamplingConfig(
        temperature=float(choices.get("temperature", 1)),
        top_k=int(choices.get("top_k", 0)),
        top_p=float(choices.get("top_p", 1)),
    )


def _until_bos(ids: np.ndarray, bos: int) -> np.ndarray:
    ends = np.flatnonzero(ids == bos)
    return ids[: ends[0]] if len(ends) else ids


def _cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first stop string."""
    return text[: min((place for stop in until if stop and (place := text.find(stop)) >= 0), default=len(text))]
