"""From a run's YAML to a job: the script's text (`job`), `ardtrain submit` (`submit`), the guard of a launcher that
loses signals (`supervise`). Nothing here starts an engine; the templates lie in launcher/."""
