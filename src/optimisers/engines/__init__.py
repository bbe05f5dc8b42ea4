"""Who computes a step? `run(tasks)` takes every pass in lock step, so that totals reach over all of them."""
