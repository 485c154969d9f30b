"""Compilations in child processes: what an abort leaves behind, and one real row where libtpu is installed."""

import dataclasses
import sys

import pytest
from test_lower_dumps import BUNDLES, UTILIZATION, VMEM_REPORT

from experiments.lower import measure
from experiments.lower.kernels import KERNELS, Kernel, Operator
from tests.pallas_kernels.ahead_of_time import needs_libtpu

AROUND = Operator(name="descent", case="around", build=lambda: 1 / 0, per=10, per_name="input")
FAKE = Kernel(name="descent", case="5m", build=lambda *numbers: 1 / 0, steps=(5, 10), per=10, per_name="input")
ABORT = "print('F1122 05:22:24.33 18699 llo.cc:1] profiling failed: DMA 10', file=sys.stderr); os.abort()"


PREAMBLE = f"""
import json, os, pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
steps, programs, report = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
folder, estimate = report.parent, "llo_profile" in os.environ["LIBTPU_INIT_ARGS"]
def write(name, text):
    (folder / name).write_text(text)
def cycles(number, chip=""):
    write(f"descent.1{{chip}}_static_llo_profile.textproto", f"estimated_cycles: {{number}}")
write("17-descent.1-00-final_hlo-static-per-bundle-utilization.txt", {UTILIZATION!r})
write("17-descent.1-01-schedule-analysis_final_bundles.txt", "")
write("17-descent.1-02-final_bundles.txt", {BUNDLES!r})
write("16-descent_fusion-02-final_bundles.txt", "another kernel")
done = json.dumps(dict(code_bytes=2048))
"""
REST = f"write('16-TLP-03-vmem_report.html', {VMEM_REPORT!r}); report.write_text(done)\n"


@pytest.fixture
def child(monkeypatch):
    """Puts lines of Python in the place of the compiler.

    They know folder, report, steps, programs, cycles(n) and estimate.
    """

    def put(lines: str) -> None:
        monkeypatch.setattr(
            measure, "command", lambda *row: [sys.executable, "-c", PREAMBLE + lines, *map(str, row[2:])]
        )

    return put


def test_a_step_costs_the_difference_of_two_compilations(child):
    child("cycles(50 + programs * (100 + 30 * steps))\n" + REST)
    cost = measure.measure(FAKE, "v5e")
    assert (cost.kernel, cost.case, cost.chip, cost.per) == ("descent", "5m", "v5e", "input")
    assert (cost.cycles, cost.step, cost.once) == (400, 3.0, 10.0)
    assert (cost.bundles, cost.loop_bundles, cost.vmem_bytes, cost.code_bytes) == (7, 3, 5129216, 2048)
    assert cost.refused is None and cost.no_estimate is None


def test_one_number_of_steps_gives_the_cycles_of_a_program(child):
    child("cycles(50 + programs * (100 + 30 * steps))\n" + REST)
    cost = measure.measure(dataclasses.replace(FAKE, steps=(1,)), "v5e")
    assert (cost.cycles, cost.step, cost.once) == (130, None, 13.0)


def test_one_program_is_counted_with_what_it_waits_for(child):
    child("cycles(50 + programs * (100 + 30 * steps))\n" + REST)
    cost = measure.measure(dataclasses.replace(FAKE, programs=1), "v5e")
    assert (cost.cycles, cost.step, cost.once) == (450, 3.0, 15.0)


@pytest.mark.parametrize("chip", ["_TPU v6 lite", "_TPU7x"])
def test_newer_compilers_write_the_chip_into_the_name_of_the_file(child, chip):
    child(f"cycles(programs * 30 * steps, {chip!r})\n" + REST)
    assert measure.measure(FAKE, "v5e").cycles == 300


def test_an_abort_of_the_estimate_costs_only_the_estimate(child):
    child(f"if estimate:\n    {ABORT}\n" + REST)
    cost = measure.measure(FAKE, "v5e")
    assert cost.no_estimate == "profiling failed: DMA 10" and cost.refused is None
    assert (cost.cycles, cost.bundles, cost.vmem_bytes) == (None, 7, 5129216)


def test_an_estimate_that_was_written_before_the_abort_counts(child):
    child(f"if estimate:\n    cycles(programs * 30 * steps)\n    {ABORT}\n" + REST)
    cost = measure.measure(FAKE, "v5e")
    assert (cost.cycles, cost.step, cost.no_estimate, cost.vmem_bytes) == (300, 3.0, None, 5129216)


def test_a_compiler_that_aborts_in_any_case_does_not_compile(child):
    child("os.abort()")
    cost = measure.measure(FAKE, "v5e")
    assert cost.refused == "ended by SIGABRT" and cost.cycles is None and cost.bundles is None


def test_what_a_child_left_half_written_is_not_read(child):
    child("write('17-descent.1-02-final_bundles.txt', ''.join(" + repr(BUNDLES) + ".splitlines(True)[:2])); os.abort()")
    cost = measure.measure(FAKE, "v5e")
    assert cost.refused == "ended by SIGABRT" and cost.bundles is None


def test_what_the_compiler_refuses_is_said_in_its_words(child):
    child("report.write_text(json.dumps(dict(refused='out of memory')))")
    assert measure.measure(FAKE, "v5e").refused == "out of memory"


@pytest.mark.parametrize(
    ("cycles", "why"), [("0", "libtpu has none"), ("70", "steps cost nothing"), ("30 * steps", "programs cost nothing")]
)
def test_an_estimate_that_means_nothing_is_none(child, cycles, why):
    child(f"cycles({cycles})\n" + REST)
    cost = measure.measure(FAKE, "v5e")
    assert cost.no_estimate.startswith(why) and (cost.cycles, cost.step, cost.once) == (None, None, None)


def test_a_compilation_that_takes_too_long_is_ended(child, monkeypatch):
    monkeypatch.setattr(measure, "LIMIT", 0.5)
    child("import time; time.sleep(60)")
    assert measure.measure(FAKE, "v5e").refused == "took more than 0.5 seconds"


@pytest.mark.parametrize(
    ("report", "cycles", "once"), [("around=70", 70, 7.0), ("around=None", None, None), ("refused='no'", None, None)]
)
def test_what_xla_does_around_kernels_is_what_the_compiler_reports(child, report, cycles, once):
    child(f"report.write_text(json.dumps(dict(code_bytes=2048, {report})))")
    cost = measure.measure(AROUND, "v5e")
    assert (cost.kernel, cost.case, cost.cycles, cost.once) == ("descent", "around", cycles, once)
    assert (cost.no_estimate is not None) == (report == "around=None") and (cost.refused == "no") == ("no" in report)


def test_a_program_that_python_ends_says_its_last_line(child):
    child("raise SystemExit('no such row')")
    assert measure.measure(FAKE, "v5e").refused == "no such row"


def test_rows_are_told_apart_by_kernel_and_case_and_are_divided_by_something():
    assert len({(kernel.name, kernel.case) for kernel in KERNELS}) == len(KERNELS)
    for kernel in KERNELS:
        assert kernel.per > 0 and kernel.chips
        if isinstance(kernel, Operator):
            function, arguments = kernel.build()
        else:
            assert tuple(sorted(set(kernel.steps))) == kernel.steps and kernel.programs in (1, 2)
            function, arguments = kernel.build(*kernel.runs[-1], 2)
        assert callable(function) and arguments


@needs_libtpu
def test_a_real_row_has_everything():
    row = next(kernel for kernel in KERNELS if kernel.name == "router_descent")
    cost = measure.measure(row, "v6e")
    assert cost.refused is None and cost.no_estimate is None
    assert 1 < cost.step < 4 and cost.once > 1, "about 300 cycles a step for a tile of 128 inputs"
    assert 0 < cost.loop_bundles < cost.bundles and cost.mxu == 0 and cost.vpu > 0.5, "it runs on the vector unit"
    assert cost.vmem_bytes > 128 * 4 * 5 * 6 * 21 and cost.code_bytes > 0
