"""One replica's compute: a step loop, a scheduler and an executor. Imports no transport."""
