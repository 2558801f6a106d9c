# For developers. The work is done by tools/test, which also sets the machine up (as root).
VENV := $(or $(HOSTUPDATE_VENV),.venv)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: all test lint format c-tests unit functional bench demo dist clean

all: ## build in place, with the test tools, into .venv
	tools/test --only build

test: ## everything
	$(SUDO) tools/test

demo: ## a first update under running guests
	$(SUDO) tools/demo

lint:
	tools/test --only lint

c-tests:
	tools/test --only c

unit:
	tools/test --only unit

functional:
	$(SUDO) tools/test --only functional

bench: ## at full length
	$(SUDO) env HOSTUPDATE_BENCH_ROUNDS=50 tools/test --only benchmarks

format: all
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc hostupdate tests/c -name '*.[ch]' ! -name _core.c -exec $(VENV)/bin/clang-format -i {} +

dist: all
	$(VENV)/bin/pip install --quiet build
	$(VENV)/bin/python -m build

clean:
	$(MAKE) -C tests/c clean
	rm -rf build dist *.egg-info hostupdate/_core.c hostupdate/_core*.so
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
