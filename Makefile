# make train: sets up .venv and trains on the embedded simulated dataset.   make test: the same set-up with all optional
# packages, then all tests.   make gpu PYTHON=...: tests and measures on a GPU, with a Python that has all it needs.
PYTHON ?= python3
RES_DIR ?= results/simulated

.PHONY: train test soak audit gpu

train: .venv/.installed
	.venv/bin/python train.py --epochs 15 --batch_size 32 --res_dir $(RES_DIR) $(if $(findstring --overwrite,$(OPTIONS)),,--resume) $(OPTIONS)

# Two processes; each takes tests from the other's list when its own is empty.
test: .venv/.everything
	.venv/bin/python -m pytest -n 2 --dist worksteal $(OPTIONS)

# Kills, damaged files and processes that train together, for as long as real runs, what takes a training to an accuracy,
# and the benchmark as a user runs it: half an hour or more.
soak: .venv/.everything
	SOAK=1 .venv/bin/python -m pytest tests/test_resume.py tests/test_faults.py tests/test_fuzz.py tests/test_distributed.py tests/test_soak.py \
		tests/test_readme.py tests/test_train.py tests/test_prepare.py tests/test_suspects.py tests/test_sets.py $(OPTIONS)

# Nothing is installed: PyTorch must fit the machine's driver. Ends with 2 where there is no GPU.
gpu:
	@$(PYTHON) -c 'import torch, torchnet, pytest' || { echo "error: $(PYTHON) lacks packages; set PYTHON= to a Python that has PyTorch for CUDA, what requirements.txt lists, and pytest" >&2; exit 2; }
	@$(PYTHON) -m benchmarks.cuda $(OPTIONS)

# Known vulnerabilities of the packages that are installed, by a tool in an environment of its own.
AUDIT = .venv/audit
audit: .venv/.installed $(AUDIT)/.installed
	@.venv/bin/python -m pip freeze --exclude-editable --disable-pip-version-check > $(AUDIT)/packages.txt
	@$(AUDIT)/bin/pip-audit -r $(AUDIT)/packages.txt --no-deps --disable-pip --progress-spinner off > $(AUDIT)/report.txt 2>&1; \
	status=$$?; total=$$(grep -c . $(AUDIT)/packages.txt); skipped=$$(grep -c 'could not be audited' $(AUDIT)/report.txt); \
	if [ $$skipped -eq $$total ] || ! grep -q -i 'vulnerabilit' $(AUDIT)/report.txt; then \
		echo "not audited: pip-audit could not reach its database; run make audit where there is a connection to it"; exit 3; \
	fi; \
	cat $(AUDIT)/report.txt; exit $$status

$(AUDIT)/.installed: .venv/.installed
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --disable-pip-version-check --quiet pip-audit
	touch $@

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: Python 3.11 or later is needed, $(PYTHON) is %d.%d; set PYTHON=" % v[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --requirement requirements.txt
	touch $@

EXTRAS = requirements-geo.txt requirements-export.txt requirements-notebook.txt requirements-formats.txt
.venv/.everything: .venv/.installed $(EXTRAS)
	.venv/bin/python -m pip install --disable-pip-version-check $(EXTRAS:%=--requirement %)
	touch $@
