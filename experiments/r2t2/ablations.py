"""What each choice of the descent is worth, on development scenes; everything else stays as it was chosen."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.r2t2.references import constants, embedder_of
from experiments.r2t2.results import Ablation, Point
from experiments.r2t2.scenes import CONDITIONS
from experiments.r2t2.trial import Seed, Seen, attempt
from r2t2_jax.evaluate import interval, pool
from r2t2_jax.neighbors import KERNELS
from r2t2_jax.references import ReferenceSet
from r2t2_jax.reroute import RerouteConfig

RADII = (0.1, 0.2, 0.4, 0.8)
RATES = (0.1, 0.5, 1.5, 5.0)

Variant = tuple[str, Callable[[Seed], tuple[Seed, RerouteConfig, ReferenceSet]]]


def run(seeds: list[Seed], descent: RerouteConfig) -> tuple[Ablation, ...]:
    """Returns one Ablation per choice."""
    plans: list[tuple[str, str, Sequence[Variant]]] = [
        ("neighbours", "how many, k", [_neighbors(descent, str(k), k=k) for k in (1, 5, 20, 50, 100)]),
        ("radius", "within epsilon, at most 100", [_neighbors(descent, f"{e:g}", k=100, epsilon=e) for e in RADII]),
        ("kernel", "how neighbours are weighed", [_neighbors(descent, name, kernel=name) for name in KERNELS]),
        ("steps", "gradient steps", [_settings(descent, str(s), steps=s) for s in (1, 3, 10, 30)]),
        ("learning rate", "at the start", [_settings(descent, f"{x:g}", learning_rate=x) for x in RATES]),
        ("proximal term", "its weight", [_settings(descent, f"{x:g}", prox=x) for x in (0.0, 0.1, 0.5, 2.0)]),
        ("optimizer", "Adam at a tenth of the rate", [_settings(descent, "sgd"), _adam(descent), _mirror(descent)]),
        ("embedding", "how much the picture counts", [_picture(descent, x) for x in (0.0, 0.25, 0.5, 1.0, 2.0)]),
        ("references", "how many", [_fewer(descent, share) for share in (0.1, 1 / 3, 1.0)]),
        ("mismatch", "references unlike the test", [_clean(descent), _other_templates(descent)]),
    ]
    return tuple(
        Ablation(title=title, note=note, points=tuple(_point(seeds, variant) for variant in variants))
        for title, note, variants in plans
    )


def _point(seeds: list[Seed], variant: Variant) -> Point:
    label, change = variant
    tried = []
    for seed in seeds:
        changed, config, references = change(seed)
        tried.append(attempt(changed, changed.dev, config, references).paired)
    paired = pool(tried)
    return Point(label, paired.gain, *interval(paired), paired.fixed, paired.broken)


def _neighbors(descent: RerouteConfig, label: str, **changes) -> Variant:
    config = dataclasses.replace(descent, neighbors=dataclasses.replace(descent.neighbors, **changes))
    return label, lambda seed: (seed, config, seed.references)


def _settings(descent: RerouteConfig, label: str, **changes) -> Variant:
    config = dataclasses.replace(descent, settings=dataclasses.replace(descent.settings, **changes))
    return label, lambda seed: (seed, config, seed.references)


def _adam(descent: RerouteConfig) -> Variant:
    """Adam moves each logit by about the learning rate per step, so a tenth of it goes as far."""
    return _settings(descent, "adam", optimizer="adam", learning_rate=descent.settings.learning_rate / 10)


def _mirror(descent: RerouteConfig) -> Variant:
    return _settings(descent, "exponentiated", optimizer="exponentiated")


def _picture(descent: RerouteConfig, share: float) -> Variant:
    def change(seed: Seed):
        embed = jax.jit(embedder_of(seed.trained, constants(seed.trained, seed.reference_scenes, share)).embed)
        of = lambda scenes: np.asarray(embed(seed.trained.params, scenes.inputs))  # noqa: E731
        references = dataclasses.replace(
            seed.references, embedding=of(seed.reference_scenes), embedder=f"picture {share:g}"
        )
        dev = Seen(seed.dev.scenes, seed.dev.look._replace(embedding=of(seed.dev.scenes)))
        return seed._replace(dev=dev), descent, references

    return f"{share:g}", change


def _fewer(descent: RerouteConfig, share: float) -> Variant:
    def change(seed: Seed):
        kept = np.random.default_rng(0).permutation(len(seed.references))[: round(share * len(seed.references))]
        return seed, descent, seed.references.select(np.sort(kept))

    return f"{share:.0%}", change


def _clean(descent: RerouteConfig) -> Variant:
    clean = CONDITIONS.index("clean")
    return "clean references", lambda seed: (
        seed,
        descent,
        seed.references.select(seed.reference_scenes.condition == clean),
    )


def _other_templates(descent: RerouteConfig) -> Variant:
    """Half of the templates for references, the other half for development scenes."""

    def change(seed: Seed):
        asked = seed.dev.scenes.question[:, 0] % 2 == 0
        dev = Seen(seed.dev.scenes.take(asked), jax.tree.map(lambda x: jnp.asarray(x)[asked], seed.dev.look))
        return seed._replace(dev=dev), descent, seed.references.select(seed.reference_scenes.question[:, 0] % 2 == 1)

    return "other templates", change
