"""Reports: what a run shows while it goes on, and what it leaves behind. Every number says where it comes from.

console     consoles and tables: how it looks
words       how numbers and names are written (pure)
tables      result dictionaries to rows and sentences (pure)
peer_tables peers and branches: gains, ensemble, edges, who was lost (pure)
follow      metrics.jsonl read as it grows; rates, waiting share, time left
watch       one training followed: what is worth saying about it
peer_watch  all peers of a run followed together
terminal    the observer that says it: a live line, or plain lines
plots, page report.html and its curves; peer_plots: those of peers
runs        `raykd show <run folder>`
checking    `raykd check`
catalogues  `raykd list`, `raykd show <method>`
"""
