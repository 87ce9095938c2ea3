VENV ?= .venv
export VENV

.PHONY: test lint fix-copies

test:
	bash tests/run.sh

lint:
	"$(VENV)/bin/ruff" check .

fix-copies:
	python3 tests/check_copies.py --fix
