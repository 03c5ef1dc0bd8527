# make demo: install and run the injection sweep.   make test: install and run the tests.   make lint: ruff and mypy.
# make test-fast: the tests that take less than 5 seconds each.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast lint clean

demo: .venv/installed
	$(BIN)/probekit inject sweep --pairs 3 --num-steps 10 --out runs/inject-sweep/demo

test: .venv/installed-test
	$(BIN)/python -m pytest -q

test-fast: .venv/installed-test
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

# the folders hooks/ and experiments/ install as parts of probekit: mypy is shown the packages as they are installed
lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed/probekit
	ln -s $(CURDIR)/probekit/* build/typed/probekit/
	ln -s $(CURDIR)/hooks $(CURDIR)/experiments build/typed/probekit/
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p probekit

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e .
	touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[test,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
