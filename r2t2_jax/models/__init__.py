"""The contract every model fulfils, and the models that do."""

from r2t2_jax.models.contract import FrozenModel

__all__ = ["FrozenModel"]
