"""`ardtrain evaluate` (command.py), and the metrics of generated answers that a run makes too (answers.py)."""
