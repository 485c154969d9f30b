"""The only file that knows implementations and platforms."""

import functools
import logging
from collections.abc import Callable, Mapping

import jax

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")


def resolve(operator: str, implementation: str | None, kernels: Mapping[str, str | None]) -> str:
    """Returns the implementation to run: the named one, or the default where None was asked for.

    The default is "xla"; where programs are traced for a TPU and the kernel can run this, "by_platform", for `on_tpu`.

    Args:
      operator: name of the public function, for messages.
      implementation: one of IMPLEMENTATIONS, or None.
      kernels: which of them are kernels that the operator has, and why one cannot run this, as part of a sentence.

    Raises:
      ValueError: the name is not an implementation at all.
      NotImplementedError: the operator has none of this name, or its kernel cannot run this, or not here.
    """
    if implementation is None:
        return _default(operator, kernels["pallas_tpu"])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operator}: implementation={implementation!r} is unknown; use None or one of {IMPLEMENTATIONS}."
        )
    available = ("reference", "xla", *kernels)
    if implementation not in available:
        raise NotImplementedError(
            f"{operator}: implementation={implementation!r} is not one it has; use None or one of {available}."
        )
    if implementation in kernels:
        reason = kernels[implementation] or why_not_here(implementation.removeprefix("pallas_"))
        if reason is not None:
            raise NotImplementedError(f"{operator}: implementation={implementation!r} cannot run this: {reason}.")
    return implementation


def _default(operator: str, reason: str | None) -> str:
    if platform() != "tpu":
        return "xla"  # and no kernel is traced, which takes seconds
    if reason is None:
        return "by_platform"
    _log_once(operator, reason)
    return "xla"


@functools.cache
def _log_once(operator: str, reason: str) -> None:
    logging.getLogger(__name__).info("%s runs in xla: %s", operator, reason)


def platform() -> str:
    """Returns what programs traced here are for: the platform of the mesh in use, else that of this process.

    So a host without a TPU compiles the kernels within `jax.set_mesh` of a mesh of TPUs that are elsewhere.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def why_not_here(target: str) -> str | None:
    """Returns a reason if programs traced here are not for the target platform, as part of a sentence."""
    found = platform()
    return None if found == target else f"programs here are for {found}, not for {target}; use None, which adapts"


def by_platform(*operands, cpu: Callable, accelerator: Callable):
    """Calls `cpu` or `accelerator`; decided when the program is lowered, so a CPU host may compile for a TPU."""
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=accelerator)


def on_tpu(*operands, kernel: Callable, elsewhere: Callable):
    """Calls `kernel` where the program is lowered for a TPU, `elsewhere` on all other platforms."""
    return jax.lax.platform_dependent(*operands, tpu=kernel, default=elsewhere)
