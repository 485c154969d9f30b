"""What commands print, and to whom."""

import subprocess
import sys

import pytest

from experiments import cli
from experiments.bench.__main__ import BenchConfig, main


def test_help_gives_each_field_of_the_page_a_paragraph(capsys):
    with pytest.raises(SystemExit):
        cli.run(main, BenchConfig, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    for field in ("Papers:", "Command:", "Cost:", "Expected:", "Measured:"):
        (at,) = (i for i, line in enumerate(lines) if field in line)
        assert lines[at].startswith(field) and not lines[at - 1]


def test_a_reader_who_has_seen_enough_gets_no_complaint():
    command = [sys.executable, "-m", "experiments.goodput", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141  # as of a program that SIGPIPE ends
