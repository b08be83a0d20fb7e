# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""When long work should say how far it is."""

import time


class Every:
    """Says once in every `seconds` that it is time, first after as many."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def is_due(self) -> bool:
        """Whether `seconds` have passed since this was last true, or since the start."""
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True
