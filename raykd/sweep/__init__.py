"""Sweeps: many trials of one job with other settings, teachers paid for once, the winner re-run with several seeds.

space     what may vary: job path -> distribution            plan      which trials, how they are stopped
faults    all that is wrong with job and space at once        sharing   the teachers of a whole sweep
trial     one training, inside Tune's placement group         tuning    Ray Tune: schedulers, searchers, restore
ledger    what is on disk: trials, forwards, winner           run       `sweep(job, space)` from start to end
"""
