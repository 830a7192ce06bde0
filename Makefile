# make train: sets up .venv and trains on the embedded simulated dataset.   make test: the same set-up, then all tests.
PYTHON ?= python3
RES_DIR ?= results/simulated

.PHONY: train test

train: .venv/.installed
	.venv/bin/python train.py --epochs 15 --batch_size 32 --res_dir $(RES_DIR) --overwrite $(OPTIONS)

test: .venv/.installed
	.venv/bin/python -m pytest $(OPTIONS)

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: Python 3.11 or later is needed, $(PYTHON) is %d.%d; set PYTHON=" % v[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --requirement requirements.txt
	touch $@
