"""What is asked of a pod."""

import dataclasses

from experiments.runs import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotConfig(RunConfig):
    """A run, and the pod it is meant for.

    Attributes:
      topology: slice of TPUs, such as v5e:4x4, v5p:4x4x4, v6e:8x8 or tpu7x:4x4x4.
      prompts: sequences that prefill reads, and decoding goes on with, at once; 0 compiles neither.
      solver_steps: steps a token is reckoned to take; the compiler cannot know.
    """

    topology: str = "v5p:4x4x4"
    prompts: int = 64
    solver_steps: float = 5.0
