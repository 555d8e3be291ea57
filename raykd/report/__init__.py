"""Reports: what a run shows while it goes on, and what it leaves behind. Every number says where it comes from.

console     consoles and tables: how it looks
tables      result dictionaries to rows and sentences (pure)
follow      metrics.jsonl read as it grows; rates, waiting share, time left
watch       one training followed: what is worth saying about it
terminal    the observer that says it: a live line, or plain lines
plots, page report.html and its curves
runs        `raykd show <run folder>`
checking    `raykd check`
catalogues  `raykd list`, `raykd show <method>`
"""
