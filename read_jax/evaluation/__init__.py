"""Evaluation: metrics, the runner with its journal, summaries, reports and comparisons.

metrics     gIoU, cIoU, See accuracy, N-acc, T-acc, precision
runner      `evaluate` a model folder on a dataset; a stopped run goes on where it was
journal     the answers as they were written down, one line per picture
summary     metrics by query length and object size, with confidence intervals
report      Markdown and HTML
compare     two runs side by side
"""
