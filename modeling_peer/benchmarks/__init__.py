# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of a layer and of whole models, against their rivals, on the machine at hand."""
