# `make` or `make help` lists the targets. Everything runs in .venv, made from requirements.lock.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN = $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help install demo report test stress lint data bench lock queues fig6 fig8 table4

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## the virtual environment, from requirements.lock

$(VENV)/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

demo: install  ## train two small networks on scikit-image's photographs, print a table, draw a picture (5 min)
	$(RUN) src/train.py sweeps=demo
	$(RUN) src/report.py runs=runs/demo output=report/demo

# BUDGET=cpu|gpu|paper; ARGS='seed=1,2 hydra/launcher=machine' and any other override
fig6: install  ## the study of Fig. 6, then its figure (BUDGET=cpu: two cores; ARGS='seed=1,2 …': overrides)
fig8: install  ## the study of Fig. 8, then its figure
table4: install  ## the study of Table 4, then its table
fig6 fig8 table4:
	$(RUN) src/train.py sweeps=$@ $(if $(BUDGET),+budget=$(BUDGET)) $(ARGS)
	$(RUN) src/report.py study=$@

report: install  ## the paper's figures beside those of the runs below runs/, on one page, report/index.html
	$(RUN) src/report.py 'study=[fig6,fig8,table4,fig1,fig9]'

test: install  ## the whole test suite (DRRN_DATA=folder of benchmark images runs the tests that need them)
	$(RUN) -m pytest

stress: install  ## 2,000 damaged images, patch files with each bit of their header flipped, 20 trainings killed at random moments, slow tests (half an hour to an hour)
	$(RUN) tests/stress/stress_images.py 2000
	$(RUN) tests/stress/stress_input.py
	$(RUN) tests/stress/stress_kill.py 20
	DRRN_SLOW=1 $(RUN) -m pytest tests/runs/test_ddp.py tests/weights/test_foreign.py tests/tracking/test_tracking.py tests/test_bad_files.py \
		tests/weights/test_matlab_file.py tests/test_inference.py

lint: install  ## ruff, and import-linter: imports go one way (pyproject.toml)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PYTHONPATH=src $(VENV)/bin/lint-imports

data: install  ## fetch the 291 training images and Set5, and build the patch file (5 GB)
	$(RUN) src/prepare.py

bench: install  ## measure every claim about speed on this machine, in turn with plain versions (25 minutes, idle)
	$(RUN) tests/bench.py

queues: install  ## make sweeps/wandb/*.yaml, W&B's sweep files, from the studies in sweeps/
	PYTHONPATH=src $(RUN) sweeps/wandb/make.py

lock: install  ## renew requirements.lock from pyproject.toml
	$(VENV)/bin/pip-compile --quiet --strip-extras --extra dev --extra export --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --output-file requirements.lock pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.lock  # without the name of this machine's build
