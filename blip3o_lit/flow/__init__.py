"""Flow matching: paths, training times, reproducible draws, the objective and the solvers."""
