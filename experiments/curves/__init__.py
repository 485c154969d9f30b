"""Next-token log-likelihood by position of any model: score documents, bucket, compare, draw, report.

scores.py    documents -> one row per predicted token; merge, save, load
bands.py     rows -> curves over log-spaced buckets, with bands from resampling documents; paired differences
findings.py  curves -> the sentences that they support
solver.py    the same axis for the solver of a mesa layer: steps, residual, other budgets
figures.py   drawing;  page.py  the page of trained runs
"""
