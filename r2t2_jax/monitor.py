"""Is re-routing still on known ground, and does it do more good than harm? Pure functions of a small state.

Three tests need no labels: are inputs farther from the references than these are from each other, does re-routing
hardly ever act, does it give numbers that are not finite? A fourth looks at the answers whose right one became known
later: does re-routing break more than it mends? All may be consulted after every batch and for ever. The first that
fails is the alarm; it stays until `reset`, and while it stays the frozen router should answer alone.
"""

import dataclasses
import json
import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from r2t2_jax.decision import FAR, FLAT, NOT_FINITE, REROUTED, TURNED_OFF, Decisions
from r2t2_jax.evidence import Evidence, interval, largest_share, last_rise, observe

FORMAT = 1
LEVELS = np.linspace(0, 1, 21)
TAIL = 19  # an input is far if it is beyond the quantile at LEVELS[TAIL], 95 %
BLUR = 1e-3  # differences of distance below are rounding: sqrt(2 - 2 cos) for float32 cosines near 1
STREAMS = ("far", "rerouted", "abstained", "fell_back", "changed", "gain", "harm", "broken")
CAUSES = {  # the streams that are tested
    "far": "After {after} inputs, {share:.0%} of the last {lately} are farther from their nearest reference than 95% "
    "of the references are from theirs ({tolerated:.0%} are tolerated): add references like these inputs",
    "abstained": "After {after} inputs, {share:.0%} of the last {lately} kept their routing because neighbours were "
    "far or gains small ({tolerated:.0%} are tolerated): add references, or do without re-routing",
    "fell_back": "After {after} inputs, {share:.1%} of the last {lately} gave numbers that are not finite "
    "({tolerated:.1%} are tolerated): find out why",
    "broken": "After {after} answers that re-routing mended or broke, {share:.0%} of the last {lately} were broken "
    "({tolerated:.0%} are tolerated): refresh the references, or ask for a larger gain before a routing is changed",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is tolerated, and how sure an alarm has to be.

    Attributes:
      false_alarm: largest probability that there is ever an alarm while all is as tolerated, all tests together.
      max_far: tolerated share of inputs beyond the distance within which 95 % of the references have their nearest;
        raised where the references are so few that the share beyond it may be larger by chance.
      max_abstained: tolerated share of inputs that kept their routing because neighbours were far or gains small.
      max_fell_back: tolerated share of inputs whose re-routing was not finite.
      window: number of inputs that recent shares look back on; no test depends on it.
    """

    false_alarm: float = 1e-3
    max_far: float = 0.1
    max_abstained: float = 0.9
    max_fell_back: float = 0.01
    window: int = 1000

    def __post_init__(self):
        for field in ("false_alarm", "max_far", "max_abstained", "max_fell_back"):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(f"MonitorConfig: {field}={getattr(self, field)} must lie between 0 and 1.")
        if self.window < 1:
            raise ValueError(f"MonitorConfig: window={self.window} must be at least 1.")

    @property
    def level(self) -> float:
        """Largest probability of a false alarm by one of the tests."""
        return self.false_alarm / len(CAUSES)


class Baseline(NamedTuple):
    """How far references are from their nearest one of another source."""

    quantiles: tuple[float, ...]  # at LEVELS
    size: int  # how many distances they come from


class Stream(NamedTuple):
    """How often something was the case."""

    hits: int = 0
    trials: int = 0
    recent: str = ""  # the last trials, "1" where it was

    def extend(self, hits: Bool[np.ndarray, "n"], window: int) -> "Stream":
        """Returns the stream after n more trials."""
        recent = self.recent + "".join("01"[hit] for hit in hits.tolist())
        return Stream(self.hits + int(hits.sum()), self.trials + len(hits), recent[-window:])

    @property
    def recent_share(self) -> float:
        """Share of hits among the last trials; NaN before the first."""
        return self.recent.count("1") / len(self.recent) if self.recent else math.nan


class Alarm(NamedTuple):
    """The first test that failed."""

    cause: str  # a key of CAUSES
    after: int  # trials
    lately: int  # how many of them the cause has most likely been there, within the window
    share: float  # of hits among these


class MonitorState(NamedTuple):
    """All that the monitor remembers, immutable. It depends on the decisions and their order, not on their batches."""

    config: MonitorConfig
    baseline: Baseline
    streams: dict[str, Stream]  # by STREAMS
    tests: dict[str, Evidence]  # by CAUSES
    histogram: tuple[int, ...]  # inputs by distance: up to the first quantile, ..., beyond the last one
    turned_off: int = 0
    alarm: Alarm | None = None


class Rate(NamedTuple):
    """A share, of all trials and of the recent ones; NaN where there are none."""

    share: float
    low: float  # with `high`: holds the true share, at all times at once, with probability 95 %
    high: float
    recent: float


class Summary(NamedTuple):
    """What to report. Shares are of inputs that were not turned off; gain and harm, of those with a right answer."""

    inputs: int
    turned_off: int
    labelled: int
    far: Rate
    rerouted: Rate
    abstained: Rate
    fell_back: Rate
    changed: Rate
    gain: Rate
    harm: Rate
    histogram: tuple[float, ...]  # share of inputs by distance: without a shift 5 % between neighbouring quantiles
    evidence: dict[str, float]  # by cause; at 1 there is an alarm


def baseline(distances: Float[np.ndarray, "r"]) -> Baseline:
    """Returns what is normal, from the distance of each reference to its nearest one of another source.

    Raises:
      ValueError: there are fewer than 20 distances, or one is negative or not finite.
    """
    distances = np.asarray(distances, np.float64)
    if distances.ndim != 1 or len(distances) < 20:
        raise ValueError(f"baseline: distances have shape {distances.shape}; it takes a row of at least 20.")
    if not (np.isfinite(distances) & (distances >= 0)).all():
        raise ValueError("baseline: distances must be finite and not negative; leave out references without a nearest.")
    return Baseline(tuple(np.quantile(distances, LEVELS, method="higher").tolist()), len(distances))


def start(config: MonitorConfig, baseline: Baseline) -> MonitorState:
    """Returns the state before the first decision."""
    tolerated = {
        "far": max(config.max_far, largest_share(1 - LEVELS[TAIL], baseline.size, config.level)),
        "abstained": config.max_abstained,
        "fell_back": config.max_fell_back,
        "broken": 0.5,  # as many answers broken as mended
    }
    tests = {cause: Evidence(share) for cause, share in tolerated.items()}
    return MonitorState(config, baseline, dict.fromkeys(STREAMS, Stream()), tests, (0,) * (len(LEVELS) + 1))


def reset(state: MonitorState) -> MonitorState:
    """Returns the state without its memory and alarm. After a change of references, `start` with their baseline."""
    return start(state.config, state.baseline)


def update(state: MonitorState, decisions: Decisions) -> MonitorState:
    """Returns the state after a batch of decisions, in their order. Those that were turned off are only counted."""
    decisions = jax.device_get(decisions)
    on = decisions.status != TURNED_OFF
    status, bins = decisions.status[on], _bins(state.baseline, decisions.neighbors.distance[on, 0])
    state = _watch(
        state,
        {
            "far": bins > TAIL,
            "rerouted": status == REROUTED,
            "abstained": (status == FAR) | (status == FLAT),
            "fell_back": status == NOT_FINITE,
            "changed": (decisions.answers != decisions.base_answers)[on],
        },
    )
    histogram = np.bincount(bins, minlength=len(state.histogram)) + state.histogram
    return state._replace(histogram=tuple(histogram.tolist()), turned_off=state.turned_off + int((~on).sum()))


def feedback(
    state: MonitorState, correct_before: Bool[np.ndarray, "n"], correct_after: Bool[np.ndarray, "n"]
) -> MonitorState:
    """Returns the state after right answers became known, whenever that is and for however few of the inputs.

    Args:
      correct_before: whether the frozen model alone would have been right.
      correct_after: whether the answer given was.

    Raises:
      ValueError: they are no bools of one length.
    """
    before, after = np.asarray(correct_before), np.asarray(correct_after)
    if before.dtype != bool or after.dtype != bool or before.ndim != 1 or before.shape != after.shape:
        raise ValueError(
            f"feedback: correct_before is {before.dtype}{list(before.shape)} and correct_after {after.dtype}"
            f"{list(after.shape)}; pass bools of one length."
        )
    gain, harm = ~before & after, before & ~after
    return _watch(state, {"gain": gain, "harm": harm, "broken": harm[gain | harm]})


def alarm(state: MonitorState) -> str | None:
    """Returns one sentence about what went wrong and what to do, or None while nothing has."""
    if state.alarm is None:
        return None
    what = CAUSES[state.alarm.cause].format(**state.alarm._asdict(), tolerated=state.tests[state.alarm.cause].tolerated)
    return f"{what}, then reset the monitor."


def summary(state: MonitorState) -> Summary:
    """Returns the shares so far and lately, and how near each test is to an alarm."""
    streams, inputs = state.streams, state.streams["far"].trials
    return Summary(
        inputs=inputs,
        turned_off=state.turned_off,
        labelled=streams["gain"].trials,
        **{name: _rate(streams[name]) for name in STREAMS if name != "broken"},
        histogram=tuple(n / max(inputs, 1) for n in state.histogram),
        evidence={cause: test.value * state.config.level for cause, test in state.tests.items()},
    )


def to_json(state: MonitorState) -> str:
    """Returns the state as text, from which `from_json` makes the same state bit for bit."""
    fields = state._asdict() | {
        "config": dataclasses.asdict(state.config),
        "baseline": state.baseline._asdict(),
        "streams": {name: stream._asdict() for name, stream in state.streams.items()},
        "tests": {cause: test._asdict() for cause, test in state.tests.items()},
        "alarm": state.alarm and state.alarm._asdict(),
    }
    return json.dumps({"format": FORMAT} | fields, allow_nan=False)


def from_json(text: str) -> MonitorState:
    """Returns the state that `to_json` wrote.

    Raises:
      ValueError: the text is something else, or of another version.
    """
    try:
        fields = json.loads(text)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        state = MonitorState(
            config=MonitorConfig(**fields.pop("config")),
            baseline=Baseline(**_tuples(fields.pop("baseline"))),
            streams={name: Stream(**stream) for name, stream in fields.pop("streams").items()},
            tests={cause: Evidence(**_tuples(test)) for cause, test in fields.pop("tests").items()},
            alarm=Alarm(**raised) if (raised := fields.pop("alarm")) else None,
            **_tuples(fields),
        )
        if (tuple(state.streams), set(state.tests)) != (STREAMS, set(CAUSES)):
            raise ValueError("streams or tests are missing")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"monitor: this is no state that to_json wrote ({error}); start a new one.") from error
    return state


def _tuples(fields: dict) -> dict:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}


def _bins(baseline: Baseline, distance: Float[np.ndarray, "b"]) -> Int[np.ndarray, "b"]:
    """Returns the number of quantiles that each distance is beyond; NaN and inf are beyond all."""
    return np.searchsorted(np.array(baseline.quantiles) + BLUR, distance)


def _watch(state: MonitorState, hits: dict[str, Bool[np.ndarray, "n"]]) -> MonitorState:
    """Extends the streams, shows them to their tests, and keeps the first alarm there ever was."""
    streams, tests, alarms = dict(state.streams), dict(state.tests), []
    for name, new in hits.items():
        if name in tests:
            tests[name], crossed = observe(tests[name], new, 1 / state.config.level)
            if crossed is not None:
                then = streams[name].extend(new[: crossed + 1], state.config.window)
                alarms.append(_alarm(name, then, tests[name].tolerated))
        streams[name] = streams[name].extend(new, state.config.window)
    first = min(alarms, key=lambda raised: raised.after, default=None)
    return state._replace(streams=streams, tests=tests, alarm=state.alarm or first)


def _alarm(cause: str, stream: Stream, tolerated: float) -> Alarm:
    hits = np.array(list(stream.recent)) == "1"
    lately = last_rise(hits, tolerated)
    return Alarm(cause, stream.trials, lately, float(hits[-lately:].mean()))


def _rate(stream: Stream) -> Rate:
    share = stream.hits / stream.trials if stream.trials else math.nan
    return Rate(share, *interval(stream.hits, stream.trials, 0.05), stream.recent_share)
