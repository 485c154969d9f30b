"""The only file that knows implementations and platforms."""

from collections.abc import Callable

import jax

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")


def resolve(operator: str, implementation: str | None, available: tuple[str, ...]) -> str:
    """Returns the implementation to run: the named one, or the default where None was asked for.

    Args:
      operator: name of the public function, for messages.
      implementation: one of IMPLEMENTATIONS, or None.
      available: what this operator has; the last one is the default.

    Raises:
      ValueError: the name is not an implementation at all.
      NotImplementedError: the name is one that this operator does not have.
    """
    if implementation is None:
        return available[-1]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operator}: implementation={implementation!r} is unknown; use None or one of {IMPLEMENTATIONS}."
        )
    if implementation not in available:
        raise NotImplementedError(
            f"{operator}: implementation={implementation!r} is not one it has; use None or one of {available}."
        )
    return implementation


def by_platform(*operands, cpu: Callable, accelerator: Callable):
    """Calls `cpu` or `accelerator`; decided when the program is lowered, so a CPU host may compile for a TPU."""
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=accelerator)


def on_tpu(*operands, kernel: Callable, elsewhere: Callable):
    """Calls `kernel` where the program is lowered for a TPU, `elsewhere` on all other platforms."""
    return jax.lax.platform_dependent(*operands, tpu=kernel, default=elsewhere)


def require(operator: str, implementation: str, reason: str | None) -> None:
    """Raises NotImplementedError if a kernel cannot run, for a reason of its own or since its platform is not here."""
    reason = reason or why_not_here(implementation.removeprefix("pallas_"))
    if reason is not None:
        raise NotImplementedError(f"{operator}: implementation={implementation!r} cannot run this: {reason}.")


def why_not_here(platform: str) -> str | None:
    """Returns a reason if what runs on `platform` alone cannot run in this process, as part of a sentence."""
    found = jax.default_backend()
    return None if found == platform else f"this process computes on {found}, not on {platform}; use None, which adapts"
