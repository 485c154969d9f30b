# Each target installs what it needs into a virtual environment of its own. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: setup demo test check bench lower torture notebooks clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup  ## a MesaNet against a Transformer on real text, then a frozen mixture of experts re-routed (10 minutes)
	$(RUN) -m experiments.mesanet.demo
	$(RUN) -m experiments.r2t2.demo

test: check  ## everything that must hold (half an hour)
	$(RUN) -m pytest

check: setup  ## style and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	. $(VENV)/bin/activate && pyright

bench: setup  ## speed and memory as ratios, against PyTorch in the same run
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	$(RUN) -m experiments.bench

lower: setup  ## what the TPU compiler says each kernel costs, beside the last commit's record
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[tpu]"
	$(RUN) -m experiments.lower

torture: setup  ## kill, corrupt, fill and poison runs, and write RELIABILITY.md (25 minutes)
	$(RUN) -m experiments.reliability

notebooks: setup  ## write the .ipynb of every notebook source anew
	$(VENV)/bin/jupytext --to ipynb experiments/notebooks/*.py

clean:
	rm -rf $(VENV) demo
