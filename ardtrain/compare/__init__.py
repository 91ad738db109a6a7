"""`ardtrain compare SUITE.yaml`: methods x learning rates x seeds from one file, at equal final trainable parameters.

`suite` reads the file and gives each run's config; `plan` says which runs come next; `runner` starts them and is the
only part with effects beyond reading; `results` reads a run's folder; `tables` makes the report, `drawing` its
pictures, `again` both from a finished suite's record. `budgets` in the file compare the methods at several sizes.
"""

from ardtrain.compare.runner import compare, prepared_runs, suite_folder

__all__ = ["compare", "prepared_runs", "suite_folder"]
