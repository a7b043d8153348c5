"""Python imports this first in each process that a test starts while the mutants are tried."""

import in_processes

in_processes.begin()
