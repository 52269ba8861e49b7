# make toy: a small world, a run on it and its BACH curve, on a CPU
# make test: the tests. make test-slow: the slow ones. make lint: ruff
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: toy test test-slow lint

toy: .venv/ready
	$(PY) prepare/toy.py
	if ls out/toy/ckpt/[0-9]* >/dev/null 2>&1; then $(PY) train.py config/toy.py --resume=true; \
	else rm -rf out/toy; $(PY) train.py config/toy.py; fi
	$(PY) curves.py --runs=out/toy

test: .venv/ready
	$(PY) -m pytest

test-slow: .venv/ready
	$(PY) -m pytest -m slow

lint: .venv/ready
	$(PY) -m ruff check

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
