# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a part of a model: that of the model, with fields of its own."""


class PartConfig:
    """The model's configuration, seen by one part of the model.

    Fields given here replace those of the model. The others are looked up in the model's configuration at each access,
    so that changes there count here too.
    """

    def __init__(self, model_config, **fields):
        self._model_config = model_config
        vars(self).update(fields)

    def __getattr__(self, name: str):
        if name == "_model_config" or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._model_config, name)
