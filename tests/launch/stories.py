"""Stories of runs: starts with names, played one after another by tests.launch.starts."""

import json
import os
import subprocess
import sys


class Stories:
    """Starts in the order they are added; `play` runs those that were not played yet."""

    def __init__(self, folder):
        self.folder, self.results = folder, {}
        self._waiting = []
        self._played = 0

    def add(self, name, config, world_size, overrides=(), **stop):
        """A start of the run `name`; stop: stop_after or stop_in, as tests.launch.starts takes them."""
        start = {"config": str(config), "world_size": world_size, "overrides": list(overrides)} | stop
        self._waiting.append((name, start))

    def play(self):
        """{name: its starts' results so far}."""
        self._played += 1
        asked, answered = (self.folder / f"{what}-{self._played}.json" for what in ("starts", "results"))
        asked.write_text(json.dumps([start for _, start in self._waiting]))
        command = [sys.executable, "-m", "tests.launch.starts", str(asked), str(answered)]
        environment = os.environ | {"ARDTRAIN_CACHE": str(self.folder / "cache")}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
        for (name, _), result in zip(self._waiting, json.loads(answered.read_text()), strict=True):
            self.results.setdefault(name, []).append(result)
        self._waiting = []
        return self.results

    def ended_well(self, *names):
        """Every start of these runs ended with exit code 0."""
        for name in names:
            for result in self.results[name]:
                assert set(result["codes"]) == {0}, result["logs"]
