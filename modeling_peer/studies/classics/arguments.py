# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Arguments that all classics have."""

from dataclasses import dataclass, field

from modeling_peer.console.errors import require_at_least_one


@dataclass
class ClassicArguments:
    """Of every classic."""

    num_runs: int | None = field(
        default=None,
        metadata={
            "help": "Runs of each model. Default: as published, 25 in 1991, 1 in 2017 and 10 in 2022; 5 for digits."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the data and of all runs."})
    output_dir: str = field(default="runs/classics", metadata={"help": "Folder for NAME.json and NAME.png."})
    plot: bool = field(default=True, metadata={"help": "Draw NAME.png. It needs matplotlib (extra bench)."})

    def runs(self, published: int) -> int:
        """The number of runs, `published` by default. Raises SettingsError if it is below 1."""
        require_at_least_one(self, "num_runs")
        return published if self.num_runs is None else self.num_runs
