"""Compiles one row for one chip: python -m experiments.lower.compiler NAME CASE CHIP STEPS PROGRAMS FILE.

In a process of its own, because libtpu reads its flags once and its estimates can abort. What becomes of it is written
to FILE: {"code_bytes": ..., "around": cycles}, or {"refused": why}; nothing if the process dies.
"""

import json
import resource
import sys
from pathlib import Path

import jax

from experiments.lower.chips import CORES, compile_for
from experiments.lower.dumps import read_around
from experiments.lower.kernels import KERNELS, Operator


def main(name: str, case: str, chip: str, steps: str, programs: str, file: str) -> None:
    """Compiles and reports."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an abort is expected, gigabytes of core are not
    jax.config.update("jax_enable_compilation_cache", False)  # what is not compiled is not dumped
    (kernel,) = (kernel for kernel in KERNELS if (kernel.name, kernel.case) == (name, case))
    try:
        given = () if isinstance(kernel, Operator) else (int(steps), int(programs), CORES[chip])
        function, arguments = kernel.build(*given)
        compiled = compile_for(chip, function, *arguments)
        report = _report(compiled, name)
    except Exception as error:  # whatever the kernel, Mosaic or XLA raises is the answer
        report = {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
    Path(file).write_text(json.dumps(report))


def _report(compiled: jax.stages.Compiled, name: str) -> dict:
    program = compiled.as_text() or ""
    if f"%{name}" not in program:
        return {"refused": f"the program has no kernel named {name}"}
    analysis = compiled.memory_analysis()
    assert analysis is not None  # TPUs have one
    return {"code_bytes": analysis.generated_code_size_in_bytes, "around": read_around(program)}


if __name__ == "__main__":
    main(*sys.argv[1:])
