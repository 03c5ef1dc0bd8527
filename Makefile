# make demo: install and run the injection sweep.   make test: install and run the tests.   make test-fast: the quick ones.
# make inspect: install and open the inspector.    make harden: kills, damages and bad input, which take long.
# make lint: ruff, mypy and import-linter.          make docs: build the site.              make wheel: build the package, run its demo.
PYTHON ?= python3
BIN := .venv/bin
# one torch thread a worker: faster together than two threads in one process
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal
DEMO := inject sweep --pairs 3 --num-steps 10

.PHONY: demo inspect test test-fast harden lint docs wheel clean

demo: .venv/installed
	$(BIN)/probekit $(DEMO) --out runs/inject-sweep/demo

inspect: .venv/installed-inspect
	$(BIN)/probekit inspect mini-sd

test: .venv/installed-test
	$(PYTEST)

test-fast: .venv/installed-test
	$(PYTEST) -m "not slow"

# their names keep them out of the tests
harden: .venv/installed-test
	$(PYTEST) --durations=10 -o python_files="kills.py damages.py inputs.py determinism.py" tests/hardening
	cat build/hardening/inputs.txt build/hardening/*.md

# the folders hooks/ and experiments/ install as parts of probekit: linters are shown the packages as they are installed
lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed/probekit
	ln -s $(CURDIR)/probekit/* build/typed/probekit/
	ln -s $(CURDIR)/hooks $(CURDIR)/experiments build/typed/probekit/
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p probekit
	cd build/typed && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml

docs: .venv/installed-dev
	$(BIN)/python -m mkdocs build --strict --site-dir build/site

# what PyPI would give: the wheel's own files, without the checkout beside them
wheel: .venv/installed
	rm -rf build/lib build/wheel build/unpacked && $(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	$(BIN)/python -m zipfile -e build/wheel/*.whl build/unpacked
	cd build/unpacked && PYTHONPATH=. $(CURDIR)/$(BIN)/python -P -c "from probekit.cli import main; main()" \
		inject sweep --pairs 1 --factors content --num-steps 2 --out $(CURDIR)/build/wheel/demo

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e .
	touch $@

.venv/installed-inspect: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[inspect]'
	touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[test,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
